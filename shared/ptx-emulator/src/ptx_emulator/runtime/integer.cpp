// Integer arithmetic, logic and bit fields. Arguments are the destination, then the sources in PTX order.
// Signed addition and multiplication are done on unsigned numbers: the bits are the same and nothing overflows.
#include <limits>
#include <type_traits>

#include "lanewise.h"

namespace ptxe {
namespace {

using s8 = int8_t;
using u8 = uint8_t;
using s16 = int16_t;
using u16 = uint16_t;
using s32 = int32_t;
using u32 = uint32_t;
using s64 = int64_t;
using u64 = uint64_t;
__extension__ typedef __int128 s128;
__extension__ typedef unsigned __int128 u128;

template <class T> struct WiderOf;
template <> struct WiderOf<s16> { using type = s32; };
template <> struct WiderOf<u16> { using type = u32; };
template <> struct WiderOf<s32> { using type = s64; };
template <> struct WiderOf<u32> { using type = u64; };
template <> struct WiderOf<s64> { using type = s128; };
template <> struct WiderOf<u64> { using type = u128; };
template <class T> using Wider = typename WiderOf<T>::type;
template <class T> constexpr int kBits = 8 * sizeof(T);

template <class T> T saturate(s64 value) {
  constexpr s64 low = std::numeric_limits<T>::min(), high = std::numeric_limits<T>::max();
  return static_cast<T>(value < low ? low : value > high ? high : value);
}

// --- arithmetic

template <class T> T add(T a, T b) { return static_cast<T>(a + b); }
template <class T> T sub(T a, T b) { return static_cast<T>(a - b); }
s32 add_sat(s32 a, s32 b) { return saturate<s32>(static_cast<s64>(a) + b); }
s32 sub_sat(s32 a, s32 b) { return saturate<s32>(static_cast<s64>(a) - b); }
template <class T> T mul_lo(T a, T b) { return static_cast<T>(static_cast<Wider<T>>(a) * static_cast<Wider<T>>(b)); }
template <class T> T mul_hi(T a, T b) {
  return static_cast<T>((static_cast<Wider<T>>(a) * static_cast<Wider<T>>(b)) >> kBits<T>);
}
template <class T> Wider<T> mul_wide(T a, T b) { return static_cast<Wider<T>>(a) * static_cast<Wider<T>>(b); }
template <class T> T mad_lo(T a, T b, T c) {
  using U = std::make_unsigned_t<T>;
  return static_cast<T>(static_cast<U>(mul_lo(a, b)) + static_cast<U>(c));
}
template <class T> T mad_hi(T a, T b, T c) {
  using U = std::make_unsigned_t<T>;
  return static_cast<T>(static_cast<U>(mul_hi(a, b)) + static_cast<U>(c));
}
s32 mad_hi_sat(s32 a, s32 b, s32 c) { return saturate<s32>(static_cast<s64>(mul_hi(a, b)) + c); }
template <class T> Wider<T> mad_wide(T a, T b, Wider<T> c) {
  using U = std::make_unsigned_t<Wider<T>>;
  return static_cast<Wider<T>>(static_cast<U>(mul_wide(a, b)) + static_cast<U>(c));
}

// The product of the low 24 bits: .lo is its low 32 bits, .hi the high 32 bits of its 48.
template <class T> s64 product24(T a, T b) {
  if constexpr (std::is_signed_v<T>) {
    const s32 low_a = static_cast<s32>(static_cast<u32>(a) << 8) >> 8;
    const s32 low_b = static_cast<s32>(static_cast<u32>(b) << 8) >> 8;
    return static_cast<s64>(low_a) * low_b;
  } else {
    return static_cast<s64>(static_cast<u64>(a & 0xffffff) * (b & 0xffffff));
  }
}
template <class T> T mul24_lo(T a, T b) { return static_cast<T>(product24(a, b)); }
template <class T> T mul24_hi(T a, T b) { return static_cast<T>(product24(a, b) >> 16); }
template <class T> T mad24_lo(T a, T b, T c) {
  return static_cast<T>(static_cast<u32>(mul24_lo(a, b)) + static_cast<u32>(c));
}
template <class T> T mad24_hi(T a, T b, T c) {
  return static_cast<T>(static_cast<u32>(mul24_hi(a, b)) + static_cast<u32>(c));
}
s32 mad24_hi_sat(s32 a, s32 b, s32 c) { return saturate<s32>(static_cast<s64>(mul24_hi(a, b)) + c); }

// Division by zero is unspecified in the PTX ISA; quotient and remainder are all ones, as an H200 gave them.
template <class T> T div(T a, T b) {
  if (b == 0) return static_cast<T>(~T{0});
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a));
  return static_cast<T>(a / b);
}
template <class T> T rem(T a, T b) {
  if (b == 0) return static_cast<T>(~T{0});
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return 0;
  return static_cast<T>(a % b);
}
template <class T> T neg(T a) { return static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a)); }
template <class T> T abs_of(T a) { return a < 0 ? neg(a) : a; }
template <class T> T min_of(T a, T b) { return a < b ? a : b; }
template <class T> T max_of(T a, T b) { return a > b ? a : b; }
template <class T> T relu(T a) { return a < 0 ? T{0} : a; }
s32 min_relu(s32 a, s32 b) { return relu(min_of(a, b)); }
s32 max_relu(s32 a, s32 b) { return relu(max_of(a, b)); }
template <class T> T sad(T a, T b, T c) {
  using U = std::make_unsigned_t<T>;
  const U ua = static_cast<U>(a), ub = static_cast<U>(b);
  const U difference = static_cast<U>(a < b ? ub - ua : ua - ub);
  return static_cast<T>(static_cast<U>(c) + difference);
}

