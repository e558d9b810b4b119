// Products of small matrices: a tile of the result stays in registers from its first term to its last.
//
// The right operand lies in panels of kPanel columns, [panels][depth][kPanel], filled up with zeros.
#pragma once

#include "cpu/elements.h"

namespace tde::cpu {
namespace {  // compiled once per instruction set: nothing here may be shared between them

// A tile takes up to two vectors a row, and all but a few of the registers that there are
#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 12;
#elif defined(__AVX__)
constexpr int kLanes = 8, kTileRows = 6;
#else
constexpr int kLanes = 4, kTileRows = 6;
#endif
constexpr int64_t kPanel = 2 * kLanes;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float))));

// Terms that are added one to another before their sum is: a long chain rounds more, without fused adds twice as often
#if defined(__FMA__)
constexpr int64_t kChain = 64;
#else
constexpr int64_t kChain = 16;
#endif

inline int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }
inline int64_t padded(int64_t columns) { return panels_of(columns) * kPanel; }

// The left operand: element (r, k) lies at data[r * row_stride + k * depth_stride].
template <typename T>
struct Left {
  const T* data;
  int64_t row_stride, depth_stride;

  Left from(int64_t row) const { return {data + row * row_stride, row_stride, depth_stride}; }
};

// out[r][c] = sum_k left(r, k) panel[k][c] for Rows rows and the columns of a panel's first Vectors vectors.
template <int Rows, int Vectors, typename T>
void multiply_tile(const Left<T>& left, int64_t depth, const float* panel, float* out, int64_t out_stride) {
  const T* a = left.data;
  for (int64_t begin = 0; begin == 0 || begin < depth; begin += kChain) {
    Lanes sums[Rows][Vectors] = {};
    const int64_t end = begin + kChain < depth ? begin + kChain : depth;
    for (int64_t k = begin; k < end; ++k, a += left.depth_stride, panel += kPanel) {
      const Lanes* right = reinterpret_cast<const Lanes*>(panel);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const float scalar = load(a[r * left.row_stride]);
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) sums[r][v] += scalar * right[v];
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      Lanes* to = reinterpret_cast<Lanes*>(out + r * out_stride);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) to[v] = begin == 0 ? sums[r][v] : to[v] + sums[r][v];
    }
  }
}

// The same for all panels; of the last one no more than its columns need.
template <int Rows, typename T>
void multiply_rows(const Left<T>& left, int64_t depth, const float* panels, int64_t columns, float* out) {
  for (int64_t begin = 0; begin < columns; begin += kPanel, panels += depth * kPanel) {
    if (columns - begin > kLanes)
      multiply_tile<Rows, 2>(left, depth, panels, out + begin, padded(columns));
    else
      multiply_tile<Rows, 1>(left, depth, panels, out + begin, padded(columns));
  }
}

// The product of some rows with all panels, into out [rows, padded(columns)].
template <typename T>
void multiply(Left<T> left, int64_t rows, int64_t depth, const float* panels, int64_t columns, float* out) {
  while (rows > 0) {
    constexpr int kFewRows = kTileRows / 3;
    int64_t taken = 1;
    if (rows >= kTileRows)
      multiply_rows<kTileRows>(left, depth, panels, columns, out), taken = kTileRows;
    else if (rows >= kFewRows)
      multiply_rows<kFewRows>(left, depth, panels, columns, out), taken = kFewRows;
    else
      multiply_rows<1>(left, depth, panels, columns, out);
    left = left.from(taken);
    out += taken * padded(columns);
    rows -= taken;
  }
}

// A row of the right operand, element k of every panel.
inline void pack_row(const float* row, int64_t columns, int64_t k, int64_t depth, float* panels) {
  for (int64_t begin = 0; begin < columns; begin += kPanel, panels += depth * kPanel)
    for (int64_t c = 0; c < kPanel; ++c) panels[k * kPanel + c] = begin + c < columns ? row[begin + c] : 0;
}

// A column of one panel of the right operand; null is a column of zeros.
inline void pack_column(const float* column, int64_t depth, int64_t place, float* panel) {
  for (int64_t k = 0; k < depth; ++k) panel[k * kPanel + place] = column ? column[k] : 0;
}

}  // namespace
}  // namespace tde::cpu
