// The head direction's moving average (Assumption 1): ema <- momentum * ema + mean of the rows taken in.
// In two steps, so that sum and count can be reduced over ranks in between.
#pragma once

#include "tde/types.h"

namespace tde {

// feature_sum [cols + 1]: the sum of the rows of `x` where mask [rows] (null: everywhere) holds, then their number.
Status feature_sum(const Matrix& x, const bool* mask, float* feature_sum, int threads);

// ema [dim] in place, and one more in `num_updates`; neither changes where the count feature_sum[dim] is zero.
Status fold_ema(float* ema, int64_t* num_updates, const float* feature_sum, int64_t dim, float momentum);

namespace cuda {

// Whether the current device can run these kernels: a driver new enough, an architecture that the binary holds.
Status probe();

// The same on the current device; `stream` is a cudaStream_t. `workspace` holds feature_sum_workspace() floats.
int64_t feature_sum_workspace(int64_t rows, int64_t cols);
Status feature_sum(const Matrix& x, const bool* mask, float* feature_sum, float* workspace, void* stream);
Status fold_ema(float* ema, int64_t* num_updates, const float* feature_sum, int64_t dim, float momentum, void* stream);

}  // namespace cuda
}  // namespace tde
