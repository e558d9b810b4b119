// What the emulator is for: that it runs what is right, and shows what is wrong.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/elements.cuh"
#include "cuda/launch.h"

namespace tde::cuda {
namespace {

constexpr unsigned kThreads = 64;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "simt_test: %s\n", what);
  std::exit(1);
}

template <typename... Parameters, typename... Arguments>
Status run(void (*kernel)(Parameters...), size_t shared_bytes, Arguments... arguments) {
  return launch("kernel", "a test", kernel, {dim3(3, 2), kThreads, shared_bytes}, nullptr, arguments...);
}

// Every thread reads what its neighbour in another warp wrote.
void neighbour(float* out, bool with_barrier) {
  float* shared = dynamic_shared<float>();
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (with_barrier) __syncthreads();
  const unsigned block = blockIdx.y * gridDim.x + blockIdx.x;
  out[block * kThreads + threadIdx.x] = shared[(threadIdx.x + kWarp) % kThreads];
}

void sums(float* out) {
  const float sum = warp_sum(static_cast<float>(lane()));
  const float broadcast = __shfl_sync(kAllLanes, sum + lane(), 5);
  if (blockIdx.x == 0 && blockIdx.y == 0) out[threadIdx.x] = broadcast;
}

void half_a_barrier() {
  if (threadIdx.x < kWarp)
    __syncthreads();
  else
    __syncwarp();
}

void too_far() { dynamic_shared<float>()[threadIdx.x + 1] = 1; }

void copy(const float* from, float* early, float* late) {
  float* shared = dynamic_shared<float>();
  simt::copies().later([=, mine = threadIdx.x] { shared[mine] = from[mine]; });
  simt::copies().commit();
  early[threadIdx.x] = shared[threadIdx.x];
  simt::copies().wait(0);
  late[threadIdx.x] = shared[threadIdx.x];
}

// A word that arrives sometime, whether or not it is waited for.
void delivery(float* early, float* late) {
  float* shared = dynamic_shared<float>();
  if (threadIdx.x == 0) simt::sometime([shared] { *shared = 7; });
  __syncthreads();
  early[threadIdx.x] = *shared;
  simt::wait_until([shared] { return *shared == 7; });
  late[threadIdx.x] = *shared;
}

void nobody_delivers() {
  simt::wait_until([] { return false; });
}

void read_past_the_end(const float* from, size_t size, float* out) { *out = from[size]; }

void left_behind() {
  if (threadIdx.x == 0) simt::sometime([] {});
}

bool all_written(const std::vector<float>& out) {
  for (size_t i = 0; i < out.size(); ++i)
    if (out[i] != static_cast<float>((i + kWarp) % kThreads)) return false;
  return true;
}

void test() {
  std::vector<float> out(6 * kThreads);
  constexpr size_t kBytes = kThreads * sizeof(float);
  expect(run(neighbour, kBytes, out.data(), true).ok() && all_written(out), "a right kernel came out wrong");
  expect(run(neighbour, kBytes, out.data(), false).ok() && !all_written(out), "a missing barrier did not show");
  expect(run(sums, 0, out.data()).ok() && out[0] == 31 * 16 + 5 && out[63] == out[0], "a warp's sum is wrong");
  expect(!run(half_a_barrier, 0).ok(), "threads at different barriers went on");
  expect(run(sums, 0, out.data()).ok(), "nothing runs after a kernel that hung");
  expect(run(too_far, kBytes).error.find("past the end") != std::string::npos, "a write past the end went unseen");
  std::vector<float> from(kThreads, 7), early(kThreads), late(kThreads);
  expect(run(copy, kBytes, from.data(), early.data(), late.data()).ok() && late == from, "a copy did not arrive");
  expect(std::isnan(early[0]), "a copy arrived before it was waited for");
  expect(run(delivery, kBytes, early.data(), late.data()).ok() && late == from, "what happens sometime did not happen");
  const Status empty = launch("kernel", "a test", sums, {dim3(0), kThreads, 0}, nullptr, out.data());
  expect(empty.error.find("an empty grid") != std::string::npos, "a grid of no blocks was launched");
  expect(!run(nobody_delivers, 0).ok(), "threads that wait for nothing went on");
  expect(run(left_behind, 0).error.find("ended before") != std::string::npos, "a block left something under way");
}

int fault() {
  const std::vector<float> from(kThreads);
  float out = 0;
  return run(read_past_the_end, 0, from.data(), from.size(), &out).ok() && out == 0 ? 0 : 1;
}

}  // namespace
}  // namespace tde::cuda

// `read_past_the_end`, a fault on purpose: AddressSanitizer has to see it.
int main(int count, char** arguments) {
  if (count > 1 && std::strcmp(arguments[1], "read_past_the_end") == 0) return tde::cuda::fault();
  tde::cuda::test();
  std::puts("simt_test: all is as it should be");
}
