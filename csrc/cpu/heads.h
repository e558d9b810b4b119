// One row of a grouped operand, head by head: its norms and scaled values, and the gradient of those.
#pragma once

#include <cfloat>
#include <cmath>

#include "cpu/elements.h"
#include "tde/rows.h"

namespace tde::cpu {
namespace {  // compiled once per instruction set: nothing here may be shared between them

// Squares outside this range may have lost range in float32; the sum is then taken again in double.
constexpr float kSafeSquareMin = 1e-26f, kSafeSquareMax = 1e38f;

template <typename T>
float norm(const T* a, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += load(a[i]) * load(a[i]);
  if (sum >= kSafeSquareMin && sum <= kSafeSquareMax) return std::sqrt(sum);
  double wide = 0;
#pragma omp simd reduction(+ : wide)
  for (int64_t i = 0; i < n; ++i) wide += double{load(a[i])} * double{load(a[i])};
  return static_cast<float>(std::sqrt(wide));
}

template <typename Sum, typename A, typename B>
Sum dot(const A* a, const B* b, int64_t n) {
  Sum sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += load(a[i]) * load(b[i]);
  return sum;
}

inline float evaluate(const NormFactor& factor, float norm) {
  if (factor.power == 0) return 1;
  const float base = norm + factor.offset;
  if (base < FLT_MIN) return 0;
  return factor.power == 1 ? 1 / base : std::pow(base, -factor.power);
}

inline float row_constant(const RowTransform& transform, int64_t row) {
  return transform.divisor ? transform.scale / transform.divisor[row] : transform.scale;
}

template <typename In, typename Out>
void normalize_head(const In* a, int64_t width, float factor, const float* direction, float shift, Out* out) {
  if (shift == 0) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) store(out[i], factor * load(a[i]));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) store(out[i], factor * (load(a[i]) - shift * direction[i]));
  }
}

template <typename In, typename Out>
void normalize_row(const In* a, int64_t row, int64_t cols, const RowTransform& t, const RowByproducts& by, Out* out) {
  const int64_t width = cols / t.heads;
  const float constant = row_constant(t, row);
  for (int64_t k = 0; k < t.heads; ++k, a += width, out += width) {
    const float n = norm(a, width);
    const float factor = constant * evaluate(t.factor, n);
    const float* direction = t.direction ? t.direction + k * width : nullptr;
    const float projection = direction ? dot<float>(a, direction, width) : 0;
    if (by.norms) by.norms[row * t.heads + k] = n;
    if (by.projections) by.projections[row * t.heads + k] = factor * projection;
    normalize_head(a, width, factor, direction, t.alpha ? *t.alpha * projection : 0, out);
  }
}

// With P = I - alpha u u^T (symmetric) and g the gradient of out^k = c f(n) P a:
//   da = c f P g - a f * (c power <P g, a> / (n (n + offset))),     d divisor = -<P g, a> c f / divisor
// a*f comes first and the quotient after: the product of the scalars alone could leave float32's range. <P g, a> is in
// double: as a divisor's gradient it is a sum over all channels, whose digits must not hang on the compiler's order.
template <typename G, typename In>
double head_backward(const G* g, const In* a, int64_t width, float n, float constant, const NormFactor& factor,
                     const float* direction, float alpha, In* grad) {
  const float f = evaluate(factor, n);
  float shift = 0;
  double along = dot<double>(g, a, width);
  if (direction) {
    shift = alpha * dot<float>(g, direction, width);
    along -= shift * dot<float>(a, direction, width);
  }
  const bool curved = factor.power != 0 && n >= FLT_MIN;
  const float pull = curved ? constant * factor.power * (static_cast<float>(along) / n) / (n + factor.offset) : 0;
  const float push = constant * f;
  if (direction) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i)
      store(grad[i], push * (load(g[i]) - shift * direction[i]) - load(a[i]) * f * pull);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) store(grad[i], push * load(g[i]) - load(a[i]) * f * pull);
  }
  return along * push;
}

// The gradient of a row from `g`, that of its scaled values, and if not null that of its divisor.
template <typename G, typename In>
void row_backward(const G* g, const In* a, int64_t row, int64_t cols, const float* norms, const RowTransform& t,
                  In* grad, float* grad_divisor) {
  const int64_t width = cols / t.heads;
  const float constant = row_constant(t, row), alpha = t.alpha ? *t.alpha : 0;
  double along = 0;
  for (int64_t k = 0; k < t.heads; ++k) {
    const int64_t at = k * width;
    along += head_backward(g + at, a + at, width, norms[row * t.heads + k], constant, t.factor,
                           t.alpha ? t.direction + at : nullptr, alpha, grad + at);
  }
  if (grad_divisor) grad_divisor[row] = static_cast<float>(-along / t.divisor[row]);
}

}  // namespace
}  // namespace tde::cpu
