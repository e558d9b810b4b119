// The EMA update on the device, in a fixed order: blocks of rows are summed into a workspace, then in order of rows.
// No atomics, no host synchronisation; everything runs on the caller's stream.
#include <cuda_bf16.h>

#include "cuda/launch.h"
#include "tde/ema.h"

namespace tde::cuda {
namespace {

constexpr int kThreads = 128;       // columns of a block, one a thread: neighbouring threads read neighbouring columns
constexpr int64_t kBlockRows = 64;  // rows that one block sums; the workspace holds a row of sums for each

__device__ float to_float(float value) { return value; }
__device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Partial sums [blocks, cols + 1]: the last column counts the rows taken in.
template <typename T>
__global__ void sum_blocks(const T* x, int64_t rows, int64_t cols, int64_t row_stride, const bool* mask,
                           float* partial) {
  const int64_t col = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (col > cols) return;
  for (int64_t block = blockIdx.y; block * kBlockRows < rows; block += gridDim.y) {
    const int64_t begin = block * kBlockRows, end = min(begin + kBlockRows, rows);
    float sum = 0;
    for (int64_t r = begin; r < end; ++r) {
      if (mask && !mask[r]) continue;
      sum += col < cols ? to_float(x[r * row_stride + col]) : 1.f;
    }
    partial[block * (cols + 1) + col] = sum;
  }
}

__global__ void sum_partials(const float* partial, int64_t blocks, int64_t cols, float* feature_sum) {
  const int64_t col = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (col > cols) return;
  float sum = 0, lost = 0;  // compensated, so that many blocks cost no precision
  for (int64_t block = 0; block < blocks; ++block) {
    const float term = partial[block * (cols + 1) + col] - lost;
    const float next = sum + term;
    lost = (next - sum) - term;
    sum = next;
  }
  feature_sum[col] = sum;
}

__global__ void fold(float* ema, int64_t* num_updates, const float* feature_sum, int64_t dim, float momentum) {
  const float count = feature_sum[dim];
  if (count == 0) return;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < dim) ema[i] = momentum * ema[i] + feature_sum[i] / count;
  if (i == 0 && num_updates) ++*num_updates;
}

int64_t row_blocks(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

}  // namespace

Status probe() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, fold);
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // the answer is the status; no later launch inherits it
  return {cudaGetErrorString(error)};
}

int64_t feature_sum_workspace(int64_t rows, int64_t cols) { return row_blocks(rows) * (cols + 1); }

Status feature_sum(const Matrix& x, const bool* mask, float* feature_sum, float* workspace, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const unsigned strips = grid_for(x.cols + 1, kThreads);
  const int64_t blocks = row_blocks(x.rows);
  if (blocks > 0) {
    const dim3 grid(strips, static_cast<unsigned>(std::min<int64_t>(blocks, kMaxGridY)));
    if (x.dtype == DType::f32)
      sum_blocks<<<grid, kThreads, 0, on>>>(static_cast<const float*>(x.data), x.rows, x.cols, x.row_stride, mask,
                                            workspace);
    else
      sum_blocks<<<grid, kThreads, 0, on>>>(static_cast<const __nv_bfloat16*>(x.data), x.rows, x.cols, x.row_stride,
                                            mask, workspace);
  }
  if (Status status = launched("feature_sum", x.rows, x.cols); !status.ok()) return status;
  sum_partials<<<strips, kThreads, 0, on>>>(workspace, blocks, x.cols, feature_sum);
  return launched("feature_sum", x.rows, x.cols);
}

Status fold_ema(float* ema, int64_t* num_updates, const float* feature_sum, int64_t dim, float momentum, void* stream) {
  if (dim == 0) return {};
  fold<<<grid_for(dim, kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(ema, num_updates, feature_sum, dim,
                                                                                    momentum);
  return launched("fold_ema", 1, dim);
}

}  // namespace tde::cuda
