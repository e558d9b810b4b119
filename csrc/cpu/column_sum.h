// Column sums with a fixed order: blocks of rows are summed in float32, the blocks in double, in order of rows,
// so that neither the number of threads nor the scheduling changes a bit.
#pragma once

#include <algorithm>
#include <memory>

#include "cpu/elements.h"

namespace tde::cpu {
namespace {

class ColumnSum {
 public:
  ColumnSum(int64_t rows, int64_t cols, const bool* mask)
      : rows_(rows), cols_(cols), mask_(mask), partial_(new float[blocks_of(rows) * cols]) {}

  void begin_block(int64_t block) { std::fill_n(partial_.get() + block * cols_, cols_, 0.f); }

  // Adds a row to its block. A row that the mask leaves out is not read: a NaN in it does no harm.
  template <typename T>
  void add(int64_t index, const T* row) {
    if (mask_ && !mask_[index]) return;
    float* sum = partial_.get() + index / kBlockRows * cols_;
#pragma omp simd
    for (int64_t c = 0; c < cols_; ++c) sum[c] += load(row[c]);
  }

  void finish(float* feature_sum, [[maybe_unused]] int threads) const {
    constexpr int64_t kStrip = 64;
    const int64_t strips = (cols_ + kStrip - 1) / kStrip;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t begin = strip * kStrip, width = std::min(kStrip, cols_ - begin);
      double total[kStrip] = {};
      for (int64_t block = 0; block < blocks_of(rows_); ++block) {
        const float* partial = partial_.get() + block * cols_ + begin;
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) total[c] += partial[c];
      }
      for (int64_t c = 0; c < width; ++c) feature_sum[begin + c] = static_cast<float>(total[c]);
    }
    feature_sum[cols_] = static_cast<float>(mask_ ? std::count(mask_, mask_ + rows_, true) : rows_);
  }

 private:
  int64_t rows_, cols_;
  const bool* mask_;
  std::unique_ptr<float[]> partial_;
};

}  // namespace
}  // namespace tde::cpu
