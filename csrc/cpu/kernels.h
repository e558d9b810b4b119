// The CPU kernels as a table, one table per instruction set. Arguments are checked before a kernel is called.
#pragma once

#include "tde/alpha_sweep.h"
#include "tde/cross_entropy.h"
#include "tde/ema.h"
#include "tde/logits.h"
#include "tde/rows.h"

namespace tde::cpu {

struct Kernels {
  void (*normalize_rows)(const Matrix& a, const RowTransform& transform, const Matrix& out,
                         const RowByproducts& byproducts, int threads);
  void (*normalize_rows_backward)(const Matrix& grad, const Matrix& a, const float* norms,
                                  const RowTransform& transform, const Matrix& grad_a, float* grad_divisor,
                                  int threads);
  void (*row_norms)(const Matrix& a, int64_t heads, float* norms, int threads);
  void (*feature_sum)(const Matrix& x, const bool* mask, float* feature_sum, int threads);
  void (*small_logits)(const Operands& of, const bool* mask, float* feature_sum, const Matrix& out, int threads);
  void (*small_logits_backward)(const Operands& of, const Matrix& grad, const Matrix& grad_x, const Matrix& grad_w,
                                float* grad_divisor, int threads);
  void (*background_exempt)(const Matrix& logits, const float* row_projections, const float* class_projections,
                            int64_t heads, const float* alpha, int64_t background, bool log, const Matrix& out,
                            int threads);
  void (*cross_entropy)(const Matrix& logits, const CrossEntropy& loss, const LossPass& pass, int threads);
  void (*alpha_sweep)(const Lines& lines, const double* alphas, int64_t steps, int64_t* winners, int64_t stride,
                      int threads);
  void (*alpha_segments)(const Lines& lines, int64_t most, double* starts, int64_t* classes, int64_t* counts,
                         int threads);
};

#define TDE_DECLARE_KERNELS(isa)                                                                                       \
  namespace isa {                                                                                                      \
  void normalize_rows(const Matrix&, const RowTransform&, const Matrix&, const RowByproducts&, int);                   \
  void normalize_rows_backward(const Matrix&, const Matrix&, const float*, const RowTransform&, const Matrix&, float*, \
                               int);                                                                                   \
  void row_norms(const Matrix&, int64_t, float*, int);                                                                 \
  void feature_sum(const Matrix&, const bool*, float*, int);                                                           \
  void small_logits(const Operands&, const bool*, float*, const Matrix&, int);                                         \
  void small_logits_backward(const Operands&, const Matrix&, const Matrix&, const Matrix&, float*, int);               \
  void background_exempt(const Matrix&, const float*, const float*, int64_t, const float*, int64_t, bool,              \
                         const Matrix&, int);                                                                          \
  void cross_entropy(const Matrix&, const CrossEntropy&, const LossPass&, int);                                        \
  void alpha_sweep(const Lines&, const double*, int64_t, int64_t*, int64_t, int);                                      \
  void alpha_segments(const Lines&, int64_t, double*, int64_t*, int64_t*, int);                                        \
  extern const Kernels kernels;                                                                                        \
  }

TDE_DECLARE_KERNELS(baseline)
TDE_DECLARE_KERNELS(avx2)
TDE_DECLARE_KERNELS(avx512)
#undef TDE_DECLARE_KERNELS

}  // namespace tde::cpu
