// All of the API in a row: by several callers at once, who share their operands and nothing else, and on any numbers.
#include <limits>
#include <thread>

#include "tde/alpha_sweep.h"
#include "tde/background_exempt.h"
#include "tde/cross_entropy.h"
#include "tde/logits.h"
#include "tests/testing.h"

namespace tde::testing {
namespace {

constexpr int64_t kBatch = 260, kDim = 128, kClasses = 129, kHeads = 2;

// Everybody's operands.
struct Shared {
  Grid x{DType::f32, kBatch, kDim}, w{DType::f32, kClasses, kDim};
  Array<float> direction{kDim}, alpha{1}, scale{kBatch}, along_x{kBatch * kHeads}, along_w{kClasses * kHeads};
  Array<int64_t> labels{kBatch};
  Array<double> alphas{std::vector<double>{0, 1, 2, 3}};

  explicit Shared(const std::vector<float>& numbers) {
    Random random(8);
    const auto draw = [&] {
      const double share = (random() + 1) / 2;
      return numbers.empty() ? random() : numbers[static_cast<size_t>(share * static_cast<double>(numbers.size()))];
    };
    x.fill([&](int64_t, int64_t) { return draw(); });
    w.fill([&](int64_t, int64_t) { return draw(); });
    for (const auto* each : {&direction, &alpha, &scale, &along_x, &along_w})
      for (int64_t i = 0; i < each->size(); ++i) (*each)[i] = static_cast<float>(draw());
    for (int64_t r = 0; r < kBatch; ++r) labels[r] = r % kClasses;
  }
};

// One caller's way through the API.
Results through(const Shared& of, int threads) {
  const Operands operands{{of.x, {kHeads, {0, 1}, 1, nullptr, of.direction.data(), of.alpha.data()}},
                          {of.w, {kHeads, {1 / 32.f, 1}, 8}}};
  const Grid hat(DType::f32, kBatch, kDim), z(DType::f32, kBatch, kClasses), exempt(DType::f32, kBatch, kClasses);
  const Grid grad_x(DType::f32, kBatch, kDim), grad_w(DType::f32, kClasses, kDim), grad_a(DType::f32, kBatch, kDim);
  const Array<float> norms(kBatch * kHeads), sum(kDim + 1), again(kDim + 1), losses(kBatch);
  const Array<int64_t> winners(4 * kBatch), classes(kBatch * 4), counts(kBatch);
  const Array<double> starts(kBatch * 4);
  const RowTransform& transform = operands.features.transform;
  expect_ok(normalize_rows(of.x, transform, hat, {norms.data(), nullptr, nullptr, sum.data()}, threads));
  expect_ok(feature_sum(of.x, nullptr, again.data(), threads));
  expect_ok(small_logits(operands, {nullptr, nullptr, nullptr, 0, again.data()}, z, threads));
  const Lines lines{z, of.along_x.data(), of.along_w.data(), kHeads};
  expect_ok(
      background_exempt(z, of.along_x.data(), of.along_w.data(), kHeads, of.alpha.data(), 3, true, exempt, threads));
  expect_ok(alpha_sweep(lines, of.alphas.data(), 4, winners.data(), kBatch, threads));
  expect_ok(alpha_segments(lines, 4, starts.data(), classes.data(), counts.data(), threads));
  CrossEntropy loss{{{of.labels.data(), of.scale.data()}}};
  loss.classes = kClasses;
  expect_ok(cross_entropy(z, loss, {0, true, nullptr, losses.data(), true}, threads));
  expect_ok(small_logits_backward(operands, z, grad_x, grad_w, nullptr, threads));
  expect_ok(normalize_rows_backward(hat, of.x, norms.data(), transform, grad_a, nullptr, threads));
  return {{"normalize_rows", hat.values()}, {"sum", sum.values()},         {"background_exempt", exempt.values()},
          {"winners", winners.values()},    {"segments", starts.values()}, {"losses", losses.values()},
          {"grad_x", grad_x.values()},      {"grad_w", grad_w.values()},   {"grad_a", grad_a.values()}};
}

void several_callers() {
  const Shared of({});
  constexpr int kCallers = 4;
  std::vector<Results> results(kCallers);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller)
    callers.emplace_back([&, caller] { results[caller] = through(of, 1 + caller % 3); });
  for (std::thread& caller : callers) caller.join();
  const Results alone = through(of, 1);
  for (const Results& each : results) expect(each == alone, "another result where others call too");
}

void any_numbers() {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const std::vector<float> finite{0, -0.f, 1e-45f, -1e-38f, 1e-20f, -1, 1, 1e20f, -3e38f};
  const std::vector<float> all{0, 1e-45f, -1, 1, 3e38f, kInfinity, -kInfinity, NAN};
  for (const auto& numbers : {finite, all}) {
    const Shared of(numbers);
    same_for_all_threads([&](int threads) { return through(of, threads); });
  }
}

}  // namespace
}  // namespace tde::testing

int main() {
  using namespace tde::testing;
  return run({{"several callers", several_callers}, {"any numbers", any_numbers}});
}
