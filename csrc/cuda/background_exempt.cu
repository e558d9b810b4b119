// Eq. 9 in one launch over the logits: a block takes a row, both softmaxes online, then writes what they say of it.
#include <cfloat>

#include "check.h"
#include "cuda/elements.cuh"
#include "cuda/launch.h"
#include "tde/background_exempt.h"

namespace tde::cuda {
namespace {

constexpr unsigned kThreads = 256, kWarps = kThreads / kWarp;
constexpr float kLowest = -FLT_MAX;  // as a maximum of nothing: unlike -inf it can be subtracted from itself

struct LogSumExp {
  float max = kLowest, sum = 0;

  __device__ __forceinline__ void add(const LogSumExp& other) {
    const float highest = fmaxf(max, other.max);
    sum = sum * expf(max - highest) + other.sum * expf(other.max - highest);
    max = highest;
  }
  __device__ __forceinline__ void add(float z) { add(LogSumExp{z, 1}); }
  __device__ __forceinline__ float value() const { return max + logf(sum); }
};

// Of the whole block, in every thread: lanes in a tree, then warps in order. `shared` holds one for each warp.
__device__ __forceinline__ LogSumExp over_block(LogSumExp own, LogSumExp* shared) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    const LogSumExp other{__shfl_xor_sync(kAllLanes, own.max, apart), __shfl_xor_sync(kAllLanes, own.sum, apart)};
    own.add(other);
  }
  if (lane() == 0) shared[warp()] = own;
  __syncthreads();
  LogSumExp all = shared[0];
  for (unsigned w = 1; w < kWarps; ++w) all.add(shared[w]);
  return all;
}

template <typename Out>
__global__ void __launch_bounds__(kThreads)
    exempt(const float* logits, int64_t logits_stride, const float* row_projections, const float* class_projections,
           int64_t heads, const float* alpha, int64_t classes, int64_t background, bool log, Out* out,
           int64_t out_stride) {
  LogSumExp* shared = dynamic_shared<LogSumExp>();  // [2, kWarps]
  const int64_t row = blockIdx.x;
  const float* total = logits + row * logits_stride;
  const float strength = *alpha;
  const auto direct = [&](int64_t i) {
    float z = total[i];
    for (int64_t k = 0; k < heads; ++k)
      z -= strength * row_projections[row * heads + k] * class_projections[i * heads + k];
    return z;
  };
  LogSumExp foreground, direct_foreground;
  for (int64_t i = threadIdx.x; i < classes; i += kThreads) {
    if (i == background) continue;
    foreground.add(total[i]);
    direct_foreground.add(direct(i));
  }
  foreground = over_block(foreground, shared);
  direct_foreground = over_block(direct_foreground, shared + kWarps);
  const float own = total[background];
  LogSumExp everything = foreground;
  everything.add(own);
  const float log_background = own - everything.value();
  // what every foreground class adds to its direct effect: log (1 - p_0) less the log-sum of their direct effects
  const float share = (foreground.value() - everything.value()) - direct_foreground.value();
  __syncthreads();  // `out` may be `logits`: the background has been read by all
  for (int64_t i = threadIdx.x; i < classes; i += kThreads) {
    const float result = i == background ? log_background : direct(i) + share;
    out[row * out_stride + i] = from_float<Out>(log ? result : expf(result));
  }
}

}  // namespace

Status background_exempt(const Matrix& logits, const float* row_projections, const float* class_projections,
                         int64_t heads, const float* alpha, int64_t background, bool log, const Matrix& out,
                         void* stream) {
  Check check("cuda::background_exempt");
  check.exempt(logits, row_projections, class_projections, heads, alpha, background, out);
  if (!check.status().ok() || logits.rows == 0) return check.status();
  return with_type(out.dtype, [&](auto to) {
    using Out = decltype(to);
    const Launch with{dim3(static_cast<unsigned>(logits.rows)), kThreads, 2 * kWarps * sizeof(LogSumExp)};
    return launch("background_exempt", shape(logits), exempt<Out>, with, stream, elements<const float>(logits),
                  logits.row_stride, row_projections, class_projections, heads, alpha, logits.cols, background, log,
                  elements<Out>(out), out.row_stride);
  });
}

}  // namespace tde::cuda
