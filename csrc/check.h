// The checks of the API: the first that fails is the one told.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>

#include "tde/cross_entropy.h"
#include "tde/rows.h"
#include "tde/types.h"

namespace tde {

inline std::string shape(const Matrix& m) {
  return std::string("[").append(std::to_string(m.rows)).append(", ").append(std::to_string(m.cols)).append("]");
}

// As many of four bytes as 64 bits count.
constexpr int64_t kMostElements = std::numeric_limits<int64_t>::max() / 4;

inline std::string described(const Matrix& m, const char* name) {
  return std::string(name) + " " + shape(m) + ", rows " + std::to_string(m.row_stride) + " elements apart, ";
}

class Check {
 public:
  explicit Check(const char* function) : function_(function) {}

  // `otherwise` is what is wrong, or a function that says it: calls that are right then write no sentence.
  template <typename Sentence>
  Check& that(bool holds, const Sentence& otherwise) {
    if (holds || !status_.ok()) return *this;
    if constexpr (std::is_invocable_v<Sentence>)
      status_.error = std::string(function_) + ": " + otherwise();
    else
      status_.error = std::string(function_) + ": " + otherwise;
    return *this;
  }
  Check& matrix(const Matrix& m, const char* name) {
    const auto it = [&](const char* what) { return [&m, name, what] { return described(m, name) + what; }; };
    that(m.rows >= 0 && m.cols >= 0, it("has a negative size"));
    that(m.row_stride >= 0, it("has a negative row stride"));
    that(m.rows == 0 || std::max({m.cols, m.row_stride, int64_t{1}}) <= kMostElements / m.rows, it("is too large"));
    return that(m.rows == 0 || m.cols == 0 || m.data != nullptr, it("has no memory"));
  }
  Check& cpu_matrix(const Matrix& m, const char* name) {
    return matrix(m, name).that(m.dtype != DType::f16,
                                [&] { return described(m, name) + "is float16, which the CPU does not serve"; });
  }
  Check& cpu_output(const Matrix& m, const char* name) {
    return cpu_matrix(m, name).that(m.rows <= 1 || m.row_stride >= m.cols,
                                    [&] { return described(m, name) + "has rows that overlap"; });
  }
  Check& same_shape(const Matrix& a, const Matrix& b, const char* names) {
    return that(a.rows == b.rows && a.cols == b.cols,
                [&] { return std::string(names) + " differ in shape: " + shape(a) + " and " + shape(b); });
  }
  Check& heads(const RowTransform& t, const Matrix& a) {
    return that(t.heads >= 1 && a.cols % t.heads == 0, [&] {
      return std::to_string(t.heads) + " heads do not divide " + std::to_string(a.cols) + " columns";
    });
  }
  Check& exempt(const Matrix& logits, const float* row_projections, const float* class_projections, int64_t heads,
                const float* alpha, int64_t background, const Matrix& out) {
    matrix(logits, "logits").matrix(out, "out").same_shape(logits, out, "logits and out");
    that(logits.dtype == DType::f32, "logits must be float32: their difference is not taken after rounding");
    that(alpha && heads >= 1, "alpha and at least one head are needed");
    that(class_projections && (row_projections || logits.rows == 0), "projections are missing");
    return that(background >= 0 && background < logits.cols, [&] {
      return "background " + std::to_string(background) + " is not one of " + std::to_string(logits.cols) + " classes";
    });
  }
  Check& loss(const Matrix& logits, const CrossEntropy& loss, const LossPass& pass) {
    const auto classes = [&] { return std::to_string(loss.classes) + " classes"; };
    that(logits.cols > 0 || logits.rows == 0, "there are no classes");
    that(pass.first >= 0 && logits.cols >= 0 && logits.cols <= loss.classes && pass.first <= loss.classes - logits.cols,
         [&] {
           return "logits " + shape(logits) + " from class " + std::to_string(pass.first) + " on are not of " +
                  classes();
         });
    that(pass.sums || logits.rows == 0 || (pass.take && logits.cols == loss.classes),
         [&] { return "logits " + shape(logits) + " of " + classes() + " need sums"; });
    for (const LossTerm& term : loss.terms) that(!term.labels || term.scale, "a term has no scale");
    return *this;
  }
  const Status& status() const { return status_; }

 private:
  const char* function_;
  Status status_;
};

}  // namespace tde
