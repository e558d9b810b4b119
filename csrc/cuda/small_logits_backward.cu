// The gradient of either operand of a small problem, in one launch: a product over the other's rows, then the
// projection of its result, which lies in shared memory.
#include "cuda/arrive.cuh"
#include "cuda/launch.h"
#include "cuda/small_logits.cuh"

namespace tde::cuda {
namespace {

using namespace small;

constexpr int64_t kBlocksThatOccupy = 128;  // a device, about

// The sum over the other operand's rows is split, so that the blocks occupy a device; the last one of a tile adds up.
struct Split {
  int64_t rows_each;
  int64_t number;

  static Split of(int64_t own_rows, int64_t other_rows) {
    const int64_t tiles = ceil_div(own_rows, int64_t{kOwn}), steps = ceil_div(other_rows, int64_t{kOther});
    const int64_t wanted = std::max<int64_t>(1, kBlocksThatOccupy / std::max<int64_t>(tiles, 1));
    const int64_t steps_each = std::max<int64_t>(1, ceil_div(steps, wanted));
    return {steps_each * kOther, std::max<int64_t>(1, ceil_div(steps, steps_each))};
  }
};

// Four neighbouring columns are one thread's, in every few rows of the tile.
struct Share {
  int col, row, rows_apart;

  __device__ __forceinline__ explicit Share(int cols) {
    int groups = 8;  // of threads side by side: a power of two that covers the columns
    while (groups * 4 < cols) groups *= 2;
    col = static_cast<int>(threadIdx.x) % groups * 4;
    row = static_cast<int>(threadIdx.x) / groups;
    rows_apart = kThreads / groups;
  }
};
constexpr int kRowsOfThread = kOwn * kMostCols / 4 / kThreads;

template <typename T>
__global__ void __launch_bounds__(kThreads, kResident)
    gradient(Operand own, Operand other, const T* grad, int64_t grad_row, int64_t grad_col, Split split, T* out,
             int64_t out_stride, float* grad_divisor, float* partials, unsigned* arrivals) {
  const RowLayout layout(own.a.cols, own.transform.heads);
  float* a = dynamic_shared<float>();       // [kOwn, stride]
  float* b = a + kOwn * layout.stride();    // [kOther, stride]; then v [kOwn, stride]
  float* g = b + kOther * layout.stride();  // [kOwn, kOther]; then shares of the divisor's gradient [kOwn, heads]
  unsigned* flag = reinterpret_cast<unsigned*>(g + kOwn * (kOther > layout.heads ? kOther : layout.heads));
  const int64_t first = int64_t{blockIdx.x} * kOwn;
  const int64_t begin = blockIdx.y * split.rows_each, end = min(begin + split.rows_each, other.a.rows);
  const Share share(layout.cols());

  float v[kRowsOfThread][4] = {};
  for (int64_t step = begin; step < end; step += kOther) {
    load_rows(b, kOther, layout, static_cast<const T*>(other.a.data), other.a.row_stride, step, end);
    for (int i = threadIdx.x; i < kOwn * kOther; i += kThreads) {
      const int64_t r = first + i / kOther, c = step + i % kOther;
      g[i] = r < own.a.rows && c < end ? to_float(grad[r * grad_row + c * grad_col]) : 0.f;
    }
    __syncthreads();
    transform_rows(b, kOther, layout, other.transform, step, end);
    __syncthreads();
    if (share.col < layout.cols()) {
      for (int c = 0; c < kOther; ++c) {
        float hat[4];
        load(hat, b + c * layout.stride() + share.col);
#pragma unroll
        for (int j = 0; j < kRowsOfThread; ++j) {
          const int row = share.row + j * share.rows_apart;
          if (row >= kOwn) break;
#pragma unroll
          for (int e = 0; e < 4; ++e) v[j][e] = fmaf(g[row * kOther + c], hat[e], v[j][e]);
        }
      }
    }
    __syncthreads();
  }

  const int64_t tile = int64_t{kOwn} * layout.cols();  // of partial sums
  if (split.number > 1) {
    float* mine = partials + (int64_t{blockIdx.x} * split.number + blockIdx.y) * tile;
#pragma unroll
    for (int j = 0; j < kRowsOfThread; ++j) {
      const int row = share.row + j * share.rows_apart;
      if (row < kOwn && share.col < layout.cols()) store(mine + row * layout.cols() + share.col, v[j]);
    }
    if (!arrives_last(arrivals + blockIdx.x, split.number, flag)) return;
    const float* all = partials + int64_t{blockIdx.x} * split.number * tile;
    for (int i = threadIdx.x; i < tile; i += kThreads)
      b[i / layout.cols() * layout.stride() + i % layout.cols()] = sum_of(all + i, split.number, tile);
  } else {
#pragma unroll
    for (int j = 0; j < kRowsOfThread; ++j) {
      const int row = share.row + j * share.rows_apart;
      if (row < kOwn && share.col < layout.cols()) store(b + row * layout.stride() + share.col, v[j]);
    }
  }
  load_rows(a, kOwn, layout, static_cast<const T*>(own.a.data), own.a.row_stride, first, own.a.rows);
  __syncthreads();

  const RowTransform& t = own.transform;
  for_each_head(layout, kOwn, [&](int row, int k) {
    if (first + row >= own.a.rows) return;
    const int at = row * layout.stride() + k * layout.padded;
    const SharedHead head{a + at, layout.width}, upstream{b + at, layout.width};
    float along = head.dot(upstream.a);
    if (t.alpha) {
      const float* direction = t.direction + int64_t{k} * layout.width;
      const float shift = *t.alpha * upstream.dot(direction);
      along -= shift * head.dot(direction);
      for (int i = 0; i < layout.width; ++i) upstream.a[i] -= shift * direction[i];
    }
    const float norm = t.factor.power == 0 ? 0.f : head.norm();
    const Tangent tangent(t.factor, norm, row_constant(t, first + row), along);
    for (int i = 0; i < layout.width; ++i) upstream.a[i] = tangent(upstream.a[i], head.a[i]);
    g[row * layout.heads + k] = along * tangent.push;
  });
  __syncthreads();
  for_each_element(layout, kOwn, [&](int row, int col, int place) {
    if (col >= 0 && first + row < own.a.rows) out[(first + row) * out_stride + col] = from_float<T>(b[place]);
  });
  if (!grad_divisor || threadIdx.x >= kOwn || first + threadIdx.x >= own.a.rows) return;
  float along_row = 0;
  for (int k = 0; k < layout.heads; ++k) along_row += g[threadIdx.x * layout.heads + k];
  grad_divisor[first + threadIdx.x] = -along_row / t.divisor[first + threadIdx.x];
}

}  // namespace

Scratch small_logits_backward_scratch(int64_t own_rows, int64_t other_rows, int64_t dim, int64_t heads) {
  const Split split = Split::of(own_rows, other_rows);
  if (split.number == 1) return {};
  const int64_t tiles = ceil_div(own_rows, int64_t{kOwn});
  return {tiles * split.number * kOwn * RowLayout(dim, heads).cols(), tiles};
}

Status small_logits_backward(const Operand& own, const Operand& other, const Matrix& grad, int64_t grad_col_stride,
                             const Matrix& grad_own, float* grad_divisor, float* floats, unsigned* counters,
                             void* stream) {
  Check check = small::check("cuda::small_logits_backward", own, other, std::min(own.a.rows, other.a.rows));
  check.matrix(grad, "grad")
      .that(grad.rows == own.a.rows && grad.cols == other.a.rows, "grad has the shape " + shape(grad));
  check.matrix(grad_own, "grad_own").same_shape(grad_own, own.a, "grad_own and own");
  check.that(grad.dtype == own.a.dtype && grad_own.dtype == own.a.dtype, "gradients have the operands' dtype");
  check.that(own.transform.divisor || !grad_divisor, "there is no divisor to take the gradient of");
  if (!check.status().ok() || own.a.rows == 0) return check.status();
  const RowLayout layout(own.a.cols, own.transform.heads);
  const Split split = Split::of(own.a.rows, other.a.rows);
  const Launch with{
      dim3(static_cast<unsigned>(ceil_div(own.a.rows, int64_t{kOwn})), static_cast<unsigned>(split.number)), kThreads,
      ((kOwn + kOther) * layout.stride() + kOwn * std::max(kOther, layout.heads) + 1) * sizeof(float)};
  return with_type(own.a.dtype, [&](auto type) {
    using T = decltype(type);
    return launch("small_logits_backward", shapes(own, other), gradient<T>, with, stream, own, other, elements<T>(grad),
                  grad.row_stride, grad_col_stride, split, elements<T>(grad_own), grad_own.row_stride, grad_divisor,
                  floats, counters);
  });
}

}  // namespace tde::cuda
