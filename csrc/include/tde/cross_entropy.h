// Softmax cross entropy of rows of logits, and its gradient.
//
//   losses[b] = sum_t scale_t[b] (1 - p_y)^focal ((1 - smoothing) w_y (-log p_y) + smoothing / C sum_c w_c (-log p_c))
//
// with y = labels_t[b], w the class weights and p the softmax of z + bias, less margin[y] at y. A row whose label is
// the ignored one has no loss.
#pragma once

#include "tde/types.h"

namespace tde {

struct LossTerm {
  const int64_t* labels = nullptr;  // [rows], in [0, C) or ignored; null: there is no such term
  const float* scale = nullptr;     // [rows]: what the row's loss counts for
};

struct CrossEntropy {
  LossTerm terms[2];
  const float* class_weight = nullptr;  // [C] each, or null
  const float* bias = nullptr;
  const float* margin = nullptr;
  int64_t ignored = -100;
  float smoothing = 0;
  float focal = 0;
};

// `losses` [rows]; with `gradient` that of their sum takes the place of `logits` [rows, C].
Status cross_entropy(const Matrix& logits, const CrossEntropy& loss, float* losses, bool gradient, int threads);

}  // namespace tde
