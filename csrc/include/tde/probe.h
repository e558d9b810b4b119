// Whether a GPU can be served.
#pragma once

#include "tde/types.h"

namespace tde::cuda {

// Why the current device cannot run these kernels: a driver too old, an architecture that the binary does not hold.
Status probe();

// Why it cannot run the kernels that use Hopper's own instructions.
Status probe_hopper();

}  // namespace tde::cuda