// --- two 16-bit numbers in a word

template <auto F, class T> u32 halves(u32 a, u32 b) {
  const T low = F(static_cast<T>(a), static_cast<T>(b));
  const T high = F(static_cast<T>(a >> 16), static_cast<T>(b >> 16));
  return static_cast<u32>(static_cast<u16>(high)) << 16 | static_cast<u16>(low);
}
s16 min_relu16(s16 a, s16 b) { return relu(min_of(a, b)); }
s16 max_relu16(s16 a, s16 b) { return relu(max_of(a, b)); }

// --- logic and shifts

template <class T> T and_of(T a, T b) { return a & b; }
template <class T> T or_of(T a, T b) { return a | b; }
template <class T> T xor_of(T a, T b) { return a ^ b; }
template <class T> T not_of(T a) { return static_cast<T>(~a); }
template <class T> T cnot(T a) { return a == 0 ? T{1} : T{0}; }
// Shifts by the width or more give 0, or the sign.
template <class T> T shl(T a, u32 n) { return n >= kBits<T> ? T{0} : static_cast<T>(a << n); }
template <class T> T shr(T a, u32 n) {
  const u32 limit = kBits<T> - 1;
  if constexpr (std::is_signed_v<T>) return static_cast<T>(a >> (n > limit ? limit : n));
  return n > limit ? T{0} : static_cast<T>(a >> n);
}
// The funnel: b is the high word, a the low one.
u32 shf_l(u32 a, u32 b, u32 n) { return static_cast<u32>((static_cast<u64>(b) << 32 | a) << n >> 32); }
u32 shf_r(u32 a, u32 b, u32 n) { return static_cast<u32>((static_cast<u64>(b) << 32 | a) >> n); }
u32 shf_l_wrap(u32 a, u32 b, u32 n) { return shf_l(a, b, n & 31); }
u32 shf_r_wrap(u32 a, u32 b, u32 n) { return shf_r(a, b, n & 31); }
u32 shf_l_clamp(u32 a, u32 b, u32 n) { return shf_l(a, b, n > 32 ? 32 : n); }
u32 shf_r_clamp(u32 a, u32 b, u32 n) { return shf_r(a, b, n > 32 ? 32 : n); }

