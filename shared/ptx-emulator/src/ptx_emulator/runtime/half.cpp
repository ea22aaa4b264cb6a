// f16 and bf16 arithmetic, single and packed in pairs. All of it is computed on floats, which hold sums and products
// exactly or are wide enough that rounding twice changes nothing; only fma needs more.
#include <cmath>

#include "lanewise.h"

namespace ptxe {
namespace {

enum Flags : int { kPlain = 0, kFtz = 1, kSat = 2, kRelu = 4, kNan = 8, kXorSign = 16 };

struct Fp16 {
  static constexpr uint16_t kExponent = 0x7c00;
  static constexpr float kFlushBelow = 0x1.ffep-15f;  // what rounds to 2^-14 with 11 bits, whatever the exponent
  static float load(uint16_t bits) { return fp16_to_float(bits); }
  static uint16_t store(float value) { return float_to_fp16(value); }
};
struct Bf16 {
  static constexpr uint16_t kExponent = 0x7f80;
  static constexpr float kFlushBelow = 0x1.ffp-127f;  // what rounds to 2^-126 with 8 bits
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
    if constexpr (F & kFtz) value = std::fabs(value) < T::kFlushBelow ? std::copysign(0.0f, value) : value;
    return T::store(value);
  }
  static bool is_nan(uint16_t bits) { return (bits & 0x7fff) > T::kExponent; }

