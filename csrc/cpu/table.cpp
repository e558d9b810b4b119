// This instruction set's kernels, gathered.
#include "cpu/kernels.h"

namespace tde::cpu::TDE_ISA {

const Kernels kernels{normalize_rows,        normalize_rows_backward, row_norms,     feature_sum, small_logits,
                      small_logits_backward, background_exempt,       cross_entropy, alpha_sweep, alpha_segments};

}  // namespace tde::cpu::TDE_ISA
