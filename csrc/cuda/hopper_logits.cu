// Grouped logits in one pass, as in tiled_logits.cu, on Hopper's own instructions: the copy engine fetches the tiles,
// and while a warpgroup's product runs on, its threads sum the squares of the same tiles.
#include "cuda/hopper.cuh"
#include "cuda/tiled_logits.cuh"

namespace tde::cuda {

#ifdef TDE_EMULATED
Status describe(const Matrix& a, int64_t heads, int box_rows, TensorMap* map) {
  const int64_t size = element_size(a.dtype), width = a.cols / heads;
  *map = {static_cast<const unsigned char*>(a.data),
          size,
          {width, heads, a.rows},
          {size, width * size, a.row_stride * size},
          {kTileRowBytes / size, 1, box_rows}};
  return {};
}
#else
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver is not linked against: a machine without one can load this binary.
Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
}

}  // namespace

Status describe(const Matrix& a, int64_t heads, int box_rows, TensorMap* map) {
  static const Encode encode = find_encode();
  if (!encode) return {"the driver does not know cuTensorMapEncodeTiled"};
  const int64_t size = element_size(a.dtype), width = a.cols / heads;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(heads),
                              static_cast<cuuint64_t>(a.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(width * size), static_cast<cuuint64_t>(a.row_stride * size)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(kTileRowBytes / size), 1, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t every[] = {1, 1, 1};
  const CUresult result =
      encode(map, a.dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, a.data,
             sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return {};
  return {"cuTensorMapEncodeTiled refuses the matrix with error " + std::to_string(result)};
}
#endif

namespace {

constexpr int kClasses = static_cast<int>(kHopperClasses);
constexpr int kStages = 4;                     // tiles on their way or at work
constexpr size_t kSharedOfHopper = 227 << 10;  // of a block, at most
constexpr size_t kTileAlignment = 1024;        // the permutation goes by the address

// Of a block: a warpgroup for every 64 rows.
template <int kRows>
constexpr int kThreads = kRows / 64 * kWarpgroup;

template <typename T, int kRows, bool kDirected>
using Sums = TileSums<T, kRows, kClasses, kThreads<kRows>, kDirected>;

template <typename T, int kRows>
struct Shared {
  alignas(kTileAlignment) unsigned char tiles[kStages][(kRows + kClasses) * kTileRowBytes];
  Side<T, kRows, kClasses, kThreads<kRows>> side;
  Barrier full[kStages];
};

template <typename T, typename Out, int kRows, bool kDirected>
__global__ void __launch_bounds__(kThreads<kRows>, 1)
    hopper(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, TiledProblem problem) {
#ifdef TDE_HOPPER
  Shared<T, kRows>& shared = *dynamic_shared<Shared<T, kRows>>();
  Sums<T, kRows, kDirected> sums(problem, shared.side);
  const int first_of_warp = static_cast<int>(warp()) * 16 + static_cast<int>(lane()) / 4;
  const bool fetches = threadIdx.x == 0;

  Place ahead;
  const auto fetch = [&](int step) {
    if (!fetches || step >= sums.steps) return;
    unsigned char* tile = shared.tiles[step % kStages];
    Barrier& full = shared.full[step % kStages];
    full.expect(sizeof(shared.tiles[0]));
    fetch_box(tile, x_map, full, ahead.start, ahead.head, static_cast<int>(sums.first_row));
    fetch_box(tile + kRows * kTileRowBytes, w_map, full, ahead.start, ahead.head, static_cast<int>(sums.first_class));
    ahead.advance(sums.width, kTileCols<T>);
  };
  if (fetches)
    for (Barrier& full : shared.full) full.init();
  __syncthreads();
  for (int step = 0; step < kStages - 1; ++step) fetch(step);

  WarpgroupProduct total = {}, product = {};
  // use(element of total, of product, its row and column in the tile)
  const auto for_each = [&](auto use) {
#pragma unroll
    for (int n = 0; n < 16; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        use(total[n][i], product[n][i], first_of_warp + i / 2 * 8, n * 8 + static_cast<int>(lane()) % 4 * 2 + i % 2);
  };
  for (int head = 0, step = 0; head < sums.heads; ++head) {
    for (int start = 0; start < sums.width; start += kTileCols<T>, ++step) {
      shared.full[step % kStages].wait(step / kStages % 2);
      unsigned char* x_tile = shared.tiles[step % kStages];
      unsigned char* w_tile = x_tile + kRows * kTileRowBytes;
      const uint64_t x = describe_tile(x_tile + threadIdx.x / kWarpgroup * 64 * kTileRowBytes);
      const uint64_t w = describe_tile(w_tile);
      open_product_group();
#pragma unroll
      for (int k = 0; k < kTileRowBytes / 32; ++k) multiply_later<T>(product, x + k * 2, w + k * 2, start > 0 || k > 0);
      close_product_group();
      sums.add(x_tile, w_tile, step, head, start);
      wait_for_all_products_but_one();
      __syncthreads();  // nobody reads the tiles of the step before any more
      fetch(step + kStages - 1);
    }
    wait_for_products(product);
    sums.finish_head(head);
    for_each([&](float& logit, float of_head, int row, int c) { logit += sums.scaled(of_head, row, c); });
  }
  for_each([&](float logit, float, int row, int c) { sums.template write<Out>(logit, row, c); });
  sums.finish();
#else
  __trap();
#endif
}

template <typename T, typename Out, int kRows>
Status run(const TiledProblem& problem, const std::string& shapes, void* stream) {
  const Matrix &x = problem.features.a, &w = problem.weights.a;
  const int64_t heads = problem.features.transform.heads;
  TensorMap x_map, w_map;
  for (Status status : {describe(x, heads, kRows, &x_map), describe(w, heads, kClasses, &w_map)})
    if (!status.ok()) return {"cuda::hopper_logits on " + shapes + ": " + status.error};
  const Launch with{dim3(static_cast<unsigned>(ceil_div(x.rows, int64_t{kRows})),
                         static_cast<unsigned>(ceil_div(w.rows, kHopperClasses))),
                    kThreads<kRows>, sizeof(Shared<T, kRows>), kSharedOfHopper};
  const auto kernel = problem.features.transform.direction ? hopper<T, Out, kRows, true> : hopper<T, Out, kRows, false>;
  return launch("hopper_logits", shapes, kernel, with, stream, x_map, w_map, problem);
}

}  // namespace

Status hopper_logits(const TiledProblem& problem, DType out_dtype, const std::string& shapes, void* stream) {
  const int64_t rows = problem.features.a.rows, classes = problem.weights.a.rows;
  const auto with_types = [&](auto type, auto to) {
    using T = decltype(type);
    using Out = decltype(to);
    const bool tall = rows_of_tile(rows, classes, kHopperClasses) == 128;
    return (tall ? run<T, Out, 128> : run<T, Out, 64>)(problem, shapes, stream);
  };
  const auto with_operands = [&](auto type) {
    return out_dtype == DType::f32 ? with_types(type, float{}) : with_types(type, type);
  };
  return problem.features.a.dtype == DType::f16 ? with_operands(__half{}) : with_operands(__nv_bfloat16{});
}

}  // namespace tde::cuda
