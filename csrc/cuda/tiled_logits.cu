// Grouped logits in one pass on tensor cores. Norms and projections are accumulated from the very tiles that are
// multiplied, head by head; each head's product is scaled in float32 before it is added to the sum over heads.
#include "check.h"
#include "cuda/ema.cuh"
#include "cuda/launch.h"
#include "cuda/norms.cuh"
#include "cuda/tiles.cuh"
#include "tde/logits.h"

namespace tde::cuda {
namespace {

constexpr int kClasses = 64;                      // of a tile; its rows are a template's
constexpr int kWarpRows = 32, kWarpClasses = 32;  // of a warp's share of it
constexpr int kStages = 3;                        // tiles on their way or at work
constexpr int64_t kBlocksThatOccupy = 128;

// Of a block: whose warps lie side by side over its tile.
template <int kRows>
constexpr int kThreads = kRows / kWarpRows * (kClasses / kWarpClasses) * static_cast<int>(kWarp);

// Squares and dot products of a tile's rows with the direction, summed by a few of the threads for each row.
template <typename T, int kRows, int kThreads, bool kDirected>
class RowSums {
 public:
  __device__ __forceinline__ void add(unsigned char* tile, const float* direction, int inside) {
#pragma unroll
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
template <int kRows>
struct Side {
  float x_parts[2 * kThreads<kRows>], w_parts[2 * kThreads<kRows>];
  float x_factor[kRows], x_along[kRows], w_factor[kClasses], w_along[kClasses];
  float column_sums[kThreads<kRows> / kWarp * kTileRowBytes / 2];
  bool taken[kRows];
  unsigned flag;
};

// The columns of a tile of features, summed over the rows that the EMA takes in; partial sums go to `to`.
template <typename T, int kRows>
__device__ __forceinline__ void sum_columns(unsigned char* tile, Side<kRows>& side, int inside, float* to) {
  constexpr int kEach = 4 / sizeof(T), kWarps = kThreads<kRows> / kWarp;  // columns of a lane
  float own[kEach] = {};
  for (int row = warp(); row < kRows; row += kWarps) {
    if (!side.taken[row]) continue;
    float values[kEach];
    load(values, reinterpret_cast<const T*>(chunk_at(tile, row, lane() / 4)) + lane() % 4 * kEach);
#pragma unroll
    for (int e = 0; e < kEach; ++e) own[e] += values[e];
  }
#pragma unroll
  for (int e = 0; e < kEach; ++e) side.column_sums[warp() * kTileCols<T> + lane() * kEach + e] = own[e];
  __syncthreads();
  const int col = threadIdx.x;
  if (col < kTileCols<T> && col < inside) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += side.column_sums[w * kTileCols<T> + col];
    to[col] = sum;
  }
  __syncthreads();
}

// Tiles follow one another along the columns, and none spans two heads. Columns fit 32 bits, offsets do not.
struct Place {
  int head = 0, start = 0;

