// Whether a GPU can be served.
#pragma once

#include "tde/types.h"

namespace tde::cuda {

// Why the current device cannot run these kernels: a driver too old, an architecture that the binary does not hold.
Status probe();

}  // namespace tde::cuda
