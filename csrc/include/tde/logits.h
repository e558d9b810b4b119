// Grouped normalised logits in one kernel, their counterfactual and the EMA included:
//
//   logits[b, i] = sum_k < x_hat_b^k, w_hat_i^k >
//
// with the rows x_hat and w_hat as tde/rows.h transforms them: the features have the direction and alpha, the weights
// the scale and the divisor. Neither is ever stored.
#pragma once

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

// The EMA that takes the features in on the way; all null where none does.
struct EmaUpdate {
  float* ema = nullptr;            // [D] in place
  int64_t* num_updates = nullptr;  // one more where a row was taken in
  const bool* mask = nullptr;      // [B]; null means all rows
  float momentum = 0;
  float* feature_sum = nullptr;  // [D + 1]: sum of the rows taken in and their number, for a caller who folds elsewhere

  bool asked() const { return ema != nullptr || feature_sum != nullptr; }
};

namespace cuda {

// Memory that a launch needs beside its operands. The counters are zero before, and the kernel leaves them zero.
struct Scratch {
  int64_t floats = 0;
  int64_t counters = 0;
};

}  // namespace cuda
}  // namespace tde
