#include "numeric.h"

namespace ptxe {

uint8_t float_to_ue8m0(float value, bool up, bool saturate) {
  const uint32_t magnitude = as_bits(value) & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0xff;
  uint32_t exponent = magnitude >> 23;
  const uint32_t mantissa = magnitude & 0x7fffff;
  // Code 0 is 2^-127, half of the smallest normal float: of subnormals only those above it round up to code 1.
  const bool above = exponent == 0 ? mantissa > 0x400000 : mantissa != 0;
  if (up && above && exponent < 0xff) ++exponent;
  if (exponent == 0xff) return saturate ? 0xfe : 0xff;
  return static_cast<uint8_t>(exponent);
}

static double round_integral(double value, Rounding mode) {
  switch (mode) {
    case Rounding::Zero: return std::trunc(value);
    case Rounding::Down: return std::floor(value);
    case Rounding::Up: return std::ceil(value);
    case Rounding::NearestAway: return std::round(value);
    default: return std::nearbyint(value);
  }
}

static double on_overflow(double rounded, const FloatFormat& format, Rounding mode) {
  const bool away = mode == Rounding::Nearest || mode == Rounding::NearestAway ||
                    (mode == Rounding::Up && rounded > 0) || (mode == Rounding::Down && rounded < 0);
  return std::copysign(away ? HUGE_VAL : format.max_finite, rounded);
}

double round_to(double value, const FloatFormat& format, Rounding mode) {
  if (value == 0 || !std::isfinite(value)) return value;
  int exponent = std::ilogb(value);
  if (exponent < format.min_exponent) exponent = format.min_exponent;
  const int quantum = exponent - format.mantissa_bits;
  // A double far below the smallest quantum would underflow in scaling only if scaled down; it is scaled up here.
  const double rounded = std::ldexp(round_integral(std::ldexp(value, -quantum), mode), quantum);
  if (std::fabs(rounded) > format.max_finite) return on_overflow(rounded, format, mode);
  return std::copysign(rounded, value);
}

}  // namespace ptxe
