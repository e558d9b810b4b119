// The EMA update alone, in one launch, and its two halves for a reduction over ranks in between.
#include "check.h"
#include "cuda/elements.cuh"
#include "cuda/ema.cuh"
#include "cuda/launch.h"
#include "tde/ema.h"

namespace tde::cuda {
namespace {

constexpr unsigned kThreads = 256, kWarps = kThreads / kWarp;
// Rows of a block: few, so that the blocks fill a device; but no more blocks than the last one adds up in a moment.
constexpr int64_t kLeastRows = 32, kMostBlocks = 128;

int64_t rows_of_block(int64_t rows) { return std::max(kLeastRows, ceil_div(rows, kMostBlocks)); }
int64_t row_blocks(int64_t rows) { return ceil_div(rows, rows_of_block(rows)); }
int64_t strip_width(int64_t elements) { return elements * kWarp; }

// A lane keeps kColumns columns, a warp takes every kWarps-th row.
template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, 2) sum_and_fold(const T* x, int64_t rows, int64_t row_stride,
                                                            int64_t block_rows, EmaUpdate update, Partials partials) {
  float* sums = dynamic_shared<float>();  // [kWarps, kWarp * kColumns]
  unsigned* counts = reinterpret_cast<unsigned*>(sums + kThreads * kColumns);
  const int64_t begin = int64_t{blockIdx.x} * kWarp * kColumns, col = begin + lane() * kColumns;
  const int64_t first = int64_t{blockIdx.y} * block_rows, last = min(first + block_rows, rows);
  const bool inside = col < partials.cols;
  float own[kColumns] = {};
  unsigned taken = 0;
  for (int64_t row = first + warp(); row < last; row += kWarps) {
    if (update.mask && !update.mask[row]) continue;  // not read: a NaN in it does no harm
    ++taken;
    if (!inside) continue;
    float values[kColumns];
    load(values, x + row * row_stride + col);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) own[i] += values[i];
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) sums[threadIdx.x * kColumns + i] = own[i];
  if (lane() == 0) counts[warp()] = taken;
  __syncthreads();
  const int64_t end = min(begin + int64_t{kWarp} * kColumns, partials.cols);
  for (int64_t i = threadIdx.x; begin + i < end; i += kThreads) {
    float sum = 0;
#pragma unroll
    for (unsigned w = 0; w < kWarps; ++w) sum += sums[w * kWarp * kColumns + i];
    partials.sums[blockIdx.y * partials.cols + begin + i] = sum;
  }
  if (threadIdx.x == 0) {
    unsigned count = 0;
#pragma unroll
    for (unsigned w = 0; w < kWarps; ++w) count += counts[w];
    partials.counts[blockIdx.x * partials.row_blocks + blockIdx.y] = static_cast<float>(count);
  }
  arrive_and_fold(update, partials, blockIdx.x, begin, end, counts + kWarps);
}

template <typename T, int kColumns>
Status sum_columns(const Matrix& x, const EmaUpdate& update, float* floats, unsigned* counters, void* stream) {
  const int64_t blocks = row_blocks(x.rows), strips = ceil_div(x.cols, strip_width(kColumns));
  const Launch with{dim3(static_cast<unsigned>(strips), static_cast<unsigned>(blocks)), kThreads,
                    (kThreads * kColumns + kWarps + 1) * sizeof(float)};
  return launch("update_ema", shape(x), sum_and_fold<T, kColumns>, with, stream, elements<T>(x), x.rows, x.row_stride,
                rows_of_block(x.rows), update, Partials::in(floats, counters, blocks, x.cols));
}

__global__ void fold(float* ema, int64_t* num_updates, const float* feature_sum, int64_t dim, float momentum) {
  const float count = feature_sum[dim];
  if (count == 0) return;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < dim) ema[i] = momentum * ema[i] + feature_sum[i] / count;
  if (i == 0 && num_updates) ++*num_updates;
}

}  // namespace

Scratch update_ema_scratch(const Matrix& x) {
  const int64_t each = aligned(x) ? kAccess / element_size(x.dtype) : 1;
  return Partials::scratch(row_blocks(x.rows), x.cols, ceil_div(x.cols, strip_width(each)));
}

Status update_ema(const Matrix& x, const EmaUpdate& update, float* floats, unsigned* counters, void* stream) {
  Check check("cuda::update_ema");
  check.matrix(x, "x").that(update.asked(), "there is nowhere to write to");
  check.that(x.rows > 0 || !update.feature_sum, "the sum of no rows needs no kernel: fill it with zeros");
  if (!check.status().ok() || x.rows == 0 || x.cols == 0) return check.status();
  return with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    return aligned(x) ? sum_columns<T, kAccess / sizeof(T)>(x, update, floats, counters, stream)
                      : sum_columns<T, 1>(x, update, floats, counters, stream);
  });
}

Status fold_ema(float* ema, int64_t* num_updates, const float* feature_sum, int64_t dim, float momentum, void* stream) {
  if (dim == 0) return {};
  const Launch with{dim3(static_cast<unsigned>(ceil_div(dim, int64_t{kThreads}))), kThreads};
  return launch("fold_ema", "[" + std::to_string(dim) + "]", fold, with, stream, ema, num_updates, feature_sum, dim,
                momentum);
}

}  // namespace tde::cuda
