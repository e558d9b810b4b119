// What the files of the Python module share: tensors come as addresses, a bad status leaves as an error.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "tde/types.h"

using Address = uintptr_t;  // of a tensor's first element on its device; 0 is null

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline void raise_unless_ok(const tde::Status& status) {
  if (!status.ok()) throw std::runtime_error(status.error);
}

void bind_cuda(pybind11::module_& m);
