// Comparison and selection: setp, set, selp, slct.
#include <cmath>

#include "lanewise.h"

namespace ptxe {
namespace {

// As compare.py numbers them. The unordered forms are the ordered ones plus kUnordered.
enum Comparison : uint32_t { kEq, kNe, kLt, kLe, kGt, kGe, kNum, kNan, kUnordered = 8 };
enum Combine : uint32_t { kNone, kAnd, kOr, kXor };
enum Options : uint32_t { kFtz = 1 };

// Loads a lane as a number that can be compared.
template <class T> struct Plain {
  using Lane = T;
  static T load(T value, bool) { return value; }
};
struct Single {
  using Lane = float;
  static float load(float value, bool ftz) {
    const uint32_t bits = as_bits(value);
    return ftz && (bits & 0x7f800000) == 0 ? as_float(bits & 0x80000000) : value;
  }
};
struct Half {
  using Lane = uint16_t;
  static float load(uint16_t value, bool ftz) {
    return ftz && (value & 0x7c00) == 0 ? 0.0f : fp16_to_float(value);
  }
};
struct Brain {
  using Lane = uint16_t;
  static float load(uint16_t value, bool) { return bf16_to_float(value); }
};
// One half of a packed pair.
template <class Format, int Shift> struct Part {
  using Lane = uint32_t;
  static float load(uint32_t value, bool ftz) { return Format::load(static_cast<uint16_t>(value >> Shift), ftz); }
};

template <class Source>
Lanes compare(const typename Source::Lane* a, const typename Source::Lane* b, uint32_t how, bool ftz) {
  const auto mask = [&](auto test) {
    return lane_mask([&](int lane) { return test(Source::load(a[lane], ftz), Source::load(b[lane], ftz)); });
  };
  const auto ordered = [](auto x, auto y) { return x == x && y == y; };
  Lanes result = 0;
  switch (how & 7) {
    case kEq: result = mask([](auto x, auto y) { return x == y; }); break;
    case kNe: result = mask([](auto x, auto y) { return x < y || x > y; }); break;
    case kLt: result = mask([](auto x, auto y) { return x < y; }); break;
    case kLe: result = mask([](auto x, auto y) { return x <= y; }); break;
    case kGt: result = mask([](auto x, auto y) { return x > y; }); break;
    case kGe: result = mask([](auto x, auto y) { return x >= y; }); break;
    case kNum: return mask(ordered);
    default: return ~mask(ordered);
  }
  return how & kUnordered ? result | ~mask(ordered) : result;
}

Lanes combine(Lanes value, uint32_t how, Lanes with) {
  switch (how) {
    case kAnd: return value & with;
    case kOr: return value | with;
    case kXor: return value ^ with;
    default: return value;
  }
}

// What both halves of a packed pair give; the same for a single value.
struct Result {
  Lanes low, high;
};
template <class Source> struct Scalar {
  static Result run(Warp& w, const Instruction& i, uint32_t first) {
    using Lane = typename Source::Lane;
    const Lanes mask = compare<Source>(w.values<Lane>(i.args[first]), w.values<Lane>(i.args[first + 1]),
                                       i.args[first + 2], i.args[first + 3] & kFtz);
    return {mask, mask};
  }
};
template <class Format> struct Packed {
  static Result run(Warp& w, const Instruction& i, uint32_t first) {
    return {Scalar<Part<Format, 0>>::run(w, i, first).low, Scalar<Part<Format, 16>>::run(w, i, first).low};
  }
};

// p, a, b, comparison, options[, q or p again, combine, c]. Of one value q is the complement before combining, of a
// pair p is of the low halves and q of the high ones.
template <class Compare, bool Pair> Step setp(Warp& w, const Instruction& i) {
  const Result result = Compare::run(w, i, 1);
  if (i.num_args == 5) {
    w.set_predicate(i.args[0], result.low);
    return Step::Next;
  }
  const Lanes with = i.args[6] == kNone ? 0 : w.predicate(i.args[7]);
  w.set_predicate(i.args[0], combine(result.low, i.args[6], with));
  w.set_predicate(i.args[5], combine(Pair ? result.high : ~result.low, i.args[6], with));
  return Step::Next;
}

// d, a, b, comparison, options, bits of d, value if true, combine, c.
template <class Compare, bool Pair> Step set(Warp& w, const Instruction& i) {
  const Result result = Compare::run(w, i, 1);
  const Lanes with = i.args[7] == kNone ? 0 : w.predicate(i.args[8]);
  const Lanes low = combine(result.low, i.args[7], with), high = combine(result.high, i.args[7], with);
  const uint32_t bits = i.args[5], truth = i.args[6];
  each_lane(w, [&](int lane) {
    const uint32_t value = low >> lane & 1 ? truth : 0;
    if (bits == 16) {
      w.values<uint16_t>(i.args[0])[lane] = static_cast<uint16_t>(value);
    } else if constexpr (Pair) {
      const uint32_t upper = high >> lane & 1 ? truth : 0;
      w.values<uint32_t>(i.args[0])[lane] = upper << 16 | (value & 0xffff);
    } else {
      w.values<uint32_t>(i.args[0])[lane] = value;
    }
  });
  return Step::Next;
}

#define COMPARED(type, pair, ...) \
  {"setp." type, &setp<__VA_ARGS__, pair>}, {"set." type, &set<__VA_ARGS__, pair>}

const Register kRegister[] = {
    COMPARED("u16", false, Scalar<Plain<uint16_t>>), COMPARED("s16", false, Scalar<Plain<int16_t>>),
    COMPARED("u32", false, Scalar<Plain<uint32_t>>), COMPARED("s32", false, Scalar<Plain<int32_t>>),
    COMPARED("u64", false, Scalar<Plain<uint64_t>>), COMPARED("s64", false, Scalar<Plain<int64_t>>),
    COMPARED("f32", false, Scalar<Single>),          COMPARED("f64", false, Scalar<Plain<double>>),
    COMPARED("f16", false, Scalar<Half>),            COMPARED("bf16", false, Scalar<Brain>),
    COMPARED("f16x2", true, Packed<Half>),            COMPARED("bf16x2", true, Packed<Brain>),
};

// d, a, b, predicate.
template <class T> Step selp(Warp& w, const Instruction& i) {
  T* d = w.values<T>(i.args[0]);
  const T *a = w.values<T>(i.args[1]), *b = w.values<T>(i.args[2]);
  const Lanes p = w.predicate(i.args[3]);
  each_lane_vector(w, [&](int lane) { d[lane] = p >> lane & 1 ? a[lane] : b[lane]; });
  return Step::Next;
}

template <class T> T slct_integer(T a, T b, int32_t c) { return c >= 0 ? a : b; }
template <class T> T slct_float(T a, T b, float c) { return c >= 0 ? a : b; }  // NaN selects b
template <class T> T slct_ftz(T a, T b, float c) { return Single::load(c, true) >= 0 ? a : b; }

#define SELECT(type, T)                                                                                       \
  {"selp." type, &selp<T>}, {"slct." type ".s32", Lanewise<&slct_integer<T>>::run},                           \
  {"slct." type ".f32", Lanewise<&slct_float<T>>::run}, {"slct.ftz." type ".f32", Lanewise<&slct_ftz<T>>::run}

const Register kSelect[] = {SELECT("16", uint16_t), SELECT("32", uint32_t), SELECT("64", uint64_t)};

}  // namespace
}  // namespace ptxe
