// Launch arithmetic and the status of a launch.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>

#include "tde/types.h"

namespace tde::cuda {

constexpr int64_t kMaxGridY = 65535;

inline unsigned grid_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

// The status of the launch just made. Reads and clears the error, so that the next launch does not inherit it.
inline Status launched(const char* kernel, int64_t rows, int64_t cols) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  return {std::string("cuda::") + kernel + " on [" + std::to_string(rows) + ", " + std::to_string(cols) +
          "]: " + cudaGetErrorString(error)};
}

}  // namespace tde::cuda
