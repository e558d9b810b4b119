// tde/background_exempt.h: Eq. 9.
#include "tde/background_exempt.h"

#include "tests/testing.h"

namespace tde::testing {
namespace {

struct Problem {
  int64_t rows, classes, heads, background, gap;
  DType out;
};

const Problem kProblems[] = {{0, 3, 1, 0, 0, DType::f32},     {1, 1, 1, 0, 0, DType::f32},
                             {5, 2, 2, 1, 3, DType::bf16},    {33, 127, 3, 126, 1, DType::f32},
                             {37, 1000, 2, 0, 2, DType::f32}, {40, 1231, 8, 600, 0, DType::bf16}};

struct Inputs {
  Grid logits;
  Array<float> rows, classes, alpha;

  explicit Inputs(const Problem& p)
      : logits(DType::f32, p.rows, p.classes, p.gap), rows(p.rows * p.heads), classes(p.classes * p.heads), alpha(1) {
    Random random(5);
    logits.fill([&](int64_t, int64_t) { return 16 * random(); });
    for (int64_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<float>(random());
    for (int64_t i = 0; i < classes.size(); ++i) classes[i] = static_cast<float>(random());
    alpha[0] = 1.5f;
  }
};

template <typename Real>
std::vector<Real> softmax(std::vector<Real> z) {
  Real largest = z[0], sum = 0;
  for (const Real each : z) largest = std::max(largest, each);
  for (Real& each : z) sum += each = std::exp(each - largest);
  for (Real& each : z) each /= sum;
  return z;
}

template <typename Real>
Results plainly(const Problem& p, const Inputs& of) {
  Results result;
  for (int64_t r = 0; r < p.rows; ++r) {
    std::vector<Real> z(p.classes), direct;
    for (int64_t i = 0; i < p.classes; ++i) {
      z[i] = of.logits.at(r, i);
      Real corrected = z[i];
      for (int64_t k = 0; k < p.heads; ++k)
        corrected -= of.alpha[0] * of.rows[r * p.heads + k] * of.classes[i * p.heads + k];
      if (i != p.background) direct.push_back(corrected);
    }
    const std::vector<Real> all = softmax(z);
    std::vector<Real> foreground = direct.empty() ? direct : softmax(direct);
    Real remaining = 0;
    for (int64_t i = 0; i < p.classes; ++i) remaining += i == p.background ? 0 : all[i];
    foreground.insert(foreground.begin() + p.background, 0);
    for (int64_t i = 0; i < p.classes; ++i) {
      const Real probability = i == p.background ? all[i] : remaining * foreground[i];
      result["probabilities"].push_back(probability);
      result["logarithms"].push_back(std::log(probability));
    }
  }
  return result;
}

void against_plain_loops() {
  for (const Problem& p : kProblems) {
    const Inputs of(p);
    const auto run = [&](bool log, const Matrix& out, int threads) {
      expect_ok(background_exempt(of.logits, of.rows.data(), of.classes.data(), p.heads, of.alpha.data(), p.background,
                                  log, out, threads));
    };
    const Results ours = same_for_all_threads([&](int threads) {
      const Grid probabilities(p.out, p.rows, p.classes, p.gap + 1), logarithms(p.out, p.rows, p.classes);
      run(false, probabilities, threads);
      run(true, logarithms, threads);
      return Results{{"probabilities", probabilities.values()}, {"logarithms", logarithms.values()}};
    });
    expect_close(ours, plainly<double>(p, of), plainly<float>(p, of),
                 {{"probabilities", p.out}, {"logarithms", p.out}});
    if (p.out != DType::f32) continue;
    run(false, of.logits, 2);
    expect(of.logits.values() == ours.at("probabilities"), "other probabilities in the place of the logits");
  }
}

void what_is_wrong_is_refused() {
  const Grid z(DType::f32, 2, 6), half(DType::bf16, 2, 6), other(DType::f32, 2, 5);
  const Array<float> some(12);
  const auto refused = [&](const Matrix& logits, const float* rows, const float* classes, int64_t heads,
                           const float* alpha, int64_t background, const Matrix& out, const char* names) {
    expect_refused(background_exempt(logits, rows, classes, heads, alpha, background, true, out, 1), names);
  };
  const float* good = some.data();
  refused(half, good, good, 2, good, 0, z, "float32");
  refused(z, good, good, 2, good, 0, other, "shape");
  refused(z, nullptr, good, 2, good, 0, z, "projections");
  refused(z, good, nullptr, 2, good, 0, z, "projections");
  refused(z, good, good, 0, good, 0, z, "head");
  refused(z, good, good, 2, nullptr, 0, z, "alpha");
  refused(z, good, good, 2, good, 6, z, "background 6");
  refused(z, good, good, 2, good, -1, z, "background -1");
  Matrix nowhere = z, overlapping = z;
  nowhere.data = nullptr, overlapping.row_stride = 5;
  refused(nowhere, good, good, 2, good, 0, z, "logits [2, 6]");
  refused(z, good, good, 2, good, 0, nowhere, "out [2, 6]");
  refused(z, good, good, 2, good, 0, overlapping, "overlap");
}

}  // namespace
}  // namespace tde::testing

int main() {
  using namespace tde::testing;
  return run({{"against plain loops", against_plain_loops}, {"what is wrong is refused", what_is_wrong_is_refused}});
}
