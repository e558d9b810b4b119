// What the tests of the C API share: guarded memory, random numbers, bounds, and a main that names what fails.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "tde/build_info.h"
#include "tde/types.h"

#ifdef TDE_SANITIZED_ADDRESSES
#include <sanitizer/asan_interface.h>
#endif

namespace tde::testing {

inline const char* running = "";  // the case

inline void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("FAILED %s: %s\n", running, what.c_str());
  std::fflush(stdout);
  std::_Exit(1);
}

inline void expect_ok(const Status& status) { expect(status.ok(), status.error); }

// The call is refused, with a sentence in which `names` stands.
inline void expect_refused(const Status& status, const std::string& names) {
  expect(!status.ok(), "what is wrong with " + names + " was not refused");
  expect(status.error.find(names) != std::string::npos, "'" + status.error + "' does not name " + names);
}

// Rows of bytes. They begin as NaN; what lies before, between and behind them must be neither read nor written, of
// which AddressSanitizer sees both and a canary the second.
class Memory {
 public:
  Memory(int64_t rows, int64_t row_bytes, int64_t gap_bytes, int64_t alignment)
      : rows_(rows), row_(row_bytes), pitch_(row_bytes + gap_bytes), guard_(64 + alignment) {
    const int64_t bytes = 2 * guard_ + rows * pitch_;
    bytes_ = std::make_unique<unsigned char[]>(bytes);
    std::memset(bytes_.get(), kCanary, bytes);
    for (int64_t r = 0; r < rows; ++r) std::memset(row(r), kNaN, row_);
#ifdef TDE_SANITIZED_ADDRESSES
    __asan_poison_memory_region(bytes_.get(), bytes);
    for (int64_t r = 0; r < rows; ++r) __asan_unpoison_memory_region(row(r), row_);
#endif
  }

  unsigned char* row(int64_t r) const { return bytes_.get() + guard_ + r * pitch_; }

  void expect_intact() const {
#ifndef TDE_SANITIZED_ADDRESSES
    const auto untouched = [](const unsigned char* begin, const unsigned char* end) {
      for (; begin != end; ++begin) expect(*begin == kCanary, "a write beside the rows");
    };
    untouched(bytes_.get(), row(0));
    for (int64_t r = 0; r < rows_; ++r) untouched(row(r) + row_, row(r) + pitch_);
    untouched(row(rows_), row(rows_) + guard_);
#endif
  }

 private:
  static constexpr unsigned char kCanary = 0xa5, kNaN = 0xff;
  int64_t rows_, row_, pitch_, guard_;
  std::unique_ptr<unsigned char[]> bytes_;
};

// An array, aligned as its elements are and no better.
template <typename T>
class Array {
 public:
  explicit Array(int64_t size) : size_(size), memory_(1, size * sizeof(T), 0, sizeof(T)) {}
  Array(const std::vector<T>& values) : Array(static_cast<int64_t>(values.size())) {
    for (int64_t i = 0; i < size_; ++i) (*this)[i] = values[i];
  }
  ~Array() { memory_.expect_intact(); }

  T* data() const { return size_ == 0 ? nullptr : reinterpret_cast<T*>(memory_.row(0)); }  // as torch has it
  T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return size_; }
  std::vector<double> values() const { return {data(), data() + size_}; }

 private:
  int64_t size_;
  Memory memory_;
};

inline float rounded(double value, DType dtype) {
  const float narrow = static_cast<float>(value);
  if (dtype == DType::f32 || std::isnan(narrow)) return narrow;
  const uint32_t bits = std::bit_cast<uint32_t>(narrow), odd = bits >> 16 & 1;
  return std::bit_cast<float>((bits + 0x7fff + odd) & 0xffff0000u);  // to nearest even
}

// A matrix of float32 or bfloat16 whose rows lie `gap` elements further apart than they must.
class Grid {
 public:
  Grid(DType dtype, int64_t rows, int64_t cols, int64_t gap = 0)
      : dtype_(dtype), rows_(rows), cols_(cols), gap_(gap), memory_(rows, cols * size(), gap * size(), size()) {}
  ~Grid() { memory_.expect_intact(); }

  operator Matrix() const {
    return {rows_ * cols_ == 0 ? nullptr : memory_.row(0), dtype_, rows_, cols_, std::max<int64_t>(cols_ + gap_, 1)};
  }

