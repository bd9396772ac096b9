// exp(x) for loops that the compiler vectorises: no jump, no table, no call.
#pragma once

#include <cstdint>
#include <cstring>

#include "bfloat16.h"

namespace puat {

// At most 1 ulp off, also below the smallest normal number; beyond the range 0 and inf; NaN gives NaN.
// exp(x) = 2^n exp(r) with n = round(x / ln 2), so |r| <= ln(2) / 2: there the polynomial of Cephes (Moshier, expf.c).
PUAT_HOST_DEVICE inline float exp(float given) {
  // exp is inf from 88.73 on and 0 from -103.98 on. Both ask `given`: of a chain, gcc would make a jump.
  float x = given < -104.0f ? -104.0f : given;
  x = given > 89.0f ? 89.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the sum has no bits left for a fraction
  constexpr uint32_t kRoundBits = 0x4B400000u;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts: n times the first is exact
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^n in two factors, since 2^128 and 2^-150 are no floats. Their exponents come from the bits of `shifted`.
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const int32_t power = static_cast<int32_t>(bits - kRoundBits);
  const int32_t half = power >> 1;
  const uint32_t first_bits = static_cast<uint32_t>(half + 127) << 23;
  const uint32_t second_bits = static_cast<uint32_t>(power - half + 127) << 23;
  float first, second;
  std::memcpy(&first, &first_bits, sizeof(first));
  std::memcpy(&second, &second_bits, sizeof(second));
  return p * first * second;
}

}  // namespace puat
