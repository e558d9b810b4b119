// CUDA's vocabulary on the CPU, so that the kernels' own source can be run and tested where there is no GPU.
//
// A block's threads are fibers of one thread of the CPU. Between two collectives each runs alone, and who runs next is
// drawn at random: what a missing barrier leaves to chance comes out wrong sooner or later. Shared memory starts as
// NaN and must not be written past its end; asynchronous copies arrive no earlier than they are waited for.
// Only tests use this; no wheel holds it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "tde/types.h"

namespace tde::simt {

constexpr unsigned kWarp = 32;

struct Position {
  uint3 thread, block;
  dim3 threads, blocks;
};

// The thread that is running.
const Position& here();

// The block's dynamic shared memory.
unsigned char* shared_memory();

// Waits for all threads of the block.
void sync_block();

// Waits for all lanes of the warp and returns what each handed in, side by side; valid until the next such call.
const void* exchange(const void* mine, std::size_t bytes);

template <typename T>
const T* gather(const T& mine) {
  return static_cast<const T*>(exchange(&mine, sizeof(T)));
}

// Asynchronous copies of the running thread: begun, closed into a group, and carried out when they are waited for.
void copy_later(void* to, const void* from, std::size_t bytes);
void commit_copies();
void wait_for_copies(std::size_t groups_left);

// Runs `thread` for every thread of a grid: a few blocks beside one another, in random order.
Status run(const std::string& what, dim3 grid, unsigned threads, std::size_t shared_bytes,
           const std::function<void()>& thread);

}  // namespace tde::simt

#define threadIdx (tde::simt::here().thread)
#define blockIdx (tde::simt::here().block)
#define blockDim (tde::simt::here().threads)
#define gridDim (tde::simt::here().blocks)
#undef __launch_bounds__
#define __launch_bounds__(...)

using std::max;
using std::min;

inline void __syncthreads() { tde::simt::sync_block(); }
inline void __syncwarp() { tde::simt::gather('\0'); }
inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return tde::simt::gather(value)[lane];
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int flipped) {
  return tde::simt::gather(value)[(threadIdx.x % tde::simt::kWarp) ^ flipped];
}

inline unsigned atomicAdd(unsigned* at, unsigned value) {
  const unsigned before = *at;
  *at += value;
  return before;
}

template <typename T>
T __ldcg(const T* from) {
  return *from;
}

inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }

namespace tde::cuda {

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(simt::shared_memory());
}

}  // namespace tde::cuda
