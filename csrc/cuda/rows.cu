// The two passes around a library's product: scaled rows before it, their gradient after it. A warp takes a row, head
// by head; a head is read from memory once, sixteen bytes at a time, and kept in registers as far as it fits there.
#include <initializer_list>

#include "check.h"
#include "cuda/elements.cuh"
#include "cuda/launch.h"
#include "cuda/norms.cuh"
#include "tde/rows.h"

namespace tde::cuda {
namespace {

constexpr unsigned kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kResident =
    4;                    // blocks on a multiprocessor at least: leaves the compiler registers enough for all it keeps
constexpr int kKept = 4;  // accesses of a head that a lane keeps; a wider head's rest is read again, from the cache

// One head of a row: N neighbouring elements an access, a lane's accesses a warp's width apart.
template <typename T, int N>
class Head {
 public:
  __device__ __forceinline__ Head(const T* first, int64_t width) : first_(first) {
#pragma unroll
    for (int i = 0; i < kKept; ++i)
      if (column(i) < width) kept_[i] = *reinterpret_cast<const Vector<T, N>*>(first + column(i));
  }

  __device__ __forceinline__ static int64_t column(int64_t access) { return (access * kWarp + lane()) * N; }

  // Access i; the loops below know at compile time whether it is one of the kept.
  __device__ __forceinline__ void get(float (&to)[N], int i) const {
#pragma unroll
    for (int e = 0; e < N; ++e) to[e] = to_float(kept_[i].at[e]);
  }
  __device__ __forceinline__ void read(float (&to)[N], int64_t i) const { load(to, first_ + column(i)); }

 private:
  const T* first_;
  Vector<T, N> kept_[kKept];
};

// Calls use(values of each head..., column) for all of a lane's accesses.
template <int N, typename Use, typename... Heads>
__device__ __forceinline__ void for_each(int64_t width, Use use, const Heads&... heads) {
  auto access = [&](auto fetch, int64_t column) {
    float values[sizeof...(Heads)][N];
    int h = 0;
    (fetch(heads, values[h++]), ...);
    use(values, column);
  };
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int64_t column = (int64_t{i} * kWarp + lane()) * N;
    if (column < width) access([i](const auto& head, float (&to)[N]) { head.get(to, i); }, column);
  }
#pragma unroll 1
  for (int64_t i = kKept; (i * kWarp + lane()) * N < width; ++i)
    access([i](const auto& head, float (&to)[N]) { head.read(to, i); }, (i * kWarp + lane()) * N);
}

template <int N>
__device__ __forceinline__ float dot(const float (&a)[N], const float (&b)[N]) {
  float sum = 0;
#pragma unroll
  for (int e = 0; e < N; ++e) sum = fmaf(a[e], b[e], sum);
  return sum;
}

template <int N, typename T>
__device__ __forceinline__ float sum_of_squares(const Head<T, N>& head, int64_t width, float scale) {
  float sum = 0;
  for_each<N>(
      width,
      [&](float (&a)[1][N], int64_t) {
#pragma unroll
        for (int e = 0; e < N; ++e) {
          const float scaled = a[0][e] * scale;
          sum = fmaf(scaled, scaled, sum);
        }
      },
      head);
  return warp_sum(sum);
}

template <typename In, typename Out, int N>
__global__ void __launch_bounds__(kThreads, kResident)
    normalize(const In* a, int64_t a_stride, Out* out, int64_t out_stride, int64_t rows, int64_t width,
              RowTransform transform, float* norms, float* projections) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + warp();
  if (row >= rows) return;  // a whole warp
  const float constant = row_constant(transform, row);
  for (int64_t k = 0; k < transform.heads; ++k) {
    const Head<In, N> head(a + row * a_stride + k * width, width);
    const float* direction = transform.direction ? transform.direction + k * width : nullptr;
    float squares = sum_of_squares<N>(head, width, 1), along = 0;
    if (direction) {
      for_each<N>(
          width,
          [&](float (&x)[1][N], int64_t column) {
            float u[N];
            load(u, direction + column);
            along += dot(x[0], u);
          },
          head);
      along = warp_sum(along);
    }
    const float scale = rescue_scale(squares);
    if (scale != 1) squares = sum_of_squares<N>(head, width, scale);
    const float norm = sqrtf(squares) / scale, factor = norm_factor(transform.factor, norm, constant);
    if (lane() == 0) {
      if (norms) norms[row * transform.heads + k] = norm;
      if (projections) projections[row * transform.heads + k] = factor * along;
    }
    const float shift = transform.alpha ? *transform.alpha * along : 0;
    Out* to = out + row * out_stride + k * width;
    for_each<N>(
        width,
        [&](float (&x)[1][N], int64_t column) {
          if (transform.alpha) {
            float u[N];
            load(u, direction + column);
#pragma unroll
            for (int e = 0; e < N; ++e) x[0][e] -= shift * u[e];
          }
#pragma unroll
          for (int e = 0; e < N; ++e) x[0][e] *= factor;
          store(to + column, x[0]);
        },
        head);
  }
}

