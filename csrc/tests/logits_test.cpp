// tde/logits.h: small problems in one call, their gradients in another.
#include "tde/logits.h"

#include <cfloat>

#include "tests/testing.h"

namespace tde::testing {
namespace {

struct Problem {
  int64_t batch, dim, classes, heads, gap;
  DType dtype;
  NormFactor feature, weight;
  bool divided, directed;
};

const Problem kProblems[] = {
    {1, 1, 1, 1, 0, DType::f32, {1, 1}, {1 / 32.f, 1}, false, false},
    {7, 12, 9, 3, 2, DType::f32, {0, 1}, {1 / 32.f, 1}, false, true},
    {70, 128, 129, 2, 1, DType::f32, {0, 1}, {1 / 32.f, 1}, false, true},
    {127, 65, 33, 1, 0, DType::bf16, {1, 1}, {0, 1}, false, false},
    {65, 136, 70, 8, 3, DType::bf16, {0, 0}, {0, 0}, true, true},
    {34, 30, 17, 2, 0, DType::f32, {0, 0}, {0, 0.7f}, false, false},
    {0, 8, 5, 2, 0, DType::f32, {0, 1}, {0, 1}, false, true},
    {5, 8, 0, 2, 0, DType::f32, {0, 1}, {0, 1}, true, true},
};

struct Inputs {
  Grid x, w, grad;
  Array<float> divisor, direction, alpha;
  Array<bool> mask;

  explicit Inputs(const Problem& p)
      : x(p.dtype, p.batch, p.dim, p.gap),
        w(p.dtype, p.classes, p.dim, p.gap + 1),
        grad(p.dtype, p.batch, p.classes, p.gap + 2),
        divisor(p.classes),
        direction(p.dim),
        alpha(1),
        mask(p.batch) {
    Random random(4);
    const int64_t width = p.dim / p.heads;
    x.fill([&](int64_t r, int64_t c) { return r % 7 == 3 && c < width ? 0 : random() + 0.3; });
    w.fill([&](int64_t r, int64_t c) { return r % 5 == 3 && c < width ? 0 : random(); });
    grad.fill([&](int64_t, int64_t) { return random(); });
    for (int64_t c = 0; c < p.classes; ++c) divisor[c] = static_cast<float>(random() + 2);
    for (int64_t c = 0; c < p.dim; ++c) direction[c] = static_cast<float>(random() / std::sqrt(width / 3.));
    for (int64_t r = 0; r < p.batch; ++r) mask[r] = random() > 0;
    alpha[0] = 1.5f;
  }

  Operands operands(const Problem& p) const {
    const float* along = p.directed ? direction.data() : nullptr;
    return {{x, {p.heads, p.feature, 1, nullptr, along, p.directed ? alpha.data() : nullptr}},
            {w, {p.heads, p.weight, 16.f / p.heads, p.divided ? divisor.data() : nullptr}}};
  }
};

// The scaled rows of one operand, and the gradients through the scaling.
template <typename Real>
struct Scaled {
  int64_t width;
  const Grid& a;
  const RowTransform& t;
  std::vector<Real> hat;

  Scaled(const Grid& a, const RowTransform& t) : width(a.cols() / t.heads), a(a), t(t), hat(a.rows() * a.cols()) {
    for (int64_t r = 0; r < a.rows(); ++r)
      for (int64_t c = 0; c < a.cols(); ++c)
        hat[r * a.cols() + c] = constant(r) * f(norm(r, c)) * (a.at(r, c) - alpha() * dot_u(a, r, c) * u(c));
  }

