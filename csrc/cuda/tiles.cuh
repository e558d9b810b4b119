// Tiles of rows in shared memory, 128 bytes of each, fetched while the tiles before them are worked on.
#pragma once

#include "cuda/ptx.cuh"

namespace tde::cuda {

constexpr int kTileRowBytes = 128, kChunks = kTileRowBytes / kAccess;

template <typename T>
constexpr int kTileCols = kTileRowBytes / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kChunkCols = kAccess / static_cast<int>(sizeof(T));

// Where a chunk of sixteen bytes lies: rows permute theirs, so that eight rows' same chunk fills all banks.
__device__ __forceinline__ unsigned char* chunk_at(unsigned char* tile, int row, int chunk) {
  return tile + row * kTileRowBytes + ((chunk ^ (row % kChunks)) * kAccess);
}

// Begins to copy columns [col, col + inside) of rows [first, first + kRows), with zeros where `a` has none.
template <typename T, int kRows, int kThreads>
__device__ __forceinline__ void fetch_tile(unsigned char* tile, const T* a, int64_t row_stride, int64_t first,
                                           int64_t rows, int col, int inside) {
#pragma unroll
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int item = i * kThreads + static_cast<int>(threadIdx.x), row = item / kChunks, chunk = item % kChunks;
    const bool exists = first + row < rows && chunk * kChunkCols<T> < inside;
    const T* from = exists ? a + (first + row) * row_stride + col + chunk * kChunkCols<T> : a;
    copy_async(chunk_at(tile, row, chunk), from, exists);
  }
}

// product += x w^T for a warp's share: kM times 16 rows of x from `x_row`, kN times 8 rows of w from `w_row`.
template <typename T, int kM, int kN>
__device__ __forceinline__ void multiply_tiles(float (&product)[kM][kN][4], unsigned char* x, int x_row,
                                               unsigned char* w, int w_row) {
  static_assert(kN % 2 == 0, "two column tiles of w are loaded at once");
#pragma unroll
  for (int k = 0; k < kChunks; k += 2) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      load_matrices(a[m], chunk_at(x, x_row + m * 16 + lane() % 16, k + lane() / 16));
      round_operand<T>(a[m]);
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t both[4];
      load_matrices(both, chunk_at(w, w_row + n * 8 + lane() % 8 + lane() / 16 * 8, k + lane() / 8 % 2));
      round_operand<T>(both);
      const uint32_t b[2][2] = {{both[0], both[1]}, {both[2], both[3]}};
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply<T>(product[m][n], a[m], b[0]);
        multiply<T>(product[m][n + 1], a[m], b[1]);
      }
    }
  }
}

}  // namespace tde::cuda
