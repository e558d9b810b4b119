// Elements of a row: loads and stores that compute in float32, and the choice of a template by dtype.
#pragma once

#include <bit>
#include <cstdint>

#include "tde/types.h"

namespace tde::cpu {
namespace {  // compiled once per instruction set: nothing here may be shared between them

struct bf16 {
  uint16_t bits;
};

inline float load(float value) { return value; }
inline float load(bf16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }

inline void store(float& to, float value) { to = value; }
inline void store(bf16& to, float value) {  // to nearest even; a NaN stays one
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : rounded);
}

template <typename T>
T* row(const Matrix& matrix, int64_t index) {
  return static_cast<T*>(matrix.data) + index * matrix.row_stride;
}

// Calls run(T{}) with the element type of `dtype`.
template <typename Run>
void with_type(DType dtype, Run run) {
  switch (dtype) {
    case DType::f32:
      return run(float{});
    case DType::bf16:
      return run(bf16{});
    case DType::f16:
      break;  // refused with the other arguments
  }
}

// Waking a thread costs microseconds: below this many elements a pass stays on the calling one.
constexpr int64_t kElementsWorthThreads = 1 << 15;

inline int threads_for(int64_t elements, int threads) { return elements < kElementsWorthThreads ? 1 : threads; }
inline int threads_for(const Matrix& matrix, int threads) { return threads_for(matrix.rows * matrix.cols, threads); }

// Calls run(block, begin, end) for every block of rows; a block is one thread's. Blocks do not depend on the threads.
constexpr int64_t kBlockRows = 32;

inline int64_t blocks_of(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

template <typename Run>
void for_each_block(int64_t rows, [[maybe_unused]] int threads, Run run) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < blocks_of(rows); ++block) {
    const int64_t begin = block * kBlockRows;
    run(block, begin, begin + kBlockRows < rows ? begin + kBlockRows : rows);
  }
}

}  // namespace
}  // namespace tde::cpu
