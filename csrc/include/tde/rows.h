// The two passes around a matrix product of normalised operands: rows in, scaled rows out, and its gradient.
//
// Each row `a` of D = K*d columns is K heads a^k. With the norm n_k = ||a^k||, a factor f and a unit direction u^k,
//
//   out^k = c * f(n_k) * (a^k - alpha * <a^k, u^k> * u^k),     c = scale / divisor[row]
//
// Every member of the paper's Eq. 10 is a product of two such matrices, and TDE (Eq. 8) is the term in alpha.
#pragma once

#include "tde/types.h"

namespace tde {

// f(n) = (n + offset)^-power; 0 where n + offset is below the smallest normal float, so that a zero head contributes 0.
struct NormFactor {
  float offset = 0;
  float power = 0;
};

struct RowTransform {
  int64_t heads = 1;
  NormFactor factor;
  float scale = 1;
  const float* divisor = nullptr;    // [rows] or null: a learnt scale per class (LWS)
  const float* direction = nullptr;  // [cols] or null: unit per head, or zero
  const float* alpha = nullptr;      // one number, or null: the direction is then only projected on
};

// What one pass over `a` leaves behind beside `out`; null members are not computed.
struct RowByproducts {
  float* norms = nullptr;        // [rows, heads]: n_k
  float* projections = nullptr;  // [rows, heads]: c * f(n_k) * <a^k, u^k>
  const bool* mask = nullptr;    // [rows]: rows that the feature sum takes in; null means all
  float* feature_sum = nullptr;  // [cols + 1]: sum of the rows taken in, then their number
};

// `out` has the shape of `a` and may have another dtype.
Status normalize_rows(const Matrix& a, const RowTransform& transform, const Matrix& out,
                      const RowByproducts& byproducts, int threads);

// The norms [rows, heads] alone.
Status row_norms(const Matrix& a, int64_t heads, float* norms, int threads);

// From `grad`, the gradient of `out`, the gradient of `a` into `grad_a` (may be `grad` itself where dtypes agree)
// and, if not null, the gradient of the divisor [rows].
Status normalize_rows_backward(const Matrix& grad, const Matrix& a, const float* norms, const RowTransform& transform,
                               const Matrix& grad_a, float* grad_divisor, int threads);

namespace cuda {

// The same on the current device and a cudaStream_t; the feature sum is update_ema's.
Status normalize_rows(const Matrix& a, const RowTransform& transform, const Matrix& out, float* norms,
                      float* projections, void* stream);
Status normalize_rows_backward(const Matrix& grad, const Matrix& a, const float* norms, const RowTransform& transform,
                               const Matrix& grad_a, float* grad_divisor, void* stream);

}  // namespace cuda
}  // namespace tde
