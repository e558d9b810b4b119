// What this binary holds, for `tde_kernels.info()`.
#pragma once

#include <string>

namespace tde {

struct BuildInfo {
  std::string version;
  std::string compiler;
  std::string threading;        // "OpenMP", or why there is one thread
  std::string instruction_set;  // of the CPU kernels that this process runs
  std::string cuda;             // toolkit and architectures, or why there are none
  bool has_cuda;
  bool emulated;   // the CUDA kernels run on the CPU, for tests
  bool intel_cpu;  // whose products MKL does best
};

BuildInfo build_info();

}  // namespace tde
