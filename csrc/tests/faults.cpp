// Faults on purpose, one an argument: a sanitizer that lets one pass is not at work.
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>

#include "tests/testing.h"

namespace {

using tde::testing::Array;

int read_past_the_end(int past) {
  const std::unique_ptr<float[]> memory(new float[16]());
  return static_cast<int>(memory[15 + past]);
}

// What the tests' own memory guards: the elements between two rows.
int read_between_rows(int past) {
  const tde::testing::Grid grid(tde::DType::f32, 2, 8, 8);
  return static_cast<int>(static_cast<const float*>(tde::Matrix(grid).data)[7 + past]);
}

int overflow(int one) { return std::numeric_limits<int>::max() + one; }

int out_of_range(int) {
  volatile float large = 1e20f;
  return static_cast<int>(large);
}

int leak(int) {
  for (int i = 0; i < 8; ++i) *new volatile int[64] = i;
  return 0;
}

// A sum that all threads add to, as a loop does whose reduction was forgotten.
int race(int) {
  const Array<float> sum(1);
  sum[0] = 0;
  float* total = sum.data();
#pragma omp parallel for schedule(static) num_threads(4)
  for (int i = 0; i < 1000; ++i) *total += 1;
  return 0;
}

// A second loop that reads what the first is still writing: its barrier is missing.
int no_barrier(int) {
  const Array<float> numbers(1000);
  float *to = numbers.data(), total = 0;
#pragma omp parallel num_threads(4) reduction(+ : total)
  {
#pragma omp for schedule(static) nowait
    for (int i = 0; i < 1000; ++i) to[i] = 1;
#pragma omp for schedule(static) nowait
    for (int i = 0; i < 1000; ++i) total += to[999 - i];
  }
  return total > 0 ? 0 : 1;
}

// What is right, by the same means: nothing may be reported.
int nothing(int) {
  const Array<float> numbers(1000);
  float *to = numbers.data(), total = 0;
#pragma omp parallel num_threads(4)
  {
#pragma omp for schedule(static)
    for (int i = 0; i < 1000; ++i) to[i] = 1;
#pragma omp for schedule(dynamic) nowait
    for (int i = 0; i < 1000; ++i) to[999 - i] += 1;
  }
  for (int i = 0; i < 1000; ++i) total += to[i];
  return total == 2000 ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
  volatile int one = 1;  // unknown to the compiler, which otherwise finds the faults itself
  const struct {
    const char* name;
    int (*commit)(int);
  } faults[] = {{"nothing", nothing},
                {"read_past_the_end", read_past_the_end},
                {"read_between_rows", read_between_rows},
                {"overflow", overflow},
                {"out_of_range", out_of_range},
                {"leak", leak},
                {"race", race},
                {"no_barrier", no_barrier}};
  for (const auto& fault : faults)
    if (count == 2 && std::strcmp(arguments[1], fault.name) == 0) return fault.commit(one);
  std::fputs("faults: name one\n", stderr);
  return 2;
}
