// Row normalisation and its gradient: each row is read from memory once and stays in the first-level cache meanwhile.
#include <optional>

#include "cpu/column_sum.h"
#include "cpu/heads.h"
#include "cpu/kernels.h"

namespace tde::cpu::TDE_ISA {

void normalize_rows(const Matrix& a, const RowTransform& transform, const Matrix& out, const RowByproducts& byproducts,
                    int threads) {
  threads = threads_for(a, threads);
  std::optional<ColumnSum> sum;
  if (byproducts.feature_sum) sum.emplace(a.rows, a.cols, byproducts.mask);
  with_type(a.dtype, [&](auto in) {
    with_type(out.dtype, [&](auto to) {
      using In = decltype(in);
      using Out = decltype(to);
      for_each_block(a.rows, threads, [&](int64_t block, int64_t begin, int64_t end) {
        if (sum) sum->begin_block(block);
        for (int64_t r = begin; r < end; ++r) {
          normalize_row(row<In>(a, r), r, a.cols, transform, byproducts, row<Out>(out, r));
          if (sum) sum->add(r, row<In>(a, r));
        }
      });
    });
  });
  if (sum) sum->finish(byproducts.feature_sum, threads);
}

void row_norms(const Matrix& a, int64_t heads, float* norms, int threads) {
  const int64_t width = a.cols / heads;
  with_type(a.dtype, [&](auto in) {
    using In = decltype(in);
    for_each_block(a.rows, threads_for(a, threads), [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        for (int64_t k = 0; k < heads; ++k) norms[r * heads + k] = norm(row<In>(a, r) + k * width, width);
    });
  });
}

void normalize_rows_backward(const Matrix& grad, const Matrix& a, const float* norms, const RowTransform& transform,
                             const Matrix& grad_a, float* grad_divisor, int threads) {
  threads = threads_for(a, threads);
  with_type(grad.dtype, [&](auto g) {
    with_type(a.dtype, [&](auto in) {
      using G = decltype(g);
      using In = decltype(in);
      for_each_block(a.rows, threads, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
          row_backward(row<G>(grad, r), row<In>(a, r), r, a.cols, norms, transform, row<In>(grad_a, r), grad_divisor);
      });
    });
  });
}

}  // namespace tde::cpu::TDE_ISA
