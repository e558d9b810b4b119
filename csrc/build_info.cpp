// The macros come from CMakeLists.txt.
#include "tde/build_info.h"

#include "cpu/dispatch.h"

namespace tde {

BuildInfo build_info() {
#ifdef TDE_HAS_CUDA
  constexpr bool has_cuda = true;
#else
  constexpr bool has_cuda = false;
#endif
#ifdef TDE_EMULATED
  constexpr bool emulated = true;
#else
  constexpr bool emulated = false;
#endif
  return {TDE_VERSION,     TDE_COMPILER, TDE_OPENMP_STATUS, cpu_instruction_set(),
          TDE_CUDA_STATUS, has_cuda,     emulated,          runs_on_intel()};
}

}  // namespace tde
