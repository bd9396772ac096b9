// exp(x) for loops that the compiler vectorises: no jump, no table, no call.
#pragma once

#include <cstdint>
#include <cstring>

#include "bfloat16.h"

namespace puat {

// At most 1 ulp off between -87 and 88; inf from 88.4 on (not 88.7), 0 instead of subnormal numbers; NaN gives NaN.
// exp(x) = 2^n exp(r) with n = round(x / ln 2), so |r| <= ln(2) / 2: there the polynomial of Cephes (Moshier, expf.c).
PUAT_HOST_DEVICE inline float exp(float given) {
  float x = given < -88.0f ? -88.0f : given;  // n is -127 at least, and 128 at most
  x = given > 89.0f ? 89.0f : x;              // asks `given` again: of a chain, gcc would make a jump
  constexpr float kRound = 12582912.0f;       // 1.5 * 2^23: the sum has no bits left for a fraction
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
  // The bits of `shifted` count n. Exponent n + 127 is that of 2^n; of 0 for n = -127, of inf for n = 128.
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits - kRoundBits + 127u) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}

}  // namespace puat
