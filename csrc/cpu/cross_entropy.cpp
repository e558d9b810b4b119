// Softmax cross entropy and its gradient, a few rows at a time: they stay in cache from their logits to their gradient.
#include "tde/cross_entropy.h"

#include <algorithm>
#include <memory>

#include "cpu/elements.h"
#include "cpu/exp.h"
#include "cpu/kernels.h"
#include "cpu/sums.h"
#include "row_loss.h"

namespace tde::cpu::TDE_ISA {
namespace {

constexpr int64_t kBlock = 4096;   // terms that are summed in float32
constexpr int64_t kLanes = 16;     // of the widest vectors
constexpr int64_t kTogether = 8;   // rows, at most
constexpr int64_t kCached = 8192;  // floats of those, in the first-level cache
constexpr int64_t kRowCost = 128;  // what a row costs beside its columns, in columns

// Rows are worked on some together, step by step: while one waits for a reduction, the next has work. They are copied,
// and filled up to whole vectors by classes of no probability: a loop's remainder would cost more than a short row.
class Rows {
 public:
  Rows(const CrossEntropy& loss, const LossPass& pass, int64_t columns)
      : loss_(loss),
        pass_(pass),
        columns_(columns),
        padded_((columns + kLanes - 1) / kLanes * kLanes),
        z_(new float[together(columns) * padded_]) {
    if (loss.bias) bias_ = loss.bias + pass.first;
    if (loss.class_weight) weight_ = loss.class_weight + pass.first;
  }

  static int64_t together(int64_t columns) {
    return std::clamp<int64_t>(kCached / std::max<int64_t>(columns, 1), 1, kTogether);
  }

  // Rows from `first` on, no more than are worked on together.
  template <typename T>
  void run(const Matrix& logits, int64_t first, int64_t rows) {
    const bool goes_on = pass_.sums && (!pass_.take || pass_.first > 0);
    SoftmaxSums own[kTogether];
    for (int64_t r = 0; r < rows; ++r) {
      read(row<T>(logits, first + r), z(r));
      if (pass_.take) own[r] = take_labels(first + r, z(r));
    }
    if (pass_.take)
      for (int64_t r = 0; r < rows; ++r) take_sums(first + r, z(r), own[r]);
    for (int64_t r = 0; r < rows; ++r) {
      SoftmaxSums sums = goes_on ? pass_.sums[first + r] : own[r];
      if (goes_on && pass_.take) sums = merged(sums, own[r]);
      if (pass_.sums) pass_.sums[first + r] = sums;
      if (!pass_.losses && !pass_.gradient) continue;
      const RowLoss of(loss_, first + r, sums);
      if (pass_.losses) pass_.losses[first + r] = of.value;
      if (!pass_.gradient) continue;
      const float base = base_of(pass_.take ? own[r].peak : sums.peak);
      if (!pass_.take) take_exponentials(z(r), base);
      write_gradient(row<T>(logits, first + r), z(r), of, base);
    }
  }

 private:
  float* z(int64_t r) const { return z_.get() + r * padded_; }

  template <typename T>
  void read(const T* logits, float* z) const {
    if (bias_) {
#pragma omp simd
      for (int64_t c = 0; c < columns_; ++c) z[c] = load(logits[c]) + bias_[c];
    } else {
#pragma omp simd
      for (int64_t c = 0; c < columns_; ++c) z[c] = load(logits[c]);
    }
    std::fill(z + columns_, z + padded_, -INFINITY);
  }

  // The place of a label among these columns, or -1.
  int64_t place(int64_t label) const {
    const int64_t at = label - pass_.first;
    return label >= 0 && at >= 0 && at < columns_ ? at : -1;
  }

  int64_t place(int term, int64_t row) const { return place(label_of(loss_, term, row)); }

  void set_labels(int64_t row, float* z, float value) const {
    for (int t = 0; t < 2; ++t)
      if (const int64_t at = place(t, row); at >= 0) z[at] = value;
  }

  // Takes the labels' logits out of a row.
  SoftmaxSums take_labels(int64_t row, float* z) const {
    SoftmaxSums sums = no_classes();
    for (int t = 0; t < 2; ++t)
      if (const int64_t at = place(t, row); at >= 0) sums.logits[t] = z[at];
    set_labels(row, z, -INFINITY);
    return sums;
  }

  // The sums over all other classes; the logits are exponentials then.
  void take_sums(int64_t row, float* z, SoftmaxSums& sums) const {
    float highest = -INFINITY;
#pragma omp simd reduction(max : highest)
    for (int64_t c = 0; c < padded_; ++c) highest = z[c] > highest ? z[c] : highest;
    const float base = base_of(highest);
    sums.peak = highest;
    if (loss_.smoothing > 0) {
      set_labels(row, z, base);  // that they are not below
      const float* weight = weight_;
      sums.below = weight ? sum_of<kBlock>(columns_, [=](int64_t c) { return weight[c] * (base - z[c]); })
                          : sum_of<kBlock>(columns_, [=](int64_t c) { return base - z[c]; });
      sums.weight =
          weight ? sum_of<kBlock>(columns_, [=](int64_t c) { return weight[c]; }) : static_cast<float>(columns_);
      const int64_t places[2] = {place(0, row), place(1, row)};
      for (int t = 0; t < 2; ++t)
        if (places[t] >= 0 && (t == 0 || places[t] != places[0])) sums.weight -= weight ? weight[places[t]] : 1.f;
      set_labels(row, z, -INFINITY);
    }
    sums.sum = take_exponentials(z, base);
  }

  // z becomes exp(z - base); returns the sum.
  float take_exponentials(float* z, float base) const {
    return sum_of<kBlock>(padded_, [=](int64_t c) { return z[c] = exp_nonpositive(z[c] - base); });
  }

  // From a row of exponentials, by their base.
  template <typename T>
  void write_gradient(T* to, const float* e, const RowLoss& of, float base) const {
    if (of.ignored()) {
      for (int64_t c = 0; c < columns_; ++c) store(to[c], of.nothing());
      return;
    }
    const float spread = base == of.base() ? of.spread() : of.spread() * expf(base - of.base());
    const float *weight = weight_, smooth = of.smooth();
    if (smooth != 0 && weight) {
#pragma omp simd
      for (int64_t c = 0; c < columns_; ++c) store(to[c], spread * e[c] - smooth * weight[c]);
    } else {
#pragma omp simd
      for (int64_t c = 0; c < columns_; ++c) store(to[c], spread * e[c] - smooth);
    }
    for (int t = 0; t < 2; ++t)
      if (const int64_t at = place(of.label(t)); at >= 0) store(to[at], of.at_label(t));
  }

  const CrossEntropy& loss_;
  const LossPass& pass_;
  int64_t columns_, padded_;
  const float* bias_ = nullptr;
  const float* weight_ = nullptr;
  std::unique_ptr<float[]> z_;  // [together, padded_]
};

}  // namespace

void cross_entropy(const Matrix& logits, const CrossEntropy& loss, const LossPass& pass, int threads) {
  const int64_t n = logits.rows, together = Rows::together(logits.cols);
  [[maybe_unused]] const int used = threads_for(n * (logits.cols + kRowCost), threads);
  with_type(logits.dtype, [&](auto type) {
    using T = decltype(type);
#pragma omp parallel num_threads(used) if (used > 1)
    {
      Rows rows(loss, pass, logits.cols);
#pragma omp for schedule(static)
      for (int64_t r = 0; r < n; r += together) rows.run<T>(logits, r, std::min(together, n - r));
    }
  });
}

}  // namespace tde::cpu::TDE_ISA
