// An exponential that vectorises: for arguments <= 0, as after subtracting a maximum. Within 2 units in the last place.
#pragma once

#include <bit>
#include <cstdint>

namespace tde::cpu {
namespace {

inline float exp_nonpositive(float x) {
  constexpr float kLowest = -87.f;        // e^-87 is the end of the normal range; below it the result counts as 0
  constexpr float kRounder = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  constexpr float kLog2e = 1.44269504f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const float clamped = x < kLowest ? kLowest : x;  // a NaN passes
  const float shifted = clamped * kLog2e + kRounder;
  const float n = shifted - kRounder;
  const float r = (clamped - n * kLn2High) - n * kLn2Low;
  // Taylor's series to r^7/7!, |r| <= ln(2)/2: truncated below half a unit
  float p = 1.f / 5040;
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const uint32_t exponent = std::bit_cast<uint32_t>(shifted) << 23;  // n, where a float keeps its exponent
  // Multiplied, not added to the bits of p: of a NaN, whose low bits may be any, a NaN is to come out
  const float power = std::bit_cast<float>(exponent + 0x3f800000u);
  return x < kLowest ? 0.f : p * power;
}

}  // namespace
}  // namespace tde::cpu
