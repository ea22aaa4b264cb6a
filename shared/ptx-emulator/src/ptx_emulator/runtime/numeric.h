// Conversions between the number formats of the PTX and float, by value.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace ptxe {

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline double as_double(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}
inline uint64_t as_bits(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, 8);
  return bits;
}

constexpr uint32_t kCanonicalNan = 0x7fffffff;  // of f32 and tf32
constexpr uint16_t kCanonicalNan16 = 0x7fff;    // of f16 and bf16
constexpr uint64_t kQuietBit64 = uint64_t{1} << 51;

// Numbers as the lowering passes them (modifiers.py, convert.py).
enum class Rounding : uint32_t { Nearest, Zero, Down, Up, NearestAway };

// ---------------------------------------------------------------------------------------------- small formats

// A format of at most 8 bits without infinities that are ever written: exponent and mantissa bits, exponent bias,
// the code of the largest finite value, and what NaN becomes.
template <int E, int M, int Bias, uint32_t MaxCode, uint32_t NanCode>
struct SmallFormat {
  static constexpr int kBits = 1 + E + M;
  static constexpr uint32_t kSign = 1u << (E + M);
  static constexpr uint32_t kMaxFloat = ((MaxCode >> M) + 127 - Bias) << 23 | (MaxCode & ((1u << M) - 1)) << (23 - M);

  // Round to nearest even, saturating.
  static uint8_t encode(float value) {
    const uint32_t bits = as_bits(value);
    uint32_t magnitude = bits & 0x7fffffff;
    const bool nan = magnitude > 0x7f800000;
    magnitude = magnitude < kMaxFloat ? magnitude : kMaxFloat;
    constexpr int kShift = 23 - M;
    const uint32_t normal =
        ((magnitude + ((1u << (kShift - 1)) - 1) + (magnitude >> kShift & 1)) >> kShift) - ((127 - Bias) << M);
    // Adding 2^23 quanta lets the host round to a whole number of them.
    constexpr uint32_t kQuanta = static_cast<uint32_t>(24 - Bias - M + 127) << 23;
    const uint32_t subnormal = as_bits(as_float(magnitude) + as_float(kQuanta)) - kQuanta;
    constexpr uint32_t kMinNormal = static_cast<uint32_t>(1 - Bias + 127) << 23;
    const uint32_t code = magnitude < kMinNormal ? subnormal : normal;
    return static_cast<uint8_t>(nan ? NanCode : code | (bits >> 31) * kSign);
  }

  static float decode(uint8_t code) {
    constexpr uint32_t kScale = static_cast<uint32_t>(127 - Bias + 127) << 23;
    const float magnitude = as_float((code & (kSign - 1u)) << (23 - M)) * as_float(kScale);
    return as_float(as_bits(magnitude) | static_cast<uint32_t>((code & kSign) != 0) << 31);
  }
};

using E4m3 = SmallFormat<4, 3, 7, 0x7e, 0x7f>;
using E5m2 = SmallFormat<5, 2, 15, 0x7b, 0x7f>;
using E2m1 = SmallFormat<2, 1, 1, 0x7, 0x7>;    // NaN becomes the largest value, as in all formats without NaN
using E2m3 = SmallFormat<2, 3, 1, 0x1f, 0x1f>;
using E3m2 = SmallFormat<3, 2, 3, 0x1f, 0x1f>;

// ---------------------------------------------------------------------------------------------- to float

