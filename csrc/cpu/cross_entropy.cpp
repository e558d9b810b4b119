// Softmax cross entropy and its gradient, a row at a time: it stays in cache from its logits to its gradient.
#include "tde/cross_entropy.h"

#include <algorithm>
#include <vector>

#include "cpu/elements.h"
#include "cpu/exp.h"
#include "cpu/kernels.h"
#include "cpu/sums.h"
#include "row_loss.h"

namespace tde::cpu::TDE_ISA {
namespace {

constexpr int64_t kBlock = 4096;  // terms that are summed in float32

class Rows {
 public:
  Rows(const CrossEntropy& loss, const LossPass& pass, int64_t columns)
      : loss_(loss), pass_(pass), columns_(columns), z_(columns) {
    if (loss.bias) bias_ = loss.bias + pass.first;
    if (loss.class_weight) weight_ = loss.class_weight + pass.first;
  }

  template <typename T>
  void run(T* logits, int64_t row) {
    read(logits);
    SoftmaxSums sums = no_classes();
    if (pass_.sums && (!pass_.take || pass_.first > 0)) sums = pass_.sums[row];
    if (pass_.take) sums = merged(sums, sums_of(row));
    if (pass_.sums) pass_.sums[row] = sums;
    if (!pass_.losses && !pass_.gradient) return;
    const RowLoss of(loss_, row, sums);
    if (pass_.losses) pass_.losses[row] = of.value;
    if (pass_.gradient) write_gradient(logits, of);
  }

 private:
  template <typename T>
  void read(const T* logits) {
    float* z = z_.data();
    if (bias_) {
#pragma omp simd
      for (int64_t c = 0; c < columns_; ++c) z[c] = load(logits[c]) + bias_[c];
    } else {
#pragma omp simd
      for (int64_t c = 0; c < columns_; ++c) z[c] = load(logits[c]);
    }
  }

  // The place of a label among these columns, or -1.
  int64_t place(int64_t label) const {
    const int64_t at = label - pass_.first;
    return label >= 0 && at >= 0 && at < columns_ ? at : -1;
  }

  SoftmaxSums sums_of(int64_t row) {
    SoftmaxSums sums = no_classes();
    const int64_t places[2] = {place(label_of(loss_, 0, row)), place(label_of(loss_, 1, row))};
    for (int t = 0; t < 2; ++t)
      if (places[t] >= 0) sums.logits[t] = z_[places[t]];
    const auto set_labels = [&](float value) {
      for (const int64_t at : places)
        if (at >= 0) z_[at] = value;
    };
    set_labels(-INFINITY);
    const float* z = z_.data();
    float highest = -INFINITY;
#pragma omp simd reduction(max : highest)
    for (int64_t c = 0; c < columns_; ++c) highest = z[c] > highest ? z[c] : highest;
    const float base = base_of(highest);
    sums.peak = highest;
    sums.sum = sum_of<kBlock>(columns_, [=](int64_t c) { return exp_nonpositive(z[c] - base); });
    if (loss_.smoothing > 0) {
      set_labels(base);  // that they are not below
      const float* weight = weight_;
      sums.below = weight ? sum_of<kBlock>(columns_, [=](int64_t c) { return weight[c] * (base - z[c]); })
                          : sum_of<kBlock>(columns_, [=](int64_t c) { return base - z[c]; });
      sums.weight =
          weight ? sum_of<kBlock>(columns_, [=](int64_t c) { return weight[c]; }) : static_cast<float>(columns_);
      for (int t = 0; t < 2; ++t)
        if (places[t] >= 0 && (t == 0 || places[t] != places[0])) sums.weight -= weight ? weight[places[t]] : 1.f;
    }
    return sums;
  }

  template <typename T>
  void write_gradient(T* to, const RowLoss& of) const {
    if (of.ignored()) {
      for (int64_t c = 0; c < columns_; ++c) store(to[c], of.value);
      return;
    }
    const float *weight = weight_, *z = z_.data(), base = of.base(), spread = of.spread(), smooth = of.smooth();
    // a label may be above the base: its value here is replaced
    if (smooth != 0 && weight) {
#pragma omp simd
      for (int64_t c = 0; c < columns_; ++c) store(to[c], spread * exp_nonpositive(z[c] - base) - smooth * weight[c]);
    } else {
#pragma omp simd
      for (int64_t c = 0; c < columns_; ++c) store(to[c], spread * exp_nonpositive(z[c] - base) - smooth);
    }
    for (int t = 0; t < 2; ++t)
      if (const int64_t at = place(of.label(t)); at >= 0) store(to[at], of.at_label(t));
  }

  const CrossEntropy& loss_;
  const LossPass& pass_;
  int64_t columns_;
  const float* bias_ = nullptr;
  const float* weight_ = nullptr;
  std::vector<float> z_;
};

}  // namespace

void cross_entropy(const Matrix& logits, const CrossEntropy& loss, const LossPass& pass, int threads) {
  with_type(logits.dtype, [&](auto type) {
    using T = decltype(type);
    [[maybe_unused]] const int used = threads_for(logits, threads);
#pragma omp parallel num_threads(used) if (used > 1)
    {
      Rows rows(loss, pass, logits.cols);
#pragma omp for schedule(static)
      for (int64_t r = 0; r < logits.rows; ++r) rows.run(row<T>(logits, r), r);
    }
  });
}

}  // namespace tde::cpu::TDE_ISA
