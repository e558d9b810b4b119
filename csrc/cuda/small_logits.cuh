// What the kernels of small problems share: whole rows of both operands lie in shared memory, scaled there in place.
#pragma once

#include <string>

#include "check.h"
#include "cuda/shared_rows.cuh"
#include "tde/logits.h"

namespace tde::cuda::small {

constexpr int kThreads = 128;
constexpr int kResident = 4;           // blocks on a multiprocessor at least: leaves the compiler registers enough
constexpr int kOwn = 16, kOther = 32;  // rows of a tile: of the result's operand, and of the one it is multiplied with
constexpr int kMostCols = 256;         // of a row in shared memory

inline std::string shapes(const Operand& a, const Operand& b) { return shape(a.a) + " x " + shape(b.a); }

inline Check check(const char* function, const Operand& a, const Operand& b, int64_t classes) {
  Check check(function);
  check.matrix(a.a, "the one operand").matrix(b.a, "the other operand").heads(a.transform, a.a);
  check.that(a.a.cols == b.a.cols, "operands " + shapes(a, b) + " have no common width");
  check.that(a.transform.heads == b.transform.heads, "the operands differ in heads");
  check.that(a.a.dtype == b.a.dtype, "the operands differ in dtype");
  return check.that(small_logits_fit(a.a.cols, classes, a.transform.heads), shapes(a, b) + " is not a small problem");
}

}  // namespace tde::cuda::small
