// The head direction's moving average (Assumption 1): ema <- momentum * ema + mean of the rows taken in.
// In two steps where sum and count are reduced over ranks in between.
#pragma once

#include "tde/types.h"

namespace tde {

// feature_sum [cols + 1]: the sum of the rows of `x` where mask [rows] (null: everywhere) holds, then their number.
Status feature_sum(const Matrix& x, const bool* mask, float* feature_sum, int threads);

// ema [dim] in place, and one more in `num_updates`; neither changes where the count feature_sum[dim] is zero.
Status fold_ema(float* ema, int64_t* num_updates, const float* feature_sum, int64_t dim, float momentum);

// direction [dim]: ema^k / ||ema^k|| for each head, zero where that is zero.
Status head_direction(const float* ema, int64_t dim, int64_t heads, float* direction, int threads);

// The EMA that takes features [rows, cols] in on the way; all null where none does.
struct EmaUpdate {
  float* ema = nullptr;            // [cols] in place
  int64_t* num_updates = nullptr;  // one more where a row was taken in
  const bool* mask = nullptr;      // [rows]; null means all
  float momentum = 0;
  float* feature_sum = nullptr;  // [cols + 1], for a caller who folds elsewhere

  bool asked() const { return ema != nullptr || feature_sum != nullptr; }
};

namespace cuda {

// All on the current device; `stream` is a cudaStream_t.

// Memory that a launch needs beside its operands. The counters are zero before, and the kernel leaves them zero.
struct Scratch {
  int64_t floats = 0;
  int64_t counters = 0;
};

Scratch update_ema_scratch(const Matrix& x);
Status update_ema(const Matrix& x, const EmaUpdate& update, float* floats, unsigned* counters, void* stream);
Status fold_ema(float* ema, int64_t* num_updates, const float* feature_sum, int64_t dim, float momentum, void* stream);

}  // namespace cuda
}  // namespace tde