// --- bits and bit fields

template <class T> u32 popc(T a) { return static_cast<u32>(__builtin_popcountll(a)); }
u32 clz32(u32 a) { return a ? static_cast<u32>(__builtin_clz(a)) : 32; }
u32 clz64(u64 a) { return a ? static_cast<u32>(__builtin_clzll(a)) : 64; }
u32 brev32(u32 a) {
  a = (a & 0x55555555) << 1 | (a >> 1 & 0x55555555);
  a = (a & 0x33333333) << 2 | (a >> 2 & 0x33333333);
  a = (a & 0x0f0f0f0f) << 4 | (a >> 4 & 0x0f0f0f0f);
  return __builtin_bswap32(a);
}
u64 brev64(u64 a) { return static_cast<u64>(brev32(static_cast<u32>(a))) << 32 | brev32(static_cast<u32>(a >> 32)); }
template <class T> u32 bfind(T a) {
  std::make_unsigned_t<T> bits = a;
  if constexpr (std::is_signed_v<T>)
    if (a < 0) bits = ~bits;
  return bits == 0 ? ~0u : kBits<u64> - 1 - clz64(bits);
}
template <class T> u32 bfind_shift(T a) {
  const u32 found = bfind(a);
  return found == ~0u ? found : kBits<T> - 1 - found;
}
// Position and length of a field. Beyond 255 they are undefined in the PTX ISA: an H200 takes their low byte for 32
// bits and the whole of them for 64.
template <class T> u32 field_number(u32 number) {
  if constexpr (kBits<T> == 32) return number & 0xff;
  return number > 0xff ? 0xff : number;
}
template <class T> T bfe(T a, u32 position, u32 length) {
  using U = std::make_unsigned_t<T>;
  constexpr u32 top = kBits<T> - 1;
  position = field_number<T>(position);
  length = field_number<T>(length);
  const u32 last = position + length - 1 < top ? position + length - 1 : top;  // where the sign is
  const bool negative = std::is_signed_v<T> && length != 0 && (static_cast<U>(a) >> last & 1);
  const U field = position > top ? U{0} : static_cast<U>(a) >> position;
  const U mask = length > top ? ~U{0} : static_cast<U>((U{1} << length) - 1);
  U inside = position > top ? U{0} : mask & static_cast<U>(~U{0} >> position);
  return static_cast<T>((field & inside) | (negative ? ~inside : U{0}));
}
template <class T> T bfi(T a, T b, u32 position, u32 length) {
  position = field_number<T>(position);
  length = field_number<T>(length);
  if (position >= kBits<T>) return b;
  const T mask = static_cast<T>((length >= kBits<T> ? ~T{0} : static_cast<T>((T{1} << length) - 1)) << position);
  return static_cast<T>((b & ~mask) | (static_cast<T>(a << position) & mask));
}
u32 bmsk_clamp(u32 position, u32 length) {
  if (position > 31) return 0;
  const u32 ones = length > 31 ? ~0u : (1u << length) - 1;
  return ones << position;
}
u32 bmsk_wrap(u32 position, u32 length) { return ((1u << (length & 31)) - 1) << (position & 31); }
template <class T> T extend(T a, u32 width) {
  if (width == 0) return 0;
  if (width >= 32) return a;
  return static_cast<T>(static_cast<T>(static_cast<u32>(a) << (32 - width)) >> (32 - width));
}
template <class T> T szext_clamp(T a, u32 width) { return extend(a, width); }
template <class T> T szext_wrap(T a, u32 width) { return extend(a, width & 31); }

// The place of the n-th set bit of mask from base upwards, downwards for negative n.
u32 fns(u32 mask, u32 base, s32 offset) {
  if (offset == 0) return base < 32 && (mask >> base & 1) ? base : ~0u;
  const s32 step = offset > 0 ? 1 : -1;
  s32 left = offset > 0 ? offset : -offset;
  for (s64 place = base; place >= 0 && place < 32; place += step)
    if ((mask >> place & 1) && --left == 0) return static_cast<u32>(place);
  return ~0u;
}

