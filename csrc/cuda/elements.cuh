// Elements as kernels see them: float32 in arithmetic, sixteen bytes at a time in memory, sums in a fixed order.
#pragma once

#include "cuda/simt.cuh"
#include "tde/types.h"

namespace tde::cuda {

__host__ __device__ __forceinline__ float to_float(float value) { return value; }
__host__ __device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__host__ __device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <typename T>
__host__ __device__ __forceinline__ T from_float(float value);
template <>
__host__ __device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__host__ __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__host__ __device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

constexpr int kAccess = 16;  // bytes that a thread reads or writes at once

// N neighbouring elements, loaded and stored as one where they are 16 bytes or fewer.
template <typename T, int N>
struct alignas(sizeof(T) * N < kAccess ? sizeof(T) * N : kAccess) Vector {
  T at[N];
};

template <typename T, int N>
__device__ __forceinline__ void load(float (&to)[N], const T* from) {
  const Vector<T, N> packed = *reinterpret_cast<const Vector<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_float(packed.at[i]);
}

template <typename T, int N>
__device__ __forceinline__ void store(T* to, const float (&from)[N]) {
  Vector<T, N> packed;
#pragma unroll
  for (int i = 0; i < N; ++i) packed.at[i] = from_float<T>(from[i]);
  *reinterpret_cast<Vector<T, N>*>(to) = packed;
}

// The same sum in every lane, whatever lane asks.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(kAllLanes, value, apart);
  return value;
}

template <typename T>
T* elements(const Matrix& matrix) {
  return static_cast<T*>(matrix.data);
}

// Calls run(T{}) with the element type of `dtype`.
template <typename Run>
Status with_type(DType dtype, Run run) {
  switch (dtype) {
    case DType::f32:
      return run(float{});
    case DType::bf16:
      return run(__nv_bfloat16{});
    case DType::f16:
      return run(__half{});
  }
  return {"unknown dtype " + std::to_string(static_cast<int>(dtype))};
}

inline int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Whether every row, and every head of it, starts on sixteen bytes.
inline bool aligned(const Matrix& m, int64_t heads = 1) {
  const int64_t each = kAccess / element_size(m.dtype);
  return reinterpret_cast<uintptr_t>(m.data) % kAccess == 0 && m.row_stride % each == 0 && m.cols / heads % each == 0;
}

}  // namespace tde::cuda