  void set(int64_t r, int64_t c, double value) const {
    const uint32_t bits = std::bit_cast<uint32_t>(rounded(value, dtype_));
    if (dtype_ == DType::f32)
      reinterpret_cast<uint32_t*>(memory_.row(r))[c] = bits;
    else
      reinterpret_cast<uint16_t*>(memory_.row(r))[c] = static_cast<uint16_t>(bits >> 16);
  }
  float at(int64_t r, int64_t c) const {
    if (dtype_ == DType::f32) return reinterpret_cast<const float*>(memory_.row(r))[c];
    return std::bit_cast<float>(uint32_t{reinterpret_cast<const uint16_t*>(memory_.row(r))[c]} << 16);
  }
  // fill(r, c) gives the elements.
  template <typename Fill>
  const Grid& fill(Fill fill) const {
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t c = 0; c < cols_; ++c) set(r, c, fill(r, c));
    return *this;
  }
  std::vector<double> values() const {
    std::vector<double> all;
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t c = 0; c < cols_; ++c) all.push_back(at(r, c));
    return all;
  }
  DType dtype() const { return dtype_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }

 private:
  int64_t size() const { return dtype_ == DType::f32 ? 4 : 2; }

  DType dtype_;
  int64_t rows_, cols_, gap_;
  Memory memory_;
};

// Numbers in [-1, 1), the same in every run.
class Random {
 public:
  explicit Random(uint64_t seed) : bits_(seed) {}
  double operator()() {
    bits_ = bits_ * 6364136223846793005u + 1442695040888963407u;  // Knuth's constants for 64 bits
    return std::ldexp(static_cast<double>(bits_ >> 32), -31) - 1;
  }

 private:
  uint64_t bits_;
};

using Values = std::vector<double>;

// The largest error against `exact`, in units of its largest element; infinite where one is a number and one is not.
inline double error(const Values& values, const Values& exact) {
  expect(values.size() == exact.size(), "sizes differ");
  double largest = 0, worst = 0;
  for (const double e : exact)
    if (std::isfinite(e)) largest = std::max(largest, std::abs(e));
  for (size_t i = 0; i < exact.size(); ++i) {
    if (std::isnan(exact[i]) ? std::isnan(values[i]) : values[i] == exact[i]) continue;
    if (!std::isfinite(exact[i]) || !std::isfinite(values[i])) return std::numeric_limits<double>::infinity();
    worst = std::max(worst, std::abs(values[i] - exact[i]) / largest);
  }
  return worst;
}

// What a function leaves behind, by name.
using Results = std::map<std::string, Values>;

// Each at most twice as far from `exact` as what the same plain loop gives in float32, rounded as ours is where
// `dtypes` says so.
inline void expect_close(const Results& ours, Results exact, Results plain,
                         const std::map<std::string, DType>& dtypes = {}) {
  const double tiny = 4 * std::numeric_limits<float>::epsilon();
  for (const auto& [name, values] : ours) {
    const auto dtype = dtypes.find(name);
    for (double& value : plain[name]) value = rounded(value, dtype == dtypes.end() ? DType::f32 : dtype->second);
    const double got = error(values, exact[name]), allowed = 2 * error(plain[name], exact[name]) + tiny;
    expect(got <= allowed,
           name + " is off by " + std::to_string(got) + ", of which " + std::to_string(allowed) + " is allowed");
  }
}

inline bool same_bits(const Values& a, const Values& b) {
  const auto same = [](double x, double y) { return std::bit_cast<uint64_t>(x) == std::bit_cast<uint64_t>(y); };
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), same);
}

// run(threads) for several numbers of threads, the last of them twice: the same bits each time. Returns them.
template <typename Run>
Results same_for_all_threads(Run run) {
  const Results first = run(1);
  for (const int threads : {2, 3, 8, 8}) {
    const Results again = run(threads);
    for (const auto& [name, values] : first)
      expect(same_bits(again.at(name), values), name + " differs with " + std::to_string(threads) + " threads");
  }
  return first;
}

struct Case {
  const char* name;
  void (*run)();
};

// The body of a test's main. Where TDE_CPU_ISA asks for what this CPU lacks, CTest is told so by the status 77.
inline int run(const std::vector<Case>& cases) {
  const char* wanted = std::getenv("TDE_CPU_ISA");
  if (wanted && build_info().instruction_set != wanted) {
    std::printf("not run: this CPU or build has no %s\n", wanted);
    return 77;
  }
  for (const Case& each : cases) {
    running = each.name;
    each.run();
  }
  std::printf("%zu cases passed with %s\n", cases.size(), build_info().instruction_set.c_str());
  return 0;
}

}  // namespace tde::testing