template <class A, class B> u32 dp4a(u32 a, u32 b, u32 c) {
  for (int byte = 0; byte < 4; ++byte) {
    const auto byte_a = static_cast<A>(a >> 8 * byte);
    const auto byte_b = static_cast<B>(b >> 8 * byte);
    c += static_cast<u32>(static_cast<s32>(byte_a) * static_cast<s32>(byte_b));
  }
  return c;
}
template <class A, class B, int FirstByte> u32 dp2a(u32 a, u32 b, u32 c) {
  for (int n = 0; n < 2; ++n)
    c += static_cast<u32>(static_cast<s32>(static_cast<A>(a >> 16 * n)) *
                          static_cast<s32>(static_cast<B>(b >> 8 * (n + FirstByte))));
  return c;
}

u32 prmt_byte(u64 bytes, u32 selector) {
  const u32 byte = static_cast<u32>(bytes >> 8 * (selector & 7)) & 0xff;
  return selector & 8 ? (byte & 0x80 ? 0xff : 0) : byte;
}
u32 prmt(u32 a, u32 b, u32 selectors) {
  const u64 bytes = static_cast<u64>(b) << 32 | a;
  u32 result = 0;
  for (int n = 0; n < 4; ++n) result |= prmt_byte(bytes, selectors >> 4 * n) << 8 * n;
  return result;
}
// The selectors of the named modes, by the low two bits of the third source.
constexpr u32 kPrmtF4e[] = {0x3210, 0x4321, 0x5432, 0x6543};
constexpr u32 kPrmtB4e[] = {0x5670, 0x6701, 0x7012, 0x0123};
constexpr u32 kPrmtRc8[] = {0x0000, 0x1111, 0x2222, 0x3333};
constexpr u32 kPrmtEcl[] = {0x3210, 0x3211, 0x3222, 0x3333};
constexpr u32 kPrmtEcr[] = {0x0000, 0x1110, 0x2210, 0x3210};
constexpr u32 kPrmtRc16[] = {0x1010, 0x3232, 0x1010, 0x3232};
template <const u32* Table> u32 prmt_mode(u32 a, u32 b, u32 c) { return prmt(a, b, Table[c & 3]); }

#define LANEWISE(name, ...) {name, Lanewise<&__VA_ARGS__>::run}
#define FOR_UNSIGNED(name, f) \
  LANEWISE(name ".u16", f<u16>), LANEWISE(name ".u32", f<u32>), LANEWISE(name ".u64", f<u64>)
#define FOR_SIGNED(name, f) LANEWISE(name ".s16", f<s16>), LANEWISE(name ".s32", f<s32>), LANEWISE(name ".s64", f<s64>)
#define FOR_WORDS(name, f) \
  LANEWISE(name ".u32", f<u32>), LANEWISE(name ".s32", f<s32>), LANEWISE(name ".u64", f<u64>), \
      LANEWISE(name ".s64", f<s64>)
#define FOR_HALVES(name, f) LANEWISE(name ".u16x2", halves<&f<u16>, u16>), LANEWISE(name ".s16x2", halves<&f<s16>, s16>)
#define FOR_DOT(name, ...)                                                                    \
  LANEWISE(name ".u32.u32", __VA_ARGS__(u8, u16, u8)), LANEWISE(name ".u32.s32", __VA_ARGS__(u8, u16, s8)), \
  LANEWISE(name ".s32.u32", __VA_ARGS__(s8, s16, u8)), LANEWISE(name ".s32.s32", __VA_ARGS__(s8, s16, s8))
#define DP4A(a8, a16, b8) dp4a<a8, b8>
#define DP2A_LO(a8, a16, b8) dp2a<a16, b8, 0>
#define DP2A_HI(a8, a16, b8) dp2a<a16, b8, 2>

