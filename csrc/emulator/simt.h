// CUDA's vocabulary on the CPU, so that the kernels' own source can be run and tested where there is no GPU.
//
// A block's threads are fibers of one thread of the CPU. Between two collectives each runs alone, and who runs next is
// drawn at random: what a missing barrier leaves to chance comes out wrong sooner or later. Shared memory starts as
// NaN and must not be written past its end; what is asynchronous happens as late as it is waited for, or at any time.
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
#include <deque>
#include <functional>
#include <string>
#include <utility>
#include <vector>

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

// What a thread has begun and happens later: closed into groups, and carried out when their group is waited for.
class Deferred {
 public:
  void later(std::function<void()> happens) { open_.push_back(std::move(happens)); }
  void commit() { groups_.push_back(std::exchange(open_, {})); }
  void wait(std::size_t groups_left) {
    for (; groups_.size() > groups_left; groups_.pop_front())
      for (const auto& happens : groups_.front()) happens();
  }

 private:
  std::vector<std::function<void()>> open_;  // of no group yet
  std::deque<std::vector<std::function<void()>>> groups_;
};

// Of the running thread: its asynchronous copies, and its asynchronous products.
Deferred& copies();
Deferred& products();

// Happens at a random time, before the block ends.
void sometime(std::function<void()> happens);

// Waits until `holds`, which what happens sometime may bring about.
void wait_until(std::function<bool()> holds);

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
#undef __grid_constant__
#define __grid_constant__

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
