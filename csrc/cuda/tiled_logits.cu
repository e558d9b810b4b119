// Grouped logits in one pass on tensor cores. Norms and projections are accumulated from the very tiles that are
// multiplied, head by head; each head's product is scaled in float32 before it is added to the sum over heads.
#include "check.h"
#include "cuda/tiled_logits.cuh"

namespace tde::cuda {
namespace {

constexpr int kClasses = 64;                      // of a tile; its rows are a template's
constexpr int kWarpRows = 32, kWarpClasses = 32;  // of a warp's share of it
constexpr int kStages = 3;                        // tiles on their way or at work

// Of a block: whose warps lie side by side over its tile.
template <int kRows>
constexpr int kThreads = kRows / kWarpRows * (kClasses / kWarpClasses) * static_cast<int>(kWarp);

template <typename T, int kRows, bool kDirected>
using Sums = TileSums<T, kRows, kClasses, kThreads<kRows>, kDirected>;

template <typename T, int kRows>
using SideOfTile = Side<T, kRows, kClasses, kThreads<kRows>>;

template <typename T, typename Out, int kRows, bool kDirected>
__global__ void __launch_bounds__(kThreads<kRows>, 1) tiled(TiledProblem problem) {
  constexpr int kTileBytes = (kRows + kClasses) * kTileRowBytes, kM = kWarpRows / 16, kN = kWarpClasses / 8;
  constexpr int kWarpsAcross = kClasses / kWarpClasses;
  unsigned char* tiles = dynamic_shared<unsigned char>();
  Sums<T, kRows, kDirected> sums(problem, *reinterpret_cast<SideOfTile<T, kRows>*>(tiles + kStages * kTileBytes));
  const Matrix &x = problem.features.a, &w = problem.weights.a;
  const int warp_row = static_cast<int>(warp()) / kWarpsAcross * kWarpRows;
  const int warp_col = static_cast<int>(warp()) % kWarpsAcross * kWarpClasses;

  Place ahead;
  const auto fetch = [&](int step) {
    if (step < sums.steps) {
      unsigned char* tile = tiles + step % kStages * kTileBytes;
      const int col = ahead.head * sums.width + ahead.start, inside = sums.width - ahead.start;
      fetch_tile<T, kRows, kThreads<kRows>>(tile, static_cast<const T*>(x.data), x.row_stride, sums.first_row, x.rows,
                                            col, inside);
      fetch_tile<T, kClasses, kThreads<kRows>>(tile + kRows * kTileRowBytes, static_cast<const T*>(w.data),
                                               w.row_stride, sums.first_class, w.rows, col, inside);
      ahead.advance(sums.width, kTileCols<T>);
    }
    close_copy_group();  // an empty one keeps the count of those to wait for
  };
  for (int step = 0; step < kStages - 1; ++step) fetch(step);

  float total[kM][kN][4] = {}, product[kM][kN][4] = {};
  // use(element of total, of product, its row and column in the tile)
  const auto for_each = [&](auto use) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          use(total[m][n][i], product[m][n][i], warp_row + m * 16 + i / 2 * 8 + static_cast<int>(lane()) / 4,
              warp_col + n * 8 + static_cast<int>(lane()) % 4 * 2 + i % 2);
  };
  for (int head = 0, step = 0; head < sums.heads; ++head) {
    for (int start = 0; start < sums.width; start += kTileCols<T>, ++step) {
      wait_for_copy_groups<kStages - 2>();
      __syncthreads();
      fetch(step + kStages - 1);
      unsigned char* x_tile = tiles + step % kStages * kTileBytes;
      unsigned char* w_tile = x_tile + kRows * kTileRowBytes;
      multiply_tiles<T>(product, x_tile, warp_row, w_tile, warp_col);
      sums.add(x_tile, w_tile, step, head, start);
    }
    sums.finish_head(head);
    for_each([&](float& logit, float& of_head, int row, int c) {
      logit += sums.scaled(of_head, row, c);
      of_head = 0;
    });
  }
  for_each([&](float logit, float, int row, int c) { sums.template write<Out>(logit, row, c); });
  sums.finish();
}

template <typename T, typename Out, int kRows>
Status run(const TiledProblem& problem, const std::string& shapes, void* stream) {
  const int64_t rows = problem.features.a.rows, classes = problem.weights.a.rows;
  const Launch with{dim3(static_cast<unsigned>(ceil_div(rows, int64_t{kRows})),
                         static_cast<unsigned>(ceil_div(classes, int64_t{kClasses}))),
                    kThreads<kRows>, kStages * (kRows + kClasses) * kTileRowBytes + sizeof(SideOfTile<T, kRows>)};
  const auto kernel = problem.features.transform.direction ? tiled<T, Out, kRows, true> : tiled<T, Out, kRows, false>;
  return launch("tiled_logits", shapes, kernel, with, stream, problem);
}

int64_t tile_classes(bool hopper) { return hopper ? kHopperClasses : kClasses; }

}  // namespace