inline float bf16_to_float(uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }
inline float fp16_to_float(uint16_t bits) {
  const float scaled = as_float((bits & 0x7fffu) << 13) * 0x1p112f;  // infinity and NaN as if they were finite
  const uint32_t special = (bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return as_float(as_bits(scaled) | special | (bits & 0x8000u) << 16);
}
inline float e4m3_to_float(uint8_t bits) {
  return (bits & 0x7f) == 0x7f ? as_float(kCanonicalNan) : E4m3::decode(bits);
}
inline float e5m2_to_float(uint8_t bits) { return fp16_to_float(static_cast<uint16_t>(bits << 8)); }
inline float e2m1_to_float(uint8_t bits) { return E2m1::decode(bits & 0xf); }   // low four bits
inline float e2m3_to_float(uint8_t bits) { return E2m3::decode(bits & 0x3f); }  // low six bits
inline float e3m2_to_float(uint8_t bits) { return E3m2::decode(bits & 0x3f); }  // low six bits
inline float tf32_to_float(uint32_t bits) { return as_float(bits & 0xffffe000u); }  // operand of an MMA
inline float ue8m0_to_float(uint8_t bits) {  // 2^(bits-127), 0xff is NaN
  const uint32_t normal = static_cast<uint32_t>(bits) << 23;
  return as_float(bits == 0xff ? kCanonicalNan : bits == 0 ? 0x00400000u : normal);
}

// ---------------------------------------------------------------------------------------------- from float

// Round to nearest even; NaN becomes 0x7fff.
inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? kCanonicalNan16 : rounded);
}
inline uint16_t float_to_fp16(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t normal = ((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - (112 << 10);
  normal = normal < 0x7c00 ? normal : 0x7c00;
  // Adding 2^23 of the smallest subnormal lets the host round to a whole number of them.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t code = (magnitude < 0x38800000 ? subnormal : normal) | bits >> 31 << 15;
  return static_cast<uint16_t>(magnitude > 0x7f800000 ? kCanonicalNan16 : code);
}

// Round to nearest even, saturating to the largest finite value. NaN becomes 0x7f, or the largest where there is none.
inline uint8_t float_to_e4m3(float value) { return E4m3::encode(value); }
inline uint8_t float_to_e5m2(float value) { return E5m2::encode(value); }
inline uint8_t float_to_e2m1(float value) { return E2m1::encode(value); }
inline uint8_t float_to_e2m3(float value) { return E2m3::encode(value); }
inline uint8_t float_to_e3m2(float value) { return E3m2::encode(value); }

// A scale, that is an exponent: the sign is ignored, NaN becomes 0xff. `up` rounds to the power of two above, else
// below. Beyond 2^127 it saturates to 0xfe, or becomes 0xff without `saturate`.
uint8_t float_to_ue8m0(float value, bool up, bool saturate);

// ---------------------------------------------------------------------------------------------- any rounding

// A binary format by its precision: a value is a multiple of 2^(exponent - mantissa_bits).
struct FloatFormat {
  int mantissa_bits;
  int min_exponent;
  double max_finite;
};
constexpr FloatFormat kFp16{10, -14, 65504.0};
constexpr FloatFormat kBf16{7, -126, 0x1.fep127};
constexpr FloatFormat kTf32{10, -126, 0x1.ffcp127};
constexpr FloatFormat kFp32{23, -126, 0x1.fffffep127};
constexpr FloatFormat kFp32AnyExponent{23, -1022, 0x1.fffffep127};

// The value of the format next to `value` in the rounding mode, infinity on overflow where the mode says so.
double round_to(double value, const FloatFormat& format, Rounding mode);

// Rounding to odd: the last bit is set if the exact value lies beside `rounded`, on the side of the sign of `error`.
// What is rounded once more to a format with at least two bits less is then as if it had been rounded once.
inline double to_odd(double rounded, double error) {
  const uint64_t bits = as_bits(rounded);
  const uint64_t outwards = 1 - 2 * ((as_bits(error) ^ bits) >> 63);  // or inwards, as -1
  const uint64_t if_even = (bits & 1) - 1;
  return as_double(bits + (std::fabs(error) > 0 ? outwards & if_even : 0));
}
inline float to_odd_float(double value) {
  const float rounded = static_cast<float>(value);
  const double error = value - static_cast<double>(rounded);
  const uint32_t bits = as_bits(rounded);
  const uint32_t outwards = 1 - 2 * (static_cast<uint32_t>(as_bits(error) >> 63) ^ bits >> 31);
  const uint32_t if_even = (bits & 1) - 1;
  return as_float(bits + (std::fabs(error) > 0 ? outwards & if_even : 0));
}

// a * b + c rounded to odd; the product must be exact as a double.
inline float fma_to_odd(float a, float b, float c) {
  const double product = static_cast<double>(a) * static_cast<double>(b);
  const double sum = product + static_cast<double>(c);
  const double part = sum - product;
  const double error = (product - (sum - part)) + (static_cast<double>(c) - part);
  return to_odd_float(to_odd(sum, error));
}

// .ftz makes zero of an f32 result that, rounded to 24 bits whatever its exponent, lies below the smallest normal
// number. Hosts round to the coarser grid of subnormals, which reaches that number from further below; so `scaled` is
// the result of the same operation, in the same rounding mode, with operands scaled up by kFlushScale.
constexpr float kFlushScale = 0x1p30f;
inline float flush_result(float result, float scaled) {
  return std::fabs(scaled) < 0x1p-126f * kFlushScale ? std::copysign(0.0f, result) : result;
}

// 2^x to within one unit of the last place of a float.
inline float exp2_float(float x) {
  // 2^n * 2^f with f in [-0.5, 0.5]; the polynomial is the series of exp(f ln 2), exact to 3e-13.
  double clamped = x < -200.0f ? -200.0 : static_cast<double>(x);
  clamped = clamped > 200.0 ? 200.0 : clamped;
  constexpr double kShift = 0x1.8p52;
  const double shifted = clamped + kShift;
  const double f = (clamped - (shifted - kShift)) * 0.6931471805599453;
  double p = 1.0 / 3628800;
  p = p * f + 1.0 / 362880;
  p = p * f + 1.0 / 40320;
  p = p * f + 1.0 / 5040;
  p = p * f + 1.0 / 720;
  p = p * f + 1.0 / 120;
  p = p * f + 1.0 / 24;
  p = p * f + 1.0 / 6;
  p = p * f + 0.5;
  p = p * f + 1.0;
  p = p * f + 1.0;
  const double power = as_double((as_bits(shifted) << 52) + (uint64_t{1023} << 52));
  const float result = static_cast<float>(p * power);
  return x == x ? result : as_float(kCanonicalNan);
}

}  // namespace ptxe
