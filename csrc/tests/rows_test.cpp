// tde/rows.h: rows scaled head by head, their norms, projections and sums, and the gradients.
#include "tde/rows.h"

#include <cfloat>

#include "tde/ema.h"
#include "tests/testing.h"

namespace tde::testing {
namespace {

struct Problem {
  int64_t rows, cols, heads, gap;
  DType in, out;
  NormFactor factor;
  float scale;
  bool divided, directed, masked;
  double size;  // of the elements
};

const Problem kProblems[] = {
    {1, 1, 1, 0, DType::f32, DType::f32, {1, 1}, 16, false, false, false, 1},
    {3, 127, 1, 5, DType::f32, DType::bf16, {0, 0}, 1, false, true, true, 1},
    {33, 129, 3, 1, DType::bf16, DType::f32, {1 / 32.f, 1}, 8, true, false, false, 1},
    {300, 128, 2, 3, DType::f32, DType::f32, {0, 1}, 16, false, true, true, 1},
    {300, 128, 4, 3, DType::f32, DType::f32, {0, 1}, 16, true, true, false, 1e18},  // whose squares float32 lacks
    {300, 128, 4, 3, DType::f32, DType::f32, {0, 1}, 16, true, true, false, 1e-18},
    {260, 136, 8, 0, DType::bf16, DType::bf16, {1, 1}, 4, true, true, false, 1},
    {257, 130, 2, 0, DType::f32, DType::f32, {0, 0.7f}, 1, false, false, true, 1},
    {0, 8, 2, 0, DType::f32, DType::f32, {0, 1}, 1, true, true, true, 1},
    {5, 0, 2, 3, DType::f32, DType::f32, {0, 1}, 1, true, true, true, 1},
};

// Its operands. Some heads are zero, and in the direction too.
struct Inputs {
  Grid a, grad;
  Array<float> divisor, direction, alpha;
  Array<bool> mask;

  explicit Inputs(const Problem& p)
      : a(p.in, p.rows, p.cols, p.gap),
        grad(p.out, p.rows, p.cols, p.gap + 2),
        divisor(p.rows),
        direction(p.cols),
        alpha(1),
        mask(p.rows) {
    Random random(1);
    const int64_t width = p.cols / p.heads;
    a.fill([&](int64_t r, int64_t c) { return r % 7 == 3 && c < width ? 0 : random() * p.size; });
    grad.fill([&](int64_t, int64_t) { return random(); });
    for (int64_t r = 0; r < p.rows; ++r) divisor[r] = static_cast<float>(random() + 2);
    for (int64_t r = 0; r < p.rows; ++r) mask[r] = random() > -0.2;
    for (int64_t c = 0; c < p.cols; ++c)
      direction[c] = c / width == 1 ? 0 : static_cast<float>(random() / std::sqrt(width / 3.));
    alpha[0] = 1.5f;
  }