Scratch tiled_logits_scratch(int64_t rows, int64_t classes, int64_t dim, bool hopper) {
  if (rows == 0 || classes == 0) return {};
  return Partials::scratch(ceil_div(rows, rows_of_tile(rows, classes, tile_classes(hopper))), dim,
                           ceil_div(classes, tile_classes(hopper)));
}

Status tiled_logits(const Operand& features, const Operand& weights, const LogitsByproducts& by,
                    const EmaUpdate& update, const Matrix& out, bool hopper, float* floats, unsigned* counters,
                    void* stream) {
  const Matrix &x = features.a, &w = weights.a;
  const RowTransform& t = features.transform;
  const std::string shapes = shape(x) + " x " + shape(w);
  Check check("cuda::tiled_logits");
  check.matrix(x, "x").matrix(w, "w").matrix(out, "out").heads(t, x);
  check.that(x.cols == w.cols && x.dtype == w.dtype && t.heads == weights.transform.heads,
             "operands " + shape(x) + " and " + shape(w) + " differ in width, dtype or heads");
  check.that(out.rows == x.rows && out.cols == w.rows, "out has the shape " + shape(out));
  check.that(out.dtype == x.dtype || out.dtype == DType::f32, "out has the operands' dtype or float32");
  check.that(aligned(x, t.heads) && aligned(w, t.heads), "a head of a row does not start on sixteen bytes");
  check.that(reinterpret_cast<uintptr_t>(t.direction) % kAccess == 0, "the direction does not start on sixteen bytes");
  check.that(t.direction || (!t.alpha && !by.x_projections && !by.w_projections), "projections need a direction");
  check.that(ceil_div(w.rows, tile_classes(hopper)) <= kMaxGridY, std::to_string(w.rows) + " classes are too many");
  check.that(!hopper || x.dtype != DType::f32, "wgmma would cut float32 off to tf32, not round it");
  check.that(!hopper || x.rows <= INT32_MAX, std::to_string(x.rows) + " rows are too many");
  if (!check.status().ok() || x.rows == 0 || w.rows == 0) return check.status();
  const int64_t tile_rows = rows_of_tile(x.rows, w.rows, tile_classes(hopper));
  const int64_t row_blocks = update.asked() ? ceil_div(x.rows, tile_rows) : 0;
  const TiledProblem problem{features, weights,       by, update, Partials::in(floats, counters, row_blocks, x.cols),
                             out.data, out.row_stride};
  if (hopper) return hopper_logits(problem, out.dtype, shapes, stream);
  return with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const auto with_out = [&](auto to) {
      using Out = decltype(to);
      return (tile_rows == 128 ? run<T, Out, 128> : run<T, Out, 64>)(problem, shapes, stream);
    };
    return out.dtype == DType::f32 ? with_out(float{}) : with_out(T{});
  });
}

}  // namespace tde::cuda