  __host__ __device__ __forceinline__ static int column_of(int step, int heads, int width, int tile_cols) {
    const int each = (width + tile_cols - 1) / tile_cols;
    return step >= heads * each ? heads * width : step / each * width + step % each * tile_cols;
  }
  __device__ __forceinline__ void advance(int width, int tile_cols) {
    start += tile_cols;
    if (start < width) return;
    start = 0;
    ++head;
  }
};

template <typename T, typename Out, int kRows, bool kDirected>
__global__ void __launch_bounds__(kThreads<kRows>, 1)
    tiled(Operand features, Operand weights, LogitsByproducts by, EmaUpdate update, Partials partials, Out* out,
          int64_t out_stride) {
  constexpr int kTileBytes = (kRows + kClasses) * kTileRowBytes, kCols = kTileCols<T>;
  constexpr int kBlockThreads = kThreads<kRows>, kM = kWarpRows / 16, kN = kWarpClasses / 8;
  constexpr int kWarpsAcross = kClasses / kWarpClasses;
  unsigned char* tiles = dynamic_shared<unsigned char>();
  Side<kRows>& side = *reinterpret_cast<Side<kRows>*>(tiles + kStages * kTileBytes);
  const T *x = static_cast<const T*>(features.a.data), *w = static_cast<const T*>(weights.a.data);
  const int heads = static_cast<int>(features.transform.heads), width = static_cast<int>(features.a.cols) / heads;
  const int64_t first_row = int64_t{blockIdx.x} * kRows, first_class = int64_t{blockIdx.y} * kClasses;
  const int steps = heads * ((width + kCols - 1) / kCols);
  const int warp_row = static_cast<int>(warp()) / kWarpsAcross * kWarpRows;
  const int warp_col = static_cast<int>(warp()) % kWarpsAcross * kWarpClasses;

  // the steps whose columns this block sums for the EMA: each tile of classes has its share of them
  const int tiles_of_classes = static_cast<int>(gridDim.y), share = (steps + tiles_of_classes - 1) / tiles_of_classes;
  const int share_begin = min(static_cast<int>(blockIdx.y) * share, steps);
  const int share_end = partials.row_blocks > 0 ? min(share_begin + share, steps) : share_begin;
  for (int row = threadIdx.x; row < kRows; row += kBlockThreads)
    side.taken[row] = first_row + row < features.a.rows && (!update.mask || update.mask[first_row + row]);

  Place ahead;
  const auto fetch = [&](int step) {
    if (step < steps) {
      unsigned char* tile = tiles + step % kStages * kTileBytes;
      const int col = ahead.head * width + ahead.start, inside = width - ahead.start;
      fetch_tile<T, kRows, kBlockThreads>(tile, x, features.a.row_stride, first_row, features.a.rows, col, inside);
      fetch_tile<T, kClasses, kBlockThreads>(tile + kRows * kTileRowBytes, w, weights.a.row_stride, first_class,
                                             weights.a.rows, col, inside);
      ahead.advance(width, kCols);
    }
    close_copy_group();  // an empty one keeps the count of those to wait for
  };
  for (int step = 0; step < kStages - 1; ++step) fetch(step);

  float total[kM][kN][4] = {}, product[kM][kN][4] = {};
  RowSums<T, kRows, kBlockThreads, kDirected> x_sums;
  RowSums<T, kClasses, kBlockThreads, kDirected> w_sums;
  Place now;
  for (int step = 0; step < steps; ++step) {
    wait_for_copy_groups<kStages - 2>();
    __syncthreads();
    fetch(step + kStages - 1);
    unsigned char* x_tile = tiles + step % kStages * kTileBytes;
    unsigned char* w_tile = x_tile + kRows * kTileRowBytes;
    multiply_tiles<T>(product, x_tile, warp_row, w_tile, warp_col);
    const int col = now.head * width + now.start, inside = width - now.start;
    const float* direction = kDirected ? features.transform.direction + col : nullptr;
    x_sums.add(x_tile, direction, inside);
    w_sums.add(w_tile, direction, inside);
    if (step >= share_begin && step < share_end)
      sum_columns<T>(x_tile, side, inside, partials.sums + blockIdx.x * partials.cols + col);
    const int head = now.head;
    now.advance(width, kCols);
    if (now.head == head) continue;

    x_sums.leave(side.x_parts);
    w_sums.leave(side.w_parts);
    __syncthreads();
    if (x_sums.owns())
      finish_row<T>(features, first_row + x_sums.row(), head, width, x_sums.sum(side.x_parts),
                    x_sums.sum(side.x_parts + kBlockThreads), blockIdx.y == 0, by.x_norms, by.x_projections,
                    &side.x_factor[x_sums.row()], &side.x_along[x_sums.row()]);
    if (w_sums.owns())
      finish_row<T>(weights, first_class + w_sums.row(), head, width, w_sums.sum(side.w_parts),
                    w_sums.sum(side.w_parts + kBlockThreads), blockIdx.x == 0, by.w_norms, by.w_projections,
                    &side.w_factor[w_sums.row()], &side.w_along[w_sums.row()]);
    __syncthreads();
    const float alpha = kDirected && features.transform.alpha ? *features.transform.alpha : 0;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = warp_row + m * 16 + i / 2 * 8 + lane() / 4, c = warp_col + n * 8 + lane() % 4 * 2 + i % 2;
          float z = product[m][n][i] * side.x_factor[row] * side.w_factor[c];
          if (kDirected) z -= alpha * side.x_along[row] * side.w_along[c];
          total[m][n][i] += z;
          product[m][n][i] = 0;
        }
  }

#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = first_row + warp_row + m * 16 + i / 2 * 8 + lane() / 4;
        const int64_t c = first_class + warp_col + n * 8 + lane() % 4 * 2 + i % 2;
        if (row < features.a.rows && c < weights.a.rows) out[row * out_stride + c] = from_float<Out>(total[m][n][i]);
      }

