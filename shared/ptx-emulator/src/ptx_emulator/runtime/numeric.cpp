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

// `rounded` plus an error that was lost, with the last bit as a memory of it.
static double with_sticky(double rounded, double error) {
  if (error == 0 || !std::isfinite(rounded)) return rounded;
  uint64_t bits = as_bits(rounded);
  if (bits & 1) return rounded;
  const bool outwards = (error > 0) == (rounded > 0);
  return as_double(outwards ? bits + 1 : bits - 1);
}

double fma_to_odd(double a, double b, double c) {
  const double product = a * b;  // exact: 48 bits at most
  const double sum = product + c;
  const double part = sum - product;
  const double error = (product - (sum - part)) + (c - part);
  return with_sticky(sum, error);
}

float to_odd_float(double value) {
  const float rounded = static_cast<float>(value);
  const double error = value - static_cast<double>(rounded);
  if (error == 0 || !std::isfinite(rounded)) return rounded;
  const uint32_t bits = as_bits(rounded);
  if (bits & 1) return rounded;
  if ((bits & 0x7fffffff) == 0) return as_float((value < 0 ? 0x80000000u : 0u) | 1u);
  const bool outwards = (error > 0) == (rounded > 0);
  return as_float(outwards ? bits + 1 : bits - 1);
}

}  // namespace ptxe
