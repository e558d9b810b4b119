// Eq. 8 for every alpha, a row at a time: its lines stay in cache from the first alpha to the last.
#include "tde/alpha_sweep.h"

#include <limits>
#include <vector>

#include "cpu/elements.h"
#include "cpu/kernels.h"

namespace tde::cpu::TDE_ISA {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The lines of one row, in float32, and what is computed of them, in double: no comparison depends on a rounding.
class Polygon {
 public:
  explicit Polygon(const Lines& lines) : lines_(lines), classes_(lines.logits.cols), slope_(classes_), at_(classes_) {}

  void read(int64_t row) {
    z_ = cpu::row<const float>(lines_.logits, row);
    float* slope = slope_.data();
    for (int64_t k = 0; k < lines_.heads; ++k) {
      const float own = lines_.row_projections[row * lines_.heads + k];
      const float* along = lines_.class_projections + k * classes_;
      if (k == 0) {
#pragma omp simd
        for (int64_t c = 0; c < classes_; ++c) slope[c] = own * along[c];
      } else {
#pragma omp simd
        for (int64_t c = 0; c < classes_; ++c) slope[c] += own * along[c];
      }
    }
  }

  int64_t winner(double alpha) {
    const float *z = z_, *slope = slope_.data();
    double* at = at_.data();
    double highest = -kInfinity;
#pragma omp simd reduction(max : highest)
    for (int64_t c = 0; c < classes_; ++c) {
      at[c] = z[c] - alpha * slope[c];
      highest = at[c] > highest ? at[c] : highest;
    }
    return first(highest);
  }

  // The winner before any alpha: the steepest descent, of equal ones the highest line.
  int64_t leftmost() {
    const float *z = z_, *slope = slope_.data();
    double* at = at_.data();
    float steepest = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : steepest)
    for (int64_t c = 0; c < classes_; ++c) steepest = slope[c] > steepest ? slope[c] : steepest;
    double highest = -kInfinity;
#pragma omp simd reduction(max : highest)
    for (int64_t c = 0; c < classes_; ++c) {
      at[c] = slope[c] == steepest ? static_cast<double>(z[c]) : -kInfinity;
      highest = at[c] > highest ? at[c] : highest;
    }
    return first(highest);
  }

  // Where `current` is overtaken, and by whom: of all lines that cross there, the one that then descends least.
  double overtaken(int64_t& current) {
    const float* slope = slope_.data();
    const float* z = z_;
    const double own_z = z[current], own_slope = slope[current];
    double* at = at_.data();
    double next = kInfinity;
#pragma omp simd reduction(min : next)
    for (int64_t c = 0; c < classes_; ++c) {
      const double gap = own_slope - slope[c];
      at[c] = gap > 0 ? (own_z - z[c]) / gap : kInfinity;
      next = at[c] < next ? at[c] : next;
    }
    if (next == kInfinity) return next;
    float flattest = std::numeric_limits<float>::infinity();
    for (int64_t c = 0; c < classes_; ++c)
      if (at[c] == next && slope[c] < flattest) {
        flattest = slope[c];
        current = c;
      }
    return next;
  }

 private:
  int64_t first(double highest) const {
    for (int64_t c = 0; c < classes_; ++c)
      if (at_[c] == highest) return c;
    return 0;  // no number is the largest of those that are none
  }

  const Lines& lines_;
  int64_t classes_;
  const float* z_ = nullptr;
  std::vector<float> slope_;
  std::vector<double> at_;
};

// A line that wins at two alphas wins between them, where nothing is then computed.
void fill_between(Polygon& polygon, const double* alphas, int64_t first, int64_t last, int64_t* winners,
                  int64_t stride) {
  const int64_t from = winners[first * stride], to = winners[last * stride];
  if (from == to) {
    for (int64_t i = first + 1; i < last; ++i) winners[i * stride] = from;
    return;
  }
  if (last - first < 2) return;
  const int64_t middle = first + (last - first) / 2;
  winners[middle * stride] = polygon.winner(alphas[middle]);
  fill_between(polygon, alphas, first, middle, winners, stride);
  fill_between(polygon, alphas, middle, last, winners, stride);
}

template <typename Run>
void for_each_row(const Lines& lines, int threads, Run run) {
  [[maybe_unused]] const int used = threads_for(lines.logits, threads);
#pragma omp parallel num_threads(used) if (used > 1)
  {
    Polygon polygon(lines);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < lines.logits.rows; ++row) {
      polygon.read(row);
      run(polygon, row);
    }
  }
}

}  // namespace

void alpha_sweep(const Lines& lines, const double* alphas, int64_t steps, int64_t* winners, int64_t stride,
                 int threads) {
  for_each_row(lines, threads, [=](Polygon& polygon, int64_t row) {
    int64_t* own = winners + row;
    own[0] = polygon.winner(alphas[0]);
    own[(steps - 1) * stride] = polygon.winner(alphas[steps - 1]);
    fill_between(polygon, alphas, 0, steps - 1, own, stride);
  });
}

void alpha_segments(const Lines& lines, int64_t most, double* starts, int64_t* classes, int64_t* counts, int threads) {
  for_each_row(lines, threads, [=](Polygon& polygon, int64_t row) {
    int64_t current = polygon.leftmost(), count = 0;
    for (double start = -kInfinity; start < kInfinity;) {
      if (count < most) {
        starts[row * most + count] = start;
        classes[row * most + count] = current;
      }
      ++count;
      const double next = polygon.overtaken(current);
      start = next < start ? start : next;  // rounding may put three lines' crossings out of order
    }
    counts[row] = count;
    for (; count < most; ++count) {
      starts[row * most + count] = kInfinity;
      classes[row * most + count] = 0;
    }
  });
}

}  // namespace tde::cpu::TDE_ISA
