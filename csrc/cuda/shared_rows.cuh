// Rows of an operand in shared memory, as float32: loaded whole, then scaled in place as tde/rows.h has it.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/norms.cuh"
#include "tde/rows.h"

namespace tde::cuda {

// How a row lies there: every head starts on sixteen bytes and ends in zeros; rows are apart so that threads which read
// the same column of neighbouring rows meet no bank twice.
struct RowLayout {
  int heads, width, padded;

  __host__ __device__ __forceinline__ explicit RowLayout(int64_t cols, int64_t num_heads)
      : heads(static_cast<int>(num_heads)), width(static_cast<int>(cols / num_heads)), padded((width + 3) / 4 * 4) {}
  __host__ __device__ __forceinline__ int cols() const { return heads * padded; }
  __host__ __device__ __forceinline__ int stride() const { return cols() + 4; }
};

// Calls use(row of the tile, column of the matrix, place in the tile) for every element, neighbours by neighbours.
template <typename Use>
__device__ __forceinline__ void for_each_element(const RowLayout& layout, int tile_rows, Use use) {
  for (int row = warp(); row < tile_rows; row += blockDim.x / kWarp)
    for (int k = 0; k < layout.heads; ++k)
      for (int i = lane(); i < layout.padded; i += kWarp)
        use(row, i < layout.width ? k * layout.width + i : -1, row * layout.stride() + k * layout.padded + i);
}

// Rows [first, first + tile_rows) of `a`; zeros where there is no row.
template <typename T>
__device__ __forceinline__ void load_rows(float* tile, int tile_rows, const RowLayout& layout, const T* a,
                                          int64_t row_stride, int64_t first, int64_t rows) {
  for_each_element(layout, tile_rows, [&](int row, int col, int place) {
    tile[place] = col >= 0 && first + row < rows ? to_float(a[(first + row) * row_stride + col]) : 0.f;
  });
}

// add(sum, i) for every i, in chains of which each has a share: they lose less than one would, and wait less.
template <typename Add>
__device__ __forceinline__ float sum_in_chains(int width, Add add) {
  float sums[4] = {};
  int i = 0;
  for (; i + 4 <= width; i += 4)
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[e] = add(sums[e], i + e);
  for (; i < width; ++i) sums[0] = add(sums[0], i);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// One head of a row in shared memory, worked on by one thread.
struct SharedHead {
  float* a;
  int width;

  __device__ __forceinline__ float sum_of_squares(float scale) const {
    return sum_in_chains(width, [&](float sum, int i) { return fmaf(a[i] * scale, a[i] * scale, sum); });
  }
  __device__ __forceinline__ float norm() const {
    const float squares = sum_of_squares(1), scale = rescue_scale(squares);
    return scale == 1 ? sqrtf(squares) : sqrtf(sum_of_squares(scale)) / scale;
  }
  __device__ __forceinline__ float dot(const float* b) const {
    return sum_in_chains(width, [&](float sum, int i) { return fmaf(a[i], b[i], sum); });
  }
};

// Calls use(row of the tile, head) with a thread for each; no thread has more than its share.
template <typename Use>
__device__ __forceinline__ void for_each_head(const RowLayout& layout, int tile_rows, Use use) {
  for (int item = threadIdx.x; item < tile_rows * layout.heads; item += blockDim.x)
    use(item % tile_rows, item / tile_rows);
}

// a^k becomes c f(|a^k|) (a^k - alpha <a^k, u^k> u^k).
__device__ __forceinline__ void transform_rows(float* tile, int tile_rows, const RowLayout& layout,
                                               const RowTransform& transform, int64_t first, int64_t rows) {
  for_each_head(layout, tile_rows, [&](int row, int k) {
    if (first + row >= rows) return;
    const SharedHead head{tile + row * layout.stride() + k * layout.padded, layout.width};
    const float norm = transform.factor.power == 0 ? 0.f : head.norm();
    const float factor = norm_factor(transform.factor, norm, row_constant(transform, first + row));
    if (transform.alpha) {
      const float* direction = transform.direction + int64_t{k} * layout.width;
      const float shift = *transform.alpha * head.dot(direction);
      for (int i = 0; i < head.width; ++i) head.a[i] -= shift * direction[i];
    }
    for (int i = 0; i < head.width; ++i) head.a[i] *= factor;
  });
}

}  // namespace tde::cuda
