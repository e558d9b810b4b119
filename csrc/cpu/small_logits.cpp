// Small problems: logits, counterfactual and feature sum in one call, both gradients in another. What is scaled goes
// straight into the panels of a product, and is never stored.
#include <algorithm>
#include <memory>
#include <optional>

#include "cpu/column_sum.h"
#include "cpu/heads.h"
#include "cpu/kernels.h"
#include "cpu/tiles.h"
#include "tde/logits.h"

namespace tde::cpu::TDE_ISA {
namespace {

constexpr int64_t kMultiplicationsWorthThreads = 1 << 18;

int threads_for_product(int64_t rows, int64_t depth, int64_t columns, int threads) {
  return rows * depth * columns < kMultiplicationsWorthThreads ? 1 : threads;
}

// No std::vector: its functions would be one for all instruction sets.
using Floats = std::unique_ptr<float[]>;

// Memory of the calling thread that lasts from call to call: fresh pages would cost more than the product.
float* workspace(int64_t floats) {
  thread_local Floats memory;
  thread_local int64_t size = 0;
  if (size < floats) {
    memory.reset(new float[floats]);
    size = floats;
  }
  return memory.get();
}

// An operand of the gradients' products: its scaled rows as panels [depth = rows], and their norms [rows, heads].
struct Panels {
  float* panels;
  float* norms;

  static int64_t floats(const Operand& of) { return of.a.rows * (padded(of.a.cols) + of.transform.heads); }
  Panels(const Operand& of, float* memory) : panels(memory), norms(memory + of.a.rows * padded(of.a.cols)) {}

  template <typename T>
  void fill(const Operand& of, int64_t r, float* scaled) const {
    normalize_row(row<T>(of.a, r), r, of.a.cols, of.transform, {norms}, scaled);
    pack_row(scaled, of.a.cols, r, of.a.rows, panels);
  }
};

// The gradients of up to kTileRows rows of `own` from `first` on, for `grad` (own row, other row).
template <typename T>
void gradients_of_tile(const Operand& own, const Panels& norms_of_own, const Panels& other, int64_t others,
                       const Left<T>& grad, int64_t first, float* products, const Matrix& grad_own,
                       float* grad_divisor) {
  const int64_t rows = std::min<int64_t>(kTileRows, own.a.rows - first), cols = own.a.cols;
  multiply(grad.from(first), rows, others, other.panels, cols, products);
  for (int64_t r = first; r < first + rows; ++r, products += padded(cols))
    row_backward(products, row<T>(own.a, r), r, cols, norms_of_own.norms, own.transform, row<T>(grad_own, r),
                 grad_divisor);
}

}  // namespace

void small_logits(const Operands& of, const bool* mask, float* feature_sum, const Matrix& out, int threads) {
  const Operand &features = of.features, &weights = of.weights;
  const int64_t batch = features.a.rows, dim = features.a.cols, classes = weights.a.rows;
  [[maybe_unused]] const int used = threads_for_product(batch, dim, classes, threads);
  float* panels = workspace(dim * padded(classes));
  std::optional<ColumnSum> sum;
  if (feature_sum) sum.emplace(batch, dim, mask);
  with_type(out.dtype, [&](auto type) {
    using T = decltype(type);
#pragma omp parallel num_threads(used) if (used > 1)
    {
      const Floats scaled(new float[kBlockRows * dim]), products(new float[kBlockRows * padded(classes)]);
#pragma omp for schedule(static)
      for (int64_t p = 0; p < panels_of(classes); ++p) {
        float* panel = panels + p * dim * kPanel;
        for (int64_t c = p * kPanel; c < (p + 1) * kPanel; ++c) {
          if (c < classes) normalize_row(row<T>(weights.a, c), c, dim, weights.transform, {}, scaled.get());
          pack_column(c < classes ? scaled.get() : nullptr, dim, c % kPanel, panel);
        }
      }
#pragma omp for schedule(static)
      for (int64_t block = 0; block < blocks_of(batch); ++block) {
        if (sum) sum->begin_block(block);
        const int64_t first = block * kBlockRows, rows = std::min(kBlockRows, batch - first);
        for (int64_t r = 0; r < rows; ++r) {
          const T* x = row<T>(features.a, first + r);
          normalize_row(x, first + r, dim, features.transform, {}, scaled.get() + r * dim);
          if (sum) sum->add(first + r, x);
        }
        multiply(Left<float>{scaled.get(), dim, 1}, rows, dim, panels, classes, products.get());
        for (int64_t r = 0; r < rows; ++r) {
          T* z = row<T>(out, first + r);
          const float* product = products.get() + r * padded(classes);
          for (int64_t c = 0; c < classes; ++c) store(z[c], product[c]);
        }
      }
    }
  });
  if (sum) sum->finish(feature_sum, 1);
}

void small_logits_backward(const Operands& of, const Matrix& grad, const Matrix& grad_x, const Matrix& grad_w,
                           float* grad_divisor, int threads) {
  const Operand &features = of.features, &weights = of.weights;
  const int64_t batch = features.a.rows, dim = features.a.cols, classes = weights.a.rows;
  [[maybe_unused]] const int used = threads_for_product(batch, dim, classes, threads);
  float* memory = workspace(Panels::floats(features) + Panels::floats(weights));
  const Panels x(features, memory), w(weights, memory + Panels::floats(features));
  with_type(grad.dtype, [&](auto type) {
    using T = decltype(type);
    const T* g = static_cast<const T*>(grad.data);
    const Left<T> by_row{g, grad.row_stride, 1}, by_class{g, 1, grad.row_stride};
#pragma omp parallel num_threads(used) if (used > 1)
    {
      const Floats scaled(new float[dim]), products(new float[kTileRows * padded(dim)]);
#pragma omp for schedule(static) nowait
      for (int64_t r = 0; r < batch; ++r) x.fill<T>(features, r, scaled.get());
#pragma omp for schedule(static)
      for (int64_t c = 0; c < classes; ++c) w.fill<T>(weights, c, scaled.get());
      if (grad_w.data) {
#pragma omp for schedule(dynamic) nowait
        for (int64_t c = 0; c < classes; c += kTileRows)
          gradients_of_tile(weights, w, x, batch, by_class, c, products.get(), grad_w, grad_divisor);
      }
      if (grad_x.data) {
#pragma omp for schedule(dynamic) nowait
        for (int64_t r = 0; r < batch; r += kTileRows)
          gradients_of_tile(features, x, w, classes, by_row, r, products.get(), grad_x, nullptr);
      }
    }
  });
}

}  // namespace tde::cpu::TDE_ISA
