// Who wins Eq. 8 as alpha changes: logits z_c - alpha s_c are lines, their maximum over classes a convex polygon.
#pragma once

#include "tde/types.h"

namespace tde {

// The lines of every row: z = `logits` [rows, classes] of Eq. 7, s_c = sum_k row_projections[row, k]
// class_projections[k, c].
struct Lines {
  Matrix logits;                   // float32
  const float* row_projections;    // [rows, heads]
  const float* class_projections;  // [heads, classes]
  int64_t heads;
};

// `winners` [steps, rows], `stride` apart: the class of the largest logit for each of `steps` ascending alphas, the
// lowest of equal ones.
Status alpha_sweep(const Lines& lines, const double* alphas, int64_t steps, int64_t* winners, int64_t stride,
                   int threads);

// The winner for every alpha at once: classes[row, i] wins from starts[row, i], the first from minus infinity on, to
// the next start. `counts` [rows] says how many there are; of these the first `most` are written, beyond them infinity
// and 0.
Status alpha_segments(const Lines& lines, int64_t most, double* starts, int64_t* classes, int64_t* counts, int threads);

}  // namespace tde
