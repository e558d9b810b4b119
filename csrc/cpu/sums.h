// Sums of many terms: blocks in float32, which vectorises, the blocks in double, so that the number of terms costs no
// digits.
#pragma once

#include <cstdint>

namespace tde::cpu {
namespace {  // compiled once per instruction set: nothing here may be shared between them

// term(i) summed over [0, n).
template <int64_t kBlock, typename Term>
float sum_of(int64_t n, Term term) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) sum += term(i);
    total += sum;
  }
  return static_cast<float>(total);
}

}  // namespace
}  // namespace tde::cpu
