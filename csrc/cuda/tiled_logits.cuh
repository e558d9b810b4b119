// What a tile of logits needs beside its product, from the very tiles of operands that are multiplied: the norms and
// projections of its rows, head by head, and the column sums of the EMA.
#pragma once

#include <string>

#include "cuda/ema.cuh"
#include "cuda/launch.h"
#include "cuda/norms.cuh"
#include "cuda/tiles.cuh"
#include "tde/logits.h"

namespace tde::cuda {

struct TiledProblem {
  Operand features, weights;
  LogitsByproducts by;
  EmaUpdate update;
  Partials partials;
  void* out;
  int64_t out_stride;
};

// Tiles follow one another along the columns, and none spans two heads. Columns fit 32 bits, offsets do not.
struct Place {
  int head = 0, start = 0;

  __host__ __device__ __forceinline__ static int steps_of_head(int width, int tile_cols) {
    return (width + tile_cols - 1) / tile_cols;
  }
  __device__ __forceinline__ static int column_of(int step, int heads, int width, int tile_cols) {
    const int each = steps_of_head(width, tile_cols);
    return step >= heads * each ? heads * width : step / each * width + step % each * tile_cols;
  }
  __device__ __forceinline__ void advance(int width, int tile_cols) {
    start += tile_cols;
    if (start < width) return;
    start = 0;
    ++head;
  }
};

// Squares and dot products of a tile's rows with the direction, summed by a few of the threads for each row.
template <typename T, int kRows, int kThreads, bool kDirected>
class RowSums {
 public:
  __device__ __forceinline__ void add(unsigned char* tile, const float* direction, int inside) {
#pragma unroll 4  // all eight at once would take registers that the product needs
    for (int i = 0; i < kChunks / kParts; ++i) {
      const int chunk = part() * (kChunks / kParts) + i;
      float values[kChunkCols<T>];
      load(values, reinterpret_cast<const T*>(chunk_at(tile, row(), chunk)));
#pragma unroll
      for (int e = 0; e < kChunkCols<T>; ++e) squares_ = fmaf(values[e], values[e], squares_);
      if (kDirected && chunk * kChunkCols<T> < inside) {
        float towards[kChunkCols<T>];
        load(towards, direction + chunk * kChunkCols<T>);
#pragma unroll
        for (int e = 0; e < kChunkCols<T>; ++e) along_ = fmaf(values[e], towards[e], along_);
      }
    }
  }

  // The head is over: `parts` [2, kThreads] receives the sums, which start anew.
  __device__ __forceinline__ void leave(float* parts) {
    parts[threadIdx.x] = squares_;
    parts[kThreads + threadIdx.x] = along_;
    squares_ = along_ = 0;
  }

  // Of the row that is this thread's, from what the threads left.
  __device__ __forceinline__ static float sum(const float* parts) {
    float sum = parts[row()];
#pragma unroll
    for (int p = 1; p < kParts; ++p) sum += parts[row() + p * kRows];
    return sum;
  }
  __device__ __forceinline__ static bool owns() { return part() == 0; }
  __device__ __forceinline__ static int row() { return static_cast<int>(threadIdx.x) % kRows; }

 private:
  static constexpr int kParts = kThreads / kRows;
  static_assert(kThreads % kRows == 0 && kChunks % kParts == 0, "the threads of a row share its chunks");
  __device__ __forceinline__ static int part() { return static_cast<int>(threadIdx.x) / kRows; }

  float squares_ = 0, along_ = 0;
};

// The squares of one head of a row again, from memory, where they had left float32's range.
template <typename T>
__device__ __forceinline__ float rescued_norm(const T* a, int width, float scale) {
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < width; ++i) {
    const float scaled = to_float(a[i]) * scale;
    sum = fmaf(scaled, scaled, sum);
  }
  return sqrtf(sum) / scale;
}

