// The sum of the features alone, for an EMA update that no other pass can carry.
#include "cpu/column_sum.h"
#include "cpu/kernels.h"

namespace tde::cpu::TDE_ISA {

void feature_sum(const Matrix& x, const bool* mask, float* feature_sum, int threads) {
  threads = threads_for(x, threads);
  ColumnSum sum(x.rows, x.cols, mask);
  with_type(x.dtype, [&](auto element) {
    using T = decltype(element);
    for_each_block(x.rows, threads, [&](int64_t block, int64_t begin, int64_t end) {
      sum.begin_block(block);
      for (int64_t r = begin; r < end; ++r) sum.add(r, row<T>(x, r));
    });
  });
  sum.finish(feature_sum, threads);
}

}  // namespace tde::cpu::TDE_ISA
