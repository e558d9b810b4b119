// Grouped normalised logits in one kernel, their counterfactual and the EMA included:
//
//   logits[b, i] = sum_k < x_hat_b^k, w_hat_i^k >
//
// with the rows x_hat and w_hat as tde/rows.h transforms them: the features have the direction and alpha, the weights
// the scale and the divisor. Neither is ever stored.
#pragma once

#include "tde/ema.h"
#include "tde/rows.h"
#include "tde/types.h"

namespace tde {

struct Grouped {
  Matrix x;               // [B, D]
  RowTransform features;  // its divisor is null and its scale 1
  Matrix w;               // [C, D], of the dtype of x
  RowTransform weights;   // its direction is null; heads as those of the features
};

// What the forward leaves for the backward; null members are not wanted.
struct GroupedSaved {
  float* x_norms = nullptr;  // [B, K]: norms of the feature rows, head by head
  float* w_norms = nullptr;  // [C, K]
  float* along_x = nullptr;  // [B, K]: r(n_k) <x_b^k, d^k>
};

}  // namespace tde
