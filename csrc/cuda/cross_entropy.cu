// Softmax cross entropy of logits and its gradient in their place: a block takes a row, its softmax online.
#include "check.h"
#include "cuda/elements.cuh"
#include "cuda/launch.h"
#include "row_loss.h"
#include "tde/cross_entropy.h"

namespace tde::cuda {
namespace {

constexpr unsigned kThreads = 256, kWarps = kThreads / kWarp;
constexpr unsigned kResident = 4;  // blocks on a multiprocessor: registers enough that nothing is parked

__device__ __forceinline__ void add(SoftmaxSums& sums, float z, float weight, bool smoothed) {
  if (z > sums.peak) {
    const float lower = base_of(sums.peak);
    if (smoothed && sums.weight != 0) sums.below += sums.weight * (z - lower);
    sums.sum *= expf(sums.peak - z);
    sums.peak = z;
  }
  const float base = base_of(sums.peak);
  sums.sum += expf(z - base);
  if (smoothed) {
    sums.below += weight * (base - z);
    sums.weight += weight;
  }
}

__device__ __forceinline__ SoftmaxSums of_lane(const SoftmaxSums& own, int flipped) {
  const auto other = [flipped](float value) { return __shfl_xor_sync(kAllLanes, value, flipped); };
  return {other(own.peak),
          other(own.sum),
          other(own.below),
          other(own.weight),
          {other(own.logits[0]), other(own.logits[1])}};
}

// Of the whole block, in every thread: lanes in a tree, then warps in order. `shared` holds one for each warp.
__device__ __forceinline__ SoftmaxSums over_block(SoftmaxSums own, SoftmaxSums* shared) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    const SoftmaxSums other = of_lane(own, apart);
    own = (lane() & apart) ? merged(other, own) : merged(own, other);
  }
  if (lane() == 0) shared[warp()] = own;
  __syncthreads();
  SoftmaxSums all = shared[0];
  for (unsigned w = 1; w < kWarps; ++w) all = merged(all, shared[w]);
  return all;
}

// Calls run(column, values) for N neighbouring columns at a time; N divides `columns`.
template <int N, typename T, typename Run>
__device__ __forceinline__ void for_columns(const T* from, int64_t columns, Run run) {
  for (int64_t c = static_cast<int64_t>(threadIdx.x) * N; c < columns; c += kThreads * N) {
    float values[N];
    load(values, from + c);
    run(c, values);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kResident)
    row_loss(T* logits, int64_t stride, int64_t columns, const CrossEntropy loss, const LossPass pass) {
  SoftmaxSums* shared = dynamic_shared<SoftmaxSums>();  // [kWarps]
  const int64_t row = blockIdx.x;
  T* own = logits + row * stride;
  const int64_t labels[2] = {label_of(loss, 0, row), label_of(loss, 1, row)};
  const auto logit = [&](int64_t c, float z) { return loss.bias ? z + loss.bias[pass.first + c] : z; };
  const auto weight = [&](int64_t c) { return loss.class_weight ? loss.class_weight[pass.first + c] : 1.f; };

  SoftmaxSums sums = no_classes();
  if (pass.take) {
    for_columns<N>(own, columns, [&](int64_t begin, const float (&values)[N]) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int64_t c = begin + i, label = pass.first + c;
        const float z = logit(c, values[i]);
        if (label == labels[0]) sums.logits[0] = z;
        if (label == labels[1]) sums.logits[1] = z;
        if (label != labels[0] && label != labels[1]) add(sums, z, weight(c), loss.smoothing > 0);
      }
    });
    sums = over_block(sums, shared);
    if (pass.sums && pass.first > 0) sums = merged(pass.sums[row], sums);
    __syncthreads();  // all have read what one replaces
    if (pass.sums && threadIdx.x == 0) pass.sums[row] = sums;
  } else {
    sums = pass.sums[row];
  }
  if (!pass.losses && !pass.gradient) return;

  const RowLoss of(loss, row, sums);
  if (pass.losses && threadIdx.x == 0) pass.losses[row] = of.value;
  if (!pass.gradient) return;
  for_columns<N>(own, columns, [&](int64_t begin, float (&values)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int64_t c = begin + i, label = pass.first + c;
      if (of.ignored())
        values[i] = of.nothing();
      else if (label == labels[0])
        values[i] = of.at_label(0);
      else if (label == labels[1])
        values[i] = of.at_label(1);
      else
        values[i] =
            of.spread() * expf(logit(c, values[i]) - of.base()) - (of.smooth() != 0 ? of.smooth() * weight(c) : 0);
    }
    store(own + begin, values);
  });
}

}  // namespace

Status cross_entropy(const Matrix& logits, const CrossEntropy& loss, const LossPass& pass, void* stream) {
  Check check("cuda::cross_entropy");
  check.matrix(logits, "logits").loss(logits, loss, pass);
  if (!check.status().ok() || logits.rows == 0) return check.status();
  return with_type(logits.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kWide = kAccess / sizeof(T);
    const auto kernel = aligned(logits) ? row_loss<T, kWide> : row_loss<T, 1>;
    const Launch with{dim3(static_cast<unsigned>(logits.rows)), kThreads, kWarps * sizeof(SoftmaxSums)};
    return launch("cross_entropy", shape(logits), kernel, with, stream, elements<T>(logits), logits.row_stride,
                  logits.cols, loss, pass);
  });
}

}  // namespace tde::cuda
