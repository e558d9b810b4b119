// tde/cross_entropy.h: the loss and its gradient, of all classes at once and of some at a time.
#include "tde/cross_entropy.h"

#include "tests/testing.h"

namespace tde::testing {
namespace {

struct Problem {
  int64_t rows, classes, gap;
  DType dtype;
  bool two_terms, vectors;
  float smoothing, focal;
};

const Problem kProblems[] = {
    {0, 4, 0, DType::f32, false, false, 0, 0},       {1, 1, 0, DType::f32, false, false, 0, 0},
    {33, 10, 3, DType::f32, false, false, 0, 0},     {33, 127, 1, DType::f32, true, true, 0.1f, 0},
    {34, 1000, 0, DType::f32, false, true, 0.1f, 2}, {29, 1231, 2, DType::bf16, true, true, 0, 0.5f},
    {9, 5000, 1, DType::f32, true, false, 0.3f, 0},
};

struct Inputs {
  Grid logits;
  Array<int64_t> labels[2];
  Array<float> scales[2], weight, bias, margin;

  explicit Inputs(const Problem& p)
      : logits(p.dtype, p.rows, p.classes, p.gap),
        labels{Array<int64_t>(p.rows), Array<int64_t>(p.rows)},
        scales{Array<float>(p.rows), Array<float>(p.rows)},
        weight(p.classes),
        bias(p.classes),
        margin(p.classes) {
    Random random(6);
    logits.fill([&](int64_t, int64_t) { return 8 * random(); });
    for (int term = 0; term < 2; ++term)
      for (int64_t r = 0; r < p.rows; ++r) {
        // some rows are ignored, one has a label that is no class, in some both labels are the same
        const int64_t label = static_cast<int64_t>((random() + 1) / 2 * static_cast<double>(p.classes));
        labels[term][r] = r % 11 == 5 ? -100 : r == 7 ? p.classes : term == 1 && r % 5 == 0 ? labels[0][r] : label;
        scales[term][r] = static_cast<float>(random() + 2) / 8;
      }
    for (int64_t c = 0; c < p.classes; ++c) {
      weight[c] = static_cast<float>(random() + 2);
      bias[c] = static_cast<float>(random());
      margin[c] = static_cast<float>(random() + 1) / 4;
    }
  }