const Register kRegister[] = {
    FOR_UNSIGNED("add", add), FOR_UNSIGNED("sub", sub),
    LANEWISE("add.sat.s32", add_sat), LANEWISE("sub.sat.s32", sub_sat),
    FOR_UNSIGNED("mul.lo", mul_lo),
    FOR_UNSIGNED("mul.hi", mul_hi), FOR_SIGNED("mul.hi", mul_hi),
    LANEWISE("mul.wide.u16", mul_wide<u16>), LANEWISE("mul.wide.s16", mul_wide<s16>),
    LANEWISE("mul.wide.u32", mul_wide<u32>), LANEWISE("mul.wide.s32", mul_wide<s32>),
    FOR_UNSIGNED("mad.lo", mad_lo),
    FOR_UNSIGNED("mad.hi", mad_hi), FOR_SIGNED("mad.hi", mad_hi), LANEWISE("mad.hi.sat.s32", mad_hi_sat),
    LANEWISE("mad.wide.u16", mad_wide<u16>), LANEWISE("mad.wide.s16", mad_wide<s16>),
    LANEWISE("mad.wide.u32", mad_wide<u32>), LANEWISE("mad.wide.s32", mad_wide<s32>),
    LANEWISE("mul24.lo.u32", mul24_lo<u32>), LANEWISE("mul24.lo.s32", mul24_lo<s32>),
    LANEWISE("mul24.hi.u32", mul24_hi<u32>), LANEWISE("mul24.hi.s32", mul24_hi<s32>),
    LANEWISE("mad24.lo.u32", mad24_lo<u32>), LANEWISE("mad24.lo.s32", mad24_lo<s32>),
    LANEWISE("mad24.hi.u32", mad24_hi<u32>), LANEWISE("mad24.hi.s32", mad24_hi<s32>),
    LANEWISE("mad24.hi.sat.s32", mad24_hi_sat),
    FOR_UNSIGNED("div", div), FOR_SIGNED("div", div), FOR_UNSIGNED("rem", rem), FOR_SIGNED("rem", rem),
    FOR_SIGNED("neg", neg), FOR_SIGNED("abs", abs_of),
    FOR_UNSIGNED("min", min_of), FOR_SIGNED("min", min_of), FOR_UNSIGNED("max", max_of), FOR_SIGNED("max", max_of),
    LANEWISE("min.relu.s32", min_relu), LANEWISE("max.relu.s32", max_relu),
    FOR_UNSIGNED("sad", sad), FOR_SIGNED("sad", sad),
    FOR_HALVES("add", add), FOR_HALVES("min", min_of), FOR_HALVES("max", max_of),
    LANEWISE("min.relu.s16x2", halves<&min_relu16, s16>), LANEWISE("max.relu.s16x2", halves<&max_relu16, s16>),
    FOR_UNSIGNED("and", and_of), FOR_UNSIGNED("or", or_of), FOR_UNSIGNED("xor", xor_of), FOR_UNSIGNED("not", not_of),
    FOR_UNSIGNED("cnot", cnot), FOR_UNSIGNED("shl", shl), FOR_UNSIGNED("shr", shr), FOR_SIGNED("shr", shr),
    LANEWISE("shf.l.wrap", shf_l_wrap), LANEWISE("shf.l.clamp", shf_l_clamp),
    LANEWISE("shf.r.wrap", shf_r_wrap), LANEWISE("shf.r.clamp", shf_r_clamp),
    LANEWISE("popc.u32", popc<u32>), LANEWISE("popc.u64", popc<u64>),
    LANEWISE("clz.u32", clz32), LANEWISE("clz.u64", clz64),
    LANEWISE("brev.u32", brev32), LANEWISE("brev.u64", brev64),
    FOR_WORDS("bfind", bfind), FOR_WORDS("bfind.shiftamt", bfind_shift), FOR_WORDS("bfe", bfe),
    LANEWISE("bfi.u32", bfi<u32>), LANEWISE("bfi.u64", bfi<u64>),
    LANEWISE("bmsk.clamp", bmsk_clamp), LANEWISE("bmsk.wrap", bmsk_wrap),
    LANEWISE("szext.clamp.u32", szext_clamp<u32>), LANEWISE("szext.clamp.s32", szext_clamp<s32>),
    LANEWISE("szext.wrap.u32", szext_wrap<u32>), LANEWISE("szext.wrap.s32", szext_wrap<s32>),
    LANEWISE("fns", fns),
    FOR_DOT("dp4a", DP4A), FOR_DOT("dp2a.lo", DP2A_LO), FOR_DOT("dp2a.hi", DP2A_HI),
    LANEWISE("prmt", prmt), LANEWISE("prmt.f4e", prmt_mode<kPrmtF4e>), LANEWISE("prmt.b4e", prmt_mode<kPrmtB4e>),
    LANEWISE("prmt.rc8", prmt_mode<kPrmtRc8>), LANEWISE("prmt.ecl", prmt_mode<kPrmtEcl>),
    LANEWISE("prmt.ecr", prmt_mode<kPrmtEcr>), LANEWISE("prmt.rc16", prmt_mode<kPrmtRc16>),
};

