// Conversions between number formats. The frequent ones have an operation of their own; all others read the lanes
// as 64-bit integers or doubles, convert, and write them back.
#include <cmath>
#include <limits>

#include "lanewise.h"

namespace ptxe {
namespace {

// As convert.py numbers them.
enum class Type : uint32_t { U8, S8, U16, S16, U32, S32, U64, S64, F16, BF16, F32, F64, TF32 };
enum ConvertFlags : uint32_t { kFtz = 1, kSat = 2, kSatFinite = 4, kRelu = 8, kIntegral = 16 };

int bits_of(Type type) {
  switch (type) {
    case Type::U8: case Type::S8: return 8;
    case Type::U16: case Type::S16: case Type::F16: case Type::BF16: return 16;
    case Type::U64: case Type::S64: case Type::F64: return 64;
    default: return 32;
  }
}
bool is_signed(Type type) { return static_cast<uint32_t>(type) & 1; }  // of integers

// --- lanes as 64 bits. Registers may be wider than the type: what is above is ignored, and written as the sign or 0.

uint64_t load_bits(Warp& w, uint32_t slot, uint32_t register_bits, int lane) {
  switch (register_bits) {
    case 8: return w.values<uint8_t>(slot)[lane];
    case 16: return w.values<uint16_t>(slot)[lane];
    case 32: return w.values<uint32_t>(slot)[lane];
    default: return w.values<uint64_t>(slot)[lane];
  }
}
void store_bits(Warp& w, uint32_t slot, uint32_t register_bits, int lane, uint64_t bits) {
  switch (register_bits) {
    case 8: w.values<uint8_t>(slot)[lane] = static_cast<uint8_t>(bits); break;
    case 16: w.values<uint16_t>(slot)[lane] = static_cast<uint16_t>(bits); break;
    case 32: w.values<uint32_t>(slot)[lane] = static_cast<uint32_t>(bits); break;
    default: w.values<uint64_t>(slot)[lane] = bits;
  }
}
uint64_t extended(uint64_t bits, Type type) {
  const int unused = 64 - bits_of(type);
  if (is_signed(type)) return static_cast<uint64_t>(static_cast<int64_t>(bits << unused) >> unused);
  return bits << unused >> unused;
}

// --- floats as doubles

double flushed(double value, double min_normal) {
  return std::fabs(value) < min_normal ? std::copysign(0.0, value) : value;
}

double load_float(uint64_t bits, Type type, bool ftz) {
  switch (type) {
    case Type::F16: return fp16_to_float(static_cast<uint16_t>(bits));
    case Type::BF16: return bf16_to_float(static_cast<uint16_t>(bits));
    case Type::F64: return as_double(bits);
    default: {
      const double value = as_float(static_cast<uint32_t>(bits));
      return ftz ? flushed(value, 0x1p-126) : value;
    }
  }
}

const FloatFormat& format_of(Type type) {
  switch (type) {
    case Type::F16: return kFp16;
    case Type::BF16: return kBf16;
    case Type::TF32: return kTf32;
    default: return kFp32;
  }
}

double to_integral(double value, Rounding mode) {
  switch (mode) {
    case Rounding::Zero: return std::trunc(value);
    case Rounding::Down: return std::floor(value);
    case Rounding::Up: return std::ceil(value);
    default: return std::nearbyint(value);
  }
}

// What a NaN becomes. Its payload, or the upper part of it, is kept where an H200 keeps it.
uint64_t converted_nan(uint64_t bits, Type from, Type to, Rounding mode, uint32_t options) {
  if (to == Type::F64) return as_bits(load_float(bits, from, false)) | kQuietBit64;
  if (from == Type::F64) {
    const int width = bits_of(to), mantissa_bits = format_of(to).mantissa_bits;
    const uint64_t top = uint64_t{1} << (width - 1);
    const uint64_t sign = bits >> 63 ? top : 0, exponent = top - (uint64_t{1} << mantissa_bits);
    const uint64_t mantissa = (bits | kQuietBit64) << 12 >> (64 - mantissa_bits);
    return sign | exponent | mantissa;
  }
  if (to == Type::F16 || to == Type::BF16) return kCanonicalNan16;
  if (from == Type::BF16 && !(options & kFtz)) return bits << 16;
  if (to == Type::TF32) return mode == Rounding::NearestAway ? bits & 0xffffe000 : 0x7fffe000;
  return kCanonicalNan;
}

// Of a number, not a NaN.
uint64_t store_float(double value, Type type, Rounding mode, uint32_t options) {
  if (options & kIntegral) value = to_integral(value, mode);
  if (options & kSat) value = value > 0.0 ? (value < 1.0 ? value : 1.0) : 0.0;
  if (options & kRelu) value = value <= 0.0 ? 0.0 : value;
  if (type == Type::F64) return as_bits(value);
  const FloatFormat& format = format_of(type);
  const bool flush = (options & kFtz) && type == Type::F32;
  value = round_to(value, flush ? kFp32AnyExponent : format, mode);
  if ((options & kSatFinite) && std::isinf(value)) value = std::copysign(format.max_finite, value);
  if (flush) value = flushed(value, 0x1p-126);
  const float single = static_cast<float>(value);
  if (type == Type::F16) return float_to_fp16(single);
  if (type == Type::BF16) return float_to_bf16(single);
  return as_bits(single);
}

// A float that is not a number becomes 0, except where the source is f64 or the result has 64 bits: 2^(bits-1).
uint64_t float_to_integer(double value, Type from, Type to, Rounding mode) {
  const int bits = bits_of(to);
  if (std::isnan(value)) return from == Type::F64 || bits == 64 ? uint64_t{1} << (bits - 1) : 0;
  value = to_integral(value, mode);
  const double limit = std::ldexp(1.0, is_signed(to) ? bits - 1 : bits);
  if (is_signed(to)) {
    if (value >= limit) return (uint64_t{1} << (bits - 1)) - 1;
    if (value <= -limit) return ~uint64_t{0} << (bits - 1);
    return static_cast<uint64_t>(static_cast<int64_t>(value));
  }
  if (value >= limit) return ~uint64_t{0} >> (64 - bits);
  return value <= 0 ? 0 : static_cast<uint64_t>(value);
}

uint64_t saturate_integer(uint64_t bits, Type from, Type to) {
  const bool negative = is_signed(from) && static_cast<int64_t>(bits) < 0;
  const int width = bits_of(to);
  const uint64_t high = ~uint64_t{0} >> (64 - width + (is_signed(to) ? 1 : 0));
  if (!negative) return bits > high ? high : bits;
  if (!is_signed(to)) return 0;
  const auto low = static_cast<int64_t>(~high);
  return static_cast<int64_t>(bits) < low ? static_cast<uint64_t>(low) : bits;
}

// The number that rounds like a 64-bit integer to formats of at most 51 bits.
double integer_to_odd(uint64_t bits, Type from) {
  const bool negative = is_signed(from) && static_cast<int64_t>(bits) < 0;
  uint64_t magnitude = negative ? 0 - bits : bits;
  if (magnitude >> 53) magnitude = (magnitude & ~uint64_t{0x7ff}) | ((magnitude & 0x7ff) != 0 ? 0x800 : 0);
  const auto value = static_cast<double>(magnitude);
  return negative ? -value : value;
}

struct Conversion {
  uint32_t d, a, d_bits, a_bits;
  Type to, from;
  Rounding mode;
  uint32_t options;
  explicit Conversion(const Instruction& i)
      : d(i.args[0]), a(i.args[1]), d_bits(i.args[2]), a_bits(i.args[3]), to(static_cast<Type>(i.args[4])),
        from(static_cast<Type>(i.args[5])), mode(static_cast<Rounding>(i.args[6])), options(i.args[7]) {}
};

uint64_t converted(uint64_t bits, const Conversion& c) {
  const double value = load_float(bits, c.from, c.options & kFtz);
  if (value == value) return store_float(value, c.to, c.mode, c.options);
  return c.options & kSat ? 0 : converted_nan(bits, c.from, c.to, c.mode, c.options);
}

// All of them: destination, source, bits of both registers, both types, rounding, options.
PTXE_OP("cvt.integer") {
  const Conversion c(i);
  each_lane(w, [&](int lane) {
    uint64_t bits = extended(load_bits(w, c.a, c.a_bits, lane), c.from);
    if (c.options & kSat) bits = saturate_integer(bits, c.from, c.to);
    store_bits(w, c.d, c.d_bits, lane, extended(bits, c.to));
  });
  return Step::Next;
}
PTXE_OP("cvt.to_integer") {
  const Conversion c(i);
  each_lane(w, [&](int lane) {
    const double value = load_float(load_bits(w, c.a, c.a_bits, lane), c.from, c.options & kFtz);
    store_bits(w, c.d, c.d_bits, lane, extended(float_to_integer(value, c.from, c.to, c.mode), c.to));
  });
  return Step::Next;
}
PTXE_OP("cvt.from_integer") {
  const Conversion c(i);
  each_lane(w, [&](int lane) {
    const uint64_t bits = extended(load_bits(w, c.a, c.a_bits, lane), c.from);
    store_bits(w, c.d, c.d_bits, lane, store_float(integer_to_odd(bits, c.from), c.to, c.mode, c.options));
  });
  return Step::Next;
}
PTXE_OP("cvt.float") {
  const Conversion c(i);
  each_lane(w, [&](int lane) {
    store_bits(w, c.d, c.d_bits, lane, converted(load_bits(w, c.a, c.a_bits, lane), c));
  });
  return Step::Next;
}
// Destination, a (upper half), b (lower half), type of the halves, rounding, options.
PTXE_OP("cvt.pair") {
  const auto type = static_cast<Type>(i.args[3]);
  const auto mode = static_cast<Rounding>(i.args[4]);
  const float *a = w.values<float>(i.args[1]), *b = w.values<float>(i.args[2]);
  const auto half = [&](float value) {
    return value == value ? store_float(value, type, mode, i.args[5]) : uint64_t{kCanonicalNan16};
  };
  each_lane(w, [&](int lane) {
    w.values<uint32_t>(i.args[0])[lane] = static_cast<uint32_t>(half(a[lane]) << 16 | half(b[lane]));
  });
  return Step::Next;
}

// --- the frequent ones

template <class D, class S> D resized(S a) { return static_cast<D>(a); }
template <class D, class S> D number(S a) { return static_cast<D>(a); }

float single_nan(float value) { return value == value ? value : as_float(kCanonicalNan); }
float fp16_single(uint16_t a) { return single_nan(fp16_to_float(a)); }
float narrowed(double a) { return static_cast<float>(a); }  // of a NaN's payload the upper bits
float relu(float value) { return value <= 0.0f ? 0.0f : value; }
uint32_t fp16_pair(float a, float b) { return static_cast<uint32_t>(float_to_fp16(a)) << 16 | float_to_fp16(b); }
uint32_t bf16_pair(float a, float b) { return static_cast<uint32_t>(float_to_bf16(a)) << 16 | float_to_bf16(b); }

double integral_nearest(double value) { return std::nearbyint(value); }
double integral_zero(double value) { return std::trunc(value); }
double integral_down(double value) { return std::floor(value); }
double integral_up(double value) { return std::ceil(value); }

// Rounded to a whole number, saturating; NaN gives 0.
template <class D, auto Integral> D whole(float a) {
  constexpr double low = std::numeric_limits<D>::min(), high = std::numeric_limits<D>::max();
  double value = Integral(a);
  value = value > low ? value : low;
  value = value < high ? value : high;
  return a == a ? static_cast<D>(static_cast<int64_t>(value)) : D{0};
}

#define FROM_INTEGER(type, S)                                                                   \
  {"cvt.b16." type, Lanewise<&resized<uint16_t, S>>::run}, {"cvt.b32." type, Lanewise<&resized<uint32_t, S>>::run}, \
  {"cvt.b64." type, Lanewise<&resized<uint64_t, S>>::run},                                      \
  {"cvt.f32." type, Rounded<&number<float, S>>::run}, {"cvt.f64." type, Rounded<&number<double, S>>::run}

#define WHOLE(name, integral)                                        \
  {name ".s32.f32", Lanewise<&whole<int32_t, &integral>>::run},     \
  {name ".u32.f32", Lanewise<&whole<uint32_t, &integral>>::run}

const Register kFrequent[] = {
    FROM_INTEGER("u16", uint16_t), FROM_INTEGER("s16", int16_t), FROM_INTEGER("u32", uint32_t),
    FROM_INTEGER("s32", int32_t),  FROM_INTEGER("u64", uint64_t), FROM_INTEGER("s64", int64_t),
    {"cvt.f32.f64", Rounded<&narrowed>::run},
    {"cvt.f64.f32", Lanewise<&number<double, float>>::run},
    {"cvt.f32.f16", Lanewise<&fp16_single>::run},
    {"cvt.f32.bf16", Lanewise<&bf16_to_float>::run},
    {"cvt.f16.f32", Lanewise<&float_to_fp16>::run},
    {"cvt.bf16.f32", Lanewise<&float_to_bf16>::run},
    {"cvt.f16x2.f32", Lanewise<&fp16_pair>::run},
    {"cvt.bf16x2.f32", Lanewise<&bf16_pair>::run},
    WHOLE("cvt.rni", integral_nearest), WHOLE("cvt.rzi", integral_zero), WHOLE("cvt.rmi", integral_down),
    WHOLE("cvt.rpi", integral_up),
};

// --- pairs of small formats, nearest even and saturating

template <class Format> struct Small {
  static constexpr bool kNibble = Format::kBits == 4;
  using Pair = std::conditional_t<kNibble, uint8_t, uint16_t>;
  static constexpr int kShift = kNibble ? 4 : 8;
  static Pair pack(float high, float low) {
    return static_cast<Pair>(Format::encode(high) << kShift | Format::encode(low));
  }
  static Pair from_floats(float high, float low) { return pack(high, low); }
  static Pair from_floats_relu(float high, float low) { return pack(relu(high), relu(low)); }
  static Pair from_halves(uint32_t a) {
    return pack(fp16_to_float(static_cast<uint16_t>(a >> 16)), fp16_to_float(static_cast<uint16_t>(a)));
  }
  static Pair from_halves_relu(uint32_t a) {
    return pack(relu(fp16_to_float(static_cast<uint16_t>(a >> 16))), relu(fp16_to_float(static_cast<uint16_t>(a))));
  }
};
template <auto Decode, int Shift, bool Relu, class Pair> uint32_t to_halves(Pair codes) {
  constexpr uint32_t kMask = (1u << Shift) - 1;
  float high = Decode(static_cast<uint8_t>(codes >> Shift & kMask)), low = Decode(static_cast<uint8_t>(codes & kMask));
  if constexpr (Relu) high = relu(high), low = relu(low);
  return fp16_pair(high, low);
}

#define SMALL(name, Format, Decode)                                                                     \
  {"cvt." name ".f32", Lanewise<&Small<Format>::from_floats>::run},                                     \
  {"cvt.relu." name ".f32", Lanewise<&Small<Format>::from_floats_relu>::run},                           \
  {"cvt." name ".f16x2", Lanewise<&Small<Format>::from_halves>::run},                                   \
  {"cvt.relu." name ".f16x2", Lanewise<&Small<Format>::from_halves_relu>::run},                         \
  {"cvt.f16x2." name, Lanewise<&to_halves<&Decode, Small<Format>::kShift, false, Small<Format>::Pair>>::run}, \
  {"cvt.relu.f16x2." name, Lanewise<&to_halves<&Decode, Small<Format>::kShift, true, Small<Format>::Pair>>::run}

const Register kSmall[] = {
    SMALL("e4m3x2", E4m3, e4m3_to_float), SMALL("e5m2x2", E5m2, e5m2_to_float), SMALL("e2m1x2", E2m1, e2m1_to_float),
    SMALL("e2m3x2", E2m3, e2m3_to_float), SMALL("e3m2x2", E3m2, e3m2_to_float),
};

template <bool Up, bool Saturate> uint16_t scales(float high, float low) {
  return static_cast<uint16_t>(float_to_ue8m0(high, Up, Saturate) << 8 | float_to_ue8m0(low, Up, Saturate));
}
template <bool Up, bool Saturate> uint16_t scales_of_pair(uint32_t a) {
  return scales<Up, Saturate>(bf16_to_float(static_cast<uint16_t>(a >> 16)), bf16_to_float(static_cast<uint16_t>(a)));
}
uint32_t scales_to_pair(uint16_t codes) {
  return bf16_pair(ue8m0_to_float(static_cast<uint8_t>(codes >> 8)), ue8m0_to_float(static_cast<uint8_t>(codes)));
}
#define SCALES(suffix, up, saturate)                                   \
  {"cvt" suffix ".ue8m0x2.f32", Lanewise<&scales<up, saturate>>::run}, \
  {"cvt" suffix ".ue8m0x2.bf16x2", Lanewise<&scales_of_pair<up, saturate>>::run}

const Register kScales[] = {
    SCALES(".rz", false, false), SCALES(".rz.satfinite", false, true), SCALES(".rp", true, false),
    SCALES(".rp.satfinite", true, true), {"cvt.bf16x2.ue8m0x2", Lanewise<&scales_to_pair>::run},
};

// Destination, a, b, bits of the result, whether it is signed, bits to take c up by (0: there is none)[, c].
// Two saturated numbers side by side, a above b, above them the low bits of c.
PTXE_OP("cvt.pack") {
  const uint32_t bits = i.args[3];
  const int64_t low = i.args[4] ? -(int64_t{1} << (bits - 1)) : 0;
  const int64_t high = (int64_t{1} << (i.args[4] ? bits - 1 : bits)) - 1;
  const uint32_t mask = (1u << bits) - 1;
  const auto clamped = [&](uint32_t slot, int lane) {
    const int64_t value = w.values<int32_t>(slot)[lane];
    return static_cast<uint32_t>(value < low ? low : value > high ? high : value) & mask;
  };
  each_lane(w, [&](int lane) {
    uint32_t result = clamped(i.args[1], lane) << bits | clamped(i.args[2], lane);
    if (i.args[5]) result |= w.values<uint32_t>(i.args[6])[lane] << i.args[5];
    w.values<uint32_t>(i.args[0])[lane] = result;
  });
  return Step::Next;
}

}  // namespace
}  // namespace ptxe
