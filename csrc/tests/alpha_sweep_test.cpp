// tde/alpha_sweep.h: who wins for which alpha.
#include "tde/alpha_sweep.h"

#include "tests/testing.h"

namespace tde::testing {
namespace {

struct Problem {
  int64_t rows, classes, heads, gap;
};

const Problem kProblems[] = {{0, 3, 1, 0}, {1, 1, 1, 0}, {5, 2, 3, 1}, {260, 127, 2, 3}, {7, 1000, 4, 0}};

// Numbers of few bits, so that lines are exact and several cross in one point.
struct Inputs {
  Grid logits;
  Array<float> rows, classes;

  explicit Inputs(const Problem& p)
      : logits(DType::f32, p.rows, p.classes, p.gap), rows(p.rows * p.heads), classes(p.classes * p.heads) {
    Random random(7);
    logits.fill([&](int64_t, int64_t) { return std::round(64 * random()) / 8; });
    for (int64_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<float>(std::round(8 * random()) / 4);
    for (int64_t i = 0; i < classes.size(); ++i) classes[i] = static_cast<float>(std::round(8 * random()) / 4);
  }

  Lines lines(const Problem& p) const { return {logits, rows.data(), classes.data(), p.heads}; }

  double line(const Problem& p, int64_t row, int64_t c, double alpha) const {
    double slope = 0;
    for (int64_t k = 0; k < p.heads; ++k) slope += double{rows[row * p.heads + k]} * classes[k * p.classes + c];
    return logits.at(row, c) - alpha * slope;
  }
  double highest(const Problem& p, int64_t row, double alpha) const {
    double best = -INFINITY;
    for (int64_t c = 0; c < p.classes; ++c) best = std::max(best, line(p, row, c, alpha));
    return best;
  }
};

void winners() {
  for (const Problem& p : kProblems) {
    const Inputs of(p);
    const Array<double> alphas(std::vector<double>{-8, -1, 0, 0, 0.25, 0.5, 1, 1.5, 3, 64});
    const int64_t steps = alphas.size(), stride = p.rows + 2;
    const Results ours = same_for_all_threads([&](int threads) {
      const Array<int64_t> winners(std::vector<int64_t>(steps * stride, -7));
      expect_ok(alpha_sweep(of.lines(p), alphas.data(), steps, winners.data(), stride, threads));
      return Results{{"winners", winners.values()}};
    });
    for (int64_t i = 0; i < steps * stride; ++i) {
      const double winner = ours.at("winners")[i], alpha = alphas[i / stride];
      const int64_t row = i % stride;
      if (row >= p.rows) {
        expect(winner == -7, "a write beside the rows");
        continue;
      }
      const double highest = of.highest(p, row, alpha);
      int64_t lowest = 0;
      while (of.line(p, row, lowest, alpha) < highest) ++lowest;
      expect(winner == static_cast<double>(lowest), "another winner");
    }
  }
}

void segments() {
  for (const Problem& p : kProblems) {
    const Inputs of(p);
    const int64_t most = p.classes;
    const Results ours = same_for_all_threads([&](int threads) {
      const Array<double> starts(p.rows * most);
      const Array<int64_t> classes(p.rows * most), counts(p.rows);
      expect_ok(alpha_segments(of.lines(p), most, starts.data(), classes.data(), counts.data(), threads));
      return Results{{"starts", starts.values()}, {"classes", classes.values()}, {"counts", counts.values()}};
    });
    for (int64_t row = 0; row < p.rows; ++row) {
      const double* starts = ours.at("starts").data() + row * most;
      const double* classes = ours.at("classes").data() + row * most;
      const int64_t count = static_cast<int64_t>(ours.at("counts")[row]);
      expect(count >= 1 && starts[0] == -INFINITY, "segments do not begin at minus infinity");
      for (int64_t i = 0; i < most; ++i) {
        if (i >= count) {
          expect(starts[i] == INFINITY && classes[i] == 0, "what lies beyond the segments is not filled up");
          continue;
        }
        const bool last = i + 1 == count;
        expect(last || starts[i] < starts[i + 1], "segments out of order");
        // its class wins at its start, and in its middle
        const double begin = i == 0 ? (last ? 0 : starts[1] - 2) : starts[i], end = last ? begin + 2 : starts[i + 1];
        for (const double alpha : {begin, (begin + end) / 2})
          expect(of.highest(p, row, alpha) - of.line(p, row, static_cast<int64_t>(classes[i]), alpha) < 1e-12,
                 "a segment is another class's");
      }
    }
    // few are written where there is memory for few
    const Array<double> start(p.rows);
    const Array<int64_t> first(p.rows), counts(p.rows);
    expect_ok(alpha_segments(of.lines(p), 1, start.data(), first.data(), counts.data(), 2));
    expect(counts.values() == ours.at("counts"), "another count of segments");
  }
}

void what_is_wrong_is_refused() {
  const Grid z(DType::f32, 2, 6), half(DType::bf16, 2, 6), empty(DType::f32, 2, 0);
  const Array<float> some(12);
  const Array<double> alphas(3), starts(12);
  const Array<int64_t> winners(6), classes(12), counts(2);
  const auto refused = [&](const Lines& lines, const char* names) {
    expect_refused(alpha_sweep(lines, alphas.data(), 3, winners.data(), 2, 1), names);
    expect_refused(alpha_segments(lines, 6, starts.data(), classes.data(), counts.data(), 1), names);
  };
  const Lines good{z, some.data(), some.data(), 2};
  Matrix nowhere = z;
  nowhere.data = nullptr;
  refused({half, some.data(), some.data(), 2}, "float32");
  refused({empty, some.data(), some.data(), 2}, "no classes");
  refused({nowhere, some.data(), some.data(), 2}, "memory");
  refused({z, nullptr, some.data(), 2}, "projections");
  refused({z, some.data(), nullptr, 2}, "projections");
  refused({z, some.data(), some.data(), 0}, "head");
  expect_refused(alpha_sweep(good, alphas.data(), 0, winners.data(), 2, 1), "alphas");
  expect_refused(alpha_sweep(good, nullptr, 3, winners.data(), 2, 1), "alphas");
  expect_refused(alpha_sweep(good, alphas.data(), 3, nullptr, 2, 1), "winners");
  expect_refused(alpha_sweep(good, alphas.data(), 3, winners.data(), 1, 1), "overlap");
  expect_refused(alpha_segments(good, 0, starts.data(), classes.data(), counts.data(), 1), "segments");
  expect_refused(alpha_segments(good, 6, nullptr, classes.data(), counts.data(), 1), "segments");
}

}  // namespace
}  // namespace tde::testing

int main() {
  using namespace tde::testing;
  return run({{"winners", winners}, {"segments", segments}, {"what is wrong is refused", what_is_wrong_is_refused}});
}
