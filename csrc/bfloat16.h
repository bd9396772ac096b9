// bfloat16 as its 16 bits, for host and device alike: the upper half of a float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "arithmetic.h"

namespace puat {

struct BFloat16 {
  uint16_t bits;
};

PUAT_HOST_DEVICE inline float to_float(float value) { return value; }

PUAT_HOST_DEVICE inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  memcpy(&out, &bits, sizeof(out));
  return out;
}

PUAT_HOST_DEVICE inline void store(float* to, float value) { *to = value; }

// Rounds to nearest, ties to even, as torch does; any NaN becomes the quiet one, as torch has it on the CPU.
PUAT_HOST_DEVICE inline void store(BFloat16* to, float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>(value != value ? 0x7FC0u : rounded);
}

}  // namespace puat