// What one thread finds of its row when a head is over: its factor, and its projection with the factor applied.
template <typename T>
__device__ __forceinline__ void finish_row(const Operand& operand, int64_t row, int head, int width, float squares,
                                           float along, bool writes, float* norms, float* projections, float* factor,
                                           float* projection) {
  *factor = *projection = 0;
  if (row >= operand.a.rows) return;
  *factor = row_constant(operand.transform, row);
  if (operand.transform.factor.power != 0) {
    const float scale = rescue_scale(squares);
    const T* first = static_cast<const T*>(operand.a.data) + row * operand.a.row_stride + int64_t{head} * width;
    const float norm = scale == 1 ? sqrtf(squares) : rescued_norm(first, width, scale);
    *factor = norm_factor(operand.transform.factor, norm, *factor);
    if (writes && norms) norms[row * operand.transform.heads + head] = norm;
  }
  *projection = along * *factor;
  if (writes && projections) projections[row * operand.transform.heads + head] = *projection;
}

// Shared memory beside the tiles.
template <typename T, int kRows, int kClasses, int kThreads>
struct Side {
  float x_parts[2 * kThreads], w_parts[2 * kThreads];
  float x_factor[kRows], x_along[kRows], w_factor[kClasses], w_along[kClasses];
  float column_sums[kThreads / kWarp * kTileCols<T>];
  bool taken[kRows];
  unsigned flag;
};

template <typename T, int kRows, int kClasses, int kThreads, bool kDirected>
class TileSums {
 public:
  // Threads are to meet at a barrier before the first tile is added.
  __device__ __forceinline__ TileSums(const TiledProblem& problem, Side<T, kRows, kClasses, kThreads>& side)
      : problem_(problem),
        side_(side),
        heads(static_cast<int>(problem.features.transform.heads)),
        width(static_cast<int>(problem.features.a.cols) / heads),
        steps(heads * Place::steps_of_head(width, kTileCols<T>)),
        first_row(int64_t{blockIdx.x} * kRows),
        first_class(int64_t{blockIdx.y} * kClasses) {
    // the steps whose columns this block sums for the EMA: each tile of classes has its share of them
    const int tiles_of_classes = static_cast<int>(gridDim.y), share = (steps + tiles_of_classes - 1) / tiles_of_classes;
    share_begin_ = min(static_cast<int>(blockIdx.y) * share, steps);
    share_end_ = problem.partials.row_blocks > 0 ? min(share_begin_ + share, steps) : share_begin_;
    const EmaUpdate& update = problem.update;
    for (int row = threadIdx.x; row < kRows; row += kThreads)
      side.taken[row] = first_row + row < problem.features.a.rows && (!update.mask || update.mask[first_row + row]);
  }

  // Takes in the tiles of both operands that begin at column `start` of the head.
  __device__ __forceinline__ void add(unsigned char* x_tile, unsigned char* w_tile, int step, int head, int start) {
    const int col = head * width + start, inside = width - start;
    const float* direction = kDirected ? problem_.features.transform.direction + col : nullptr;
    x_sums_.add(x_tile, direction, inside);
    w_sums_.add(w_tile, direction, inside);
    if (step >= share_begin_ && step < share_end_)
      sum_columns(x_tile, inside, problem_.partials.sums + blockIdx.x * problem_.partials.cols + col);
  }

  // The head is over: what its product is to be scaled by is there for all threads.
  __device__ __forceinline__ void finish_head(int head) {
    const LogitsByproducts& by = problem_.by;
    x_sums_.leave(side_.x_parts);
    w_sums_.leave(side_.w_parts);
    __syncthreads();
    if (x_sums_.owns())
      finish_row<T>(problem_.features, first_row + x_sums_.row(), head, width, x_sums_.sum(side_.x_parts),
                    x_sums_.sum(side_.x_parts + kThreads), blockIdx.y == 0, by.x_norms, by.x_projections,
                    &side_.x_factor[x_sums_.row()], &side_.x_along[x_sums_.row()]);
    if (w_sums_.owns())
      finish_row<T>(problem_.weights, first_class + w_sums_.row(), head, width, w_sums_.sum(side_.w_parts),
                    w_sums_.sum(side_.w_parts + kThreads), blockIdx.x == 0, by.w_norms, by.w_projections,
                    &side_.w_factor[w_sums_.row()], &side_.w_along[w_sums_.row()]);
    __syncthreads();
    alpha_ = kDirected && problem_.features.transform.alpha ? *problem_.features.transform.alpha : 0;
  }

