// Softmax cross entropy and its gradient, a row at a time: it stays in cache from its logits to its gradient.
#include "tde/cross_entropy.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/elements.h"
#include "cpu/exp.h"
#include "cpu/kernels.h"

namespace tde::cpu::TDE_ISA {
namespace {

constexpr int64_t kBlock = 4096;  // terms that are summed in float32; blocks are in double

// term(i) summed over [0, n).
template <typename Term>
double sum_of(int64_t n, Term term) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) sum += term(i);
    total += sum;
  }
  return total;
}

// Of one row: where its softmax stands, and how far all classes are from certain.
struct Softmax {
  float peak = -std::numeric_limits<float>::infinity();
  float log_sum;   // of exp(z - peak)
  float away = 0;  // sum_c w_c (-log p_c), if it is asked for

  Softmax(const float* z, int64_t classes, const float* weight, double weight_sum, bool smoothed) {
    float highest = peak;
#pragma omp simd reduction(max : highest)
    for (int64_t c = 0; c < classes; ++c) highest = z[c] > highest ? z[c] : highest;
    peak = highest;
    log_sum = static_cast<float>(std::log(sum_of(classes, [=](int64_t c) { return exp_nonpositive(z[c] - highest); })));
    if (!smoothed) return;
    const double below = weight ? sum_of(classes, [=](int64_t c) { return weight[c] * (highest - z[c]); })
                                : sum_of(classes, [=](int64_t c) { return highest - z[c]; });
    away = static_cast<float>(below + weight_sum * log_sum);
  }

  // In two steps: their sum would be rounded at the size of the peak.
  float log_p(float z) const { return (z - peak) - log_sum; }
};

// What a term adds to the gradient of a row:  spread p_c - smooth w_c, and at its label less `pull`.
struct Pull {
  int64_t label;
  float logit, margin;  // of the label: before the margin, and the margin
  float peak, log_sum;  // of the softmax
  float rest;           // 1 - p of the label, precise where p is almost 1
  float spread, pull, smooth;

  // Its part, but for `smooth`, of the gradient at a class with the logit z.
  float at(int64_t c, float z) const {
    if (c != label) return spread * std::exp((z - peak) - log_sum);
    return (spread - pull) * (1 - rest) - pull * rest;
  }
};

class Row {
 public:
  Row(const CrossEntropy& loss, int64_t classes, double weight_sum)
      : loss_(loss), classes_(classes), weight_sum_(weight_sum), z_(classes) {}

  template <typename T>
  float run(T* logits, int64_t row, bool gradient) {
    if (loss_.bias) {
#pragma omp simd
      for (int64_t c = 0; c < classes_; ++c) z_[c] = load(logits[c]) + loss_.bias[c];
    } else {
#pragma omp simd
      for (int64_t c = 0; c < classes_; ++c) z_[c] = load(logits[c]);
    }
    Pull pulls[2];
    int number = 0;
    float total = 0;
    for (const LossTerm& term : loss_.terms) {
      if (!term.labels) continue;
      if (term.labels[row] == loss_.ignored)
        total += term.scale[row] * 0;  // not a number where a mean has nothing to divide by
      else
        total += take(term.labels[row], term.scale[row], pulls[number++]);
    }
    if (gradient) write_gradient(logits, pulls, number, total);
    return total;
  }

 private:
  // The loss of one term, and what it adds to the gradient.
  float take(int64_t label, float scale, Pull& pull) {
    const float logit = z_[label], margin = loss_.margin ? loss_.margin[label] : 0;
    const bool smoothed = loss_.smoothing > 0;
    z_[label] = logit - margin;
    const Softmax softmax(z_.data(), classes_, loss_.class_weight, weight_sum_, smoothed);
    z_[label] = logit;

    const float share = loss_.smoothing / static_cast<float>(classes_);
    const float own = (1 - loss_.smoothing) * (loss_.class_weight ? loss_.class_weight[label] : 1.f);
    const float log_p = softmax.log_p(logit - margin);
    float value = own * -log_p;
    if (smoothed) value += share * softmax.away;
    const float rest = -std::expm1(log_p);
    float factor = 1, steepness = 0;  // (1 - p)^g, and its slope against log p
    if (loss_.focal != 0) {           // never of quite 0: that power has an infinite slope for exponents below 1
      factor = std::pow(std::max(rest, FLT_MIN), loss_.focal);
      if (rest > FLT_MIN) steepness = loss_.focal * factor / rest * std::exp(log_p) * value;
    }
    pull.label = label;
    pull.logit = logit;
    pull.margin = margin;
    pull.peak = softmax.peak;
    pull.log_sum = softmax.log_sum;
    pull.rest = rest;
    pull.spread = scale * (factor * (own + share * static_cast<float>(smoothed ? weight_sum_ : 0)) + steepness);
    pull.pull = scale * (factor * own + steepness);
    pull.smooth = scale * factor * share;
    return scale * factor * value;
  }

  template <typename T>
  void write_gradient(T* to, const Pull* pulls, int number, float total) {
    if (number == 0) {
      for (int64_t c = 0; c < classes_; ++c) store(to[c], total);
      return;
    }
    // All classes but the labels have one softmax up to a factor. Even the lower peak is above all their logits.
    const float peak = std::min(pulls[0].peak, pulls[number - 1].peak);
    float spread = 0, smooth = 0;
    for (const Pull* p = pulls; p < pulls + number; ++p) {
      spread += p->spread * std::exp((peak - p->peak) - p->log_sum);
      smooth += p->smooth;
    }
    const float* weight = loss_.class_weight;
    const float* z = z_.data();
    if (smooth != 0 && weight) {
#pragma omp simd
      for (int64_t c = 0; c < classes_; ++c) store(to[c], spread * exp_nonpositive(z[c] - peak) - smooth * weight[c]);
    } else {
#pragma omp simd
      for (int64_t c = 0; c < classes_; ++c) store(to[c], spread * exp_nonpositive(z[c] - peak) - smooth);
    }
    for (const Pull* at = pulls; at < pulls + number; ++at) {
      float value = -smooth * (weight ? weight[at->label] : 1.f);
      for (const Pull* p = pulls; p < pulls + number; ++p) value += p->at(at->label, at->logit);
      store(to[at->label], value);
    }
  }

  const CrossEntropy& loss_;
  int64_t classes_;
  double weight_sum_;
  std::vector<float> z_;
};

}  // namespace

void cross_entropy(const Matrix& logits, const CrossEntropy& loss, float* losses, bool gradient, int threads) {
  const float* weight = loss.class_weight;
  const double weight_sum =
      weight ? sum_of(logits.cols, [=](int64_t c) { return weight[c]; }) : static_cast<double>(logits.cols);
  with_type(logits.dtype, [&](auto type) {
    using T = decltype(type);
    [[maybe_unused]] const int used = threads_for(logits, threads);
#pragma omp parallel num_threads(used) if (used > 1)
    {
      Row of(loss, logits.cols, weight_sum);
#pragma omp for schedule(static)
      for (int64_t r = 0; r < logits.rows; ++r) losses[r] = of.run(row<T>(logits, r), r, gradient);
    }
  });
}

}  // namespace tde::cpu::TDE_ISA