  CrossEntropy options(const Problem& p) const {
    CrossEntropy loss{
        {{labels[0].data(), scales[0].data()}}, nullptr, nullptr, nullptr, p.classes, -100, p.smoothing, p.focal};
    if (p.two_terms) loss.terms[1] = {labels[1].data(), scales[1].data()};
    if (p.vectors) loss.class_weight = weight.data(), loss.bias = bias.data(), loss.margin = margin.data();
    return loss;
  }
};

// One term of one row, added to its loss and gradient.
template <typename Real>
void add_term(const Problem& p, const Inputs& of, int64_t r, int term, Real& loss, std::vector<Real>& grad) {
  const int64_t label = of.labels[term][r];
  if (label == -100) return;
  if (label < 0 || label >= p.classes) {
    loss = NAN;
    std::fill(grad.begin(), grad.end(), Real{NAN});
    return;
  }
  const auto weight = [&](int64_t c) -> Real { return p.vectors ? of.weight[c] : 1; };
  const Real own = (1 - Real{p.smoothing}) * weight(label), share = Real{p.smoothing} / static_cast<Real>(p.classes);
  std::vector<Real> z(p.classes);
  Real peak = -INFINITY, sum = 0, rest = 0, weights = 0;
  for (int64_t c = 0; c < p.classes; ++c) {
    z[c] = of.logits.at(r, c);
    if (p.vectors) z[c] += of.bias[c] - (c == label ? of.margin[c] : 0);
    peak = std::max(peak, z[c]);
  }
  for (const Real each : z) sum += std::exp(each - peak);
  Real value = 0;
  for (int64_t c = 0; c < p.classes; ++c) {
    z[c] -= peak + std::log(sum);  // now log p
    value -= (share * weight(c) + (c == label ? own : 0)) * z[c];
    weights += share * weight(c);
    rest += c == label ? 0 : std::exp(z[c]);
  }
  const Real focal = p.focal, factor = focal == 0 ? 1 : std::pow(rest, focal), scale = of.scales[term][r];
  const Real steepness = focal == 0 || rest == 0 ? 0 : focal * factor / rest * std::exp(z[label]) * value;
  loss += scale * factor * value;
  for (int64_t c = 0; c < p.classes; ++c) {
    const Real chosen = c == label;
    const Real slope = (own + weights) * std::exp(z[c]) - own * chosen - share * weight(c);
    grad[c] += scale * (factor * slope - steepness * (chosen - std::exp(z[c])));
  }
}

template <typename Real>
Results plainly(const Problem& p, const Inputs& of) {
  Results result;
  for (int64_t r = 0; r < p.rows; ++r) {
    Real loss = 0;
    std::vector<Real> grad(p.classes);
    add_term(p, of, r, 0, loss, grad);
    if (p.two_terms) add_term(p, of, r, 1, loss, grad);
    result["losses"].push_back(loss);
    result["gradient"].insert(result["gradient"].end(), grad.begin(), grad.end());
  }
  return result;
}

// Copies the logits of the classes from `first` on.
void copy(const Grid& from, int64_t first, const Grid& to) {
  to.fill([&](int64_t r, int64_t c) { return from.at(r, first + c); });
}

Results all_at_once(const Problem& p, const Inputs& of, int threads) {
  const Grid logits(p.dtype, p.rows, p.classes, p.gap), untouched(p.dtype, p.rows, p.classes, p.gap);
  copy(of.logits, 0, logits);
  copy(of.logits, 0, untouched);
  const Array<float> losses(p.rows), alone(p.rows);
  expect_ok(cross_entropy(logits, of.options(p), {0, true, nullptr, losses.data(), true}, threads));
  expect_ok(cross_entropy(untouched, of.options(p), {0, true, nullptr, alone.data(), false}, threads));
  expect(untouched.values() == of.logits.values(), "logits changed where no gradient was asked for");
  expect(same_bits(alone.values(), losses.values()), "other losses without their gradient");
  return {{"losses", losses.values()}, {"gradient", logits.values()}};
}

// The gradient of the last classes comes with the sums, that of the others after them.
Results some_at_a_time(const Problem& p, const Inputs& of, int threads) {
  const int64_t step = (p.classes + 2) / 3;
  const Array<SoftmaxSums> sums(p.rows);
  const Array<float> losses(p.rows);
  Values gradient(p.rows * p.classes);
  for (const bool take : {true, false})
    for (int64_t first = 0; first < p.classes; first += step) {
      const int64_t number = std::min(step, p.classes - first);
      const Grid logits(p.dtype, p.rows, number, p.gap);
      copy(of.logits, first, logits);
      const bool last = first + number == p.classes, with_gradient = take == last;
      if (last && !take) continue;
      expect_ok(cross_entropy(logits, of.options(p),
                              {first, take, sums.data(), last ? losses.data() : nullptr, with_gradient}, threads));
      for (int64_t r = 0; r < p.rows && with_gradient; ++r)
        for (int64_t c = 0; c < number; ++c) gradient[r * p.classes + first + c] = logits.at(r, c);
    }
  return {{"losses", losses.values()}, {"gradient", gradient}};
}

void against_plain_loops() {
  for (const Problem& p : kProblems) {
    const Inputs of(p);
    const Results exact = plainly<double>(p, of), plain = plainly<float>(p, of);
    for (const auto way : {all_at_once, some_at_a_time})
      expect_close(same_for_all_threads([&](int threads) { return way(p, of, threads); }), exact, plain,
                   {{"gradient", p.dtype}});
  }
}

void what_is_wrong_is_refused() {
  const Grid z(DType::f32, 2, 6), empty(DType::f32, 2, 0);
  const Array<int64_t> labels(std::vector<int64_t>{0, 1});
  const Array<float> some(6);
  const Array<SoftmaxSums> sums(2);
  CrossEntropy loss{{{labels.data(), some.data()}}}, no_scale{{{labels.data(), nullptr}}};
  loss.classes = no_scale.classes = 6;
  Matrix f16 = z, nowhere = z, overlapping = z;
  f16.dtype = DType::f16, nowhere.data = nullptr, overlapping.row_stride = 1;
  const auto refused = [](const Matrix& logits, const CrossEntropy& loss, const LossPass& pass, const char* names) {
    expect_refused(cross_entropy(logits, loss, pass, 1), names);
  };
  const int64_t most = std::numeric_limits<int64_t>::max();
  refused(f16, loss, {}, "float16");
  refused(nowhere, loss, {}, "memory");
  refused(empty, loss, {}, "no classes");
  refused(z, loss, {1, true, sums.data()}, "from class 1");
  refused(z, loss, {most, true, sums.data()}, "from class");
  refused(z, loss, {-1, true, sums.data()}, "from class -1");
  refused(z, loss, {0, false, nullptr, some.data()}, "sums");
  refused(z, no_scale, {0, true, nullptr, some.data()}, "scale");
  refused(overlapping, loss, {0, true, nullptr, some.data(), true}, "overlap");
  loss.classes = 12;
  refused(z, loss, {0, true, nullptr, some.data()}, "sums");
}

}  // namespace
}  // namespace tde::testing

int main() {
  using namespace tde::testing;
  return run({{"against plain loops", against_plain_loops}, {"what is wrong is refused", what_is_wrong_is_refused}});
}
