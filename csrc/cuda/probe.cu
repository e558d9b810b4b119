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

}  // namespace tde::cuda
