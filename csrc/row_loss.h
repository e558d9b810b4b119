// The cross entropy of one row once its softmax is known: numbers that the kernels of CPU and GPU compute alike.
#pragma once

#include <cfloat>
#include <cmath>

#include "tde/cross_entropy.h"

#ifdef TDE_ISA
#define TDE_INLINE inline
#else
#include "cuda/simt.cuh"
#define TDE_INLINE __device__ __forceinline__
#endif

namespace tde {
namespace {  // compiled once per instruction set: nothing here may be shared between them

// As a peak of nothing minus infinity is right, but exp(z - peak) is then no number.
TDE_INLINE float base_of(float peak) { return peak == -INFINITY ? 0.f : peak; }

TDE_INLINE SoftmaxSums no_classes() { return {-INFINITY, 0, 0, 0, {0, 0}}; }

TDE_INLINE SoftmaxSums merged(const SoftmaxSums& a, const SoftmaxSums& b) {
  const float peak = a.peak > b.peak ? a.peak : b.peak, base = base_of(peak);
  const auto lowered = [base](const SoftmaxSums& s) {
    return s.weight == 0 ? 0.f : s.weight * (base - base_of(s.peak));
  };
  return {peak,
          a.sum * expf(a.peak - base) + b.sum * expf(b.peak - base),
          (a.below + lowered(a)) + (b.below + lowered(b)),
          a.weight + b.weight,
          {a.logits[0] + b.logits[0], a.logits[1] + b.logits[1]}};
}

// The label of a term, or -1 where there is none that counts.
TDE_INLINE int64_t label_of(const CrossEntropy& loss, int term, int64_t row) {
  if (!loss.terms[term].labels) return -1;
  const int64_t label = loss.terms[term].labels[row];
  return label == loss.ignored || label < 0 || label >= loss.classes ? -1 : label;
}

// What a term adds to the gradient of a row: spread p_c - smooth w_c, and at its label less `pull`.
struct TermLoss {
  float peak = 0, log_sum = 0;  // of all classes, the label less its margin
  float rest = 0;               // 1 - p of the label
  float at_base = 0;            // p of a class whose logit is the sums' own peak
  float spread = 0, pull = 0, smooth = 0;
  float value = 0;

  TDE_INLINE float log_p(float z) const {
    return (z - peak) - log_sum;
  }  // their sum would be rounded at the peak's size
};

class RowLoss {
 public:
  float value = 0;

  TDE_INLINE RowLoss(const CrossEntropy& loss, int64_t row, const SoftmaxSums& sums)
      : loss_(loss), sums_(sums), labels_{label_of(loss, 0, row), label_of(loss, 1, row)} {
    for (int t = 0; t < 2; ++t) {
      const LossTerm& term = loss.terms[t];
      if (!term.labels) continue;
      const bool ignored = term.labels[row] == loss.ignored;
      if (labels_[t] >= 0)
        terms_[t] = take(t, term.scale[row]);
      else  // not a number where a mean has nothing to divide by, or the label is no class
        terms_[t].value = ignored ? term.scale[row] * 0 : NAN;
      value += terms_[t].value;
      if (!ignored && terms_[t].value != terms_[t].value) lost_ = true;
    }
    // The gradient where there is no label: one softmax up to a factor, and no logit above the sums' own peak.
    base_ = base_of(sums.peak);
    for (int t = 0; t < 2; ++t) {
      if (labels_[t] < 0) continue;
      spread_ += terms_[t].spread * terms_[t].at_base;
      smooth_ += terms_[t].smooth;
    }
  }

  // Whether nothing but `nothing()`, 0 or NaN, is in the gradient: 0 also where the mean of no row is not a number.
  TDE_INLINE bool ignored() const { return (labels_[0] < 0 && labels_[1] < 0) || lost_; }
  TDE_INLINE float nothing() const { return lost_ ? NAN : 0.f; }
  TDE_INLINE int64_t label(int t) const { return labels_[t]; }
  TDE_INLINE float base() const { return base_; }
  TDE_INLINE float spread() const { return spread_; }
  TDE_INLINE float smooth() const { return smooth_; }

  // The gradient at the label of term `own`.
  TDE_INLINE float at_label(int own) const {
    const int64_t label = labels_[own];
    float result = -smooth_ * weight(label);
    for (int t = 0; t < 2; ++t) {
      const TermLoss& term = terms_[t];
      if (labels_[t] < 0) continue;
      if (labels_[t] == label)
        result += (term.spread - term.pull) * (1 - term.rest) - term.pull * term.rest;
      else
        result += term.spread * expf(term.log_p(sums_.logits[own]));
    }
    return result;
  }

 private:
  TDE_INLINE float weight(int64_t c) const { return loss_.class_weight ? loss_.class_weight[c] : 1.f; }

  TDE_INLINE TermLoss take(int t, float scale) const {
    const int64_t label = labels_[t], other = labels_[1 - t] == label ? -1 : labels_[1 - t];
    const float z = sums_.logits[t] - (loss_.margin ? loss_.margin[label] : 0.f), z_other = sums_.logits[1 - t];
    TermLoss term;
    term.peak = sums_.peak > z ? sums_.peak : z;
    if (other >= 0 && z_other > term.peak) term.peak = z_other;
    const float lowered = expf(sums_.peak - term.peak);
    float others = sums_.sum * lowered;
    if (other >= 0) others += expf(z_other - term.peak);
    const float all = others + expf(z - term.peak);
    term.log_sum = logf(all);
    term.rest = others / all;
    term.at_base = lowered / all;
    const float log_p = term.log_p(z);
    const float own = (1 - loss_.smoothing) * weight(label),
                share = loss_.smoothing / static_cast<float>(loss_.classes);
    float loss = own * -log_p, weights = 0;
    if (loss_.smoothing > 0) {
      float below = sums_.below + weight(label) * (term.peak - z);
      if (sums_.weight != 0) below += sums_.weight * (term.peak - base_of(sums_.peak));
      weights = sums_.weight + weight(label);
      if (other >= 0) {
        below += weight(other) * (term.peak - z_other);
        weights += weight(other);
      }
      loss += share * (below + weights * term.log_sum);
    }
    float factor = 1, steepness = 0;  // (1 - p)^g, and its slope against log p
    if (loss_.focal != 0) {           // never of quite 0: that power has an infinite slope for exponents below 1
      factor = powf(term.rest > FLT_MIN ? term.rest : FLT_MIN, loss_.focal);
      if (term.rest > FLT_MIN) steepness = loss_.focal * factor / term.rest * expf(log_p) * loss;
    }
    term.spread = scale * (factor * (own + share * weights) + steepness);
    term.pull = scale * (factor * own + steepness);
    term.smooth = scale * factor * share;
    term.value = scale * factor * loss;
    return term;
  }

  const CrossEntropy& loss_;
  const SoftmaxSums& sums_;
  int64_t labels_[2];
  TermLoss terms_[2];
  bool lost_ = false;  // whether a term that is not ignored is not a number
  float base_, spread_ = 0, smooth_ = 0;
};

}  // namespace
}  // namespace tde
