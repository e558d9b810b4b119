// The vocabulary of the core's API: matrices over borrowed memory, and status out.
#pragma once

#include <cstdint>
#include <string>

namespace tde {

enum class DType : int32_t { f32, bf16, f16 };

// A row-major matrix over memory that the caller owns. Columns are contiguous; rows lie `row_stride` elements apart, 0
// where all are the same one. Those of an output must not overlap.
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;
};

// Empty when all went well; else a sentence that names the function and what was wrong.
struct Status {
  std::string error;

  bool ok() const { return error.empty(); }
};

}  // namespace tde
