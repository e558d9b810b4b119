// Whether the current device can run what this binary holds.
#include "cuda/launch.h"
#include "tde/probe.h"

namespace tde::cuda {
namespace {

__global__ void nothing() {}

}  // namespace

Status probe() {
#ifdef TDE_EMULATED
  return launch("probe", "nothing", nothing, {dim3(1), kWarp}, nullptr);
#else
  cudaFuncAttributes attributes;
  Status status = status_of("", cudaFuncGetAttributes(&attributes, nothing));
  if (!status.ok()) status.error.erase(0, 2);
  return status;
#endif
}

Status probe_hopper() {
#if defined(TDE_EMULATED)
  return {};
#elif defined(TDE_HAS_SM90A)
  int device = 0, major = 0, minor = 0;
  for (const cudaError_t error :
       {cudaGetDevice(&device), cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)})
    if (Status status = status_of("cuda::probe_hopper", error); !status.ok()) return status;
  if (major == 9 && minor == 0) return {};
  return {"it is of compute capability " + std::to_string(major) + "." + std::to_string(minor) + ", not 9.0"};
#else
  return {"the binary was not built for 90a"};
#endif
}

}  // namespace tde::cuda