  // The head's part of a logit, from its product.
  __device__ __forceinline__ float scaled(float product, int row, int c) const {
    const float z = product * side_.x_factor[row] * side_.w_factor[c];
    return kDirected ? z - alpha_ * side_.x_along[row] * side_.w_along[c] : z;
  }

  template <typename Out>
  __device__ __forceinline__ void write(float logit, int row, int c) const {
    if (first_row + row < problem_.features.a.rows && first_class + c < problem_.weights.a.rows)
      static_cast<Out*>(problem_.out)[(first_row + row) * problem_.out_stride + first_class + c] =
          from_float<Out>(logit);
  }

  // Leaves the EMA's column sums behind, or folds them.
  __device__ __forceinline__ void finish() {
    if (share_begin_ >= share_end_) return;
    const Partials& partials = problem_.partials;
    if (threadIdx.x == 0) {
      int count = 0;
      for (int row = 0; row < kRows; ++row) count += side_.taken[row];
      partials.counts[blockIdx.y * partials.row_blocks + blockIdx.x] = static_cast<float>(count);
    }
    arrive_and_fold(problem_.update, partials, blockIdx.y, Place::column_of(share_begin_, heads, width, kTileCols<T>),
                    Place::column_of(share_end_, heads, width, kTileCols<T>), &side_.flag);
  }

 private:
  const TiledProblem& problem_;
  Side<T, kRows, kClasses, kThreads>& side_;

 public:
  const int heads, width, steps;
  const int64_t first_row, first_class;

 private:
  // The columns of a tile of features, summed over the rows that the EMA takes in; partial sums go to `to`.
  __device__ __forceinline__ void sum_columns(unsigned char* tile, int inside, float* to) {
    constexpr int kEach = 4 / sizeof(T), kWarps = kThreads / kWarp;  // columns of a lane
    float own[kEach] = {};
    for (int row = warp(); row < kRows; row += kWarps) {
      if (!side_.taken[row]) continue;
      float values[kEach];
      load(values, reinterpret_cast<const T*>(chunk_at(tile, row, lane() / 4)) + lane() % 4 * kEach);
#pragma unroll
      for (int e = 0; e < kEach; ++e) own[e] += values[e];
    }
#pragma unroll
    for (int e = 0; e < kEach; ++e) side_.column_sums[warp() * kTileCols<T> + lane() * kEach + e] = own[e];
    __syncthreads();
    const int col = threadIdx.x;
    if (col < kTileCols<T> && col < inside) {
      float sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += side_.column_sums[w * kTileCols<T> + col];
      to[col] = sum;
    }
    __syncthreads();
  }

  RowSums<T, kRows, kThreads, kDirected> x_sums_;
  RowSums<T, kClasses, kThreads, kDirected> w_sums_;
  float alpha_ = 0;
  int share_begin_, share_end_;
};

// Rows of a tile: the fewer where the larger tile would leave multiprocessors idle.
inline int64_t rows_of_tile(int64_t rows, int64_t classes, int64_t tile_classes) {
  constexpr int64_t kBlocksThatOccupy = 128;
  return ceil_div(rows, int64_t{128}) * ceil_div(classes, tile_classes) >= kBlocksThatOccupy ? 128 : 64;
}

// On Hopper's own instructions, of bfloat16 or float16.
constexpr int64_t kHopperClasses = 128;  // of a tile
Status hopper_logits(const TiledProblem& problem, DType out_dtype, const std::string& shapes, void* stream);

}  // namespace tde::cuda