  Real alpha() const { return t.alpha ? *t.alpha : 0; }
  Real u(int64_t c) const { return t.direction ? t.direction[c] : 0; }
  Real constant(int64_t r) const { return t.divisor ? Real{t.scale} / t.divisor[r] : Real{t.scale}; }
  Real f(Real n) const {
    const Real base = n + Real{t.factor.offset};
    return t.factor.power == 0 ? 1 : base < Real{FLT_MIN} ? 0 : std::pow(base, -Real{t.factor.power});
  }
  // Of the head that column c is in.
  template <typename At>
  Real sum_of_head(int64_t c, At at) const {
    Real sum = 0;
    for (int64_t i = c / width * width; i < (c / width + 1) * width; ++i) sum += at(i);
    return sum;
  }
  Real norm(int64_t r, int64_t c) const {
    return std::sqrt(sum_of_head(c, [&](int64_t i) { return Real{a.at(r, i)} * Real{a.at(r, i)}; }));
  }
  Real dot_u(const Grid& rows, int64_t r, int64_t c) const {
    return t.direction ? sum_of_head(c, [&](int64_t i) { return Real{rows.at(r, i)} * u(i); }) : 0;
  }

  // From g = the gradient of hat[r].
  void backward(int64_t r, const std::vector<Real>& g, Values& grad, Values& grad_divisor) const {
    Real all_along = 0;
    for (int64_t c = 0; c < a.cols(); ++c) {
      const Real n = norm(r, c), base = n + Real{t.factor.offset}, power = t.factor.power;
      const Real g_u = sum_of_head(c, [&](int64_t i) { return g[i] * u(i); });
      const Real along = sum_of_head(c, [&](int64_t i) { return g[i] * a.at(r, i); }) - alpha() * dot_u(a, r, c) * g_u;
      const Real slope = n < Real{FLT_MIN} ? 0 : power * f(n) / base * along / n;
      grad.push_back(constant(r) * (f(n) * (g[c] - alpha() * g_u * u(c)) - slope * a.at(r, c)));
      if (c % width == 0) all_along += constant(r) * f(n) * along;
    }
    if (t.divisor) grad_divisor.push_back(-all_along / t.divisor[r]);
  }
};

template <typename Real>
Results plainly(const Problem& p, const Inputs& of) {
  const Operands operands = of.operands(p);
  const Scaled<Real> x(of.x, operands.features.transform), w(of.w, operands.weights.transform);
  Results result;
  std::vector<Real> sum(p.dim), g(p.dim);
  Real count = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    std::fill(g.begin(), g.end(), Real{0});
    for (int64_t i = 0; i < p.classes; ++i) {
      Real z = 0;
      for (int64_t c = 0; c < p.dim; ++c) {
        z += x.hat[b * p.dim + c] * w.hat[i * p.dim + c];
        g[c] += of.grad.at(b, i) * w.hat[i * p.dim + c];
      }
      result["logits"].push_back(z);
    }
    x.backward(b, g, result["grad_x"], result["none"]);
    if (!of.mask[b]) continue;
    for (int64_t c = 0; c < p.dim; ++c) sum[c] += of.x.at(b, c);
    ++count;
  }
  for (int64_t i = 0; i < p.classes; ++i) {
    std::fill(g.begin(), g.end(), Real{0});
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t c = 0; c < p.dim; ++c) g[c] += of.grad.at(b, i) * x.hat[b * p.dim + c];
    w.backward(i, g, result["grad_w"], result["grad_divisor"]);
  }
  for (const Real s : sum) {
    result["feature_sum"].push_back(s);
    result["ema"].push_back(count == 0 ? Real{1} : Real{0.5} + s / count);
  }
  result["feature_sum"].push_back(count);
  return result;
}

