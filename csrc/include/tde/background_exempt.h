// Eq. 9: the background keeps its probability p_0, the foreground shares the rest as the counterfactual logits say.
#pragma once

#include "tde/types.h"

namespace tde {

// `logits` [rows, classes] are those of Eq. 7; those of Eq. 8 follow from the rank-K correction
//   logits - alpha * sum_k row_projections[row, k] * class_projections[class, k].
// Writes P (or log P) of Eq. 9 into `out`, which may be `logits` itself where dtypes agree.
Status background_exempt(const Matrix& logits, const float* row_projections, const float* class_projections,
                         int64_t heads, const float* alpha, int64_t background, bool log, const Matrix& out,
                         int threads);

namespace cuda {

// The same on the current device and a cudaStream_t.
Status background_exempt(const Matrix& logits, const float* row_projections, const float* class_projections,
                         int64_t heads, const float* alpha, int64_t background, bool log, const Matrix& out,
                         void* stream);

}  // namespace cuda
}  // namespace tde
