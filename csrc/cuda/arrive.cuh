// How blocks that share a result find the last of them, who finishes it. Nobody waits, and since that one reads what
// the others left in a fixed order, no order of arrival changes a bit.
#pragma once

#include "cuda/simt.cuh"

namespace tde::cuda {

// Called by every thread of a block after what it has to leave behind is written: whether the block is the last of
// `expected`. Hands the counter back as zero. `flag` is a word of shared memory.
__device__ __forceinline__ bool arrives_last(unsigned* counter, int64_t expected, unsigned* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *flag = atomicAdd(counter, 1u);
  __syncthreads();
  if (*flag != expected - 1) return false;
  __threadfence();
  if (threadIdx.x == 0) *counter = 0;
  return true;
}

// Compensated: many terms cost no precision. Read past the first-level cache, which other blocks' writes do not reach.
__device__ __forceinline__ float sum_of(const float* terms, int64_t number, int64_t apart) {
  float sum = 0, lost = 0;
  for (int64_t i = 0; i < number; ++i) {
    const float term = __ldcg(terms + i * apart) - lost;
    const float next = sum + term;
    lost = (next - sum) - term;
    sum = next;
  }
  return sum;
}

}  // namespace tde::cuda