void against_plain_loops() {
  for (const Problem& p : kProblems) {
    const Inputs of(p);
    const Operands operands = of.operands(p);
    const Results ours = same_for_all_threads([&](int threads) {
      const Grid z(p.dtype, p.batch, p.classes, p.gap), again(p.dtype, p.batch, p.classes);
      const Array<float> ema(std::vector<float>(p.dim, 1.f)), sum(p.dim + 1), grad_divisor(p.classes);
      const Array<int64_t> updates(std::vector<int64_t>{0});
      expect_ok(small_logits(operands, {ema.data(), updates.data(), of.mask.data(), 0.5f, sum.data()}, z, threads));
      expect(updates[0] == (sum[p.dim] > 0), "updates are miscounted");
      const Array<float> ema_alone(std::vector<float>(p.dim, 1.f));
      expect_ok(small_logits(operands, {ema_alone.data(), nullptr, of.mask.data(), 0.5f}, again, threads));
      expect(ema_alone.values() == ema.values() && again.values() == z.values(), "the sum's place changes results");

      const Grid grad_x(p.dtype, p.batch, p.dim, p.gap), grad_w(p.dtype, p.classes, p.dim, p.gap);
      expect_ok(
          small_logits_backward(operands, of.grad, grad_x, grad_w, p.divided ? grad_divisor.data() : nullptr, threads));
      const Grid x_alone(p.dtype, p.batch, p.dim), w_alone(p.dtype, p.classes, p.dim);
      expect_ok(small_logits_backward(operands, of.grad, x_alone, {}, nullptr, threads));
      expect_ok(small_logits_backward(operands, of.grad, {}, w_alone, nullptr, threads));
      expect(x_alone.values() == grad_x.values() && w_alone.values() == grad_w.values(), "one gradient alone differs");
      Results results{{"logits", z.values()},
                      {"ema", ema.values()},
                      {"feature_sum", sum.values()},
                      {"grad_x", grad_x.values()},
                      {"grad_w", grad_w.values()}};
      if (p.divided) results["grad_divisor"] = grad_divisor.values();
      return results;
    });
    expect_close(ours, plainly<double>(p, of), plainly<float>(p, of),
                 {{"logits", p.dtype}, {"grad_x", p.dtype}, {"grad_w", p.dtype}});
  }
}

void what_is_wrong_is_refused() {
  const Problem& p = kProblems[1];
  const Inputs of(p);
  const Operands good = of.operands(p);
  const Grid z(p.dtype, p.batch, p.classes), narrow(p.dtype, p.batch, 2), half(DType::bf16, p.batch, p.classes);
  const Grid grad_x(p.dtype, p.batch, p.dim), grad_w(p.dtype, p.classes, p.dim), half_x(DType::bf16, p.batch, p.dim);
  const Array<float> divisor(p.classes);
  const auto refused = [&](auto change, const char* names) {
    Operands bad = good;
    change(bad);
    expect_refused(small_logits(bad, {}, z, 1), names);
    expect_refused(small_logits_backward(bad, z, grad_x, grad_w, nullptr, 1), names);
  };
  refused([](Operands& of) { of.features.a.data = nullptr; }, "features [7, 12]");
  refused([](Operands& of) { of.weights.a.rows = -9; }, "weights [-9, 12]");
  refused([](Operands& of) { of.weights.a.cols = 9; }, "differ in columns");
  refused([](Operands& of) { of.weights.a.dtype = DType::bf16; }, "dtype");
  refused([](Operands& of) { of.features.a.dtype = of.weights.a.dtype = DType::f16; }, "float16");
  refused([](Operands& of) { of.features.transform.heads = 5; }, "5 heads");
  refused([](Operands& of) { of.weights.transform.heads = 2; }, "heads");
  refused([](Operands& of) { of.features.transform.direction = nullptr; }, "direction");
  refused([](Operands& of) { of.weights.transform.direction = of.features.transform.direction; }, "direction");
  expect_refused(small_logits(good, {}, narrow, 1), "out [7, 2]");
  expect_refused(small_logits(good, {}, half, 1), "dtype");
  Matrix overlapping = z, overlapping_x = grad_x;
  overlapping.row_stride = overlapping_x.row_stride = 1;
  expect_refused(small_logits(good, {}, overlapping, 1), "overlap");
  expect_refused(small_logits_backward(good, z, overlapping_x, {}, nullptr, 1), "overlap");
  expect_refused(small_logits_backward(good, narrow, grad_x, grad_w, nullptr, 1), "grad [7, 2]");
  expect_refused(small_logits_backward(good, z, grad_w, grad_w, nullptr, 1), "gradient");
  expect_refused(small_logits_backward(good, z, half_x, grad_w, nullptr, 1), "dtype");
  expect_refused(small_logits_backward(good, z, grad_x, grad_w, divisor.data(), 1), "divisor");
}

}  // namespace
}  // namespace tde::testing

int main() {
  using namespace tde::testing;
  return run({{"against plain loops", against_plain_loops}, {"what is wrong is refused", what_is_wrong_is_refused}});
}