  static uint16_t add(uint16_t a, uint16_t b) { return store(load(a) + load(b)); }
  static uint16_t sub(uint16_t a, uint16_t b) { return store(load(a) - load(b)); }
  static uint16_t mul(uint16_t a, uint16_t b) { return store(load(a) * load(b)); }
  static uint16_t neg(uint16_t a) { return is_nan(a) ? kCanonicalNan16 : flush(a ^ 0x8000); }
  static uint16_t abs(uint16_t a) { return is_nan(a) ? kCanonicalNan16 : flush(a & 0x7fff); }
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

// Results of halves side by side in blocks of a warp's width, one a lane, or two for packed operations. Packed and
// single operations share the loop, which takes long to compile.
template <auto F, class... A> [[gnu::noinline]] void compute(uint32_t blocks, uint16_t* d, const A*... sources) {
  for (uint32_t block = 0; block < blocks; ++block) {
    PTXE_VECTOR_LOOP
    for (uint32_t k = block * kLanes; k < (block + 1) * kLanes; ++k) d[k] = F(sources[k]...);
  }
}

template <class... A, size_t... K>
void call(void (*f)(uint32_t, uint16_t*, A...), Warp& w, const Instruction& i, uint32_t blocks, uint16_t* d,
          std::index_sequence<K...>) {
  f(blocks, d, w.values<uint16_t>(i.args[K + 1])...);
}

// Arguments: destination, sources. A Lane is one half, or two of them.
template <class Lane, class... A> Step on_lanes(Warp& w, const Instruction& i, void (*f)(uint32_t, uint16_t*, A...)) {
  constexpr uint32_t kBlocks = sizeof(Lane) / sizeof(uint16_t);
  uint16_t* d = w.values<uint16_t>(i.args[0]);
  if (w.lanes == kAllLanes) {
    call(f, w, i, kBlocks, d, std::index_sequence_for<A...>{});
  } else {
    uint16_t results[kBlocks * kLanes];
    call(f, w, i, kBlocks, results, std::index_sequence_for<A...>{});
    each_lane(w, [&](int lane) { std::memcpy(d + kBlocks * lane, results + kBlocks * lane, sizeof(Lane)); });
  }
  return Step::Next;
}
using Half = const uint16_t;
template <auto F, class Lane> Step unary(Warp& w, const Instruction& i) {
  return on_lanes<Lane>(w, i, &compute<F, uint16_t>);
}
template <auto F, class Lane> Step binary(Warp& w, const Instruction& i) {
  return on_lanes<Lane>(w, i, &compute<F, uint16_t, uint16_t>);
}

// In steps of one width each, which compilers vectorise.
template <class T, int F>
[[gnu::noinline]] void compute_fma(uint32_t blocks, uint16_t* d, Half* a, Half* b, Half* c) {
  using Of = Arithmetic<T, F>;
  for (uint32_t first = 0; first < blocks * kLanes; first += kLanes) {
    float factors[3][kLanes], sums[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) factors[0][lane] = Of::load(a[first + lane]);
    for (int lane = 0; lane < kLanes; ++lane) factors[1][lane] = Of::load(b[first + lane]);
    for (int lane = 0; lane < kLanes; ++lane) factors[2][lane] = Of::load(c[first + lane]);
    for (int lane = 0; lane < kLanes; ++lane)
      sums[lane] = fma_to_odd(factors[0][lane], factors[1][lane], factors[2][lane]);
    for (int lane = 0; lane < kLanes; ++lane) d[first + lane] = Of::store(sums[lane]);
  }
}
template <class T, int F, class Lane> Step fma(Warp& w, const Instruction& i) {
  return on_lanes<Lane>(w, i, &compute_fma<T, F>);
}

#define FORM(name, arity, T, f, flags)                            \
  {name, &arity<&Arithmetic<T, (flags)>::f, uint16_t>},           \
  {name "x2", &arity<&Arithmetic<T, (flags)>::f, uint32_t>}
#define FORMS(name, arity, f, flags, suffix) \
  FORM(name suffix ".f16", arity, Fp16, f, flags), FORM(name suffix ".bf16", arity, Bf16, f, flags)
#define FTZ_FORMS(name, arity, f, flags, suffix) \
  FORMS(name, arity, f, flags, suffix), FORMS(name ".ftz", arity, f, kFtz | (flags), suffix)
#define SUM_FORMS(name, arity, f) FTZ_FORMS(name, arity, f, kPlain, ""), FTZ_FORMS(name, arity, f, kSat, ".sat")
#define EXTREME_FORMS(f)                                                                  \
  FTZ_FORMS(#f, binary, f, kPlain, ""), FTZ_FORMS(#f, binary, f, kNan, ".NaN"),                     \
  FTZ_FORMS(#f, binary, f, kXorSign, ".xorsign.abs"), FTZ_FORMS(#f, binary, f, kNan | kXorSign, ".NaN.xorsign.abs")

const Register kRegister[] = {
    SUM_FORMS("add", binary, add), SUM_FORMS("sub", binary, sub), SUM_FORMS("mul", binary, mul),
    EXTREME_FORMS(min), EXTREME_FORMS(max),
    FTZ_FORMS("neg", unary, neg, kPlain, ""), FTZ_FORMS("abs", unary, abs, kPlain, ""),
    FORMS("tanh", unary, tanh, kPlain, ""),
};

#define FMA(suffix, flags)                                                                                       \
  {"fma" suffix ".f16", &fma<Fp16, flags, uint16_t>}, {"fma" suffix ".f16x2", &fma<Fp16, flags, uint32_t>},      \
  {"fma" suffix ".bf16", &fma<Bf16, flags, uint16_t>}, {"fma" suffix ".bf16x2", &fma<Bf16, flags, uint32_t>}

const Register kFma[] = {
    FMA("", kPlain), FMA(".ftz", kFtz), FMA(".sat", kSat), FMA(".relu", kRelu), FMA(".ftz.sat", kFtz | kSat),
    FMA(".ftz.relu", kFtz | kRelu),
};

template <auto F, class Lane> Step counted(Warp& w, const Instruction& i) {
  count(w, Count::Exponentials, static_cast<uint64_t>(__builtin_popcount(w.lanes)) * (sizeof(Lane) / sizeof(uint16_t)));
  return unary<F, Lane>(w, i);
}
#define EX2(type, T, flags)                                       \
  {"ex2." type, &counted<&Arithmetic<T, flags>::ex2, uint16_t>},  \
  {"ex2." type "x2", &counted<&Arithmetic<T, flags>::ex2, uint32_t>}

const Register kEx2[] = {EX2("f16", Fp16, kPlain), EX2("bf16", Bf16, kFtz)};

float widen_fp16(uint16_t a) { return fp16_to_float(a); }
float widen_bf16(uint16_t a) { return bf16_to_float(a); }
const Register kWiden[] = {{"widen.f16", Lanewise<&widen_fp16>::run}, {"widen.bf16", Lanewise<&widen_bf16>::run}};

}  // namespace
}  // namespace ptxe