  if (share_begin >= share_end) return;
  if (threadIdx.x == 0) {
    int count = 0;
    for (int row = 0; row < kRows; ++row) count += side.taken[row];
    partials.counts[blockIdx.y * partials.row_blocks + blockIdx.x] = static_cast<float>(count);
  }
  arrive_and_fold(update, partials, blockIdx.y, Place::column_of(share_begin, heads, width, kCols),
                  Place::column_of(share_end, heads, width, kCols), &side.flag);
}

int64_t rows_of_tile(int64_t rows, int64_t classes) {
  return ceil_div(rows, int64_t{128}) * ceil_div(classes, int64_t{kClasses}) >= kBlocksThatOccupy ? 128 : 64;
}

template <typename T, typename Out, int kRows>
Status run(const Operand& features, const Operand& weights, const LogitsByproducts& by, const EmaUpdate& update,
           const Matrix& out, float* floats, unsigned* counters, void* stream) {
  const int64_t row_tiles = ceil_div(out.rows, int64_t{kRows}), class_tiles = ceil_div(out.cols, int64_t{kClasses});
  const Launch with{dim3(static_cast<unsigned>(row_tiles), static_cast<unsigned>(class_tiles)), kThreads<kRows>,
                    kStages * (kRows + kClasses) * kTileRowBytes + sizeof(Side<kRows>)};
  const Partials partials = Partials::in(floats, counters, update.asked() ? row_tiles : 0, features.a.cols);
  const auto kernel = features.transform.direction ? tiled<T, Out, kRows, true> : tiled<T, Out, kRows, false>;
  return launch("tiled_logits", shape(features.a) + " x " + shape(weights.a), kernel, with, stream, features, weights,
                by, update, partials, elements<Out>(out), out.row_stride);
}

}  // namespace

Scratch tiled_logits_scratch(int64_t rows, int64_t classes, int64_t dim) {
  if (rows == 0 || classes == 0) return {};
  return Partials::scratch(ceil_div(rows, rows_of_tile(rows, classes)), dim, ceil_div(classes, int64_t{kClasses}));
}

Status tiled_logits(const Operand& features, const Operand& weights, const LogitsByproducts& by,
                    const EmaUpdate& update, const Matrix& out, float* floats, unsigned* counters, void* stream) {
  const Matrix &x = features.a, &w = weights.a;
  const RowTransform& t = features.transform;
  Check check("cuda::tiled_logits");
  check.matrix(x, "x").matrix(w, "w").matrix(out, "out").heads(t, x);
  check.that(x.cols == w.cols && x.dtype == w.dtype && t.heads == weights.transform.heads,
             "operands " + shape(x) + " and " + shape(w) + " differ in width, dtype or heads");
  check.that(out.rows == x.rows && out.cols == w.rows, "out has the shape " + shape(out));
  check.that(out.dtype == x.dtype || out.dtype == DType::f32, "out has the operands' dtype or float32");
  check.that(aligned(x, t.heads) && aligned(w, t.heads), "a head of a row does not start on sixteen bytes");
  check.that(reinterpret_cast<uintptr_t>(t.direction) % kAccess == 0, "the direction does not start on sixteen bytes");
  check.that(t.direction || (!t.alpha && !by.x_projections && !by.w_projections), "projections need a direction");
  check.that(ceil_div(w.rows, int64_t{kClasses}) <= kMaxGridY, std::to_string(w.rows) + " classes are too many");
  if (!check.status().ok() || x.rows == 0 || w.rows == 0) return check.status();
  return with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const auto tile = [&](auto to) {
      using Out = decltype(to);
      const auto kernel = rows_of_tile(x.rows, w.rows) == 128 ? run<T, Out, 128> : run<T, Out, 64>;
      return kernel(features, weights, by, update, out, floats, counters, stream);
    };
    return out.dtype == DType::f32 ? tile(float{}) : tile(T{});
  });
}

}  // namespace tde::cuda
