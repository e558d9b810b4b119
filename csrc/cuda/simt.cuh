// What every kernel stands on: CUDA itself or, with TDE_EMULATED, its emulation on the CPU.
#pragma once

#ifdef TDE_EMULATED
#include "emulator/simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace tde::cuda {

// The block's dynamic shared memory. Kernels use no other: the emulator poisons this one.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

}  // namespace tde::cuda
#endif

namespace tde::cuda {

constexpr unsigned kWarp = 32, kAllLanes = 0xffffffffu;

__device__ __forceinline__ unsigned lane() { return threadIdx.x % kWarp; }
__device__ __forceinline__ unsigned warp() { return threadIdx.x / kWarp; }

}  // namespace tde::cuda
