// A launch with its status. Emulated, it runs the kernel on the CPU.
#pragma once

#include <string>
#include <tuple>

#include "cuda/simt.cuh"
#include "tde/types.h"

namespace tde::cuda {

constexpr int64_t kMaxGridY = 65535;

template <typename T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

constexpr size_t kLeastShared = 99 << 10;  // of a block, among the architectures that are built for

struct Launch {
  dim3 grid;
  unsigned threads;
  size_t shared_bytes = 0;
  size_t most_shared = kLeastShared;  // on the architectures that the kernel is for
};

#ifndef TDE_EMULATED
// Of the call or launch just made. Reads and clears the error, so that the next launch does not inherit it.
inline Status status_of(const std::string& what, cudaError_t error) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();
  return {what + ": " + cudaGetErrorString(error)};
}
#endif

// Runs `kernel` with `arguments` on `stream`, a cudaStream_t; a failure names the kernel and `shape`.
template <typename... Parameters, typename... Arguments>
Status launch(const char* name, const std::string& shape, void (*kernel)(Parameters...), const Launch& with,
              [[maybe_unused]] void* stream, const Arguments&... arguments) {
  const std::string what = std::string("cuda::") + name + " on " + shape;
  if (with.shared_bytes > with.most_shared)
    return {what + ": wants " + std::to_string(with.shared_bytes) + " bytes of shared memory"};
  std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
#ifdef TDE_EMULATED
  return simt::run(what, with.grid, with.threads, with.shared_bytes, [&] { std::apply(kernel, values); });
#else
  constexpr size_t kUnasked = 48 << 10;  // a kernel that wants more shared memory has to say so beforehand
  if (with.shared_bytes > kUnasked) {
    const int bytes = static_cast<int>(with.shared_bytes);
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (Status status = status_of(what, error); !status.ok()) return status;
  }
  return std::apply(
      [&](auto&... value) {
        void* addresses[] = {static_cast<void*>(&value)...};
        return status_of(what, cudaLaunchKernel(reinterpret_cast<const void*>(kernel), with.grid, dim3(with.threads),
                                                addresses, with.shared_bytes, static_cast<cudaStream_t>(stream)));
      },
      values);
#endif
}

}  // namespace tde::cuda
