// Softmax cross entropy of rows of logits, and its gradient, for all classes at once or some at a time.
//
//   losses[b] = sum_t scale_t[b] (1 - p_y)^focal ((1 - smoothing) w_y (-log p_y) + smoothing / C sum_c w_c (-log p_c))
//
// with y = labels_t[b], w the class weights and p the softmax of z + bias, less margin[y] at y. A row whose label is
// the ignored one has no loss; one whose label is no class has NaN for loss and gradient.
#pragma once

#include "tde/types.h"

namespace tde {

struct LossTerm {
  const int64_t* labels = nullptr;  // [rows]; null: there is no such term
  const float* scale = nullptr;     // [rows]: what the row's loss counts for
};

struct CrossEntropy {
  LossTerm terms[2];
  const float* class_weight = nullptr;  // [C] each, or null
  const float* bias = nullptr;
  const float* margin = nullptr;
  int64_t classes = 0;  // C
  int64_t ignored = -100;
  float smoothing = 0;
  float focal = 0;
};

// What is known of a row's softmax: sums over the classes that are no label of the row, and the labels' own logits.
// So no margin is in it, and 1 - p of a label is a sum of its own, precise where p is almost 1.
struct SoftmaxSums {
  float peak;       // the largest z
  float sum;        // of exp(z - peak)
  float below;      // of w (peak - z), where there is smoothing
  float weight;     // of w
  float logits[2];  // of the labels
};

// What to do with logits [rows, N] of the classes from `first` on.
struct LossPass {
  int64_t first = 0;
  bool take = true;  // take them into the sums, which begin anew with the first class; else sums are complete
  SoftmaxSums* sums = nullptr;  // [rows]; null where the logits are those of all classes
  float* losses = nullptr;      // [rows]; null: not asked for, or not all classes are taken in yet
  bool gradient = false;        // that of the losses' sum takes the logits' place
};

Status cross_entropy(const Matrix& logits, const CrossEntropy& loss, const LossPass& pass, int threads);

namespace cuda {

// The same on the current device and a cudaStream_t.
Status cross_entropy(const Matrix& logits, const CrossEntropy& loss, const LossPass& pass, void* stream);

}  // namespace cuda
}  // namespace tde