  RowTransform transform(const Problem& p) const {
    return {p.heads,
            p.factor,
            p.scale,
            p.divided ? divisor.data() : nullptr,
            p.directed ? direction.data() : nullptr,
            p.directed ? alpha.data() : nullptr};
  }
};

// The header's equation and its gradient, a loop at a time.
template <typename Real>
Results plainly(const Problem& p, const Inputs& of) {
  Results result;
  const int64_t width = p.cols / p.heads;
  std::vector<Real> sums(p.cols);
  const Real alpha = p.directed ? of.alpha[0] : 0, size = static_cast<Real>(p.size);
  Real count = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    const Real divisor = p.divided ? of.divisor[r] : 1, constant = p.scale / divisor;
    Real all_along = 0;
    for (int64_t k = 0; k < p.heads; ++k) {
      const auto a = [&](int64_t i) -> Real { return of.a.at(r, k * width + i); };
      const auto g = [&](int64_t i) -> Real { return of.grad.at(r, k * width + i); };
      const auto u = [&](int64_t i) -> Real { return p.directed ? of.direction[k * width + i] : 0; };
      Real square = 0, a_u = 0, g_u = 0, g_a = 0;
      for (int64_t i = 0; i < width; ++i) {
        square += a(i) / size * (a(i) / size);
        a_u += a(i) * u(i);
        g_u += g(i) * u(i);
        g_a += g(i) * a(i);
      }
      const Real norm = size * std::sqrt(square), base = norm + Real{p.factor.offset}, power = p.factor.power;
      const bool zero = base < Real{FLT_MIN};
      const Real f = power == 0 ? 1 : zero ? 0 : std::pow(base, -power);
      const Real along = g_a - alpha * a_u * g_u;  // <P g, a>
      const Real slope = norm < Real{FLT_MIN} || zero ? 0 : f * power / base * (along / norm);
      all_along += constant * f * along;
      result["norms"].push_back(norm);
      result["projections"].push_back(constant * f * a_u);
      for (int64_t i = 0; i < width; ++i) {
        result["out"].push_back(constant * f * (a(i) - alpha * a_u * u(i)));
        result["grad_a"].push_back(constant * f * (g(i) - alpha * g_u * u(i)) - constant * slope * a(i));
      }
    }
    result["grad_divisor"].push_back(-all_along / divisor);
    if (p.masked && !of.mask[r]) continue;
    for (int64_t c = 0; c < p.cols; ++c) sums[c] += of.a.at(r, c);
    ++count;
  }
  result["feature_sum"].assign(sums.begin(), sums.end());
  result["feature_sum"].push_back(count);
  return result;
}

void against_plain_loops() {
  for (const Problem& p : kProblems) {
    const Inputs of(p);
    Results exact = plainly<double>(p, of), plain = plainly<float>(p, of);
    const Results ours = same_for_all_threads([&](int threads) {
      const Grid out(p.out, p.rows, p.cols, p.gap + 1), grad_a(p.in, p.rows, p.cols, p.gap + 4);
      const Array<float> norms(p.rows * p.heads), projections(p.rows * p.heads), sum(p.cols + 1), divisor(p.rows);
      const Array<float> norms_alone(p.rows * p.heads), sum_alone(p.cols + 1);
      const bool* mask = p.masked ? of.mask.data() : nullptr;
      expect_ok(normalize_rows(of.a, of.transform(p), out,
                               {norms.data(), p.directed ? projections.data() : nullptr, mask, sum.data()}, threads));
      expect_ok(row_norms(of.a, p.heads, norms_alone.data(), threads));
      expect_ok(feature_sum(of.a, mask, sum_alone.data(), threads));
      expect(norms_alone.values() == norms.values(), "row_norms differs from normalize_rows");
      expect(sum_alone.values() == sum.values(), "feature_sum differs from normalize_rows");
      expect_ok(normalize_rows_backward(of.grad, of.a, norms.data(), of.transform(p), grad_a,
                                        p.divided ? divisor.data() : nullptr, threads));
      Results results{
          {"out", out.values()}, {"norms", norms.values()}, {"feature_sum", sum.values()}, {"grad_a", grad_a.values()}};
      if (p.directed) results["projections"] = projections.values();
      if (p.divided) results["grad_divisor"] = divisor.values();
      return results;
    });
    expect_close(ours, exact, plain, {{"out", p.out}, {"grad_a", p.in}});
  }
}

void gradient_in_place() {
  const Problem& p = kProblems[3];
  const Inputs of(p);
  const Array<float> norms(p.rows * p.heads);
  expect_ok(row_norms(of.a, p.heads, norms.data(), 2));
  const Grid grad_a(p.in, p.rows, p.cols);
  expect_ok(normalize_rows_backward(of.grad, of.a, norms.data(), of.transform(p), grad_a, nullptr, 2));
  expect_ok(normalize_rows_backward(of.grad, of.a, norms.data(), of.transform(p), of.grad, nullptr, 2));
  expect(of.grad.values() == grad_a.values(), "another gradient in the place of grad");
}

// As a tensor that is expanded has it.
void one_row_for_all() {
  const Grid one(DType::f32, 1, 130), all(DType::f32, 300, 130), expanded(DType::f32, 300, 130);
  Random random(9);
  one.fill([&](int64_t, int64_t) { return random(); });
  all.fill([&](int64_t, int64_t c) { return one.at(0, c); });
  Matrix row = one;
  row.rows = 300, row.row_stride = 0;
  const Grid out(DType::f32, 300, 130);
  expect_ok(normalize_rows(row, {2, {0, 1}}, expanded, {}, 2));
  expect_ok(normalize_rows(all, {2, {0, 1}}, out, {}, 2));
  expect(out.values() == expanded.values(), "another result for rows that are one");
}

void what_is_wrong_is_refused() {
  const Grid a(DType::f32, 2, 6), other(DType::f32, 3, 6), half(DType::bf16, 2, 6);
  const Array<float> some(6);
  Matrix nowhere = a, negative = a, backwards = a, f16 = a, endless = a, overlapping = a;
  nowhere.data = nullptr, negative.rows = -1, backwards.row_stride = -6, f16.dtype = DType::f16,
  overlapping.row_stride = 5;
  endless.rows = endless.cols = int64_t{1} << 40;
  const auto scaled = [](const Matrix& a, const RowTransform& t, const Matrix& out) {
    return normalize_rows(a, t, out, {}, 1);
  };
  expect_refused(scaled(nowhere, {}, a), "a [2, 6]");
  expect_refused(scaled(a, {}, nowhere), "out [2, 6]");
  expect_refused(scaled(negative, {}, a), "negative size");
  expect_refused(scaled(backwards, {}, a), "negative row stride");
  expect_refused(scaled(endless, {}, endless), "too large");
  expect_refused(scaled(a, {}, overlapping), "overlap");
  expect_refused(scaled(f16, {}, a), "float16");
  expect_refused(scaled(a, {}, other), "shape");
  expect_refused(scaled(a, {4, {}}, a), "heads");
  expect_refused(scaled(a, {0, {}}, a), "heads");
  expect_refused(scaled(a, {1, {}, 1, nullptr, nullptr, some.data()}, a), "direction");
  expect_refused(normalize_rows(a, {}, a, {nullptr, some.data()}, 1), "direction");
  expect_refused(row_norms(a, 4, some.data(), 1), "heads");
  expect_refused(row_norms(a, 1, nullptr, 1), "norms");
  const auto backward = [&](const Matrix& grad, const Matrix& grad_a, const float* norms, float* grad_divisor) {
    return normalize_rows_backward(grad, a, norms, {}, grad_a, grad_divisor, 1);
  };
  expect_refused(backward(other, a, some.data(), nullptr), "grad and a");
  expect_refused(backward(a, other, some.data(), nullptr), "grad_a and a");
  expect_refused(backward(a, half, some.data(), nullptr), "dtype");
  expect_refused(backward(a, a, nullptr, nullptr), "norms");
  expect_refused(backward(a, a, some.data(), some.data()), "divisor");
}

}  // namespace
}  // namespace tde::testing

int main() {
  using namespace tde::testing;
  return run({{"against plain loops", against_plain_loops},
              {"gradient in place", gradient_in_place},
              {"one row for all", one_row_for_all},
              {"what is wrong is refused", what_is_wrong_is_refused}});
}
