// Eq. 9 in one pass over the logits: both softmaxes of a row while it lies in the first-level cache.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/elements.h"
#include "cpu/exp.h"
#include "cpu/kernels.h"
#include "cpu/sums.h"

namespace tde::cpu::TDE_ISA {
namespace {

constexpr int64_t kBlock = 256;  // terms that are summed in float32, few also for a compiler that does not vectorise
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

struct LogSumExp {
  float max = kMinusInfinity, sum = 0;

  LogSumExp(const float* z, int64_t n) {
    float peak = kMinusInfinity;
#pragma omp simd reduction(max : peak)
    for (int64_t i = 0; i < n; ++i) peak = z[i] > peak ? z[i] : peak;
    max = peak;
    sum = sum_of<kBlock>(n, [=](int64_t i) { return exp_nonpositive(z[i] - peak); });
  }

  LogSumExp(const LogSumExp& a, const LogSumExp& b) : max(std::max(a.max, b.max)) {
    for (const LogSumExp& part : {a, b})
      if (part.sum > 0 || std::isnan(part.sum)) sum += part.sum * std::exp(part.max - max);
  }

  float value() const { return max + std::log(sum); }
};

// One row: `total` holds the logits of Eq. 7, `direct` those of Eq. 8; the result, a log-probability, replaces
// `direct`.
void exempt_row(const float* total, float* direct, int64_t classes, int64_t background) {
  const int64_t after = background + 1, tail = classes - after;
  const LogSumExp foreground(LogSumExp(total, background), LogSumExp(total + after, tail));
  const float everything = LogSumExp(foreground, LogSumExp(total + background, 1)).value();
  const float log_background = total[background] - everything;
  const float shift = foreground.value() - everything -
                      LogSumExp(LogSumExp(direct, background), LogSumExp(direct + after, tail)).value();
#pragma omp simd
  for (int64_t i = 0; i < classes; ++i) direct[i] += shift;
  direct[background] = log_background;
}

}  // namespace

void background_exempt(const Matrix& logits, const float* row_projections, const float* class_projections,
                       int64_t heads, const float* alpha, int64_t background, bool log, const Matrix& out,
                       int threads) {
  const int64_t classes = logits.cols;
  std::vector<float> correction(heads * classes);  // alpha * class projections, one head after the other
  for (int64_t i = 0; i < classes; ++i)
    for (int64_t k = 0; k < heads; ++k) correction[k * classes + i] = *alpha * class_projections[i * heads + k];

  with_type(out.dtype, [&](auto to) {
    using Out = decltype(to);
    for_each_block(logits.rows, threads_for(logits, threads), [&](int64_t, int64_t begin, int64_t end) {
      std::vector<float> direct(classes);
      for (int64_t r = begin; r < end; ++r) {
        const float* total = row<float>(logits, r);
        std::copy_n(total, classes, direct.data());
        for (int64_t k = 0; k < heads; ++k) {
          const float c = row_projections[r * heads + k];
          const float* v = correction.data() + k * classes;
#pragma omp simd
          for (int64_t i = 0; i < classes; ++i) direct[i] -= c * v[i];
        }
        exempt_row(total, direct.data(), classes, background);
        Out* to = row<Out>(out, r);
        if (log) {
#pragma omp simd
          for (int64_t i = 0; i < classes; ++i) store(to[i], direct[i]);
        } else {
#pragma omp simd
          for (int64_t i = 0; i < classes; ++i) store(to[i], exp_nonpositive(direct[i]));
        }
      }
    });
  });
}

}  // namespace tde::cpu::TDE_ISA
