// The norms of Eq. 10 and their factors, for host and device alike.
#pragma once

#include <cfloat>
#include <cmath>

#include "cuda/simt.cuh"
#include "tde/rows.h"

namespace tde::cuda {

// Outside these a sum of squares has overflowed, or lost small elements to underflow; it is taken again at a scale.
constexpr float kLargestSquares = 0x1p120f, kSmallestSquares = 0x1p-90f, kUnit = 0x1p80f;

// The scale at which squares are summed again: 1 where that is not needed.
__host__ __device__ __forceinline__ float rescue_scale(float squares) {
  if (squares > kLargestSquares) return 1 / kUnit;
  return squares < kSmallestSquares ? kUnit : 1.f;
}

// c f(n) = c (n + offset)^-power, and 0 where the base is 0: a zero head contributes 0.
__host__ __device__ __forceinline__ float norm_factor(const NormFactor& factor, float norm, float constant = 1) {
  if (factor.power == 0) return constant;
  const float base = norm + factor.offset;
  if (base < FLT_MIN) return 0;
  return factor.power == 1 ? constant / base : constant * powf(base, -factor.power);
}

__host__ __device__ __forceinline__ float row_constant(const RowTransform& transform, int64_t row) {
  return transform.divisor ? transform.scale / transform.divisor[row] : transform.scale;
}

// The gradient of a from v, that of c f(|a|) a, with along = <v, a>:
//   c f (v - power <v, a> / n * a / (n + offset)).
// The two may all but cancel: few roundings stand between them, in an order in which nothing leaves float32's range.
struct Tangent {
  float push, cosine = 0, shrink = 0;

  __host__ __device__ __forceinline__ Tangent(const NormFactor& factor, float norm, float constant, float along)
      : push(norm_factor(factor, norm, constant)) {
    if (factor.power == 0 || norm < FLT_MIN) return;
    cosine = factor.power * (along / norm);
    shrink = 1 / (norm + factor.offset);
  }
  __host__ __device__ __forceinline__ float operator()(float v, float a) const {
    return push * fmaf(-cosine, a * shrink, v);
  }
};

}  // namespace tde::cuda
