// f16 and bf16 arithmetic, single and packed in pairs. All of it is computed on floats, which hold sums and products
// exactly or are wide enough that rounding twice changes nothing; only fma needs more.
#include <bit>
#include <cmath>

#include "lanewise.h"

namespace ptxe {
namespace {

enum Flags : int { kPlain = 0, kFtz = 1, kSat = 2, kRelu = 4, kNan = 8, kXorSign = 16 };

struct Fp16 {
  static constexpr uint16_t kExponent = 0x7c00;
  static float load(uint16_t bits) { return fp16_to_float(bits); }
  static uint16_t store(float value) { return float_to_fp16(value); }
};
struct Bf16 {
  static constexpr uint16_t kExponent = 0x7f80;
  static float load(uint16_t bits) { return bf16_to_float(bits); }
  static uint16_t store(float value) { return float_to_bf16(value); }
};

template <class T, int F> struct Arithmetic {
  static uint16_t flush(uint16_t bits) {
    if constexpr ((F & kFtz) == 0) return bits;
    return static_cast<uint16_t>((bits & T::kExponent) == 0 ? bits & 0x8000 : bits);
  }
  static float load(uint16_t bits) { return T::load(flush(bits)); }
  static uint16_t store(float value) {
    if constexpr (F & kSat) value = value > 0.0f ? (value < 1.0f ? value : 1.0f) : 0.0f;  // NaN gives 0
    if constexpr (F & kRelu) value = value <= 0.0f ? 0.0f : value;                        // NaN stays
    return flush(T::store(value));
  }
  static bool is_nan(uint16_t bits) { return (bits & 0x7fff) > T::kExponent; }

  static uint16_t add(uint16_t a, uint16_t b) { return store(load(a) + load(b)); }
  static uint16_t sub(uint16_t a, uint16_t b) { return store(load(a) - load(b)); }
  static uint16_t mul(uint16_t a, uint16_t b) { return store(load(a) * load(b)); }
  static uint16_t neg(uint16_t a) { return flush(a ^ 0x8000); }
  static uint16_t abs(uint16_t a) { return flush(a & 0x7fff); }
  static uint16_t ex2(uint16_t a) { return store(exp2_float(load(a))); }
  static uint16_t tanh(uint16_t a) { return store(static_cast<float>(std::tanh(static_cast<double>(load(a))))); }

  // -0 goes before +0.
  static int key(uint16_t bits) { return bits & 0x8000 ? -1 - (bits & 0x7fff) : bits; }
  static uint16_t extreme(uint16_t a, uint16_t b, bool max) {
    uint16_t x = flush(a), y = flush(b);
    const uint16_t sign = (F & kXorSign) ? (x ^ y) & 0x8000 : 0;
    if constexpr (F & kXorSign) x &= 0x7fff, y &= 0x7fff;
    uint16_t result = (key(x) < key(y)) != max ? x : y;
    if constexpr (F & kNan) {
      if (is_nan(x) || is_nan(y)) return kCanonicalNan16;
    } else {
      if (is_nan(x) && is_nan(y)) return kCanonicalNan16;
      result = is_nan(x) ? y : is_nan(y) ? x : result;
    }
    return result | sign;
  }
  static uint16_t min(uint16_t a, uint16_t b) { return extreme(a, b, false); }
  static uint16_t max(uint16_t a, uint16_t b) { return extreme(a, b, true); }
};

// Two of them in a word.
template <auto F, class... A> uint32_t packed(A... values) {
  const uint16_t low = F(static_cast<uint16_t>(values)...);
  const uint16_t high = F(static_cast<uint16_t>(values >> 16)...);
  return static_cast<uint32_t>(high) << 16 | low;
}
template <auto F> uint32_t packed1(uint32_t a) { return packed<F>(a); }
template <auto F> uint32_t packed2(uint32_t a, uint32_t b) { return packed<F>(a, b); }

// Destination, a, b, c. In steps of one width each, which compilers vectorise.
template <class T, int F, class Lane> Step fma(Warp& w, const Instruction& i) {
  using Half = Arithmetic<T, F>;
  float factors[3][kLanes];
  Lane results[kLanes] = {};
  for (size_t shift = 0; shift < 8 * sizeof(Lane); shift += 16) {
    for (uint32_t source = 0; source < 3; ++source) {
      const Lane* bits = w.values<Lane>(i.args[1 + source]);
      for (int lane = 0; lane < kLanes; ++lane)
        factors[source][lane] = Half::load(static_cast<uint16_t>(bits[lane] >> shift));
    }
    float sums[kLanes];
    for (int lane = 0; lane < kLanes; ++lane)
      sums[lane] = fma_to_odd(factors[0][lane], factors[1][lane], factors[2][lane]);
    for (int lane = 0; lane < kLanes; ++lane)
      results[lane] = static_cast<Lane>(results[lane] | static_cast<Lane>(Half::store(sums[lane])) << shift);
  }
  Lane* d = w.values<Lane>(i.args[0]);
  each_lane_vector(w, [&](int lane) { d[lane] = results[lane]; });
  return Step::Next;
}

#define FORM(name, n, T, f, flags)                              \
  {name, Lanewise<&Arithmetic<T, (flags)>::f>::run},            \
  {name "x2", Lanewise<&packed##n<&Arithmetic<T, (flags)>::f>>::run}
#define FORMS(name, n, f, flags, suffix) \
  FORM(name suffix ".f16", n, Fp16, f, flags), FORM(name suffix ".bf16", n, Bf16, f, flags)
#define FTZ_FORMS(name, n, f, flags, suffix) \
  FORMS(name, n, f, flags, suffix), FORMS(name ".ftz", n, f, kFtz | (flags), suffix)
#define SUM_FORMS(name, n, f) FTZ_FORMS(name, n, f, kPlain, ""), FTZ_FORMS(name, n, f, kSat, ".sat")
#define EXTREME_FORMS(f)                                                                  \
  FTZ_FORMS(#f, 2, f, kPlain, ""), FTZ_FORMS(#f, 2, f, kNan, ".NaN"),                     \
  FTZ_FORMS(#f, 2, f, kXorSign, ".xorsign.abs"), FTZ_FORMS(#f, 2, f, kNan | kXorSign, ".NaN.xorsign.abs")

const Register kRegister[] = {
    SUM_FORMS("add", 2, add), SUM_FORMS("sub", 2, sub), SUM_FORMS("mul", 2, mul),
    EXTREME_FORMS(min), EXTREME_FORMS(max),
    FTZ_FORMS("neg", 1, neg, kPlain, ""), FTZ_FORMS("abs", 1, abs, kPlain, ""),
    FORMS("tanh", 1, tanh, kPlain, ""),
};

#define FMA(suffix, flags)                                                                                       \
  {"fma" suffix ".f16", &fma<Fp16, flags, uint16_t>}, {"fma" suffix ".f16x2", &fma<Fp16, flags, uint32_t>},      \
  {"fma" suffix ".bf16", &fma<Bf16, flags, uint16_t>}, {"fma" suffix ".bf16x2", &fma<Bf16, flags, uint32_t>}

const Register kFma[] = {
    FMA("", kPlain), FMA(".ftz", kFtz), FMA(".sat", kSat), FMA(".relu", kRelu), FMA(".ftz.sat", kFtz | kSat),
    FMA(".ftz.relu", kFtz | kRelu),
};

template <auto F, uint32_t NumValues> Step counted(Warp& w, const Instruction& i) {
  count(w, Count::Exponentials, static_cast<uint64_t>(std::popcount(w.lanes)) * NumValues);
  return Lanewise<F>::run(w, i);
}
#define EX2(type, T, flags)                                     \
  {"ex2." type, &counted<&Arithmetic<T, flags>::ex2, 1>},       \
  {"ex2." type "x2", &counted<&packed1<&Arithmetic<T, flags>::ex2>, 2>}

const Register kEx2[] = {EX2("f16", Fp16, kPlain), EX2("bf16", Bf16, kFtz)};

float widen_fp16(uint16_t a) { return fp16_to_float(a); }
float widen_bf16(uint16_t a) { return bf16_to_float(a); }
const Register kWiden[] = {{"widen.f16", Lanewise<&widen_fp16>::run}, {"widen.bf16", Lanewise<&widen_bf16>::run}};

}  // namespace
}  // namespace ptxe