// --- operations with plain numbers or predicates among their arguments

// Destination, a, b, c, truth table.
template <class T> Step lop3(Warp& w, const Instruction& i) {
  T* d = w.values<T>(i.args[0]);
  const T *a = w.values<T>(i.args[1]), *b = w.values<T>(i.args[2]), *c = w.values<T>(i.args[3]);
  T table[8];
  for (int n = 0; n < 8; ++n) table[n] = i.args[4] >> n & 1 ? ~T{0} : T{0};
  each_lane_vector(w, [&](int lane) {
    const T x = a[lane], y = b[lane], z = c[lane];
    const T low = (~y & ((~z & table[0]) | (z & table[1]))) | (y & ((~z & table[2]) | (z & table[3])));
    const T high = (~y & ((~z & table[4]) | (z & table[5]))) | (y & ((~z & table[6]) | (z & table[7])));
    d[lane] = (~x & low) | (x & high);
  });
  return Step::Next;
}
const Register kLop3("lop3", &lop3<u32>);

// p = (d != 0) op q: p, d, q, 1 for .and and 0 for .or.
PTXE_OP("lop3.predicate") {
  const u32* d = w.values<u32>(i.args[1]);
  const Lanes nonzero = lane_mask([&](int lane) { return d[lane] != 0; });
  const Lanes q = w.predicate(i.args[2]);
  w.set_predicate(i.args[0], i.args[3] ? nonzero & q : nonzero | q);
  return Step::Next;
}

enum Carry : u32 { kReads = 1, kWrites = 2, kSubtract = 4 };

// Destination, a, b, the carry flag, what is done with it. The flag of a subtraction is the borrow.
template <class T> Step add_with_carry(Warp& w, const Instruction& i) {
  T* d = w.values<T>(i.args[0]);
  const T *a = w.values<T>(i.args[1]), *b = w.values<T>(i.args[2]);
  const u32 mode = i.args[4];
  const Lanes carry_in = mode & kReads ? w.predicate(i.args[3]) : 0;
  Lanes carry_out = 0;
  each_lane(w, [&](int lane) {
    const u128 x = a[lane], y = static_cast<u128>(b[lane]) + (carry_in >> lane & 1);
    const u128 result = mode & kSubtract ? x - y : x + y;
    carry_out |= static_cast<Lanes>(result >> kBits<T> & 1) << lane;
    d[lane] = static_cast<T>(result);
  });
  if (mode & kWrites) w.set_predicate(i.args[3], carry_out);
  return Step::Next;
}
const Register kCarry32("carry.u32", &add_with_carry<u32>);
const Register kCarry64("carry.u64", &add_with_carry<u64>);

}  // namespace
}  // namespace ptxe
