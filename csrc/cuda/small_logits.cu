// Logits of small problems, where a step is all launches: in one launch, the EMA included.
#include "cuda/ema.cuh"
#include "cuda/launch.h"
#include "cuda/small_logits.cuh"

namespace tde::cuda {
namespace {

using namespace small;

constexpr int64_t kMostClasses = 1024;  // beyond these, tensor cores are worth their preparation
constexpr int64_t kMostBlocks = 256;    // of rows: what the last one adds up for the EMA is a moment's work

static_assert(kThreads == kOwn / 2 * kOther / 2, "a thread has two rows and two columns of the tile of logits");

int64_t rows_of_block(int64_t rows) { return kOwn * ceil_div(ceil_div(rows, int64_t{kOwn}), kMostBlocks); }

template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads, kResident)
    forward(Operand features, Operand weights, int64_t block_rows, Out* out, int64_t out_stride, EmaUpdate update,
            Partials partials) {
  const RowLayout layout(features.a.cols, features.transform.heads);
  float* x = dynamic_shared<float>();          // [kOwn, stride]
  float* w = x + kOwn * layout.stride();       // [kOther, stride]
  float* sums = w + kOther * layout.stride();  // [D], where this block sums features
  unsigned* flag = reinterpret_cast<unsigned*>(sums + features.a.cols);
  const int64_t first_class = int64_t{blockIdx.x} * kOther;
  const int64_t begin = blockIdx.y * block_rows, end = min(begin + block_rows, features.a.rows);
  const bool summing = blockIdx.x == 0 && partials.row_blocks > 0;

  load_rows(w, kOther, layout, static_cast<const T*>(weights.a.data), weights.a.row_stride, first_class,
            weights.a.rows);
  if (summing)
    for (int col = threadIdx.x; col < features.a.cols; col += kThreads) sums[col] = 0;
  __syncthreads();
  transform_rows(w, kOther, layout, weights.transform, first_class, weights.a.rows);

  for (int64_t first = begin; first < end; first += kOwn) {
    load_rows(x, kOwn, layout, static_cast<const T*>(features.a.data), features.a.row_stride, first, end);
    __syncthreads();
    if (summing) {
      for (int col = threadIdx.x; col < features.a.cols; col += kThreads) {
        const int place = col / layout.width * layout.padded + col % layout.width;
        float sum = 0;
        for (int row = 0; row < kOwn && first + row < end; ++row)
          if (!update.mask || update.mask[first + row]) sum += x[row * layout.stride() + place];
        sums[col] += sum;
      }
      __syncthreads();
    }
    transform_rows(x, kOwn, layout, features.transform, first, end);
    __syncthreads();
    const int row = threadIdx.x / (kOther / 2), col = threadIdx.x % (kOther / 2);
    float z[2][2][4] = {};  // in four chains, which lose less than one
    for (int k = 0; k < layout.cols(); k += 4) {
      float a[2][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load(a[i], x + (row + i * (kOwn / 2)) * layout.stride() + k);
        load(b[i], w + (col + i * (kOther / 2)) * layout.stride() + k);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e)
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < 2; ++j) z[i][j][e] = fmaf(a[i][e], b[j][e], z[i][j][e]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t r = first + row + i * (kOwn / 2), c = first_class + col + j * (kOther / 2);
        const float sum = (z[i][j][0] + z[i][j][1]) + (z[i][j][2] + z[i][j][3]);
        if (r < end && c < weights.a.rows) out[r * out_stride + c] = from_float<Out>(sum);
      }
    __syncthreads();  // before the next tile takes the place of this one
  }

  if (!summing) return;
  for (int col = threadIdx.x; col < features.a.cols; col += kThreads)
    partials.sums[blockIdx.y * partials.cols + col] = sums[col];
  if (threadIdx.x == 0) {
    int64_t count = end - begin;
    if (update.mask)
      for (int64_t r = begin; r < end; ++r) count -= !update.mask[r];
    partials.counts[blockIdx.y] = static_cast<float>(count);
  }
  arrive_and_fold(update, partials, 0, 0, partials.cols, flag);
}

}  // namespace

bool small_logits_fit(int64_t dim, int64_t classes, int64_t heads) {
  return dim > 0 && RowLayout(dim, heads).cols() <= kMostCols && classes > 0 && classes <= kMostClasses;
}

Scratch small_logits_scratch(int64_t rows, int64_t dim) {
  return rows == 0 ? Scratch{} : Partials::scratch(ceil_div(rows, rows_of_block(rows)), dim, 1);
}

Status small_logits(const Operand& features, const Operand& weights, const EmaUpdate& update, const Matrix& out,
                    float* floats, unsigned* counters, void* stream) {
  const Matrix &x = features.a, &w = weights.a;
  Check check = small::check("cuda::small_logits", features, weights, w.rows);
  check.matrix(out, "out").that(out.rows == x.rows && out.cols == w.rows, "out has the shape " + shape(out));
  if (!check.status().ok() || x.rows == 0) return check.status();
  const int64_t block_rows = rows_of_block(x.rows), blocks = ceil_div(x.rows, block_rows);
  const Launch with{
      dim3(static_cast<unsigned>(ceil_div(w.rows, int64_t{kOther})), static_cast<unsigned>(blocks)), kThreads,
      ((kOwn + kOther) * RowLayout(x.cols, features.transform.heads).stride() + x.cols + 1) * sizeof(float)};
  const Partials partials = Partials::in(floats, counters, update.asked() ? blocks : 0, x.cols);
  return with_type(x.dtype, [&](auto type) {
    return with_type(out.dtype, [&](auto to) {
      using T = decltype(type);
      using Out = decltype(to);
      return launch("small_logits", shapes(features, weights), forward<T, Out>, with, stream, features, weights,
                    block_rows, elements<Out>(out), out.row_stride, update, partials);
    });
  });
}

}  // namespace tde::cuda
