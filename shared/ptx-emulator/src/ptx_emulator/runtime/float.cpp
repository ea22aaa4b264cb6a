// f32 and f64 arithmetic. Operations that PTX rounds take the rounding mode as their last argument.
// The .approx functions give the correctly rounded result or one next to it: closer than the hardware, not its bits.
#include <cmath>
#include <limits>
#include <type_traits>

#include "lanewise.h"

namespace ptxe {
namespace {

enum Flags : int { kPlain = 0, kFtz = 1, kSat = 2, kNan = 4, kXorSign = 8 };

float canonical(float value) { return value == value ? value : as_float(kCanonicalNan); }
// The payload of an f64 NaN is kept, but it becomes a quiet one.
double canonical(double value) { return value == value ? value : as_double(as_bits(value) | kQuietBit64); }

template <int F> float flush(float value) {
  if constexpr ((F & kFtz) == 0) return value;
  const uint32_t bits = as_bits(value);
  return as_float((bits & 0x7f800000) == 0 ? bits & 0x80000000 : bits);
}
template <int F> double flush(double value) { return value; }

// What becomes of a computed result: flushed, clamped to [0, 1] with NaN as 0, or NaN made canonical.
template <int F, class T> T finish(T value) {
  value = flush<F>(value);
  if constexpr (F & kSat) {
    const T clamped = value < T{1} ? value : T{1};
    return value > T{0} ? clamped : T{0};
  }
  return canonical(value);
}

// Sums are exact where they are subnormal. Of f64 NaNs the second operand's payload is kept, then the third's.
template <int F, class T> T add(T a, T b) {
  if constexpr (std::is_same_v<T, double>) return canonical(b == b ? a + b : b);
  return finish<F>(flush<F>(a) + flush<F>(b));
}
template <int F, class T> T sub(T a, T b) {
  if constexpr (std::is_same_v<T, double>) return canonical(b == b ? a - b : b);
  return finish<F>(flush<F>(a) - flush<F>(b));
}

// The result of an operation on flushed operands. Its first factor, the dividend or all summands can be scaled.
template <int F, class T, class Operation> T rounded(Operation operation) {
  T result = operation(T{1});
  if constexpr ((F & kFtz) != 0 && std::is_same_v<T, float>) result = flush_result(result, operation(kFlushScale));
  return finish<F>(result);
}
template <int F, class T> T mul(T a, T b) {
  if constexpr (std::is_same_v<T, double>) return canonical(b == b ? a * b : b);
  return rounded<F, T>([a = flush<F>(a), b = flush<F>(b)](T scale) { return a * scale * b; });
}
template <int F, class T> T fma_of(T a, T b, T c) {
  if constexpr (std::is_same_v<T, double>) return canonical(b != b ? b : c == c ? std::fma(a, b, c) : c);
  const T x = flush<F>(a), y = flush<F>(b), z = flush<F>(c);
  return rounded<F, T>([=](T scale) { return std::fma(x * scale, y, z * scale); });
}
template <int F, class T> T div(T a, T b) {
  return rounded<F, T>([a = flush<F>(a), b = flush<F>(b)](T scale) { return a * scale / b; });
}
template <int F, class T> T rcp(T a) { return rounded<F, T>([a = flush<F>(a)](T scale) { return scale / a; }); }
template <int F, class T> T sqrt_of(T a) { return finish<F>(std::sqrt(flush<F>(a))); }

// div.approx gives 0, or NaN for an infinite dividend, where 1/b would be subnormal.
template <int F> float div_approx(float a, float b) {
  const float x = flush<F>(a), y = flush<F>(b);
  const float magnitude = std::fabs(y);
  if (magnitude > 0x1p126f && magnitude < HUGE_VALF) {
    if (std::isinf(x) || std::isnan(x)) return as_float(kCanonicalNan);
    return std::copysign(0.0f, as_float(as_bits(x) ^ as_bits(y)));
  }
  return finish<F>(x / y);
}
template <int F> float rsqrt(float a) {
  return finish<F>(static_cast<float>(1.0 / std::sqrt(static_cast<double>(flush<F>(a)))));
}
double rsqrt64(double a) { return 1.0 / std::sqrt(a); }
template <int F> float ex2(float a) { return flush<F>(exp2_float(flush<F>(a))); }
template <int F> float lg2(float a) {
  return finish<F>(static_cast<float>(std::log2(static_cast<double>(flush<F>(a)))));
}
template <int F> float sin_of(float a) {
  return finish<F>(static_cast<float>(std::sin(static_cast<double>(flush<F>(a)))));
}
template <int F> float cos_of(float a) {
  return finish<F>(static_cast<float>(std::cos(static_cast<double>(flush<F>(a)))));
}
template <int F> float tanh_of(float a) { return finish<F>(static_cast<float>(std::tanh(static_cast<double>(a)))); }

// rcp.approx.ftz.f64 and rsqrt.approx.ftz.f64 read and write the upper word; subnormals are zero.
double upper_word(double value) {
  const uint64_t bits = as_bits(value);
  const bool subnormal = (bits >> 52 & 0x7ff) == 0;
  return as_double(subnormal ? bits & (uint64_t{1} << 63) : bits & ~uint64_t{0xffffffff});
}
double from_upper_word(double value) {
  return std::isnan(value) ? as_double(uint64_t{0x7fffffff} << 32) : upper_word(value);
}
double rcp64_approx(double a) { return from_upper_word(1.0 / upper_word(a)); }
double rsqrt64_approx(double a) { return from_upper_word(1.0 / std::sqrt(upper_word(a))); }

float neg_bits(float a) { return as_float(as_bits(a) ^ 0x80000000); }
double neg_bits(double a) { return as_double(as_bits(a) ^ uint64_t{1} << 63); }
float abs_bits(float a) { return as_float(as_bits(a) & 0x7fffffff); }
double abs_bits(double a) { return as_double(as_bits(a) & ~(uint64_t{1} << 63)); }
template <int F, class T> T neg(T a) { return a == a ? flush<F>(neg_bits(a)) : canonical(a); }
template <int F, class T> T abs_of(T a) { return a == a ? flush<F>(abs_bits(a)) : canonical(a); }
template <class T> T copy_sign(T a, T b) { return std::copysign(b, a); }  // the sign of a, the rest of b

// Whether a goes before b, with -0 before +0.
bool before(float a, float b) {
  const auto key = [](float v) {
    const auto bits = static_cast<int32_t>(as_bits(v));
    return bits ^ static_cast<int32_t>(static_cast<uint32_t>(bits >> 31) >> 1);
  };
  return key(a) < key(b);
}
bool before(double a, double b) {
  const auto key = [](double v) {
    const auto bits = static_cast<int64_t>(as_bits(v));
    return bits ^ static_cast<int64_t>(static_cast<uint64_t>(bits >> 63) >> 1);
  };
  return key(a) < key(b);
}

template <int F, bool Max, class T> T extreme(T a, T b) {
  T x = flush<F>(a), y = flush<F>(b);
  if constexpr (F & kXorSign) x = abs_bits(x), y = abs_bits(y);
  const bool first = before(x, y) != Max;
  T result = first ? x : y;
  if constexpr (F & kNan)
    result = x == x ? (y == y ? result : y) : x;
  else
    result = x == x ? (y == y ? result : x) : y;
  if constexpr (F & kXorSign) {
    if (std::signbit(a) != std::signbit(b)) result = neg_bits(result);
  }
  return canonical(result);
}
template <int F, class T> T min_of(T a, T b) { return extreme<F, false>(a, b); }
template <int F, class T> T max_of(T a, T b) { return extreme<F, true>(a, b); }
template <int F, class T> T min3(T a, T b, T c) { return min_of<F>(min_of<F>(a, b), c); }
template <int F, class T> T max3(T a, T b, T c) { return max_of<F>(max_of<F>(a, b), c); }

// --- two f32 in 64 bits, the first in the low half

template <auto F, class... A> uint64_t pairs(A... values) {
  const float low = F(as_float(static_cast<uint32_t>(values))...);
  const float high = F(as_float(static_cast<uint32_t>(values >> 32))...);
  return static_cast<uint64_t>(as_bits(high)) << 32 | as_bits(low);
}
template <auto F> uint64_t pairs2(uint64_t a, uint64_t b) { return pairs<F>(a, b); }
template <auto F> uint64_t pairs3(uint64_t a, uint64_t b, uint64_t c) { return pairs<F>(a, b, c); }

#define PLAIN(name, ...) {name, Lanewise<&__VA_ARGS__>::run}
#define ROUNDED(name, ...) {name, Rounded<&__VA_ARGS__>::run}
#define PLAIN_FTZ(name, f) PLAIN(name ".f32", f<kPlain>), PLAIN(name ".ftz.f32", f<kFtz>)
#define TYPED_FTZ(name, f) PLAIN(name ".f32", f<kPlain, float>), PLAIN(name ".ftz.f32", f<kFtz, float>)
#define TYPED(name, f) TYPED_FTZ(name, f), PLAIN(name ".f64", f<kPlain, double>)
#define ROUNDED_ALL(name, f)                                                                                     \
  ROUNDED(name ".f32", f<kPlain, float>), ROUNDED(name ".ftz.f32", f<kFtz, float>),                              \
  ROUNDED(name ".sat.f32", f<kSat, float>), ROUNDED(name ".ftz.sat.f32", f<kFtz | kSat, float>),                 \
  ROUNDED(name ".f64", f<kPlain, double>)
#define ROUNDED_FTZ(name, f)                                                                                     \
  ROUNDED(name ".f32", f<kPlain, float>), ROUNDED(name ".ftz.f32", f<kFtz, float>),                              \
  ROUNDED(name ".f64", f<kPlain, double>)
#define ROUNDED_PAIRS(name, n, f)                                                                                \
  ROUNDED(name ".f32x2", pairs##n<&f<kPlain, float>>), ROUNDED(name ".ftz.f32x2", pairs##n<&f<kFtz, float>>)
#define EXTREME(name, f)                                                                                         \
  TYPED_FTZ(name, f), PLAIN(name ".NaN.f32", f<kNan, float>), PLAIN(name ".ftz.NaN.f32", f<kFtz | kNan, float>), \
  PLAIN(name ".xorsign.abs.f32", f<kXorSign, float>),                                                            \
  PLAIN(name ".ftz.xorsign.abs.f32", f<kFtz | kXorSign, float>),                                                 \
  PLAIN(name ".NaN.xorsign.abs.f32", f<kNan | kXorSign, float>),                                                 \
  PLAIN(name ".ftz.NaN.xorsign.abs.f32", f<kFtz | kNan | kXorSign, float>)

const Register kRegister[] = {
    ROUNDED_ALL("add", add), ROUNDED_ALL("sub", sub), ROUNDED_ALL("mul", mul), ROUNDED_ALL("fma", fma_of),
    ROUNDED_PAIRS("add", 2, add), ROUNDED_PAIRS("sub", 2, sub), ROUNDED_PAIRS("mul", 2, mul),
    ROUNDED_PAIRS("fma", 3, fma_of),
    ROUNDED_FTZ("div", div), ROUNDED_FTZ("rcp", rcp), ROUNDED_FTZ("sqrt", sqrt_of),
    PLAIN_FTZ("div.approx", div_approx), PLAIN_FTZ("rsqrt", rsqrt), PLAIN("rsqrt.f64", rsqrt64),
    PLAIN("rcp.approx.f64", rcp64_approx), PLAIN("rsqrt.approx.f64", rsqrt64_approx),
    PLAIN_FTZ("lg2", lg2), PLAIN_FTZ("sin", sin_of), PLAIN_FTZ("cos", cos_of), PLAIN("tanh.f32", tanh_of<kPlain>),
    TYPED("neg", neg), TYPED("abs", abs_of),
    PLAIN("copysign.f32", copy_sign<float>), PLAIN("copysign.f64", copy_sign<double>),
    EXTREME("min", min_of), EXTREME("max", max_of),
    PLAIN("min.f64", min_of<kPlain, double>), PLAIN("max.f64", max_of<kPlain, double>),
    EXTREME("min3", min3), EXTREME("max3", max3),
};

template <int F> Step ex2_counted(Warp& w, const Instruction& i) {
  count(w, Count::Exponentials, static_cast<uint64_t>(__builtin_popcount(w.lanes)));
  return Lanewise<&ex2<F>>::run(w, i);
}
const Register kEx2("ex2.f32", &ex2_counted<kPlain>);
const Register kEx2Ftz("ex2.ftz.f32", &ex2_counted<kFtz>);

// --- testp

enum class Property : uint32_t { Finite, Infinite, Number, NotANumber, Normal, Subnormal };

template <class T> bool has_property(T value, Property property) {
  switch (property) {
    case Property::Finite: return std::isfinite(value);
    case Property::Infinite: return std::isinf(value);
    case Property::Number: return !std::isnan(value);
    case Property::NotANumber: return std::isnan(value);
    case Property::Normal: return std::isnormal(value) || value == T{0};
    default: return std::fpclassify(value) == FP_SUBNORMAL;
  }
}

// Predicate, a, property.
template <class T> Step testp(Warp& w, const Instruction& i) {
  const T* a = w.values<T>(i.args[1]);
  const auto property = static_cast<Property>(i.args[2]);
  w.set_predicate(i.args[0], lane_mask([&](int lane) { return has_property(a[lane], property); }));
  return Step::Next;
}
const Register kTestp32("testp.f32", &testp<float>);
const Register kTestp64("testp.f64", &testp<double>);

}  // namespace
}  // namespace ptxe
