// Several callers at once, each with threads of its own: they share operands, and nothing else.
#include <thread>

#include "tde/alpha_sweep.h"
#include "tde/background_exempt.h"
#include "tde/cross_entropy.h"
#include "tde/logits.h"
#include "tests/testing.h"

namespace tde::testing {
namespace {

constexpr int64_t kBatch = 260, kDim = 128, kClasses = 129, kHeads = 2;

// What the callers share.
struct Shared {
  Grid x{DType::f32, kBatch, kDim}, w{DType::f32, kClasses, kDim};
  Array<float> direction{kDim}, alpha{1}, scale{kBatch}, along_x{kBatch * kHeads}, along_w{kClasses * kHeads};
  Array<int64_t> labels{kBatch};
  Array<double> alphas{std::vector<double>{0, 1, 2, 3}};

  Shared() {
    Random random(8);
    x.fill([&](int64_t, int64_t) { return random(); });
    w.fill([&](int64_t, int64_t) { return random(); });
    for (const auto* numbers : {&direction, &alpha, &scale, &along_x, &along_w})
      for (int64_t i = 0; i < numbers->size(); ++i) (*numbers)[i] = static_cast<float>(random());
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
  const Shared of;
  constexpr int kCallers = 4;
  std::vector<Results> results(kCallers);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller)
    callers.emplace_back([&, caller] { results[caller] = through(of, 1 + caller % 3); });
  for (std::thread& caller : callers) caller.join();
  const Results alone = through(of, 1);
  for (const Results& each : results) expect(each == alone, "another result where others call too");
}

}  // namespace
}  // namespace tde::testing

int main() {
  using namespace tde::testing;
  return run({{"several callers", several_callers}});
}
