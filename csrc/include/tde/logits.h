// Grouped normalised logits in one kernel, their counterfactual and the EMA included, and their gradients:
//
//   logits[b, i] = sum_k < x_hat_b^k, w_hat_i^k >
//
// with the rows x_hat and w_hat as tde/rows.h transforms them: the features have the direction and alpha, the weights
// the scale and the divisor. Neither is ever stored.
#pragma once

#include "tde/ema.h"
#include "tde/rows.h"
#include "tde/types.h"

namespace tde {

// Rows, and the scaled rows that they stand for. The two operands of a product have the same heads and dtype.
struct Operand {
  Matrix a;
  RowTransform transform;
};

struct Operands {
  Operand features, weights;
};

// Small problems on the CPU, whose scaled operands stay in cache: one call forward, one for both gradients from `grad`
// [B, C]. A gradient without memory is not wanted; grad_divisor [C] comes with grad_w, if not null.
Status small_logits(const Operands& of, const EmaUpdate& update, const Matrix& out, int threads);
Status small_logits_backward(const Operands& of, const Matrix& grad, const Matrix& grad_x, const Matrix& grad_w,
                             float* grad_divisor, int threads);

namespace cuda {

// All on the current device and a cudaStream_t, with as much scratch memory as is asked for.

// Small problems: whole rows fit the shared memory of a block.
bool small_logits_fit(int64_t dim, int64_t classes, int64_t heads);

Scratch small_logits_scratch(int64_t rows, int64_t dim);
Status small_logits(const Operand& features, const Operand& weights, const EmaUpdate& update, const Matrix& out,
                    float* floats, unsigned* counters, void* stream);

// The gradient of `own` from `grad` [own rows, other rows], whose columns lie `grad_col_stride` elements apart, and if
// not null that of its divisor [own rows].
Scratch small_logits_backward_scratch(int64_t own_rows, int64_t other_rows, int64_t dim, int64_t heads);
Status small_logits_backward(const Operand& own, const Operand& other, const Matrix& grad, int64_t grad_col_stride,
                             const Matrix& grad_own, float* grad_divisor, float* floats, unsigned* counters,
                             void* stream);

// Any problem whose heads start on sixteen bytes, on tensor cores: float32 is multiplied as tf32. `out` has the
// operands' dtype or is float32. A direction without alpha is only projected on. `hopper` asks for that architecture's
// own instructions, which multiply bfloat16 and float16 only; see probe_hopper.
struct LogitsByproducts {
  float* x_norms = nullptr;        // [B, K]; null members are not wanted
  float* w_norms = nullptr;        // [C, K]
  float* x_projections = nullptr;  // [B, K]: <x_hat^k, d^k>
  float* w_projections = nullptr;  // [C, K]
};

Scratch tiled_logits_scratch(int64_t rows, int64_t classes, int64_t dim, bool hopper);
Status tiled_logits(const Operand& features, const Operand& weights, const LogitsByproducts& by,
                    const EmaUpdate& update, const Matrix& out, bool hopper, float* floats, unsigned* counters,
                    void* stream);

}  // namespace cuda
}  // namespace tde
