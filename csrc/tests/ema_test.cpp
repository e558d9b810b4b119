// tde/ema.h: sums of features, their moving average, and its direction.
#include "tde/ema.h"

#include "tests/testing.h"

namespace tde::testing {
namespace {

struct Problem {
  int64_t rows, cols, gap;
  DType dtype;
};

const Problem kProblems[] = {{0, 5, 0, DType::f32},      {1, 1, 0, DType::bf16},     {31, 65, 3, DType::f32},
                             {1000, 127, 1, DType::f32}, {1231, 64, 0, DType::bf16}, {3, 0, 1, DType::f32}};

template <typename Real>
Results plainly(const Grid& x, const Array<bool>& mask, bool masked) {
  std::vector<Real> sum(x.cols() + 1);
  for (int64_t r = 0; r < x.rows(); ++r) {
    if (masked && !mask[r]) continue;
    for (int64_t c = 0; c < x.cols(); ++c) sum[c] += x.at(r, c);
    sum[x.cols()] += 1;
  }
  return {{"sum", {sum.begin(), sum.end()}}};
}

void sums() {
  for (const Problem& p : kProblems)
    for (const bool masked : {false, true}) {
      const Grid x(p.dtype, p.rows, p.cols, p.gap);
      const Array<bool> mask(p.rows);
      Random random(2);
      for (int64_t r = 0; r < p.rows; ++r) mask[r] = random() > 0;
      // a row that is left out may hold anything
      x.fill([&](int64_t r, int64_t) { return masked && !mask[r] ? NAN : random() + 0.5; });
      const Results ours = same_for_all_threads([&](int threads) {
        const Array<float> sum(p.cols + 1);
        expect_ok(feature_sum(x, masked ? mask.data() : nullptr, sum.data(), threads));
        return Results{{"sum", sum.values()}};
      });
      expect_close(ours, plainly<double>(x, mask, masked), plainly<float>(x, mask, masked));
    }
}

void average() {
  const Array<float> sum(std::vector<float>{3, -6, 1, 3}), none(std::vector<float>{0, 0, 0, 0});
  const Array<float> ema(std::vector<float>{1, 2, 4});
  const Array<int64_t> updates(std::vector<int64_t>{7});
  expect_ok(fold_ema(ema.data(), updates.data(), sum.data(), 3, 0.5f));
  expect(ema.values() == Values{1.5, -1, 2 + 1.f / 3} && updates[0] == 8, "another average");
  expect_ok(fold_ema(ema.data(), updates.data(), none.data(), 3, 0.5f));
  expect(ema.values() == Values{1.5, -1, 2 + 1.f / 3} && updates[0] == 8, "no rows changed the average");
  expect_ok(fold_ema(ema.data(), nullptr, sum.data(), 3, 0));
  expect(ema.values() == Values{1, -2, 1.f / 3}, "another average without momentum");
  expect_ok(fold_ema(nullptr, nullptr, sum.data() + 3, 0, 0.5f));
}

void directions() {
  const int64_t heads = 3, width = 43;
  const Array<float> ema(heads * width), direction(heads * width), zeros(4), of_zeros(4);
  Random random(3);
  for (int64_t i = 0; i < ema.size(); ++i) ema[i] = static_cast<float>(i / width == 1 ? 1e-20 * random() : random());
  expect_ok(head_direction(ema.data(), ema.size(), heads, direction.data(), 2));
  for (int64_t k = 0; k < heads; ++k) {
    double square = 0, along = 0, own = 0;
    for (int64_t i = k * width; i < (k + 1) * width; ++i) {
      square += double{ema[i]} * ema[i];
      own += double{direction[i]} * direction[i];
      along += double{ema[i]} * direction[i];
    }
    expect(std::abs(own - 1) < 1e-6 && std::abs(along / std::sqrt(square) - 1) < 1e-6, "no unit vector along the head");
  }
  for (int64_t i = 0; i < 4; ++i) zeros[i] = 0;
  expect_ok(head_direction(zeros.data(), 4, 2, of_zeros.data(), 1));
  expect(of_zeros.values() == zeros.values(), "zero has a direction");
}

void what_is_wrong_is_refused() {
  const Grid x(DType::f32, 2, 6);
  const Array<float> some(7);
  Matrix f16 = x;
  f16.dtype = DType::f16;
  expect_refused(feature_sum(f16, nullptr, some.data(), 1), "float16");
  expect_refused(feature_sum(x, nullptr, nullptr, 1), "sum");
  expect_refused(fold_ema(nullptr, nullptr, some.data(), 6, 0.9f), "ema");
  expect_refused(fold_ema(some.data(), nullptr, nullptr, 6, 0.9f), "sum");
  expect_refused(fold_ema(some.data(), nullptr, some.data(), -1, 0.9f), "size");
  expect_refused(head_direction(some.data(), 6, 4, some.data(), 1), "heads");
  expect_refused(head_direction(nullptr, 6, 2, some.data(), 1), "memory");
  expect_refused(head_direction(some.data(), 6, 2, nullptr, 1), "memory");
}

}  // namespace
}  // namespace tde::testing

int main() {
  using namespace tde::testing;
  return run({{"sums", sums},
              {"average", average},
              {"directions", directions},
              {"what is wrong is refused", what_is_wrong_is_refused}});
}
