// The EMA of the head direction as part of any kernel that reads the features: each block of rows leaves its column
// sums behind; the last to arrive adds them up, in order of rows.
#pragma once

#include "cuda/arrive.cuh"
#include "cuda/simt.cuh"
#include "tde/ema.h"

namespace tde::cuda {

// What the row blocks leave for the last of them; columns lie in strips that are folded each on its own.
struct Partials {
  float* sums;         // [row_blocks, cols]
  float* counts;       // [strips, row_blocks]: rows taken in
  unsigned* arrivals;  // [strips]: zero before and after
  int64_t row_blocks;
  int64_t cols;

  static Scratch scratch(int64_t row_blocks, int64_t cols, int64_t strips) {
    return {row_blocks * (cols + strips), strips};
  }
  static Partials in(float* floats, unsigned* counters, int64_t row_blocks, int64_t cols) {
    return {floats, floats + row_blocks * cols, counters, row_blocks, cols};
  }
};

// Called by every thread of a block after it has written its sums of columns [begin, end) and its count; `flag` is a
// word of shared memory.
__device__ __forceinline__ void arrive_and_fold(const EmaUpdate& update, const Partials& partials, int64_t strip,
                                                int64_t begin, int64_t end, unsigned* flag) {
  if (!arrives_last(partials.arrivals + strip, partials.row_blocks, flag)) return;
  const float count = sum_of(partials.counts + strip * partials.row_blocks, partials.row_blocks, 1);
  for (int64_t col = begin + threadIdx.x; col < end; col += blockDim.x) {
    const float sum = sum_of(partials.sums + col, partials.row_blocks, partials.cols);
    if (update.feature_sum) update.feature_sum[col] = sum;
    if (update.ema && count > 0) update.ema[col] = update.momentum * update.ema[col] + sum / count;
  }
  if (threadIdx.x != 0 || strip != 0) return;
  if (update.feature_sum) update.feature_sum[partials.cols] = count;
  if (update.num_updates && count > 0) ++*update.num_updates;
}

}  // namespace tde::cuda