// With P = I - alpha u u^T, symmetric: v = P g is the gradient of f(|a|) a, and <v, a> = <g, a> - alpha <g, u> <a, u>.
template <typename G, typename In, int N>
__global__ void __launch_bounds__(kThreads, kResident)
    project(const G* grad, int64_t grad_stride, const In* a, int64_t a_stride, In* out, int64_t out_stride,
            int64_t rows, int64_t width, const float* norms, RowTransform transform, float* grad_divisor) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + warp();
  if (row >= rows) return;  // a whole warp
  const float constant = row_constant(transform, row);
  float along_row = 0;
  for (int64_t k = 0; k < transform.heads; ++k) {
    const Head<G, N> g(grad + row * grad_stride + k * width, width);
    const Head<In, N> head(a + row * a_stride + k * width, width);
    const float* direction = transform.alpha ? transform.direction + k * width : nullptr;
    float along = 0, g_along = 0, a_along = 0;
    for_each<N>(
        width,
        [&](float (&both)[2][N], int64_t column) {
          along += dot(both[0], both[1]);
          if (!direction) return;
          float u[N];
          load(u, direction + column);
          g_along += dot(both[0], u);
          a_along += dot(both[1], u);
        },
        g, head);
    along = warp_sum(along);
    float shift = 0;
    if (direction) {
      shift = *transform.alpha * warp_sum(g_along);
      along -= shift * warp_sum(a_along);
    }
    const float norm = transform.factor.power != 0 ? norms[row * transform.heads + k] : 0;
    const Tangent tangent(transform.factor, norm, constant, along);
    along_row += along * tangent.push;
    In* to = out + row * out_stride + k * width;
    for_each<N>(
        width,
        [&](float (&both)[2][N], int64_t column) {
          if (direction) {
            float u[N];
            load(u, direction + column);
#pragma unroll
            for (int e = 0; e < N; ++e) both[0][e] -= shift * u[e];
          }
          float result[N];
#pragma unroll
          for (int e = 0; e < N; ++e) result[e] = tangent(both[0][e], both[1][e]);
          store(to + column, result);
        },
        g, head);
  }
  if (grad_divisor && lane() == 0) grad_divisor[row] = -along_row / transform.divisor[row];
}

Launch warp_a_row(int64_t rows) { return {dim3(static_cast<unsigned>(ceil_div(rows, int64_t{kWarps}))), kThreads}; }

bool aligned_rows(const RowTransform& t, std::initializer_list<const Matrix*> matrices) {
  bool all = reinterpret_cast<uintptr_t>(t.direction) % kAccess == 0;
  for (const Matrix* m : matrices) all = all && aligned(*m, t.heads);
  return all;
}

}  // namespace

Status normalize_rows(const Matrix& a, const RowTransform& transform, const Matrix& out, float* norms,
                      float* projections, void* stream) {
  Check check("cuda::normalize_rows");
  check.matrix(a, "a").matrix(out, "out").same_shape(a, out, "a and out").heads(transform, a);
  check.that(transform.direction || (!transform.alpha && !projections), "alpha and projections need a direction");
  if (!check.status().ok() || a.rows == 0) return check.status();
  return with_type(a.dtype, [&](auto in) {
    return with_type(out.dtype, [&](auto to) {
      using In = decltype(in);
      using Out = decltype(to);
      constexpr int kElements = kAccess / sizeof(In);
      const auto kernel = aligned_rows(transform, {&a, &out}) ? normalize<In, Out, kElements> : normalize<In, Out, 1>;
      return launch("normalize_rows", shape(a), kernel, warp_a_row(a.rows), stream, elements<In>(a), a.row_stride,
                    elements<Out>(out), out.row_stride, a.rows, a.cols / transform.heads, transform, norms,
                    projections);
    });
  });
}

Status normalize_rows_backward(const Matrix& grad, const Matrix& a, const float* norms, const RowTransform& transform,
                               const Matrix& grad_a, float* grad_divisor, void* stream) {
  Check check("cuda::normalize_rows_backward");
  check.matrix(grad, "grad").matrix(a, "a").matrix(grad_a, "grad_a").heads(transform, a);
  check.same_shape(grad, a, "grad and a").same_shape(grad_a, a, "grad_a and a");
  check.that(grad_a.dtype == a.dtype, "grad_a must have the dtype of a");
  check.that(norms || a.rows == 0 || transform.factor.power == 0, "norms are missing");
  check.that(transform.direction || !transform.alpha, "alpha needs a direction");
  check.that(transform.divisor || !grad_divisor, "there is no divisor to take the gradient of");
  if (!check.status().ok() || a.rows == 0) return check.status();
  return with_type(grad.dtype, [&](auto g) {
    return with_type(a.dtype, [&](auto in) {
      using G = decltype(g);
      using In = decltype(in);
      constexpr int kElements = kAccess / sizeof(In);
      const auto kernel = aligned_rows(transform, {&grad, &a, &grad_a}) ? project<G, In, kElements> : project<G, In, 1>;
      return launch("normalize_rows_backward", shape(a), kernel, warp_a_row(a.rows), stream, elements<G>(grad),
                    grad.row_stride, elements<In>(a), a.row_stride, elements<In>(grad_a), grad_a.row_stride, a.rows,
                    a.cols / transform.heads, norms, transform, grad_divisor);
    });
  });
}

}  // namespace tde::cuda
