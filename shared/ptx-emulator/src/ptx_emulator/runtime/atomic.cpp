// atom and red: read-modify-write of one location by each lane, in the order of the lanes.
#include <algorithm>

#include "memory.h"
#include "numeric.h"
#include "strong.h"

namespace ptxe {

namespace {

__extension__ typedef unsigned __int128 Bits128;

// Arguments: address, space, semantics, scope, whether there is a destination, number of elements, then the slots of
// the destinations, of the sources, and of the second sources.
struct AtomicArgs {
  AddressArgs address;
  Space space;
  Strength strength;
  bool has_destination;
  uint32_t num_elements;
  const uint32_t* slots;

  explicit AtomicArgs(const Instruction& i)
      : address(i, 0), space(static_cast<Space>(i.args[4])), strength(i.args[5], i.args[6]),
        has_destination(i.args[7] != 0), num_elements(i.args[8]), slots(i.args + 9) {}
  uint32_t destination(uint32_t element) const { return slots[element]; }
  uint32_t source(uint32_t element, uint32_t which) const {
    return slots[(has_destination + which) * num_elements + element];
  }
};

// A cluster runs on one thread, so shared memory needs no atomic exchange.
template <class T>
bool exchange(T* at, T& expected, T desired, bool global) {
  if (!global) {
    *at = desired;
    return true;
  }
  if constexpr (sizeof(T) == 16) {
    const T found = __sync_val_compare_and_swap(at, expected, desired);
    const bool done = found == expected;
    expected = found;
    return done;
  } else {
    return __atomic_compare_exchange_n(at, &expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  }
}

template <class T>
T read_first(const T* at) {
  T value;
  if constexpr (sizeof(T) == 16) {
    std::memcpy(&value, at, sizeof value);
  } else {
    value = __atomic_load_n(at, __ATOMIC_RELAXED);
  }
  return value;
}

template <class T>
struct Modified {
  T old;
  bool changed;
};

template <class T, auto F>
Modified<T> modify(uint8_t* data, T b, T c, bool global) {
  T* at = reinterpret_cast<T*>(data);
  T old = read_first(at);
  T desired = F(old, b, c, global);
  while (!exchange(at, old, desired, global)) desired = F(old, b, c, global);
  return {old, desired != old};
}

template <class T, auto F, bool HasSecond>
Step atomic(Warp& w, const Instruction& i) {
  const AtomicArgs args(i);
  const uint32_t bytes = args.num_elements * sizeof(T);
  const LaneAddresses from(w, args.address, w.lanes);
  const LanePlaces to = resolve_lanes(w, args.space, from, bytes, bytes, AccessKind::Atomic);
  each_place(w, args.space, from, to, [&](const Place& place) {
    publish(w, place, args.strength.order, args.strength.scope);
  });
  bool changed = false;  // what leaves memory as it was is a poll: nobody can have waited for it
  for (Lanes rest = w.lanes; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    const bool granted = to.granted >> lane & 1;
    for (uint32_t element = 0; element < args.num_elements; ++element) {
      T old;
      std::memset(&old, 0xff, sizeof old);
      if (granted) {
        const T b = w.values<T>(args.source(element, 0))[lane];
        const T c = HasSecond ? w.values<T>(args.source(element, 1))[lane] : T{};
        const auto modified = modify<T, F>(to.data[lane] + element * sizeof(T), b, c, to.home != Place::Shared);
        old = modified.old;
        changed |= modified.changed;
      }
      if (args.has_destination) w.values<T>(args.destination(element))[lane] = old;
    }
  }
  w.cluster->progress += changed;
  if (!args.has_destination) return Step::Next;
  each_place(w, args.space, from, to, [&](const Place& place) {
    observe(w, place, args.strength.order, args.strength.scope);
  });
  return Step::Yield;  // perhaps a poll
}

// ---------------------------------------------------------------------------------------------- functions

template <class T> T op_add(T a, T b, T, bool) { return a + b; }
template <class T> T op_and(T a, T b, T, bool) { return a & b; }
template <class T> T op_or(T a, T b, T, bool) { return a | b; }
template <class T> T op_xor(T a, T b, T, bool) { return a ^ b; }
template <class T> T op_exch(T, T b, T, bool) { return b; }
template <class T> T op_cas(T a, T b, T c, bool) { return a == b ? c : a; }
template <class T> T op_min(T a, T b, T, bool) { return std::min(a, b); }
template <class T> T op_max(T a, T b, T, bool) { return std::max(a, b); }
uint32_t op_inc(uint32_t a, uint32_t b, uint32_t, bool) { return a >= b ? 0 : a + 1; }
uint32_t op_dec(uint32_t a, uint32_t b, uint32_t, bool) { return a == 0 || a > b ? b : a - 1; }

template <class T> T op_signed_min(T a, T b, T, bool) {
  using S = std::make_signed_t<T>;
  return static_cast<T>(std::min(static_cast<S>(a), static_cast<S>(b)));
}
template <class T> T op_signed_max(T a, T b, T, bool) {
  using S = std::make_signed_t<T>;
  return static_cast<T>(std::max(static_cast<S>(a), static_cast<S>(b)));
}

float flushed(float value) {
  const uint32_t bits = as_bits(value);
  return bits & 0x7f800000 ? value : as_float(bits & 0x80000000);
}

// In global memory subnormals are flushed to zero with their sign, in shared memory they are kept.
uint32_t op_add_f32(uint32_t a, uint32_t b, uint32_t, bool global) {
  const float sum = global ? flushed(flushed(as_float(a)) + flushed(as_float(b))) : as_float(a) + as_float(b);
  return sum == sum ? as_bits(sum) : kCanonicalNan;
}
uint64_t op_add_f64(uint64_t a, uint64_t b, uint64_t, bool) { return as_bits(as_double(a) + as_double(b)); }

enum class Half { F16, Bf16 };
enum class HalfOp { Add, Min, Max };

template <Half H> float widen(uint16_t bits) { return H == Half::F16 ? fp16_to_float(bits) : bf16_to_float(bits); }
template <Half H> uint16_t narrow(float v) { return H == Half::F16 ? float_to_fp16(v) : float_to_bf16(v); }

template <Half H, HalfOp Op>
uint16_t op_half(uint16_t a, uint16_t b, uint16_t, bool) {
  const float x = widen<H>(a), y = widen<H>(b);
  if constexpr (Op == HalfOp::Add) {
    return narrow<H>(x + y);  // rounding to f32 first changes nothing: it has more than twice the digits
  } else {
    if (x != x || y != y) return x == x ? a : y == y ? b : kCanonicalNan16;
    const bool a_is_less = x < y || (x == y && a >> 15);  // -0 < +0
    return (Op == HalfOp::Min) == a_is_less ? a : b;
  }
}

template <Half H, HalfOp Op>
uint32_t op_packed(uint32_t a, uint32_t b, uint32_t, bool) {
  const uint16_t low = op_half<H, Op>(static_cast<uint16_t>(a), static_cast<uint16_t>(b), 0, false);
  const uint16_t high = op_half<H, Op>(static_cast<uint16_t>(a >> 16), static_cast<uint16_t>(b >> 16), 0, false);
  return static_cast<uint32_t>(high) << 16 | low;
}

template <class T, auto F>
void add(const char* name) {
  const Register registered(name, &atomic<T, F, false>);
}
template <class T>
void add_cas(const char* name) {
  const Register registered(name, &atomic<T, &op_cas<T>, true>);
}

template <Half H>
void add_halves(const char* const (&names)[6]) {
  add<uint16_t, &op_half<H, HalfOp::Add>>(names[0]);
  add<uint16_t, &op_half<H, HalfOp::Min>>(names[1]);
  add<uint16_t, &op_half<H, HalfOp::Max>>(names[2]);
  add<uint32_t, &op_packed<H, HalfOp::Add>>(names[3]);
  add<uint32_t, &op_packed<H, HalfOp::Min>>(names[4]);
  add<uint32_t, &op_packed<H, HalfOp::Max>>(names[5]);
}

bool add_all() {
  add<uint32_t, &op_and<uint32_t>>("atom.and.b32");
  add<uint64_t, &op_and<uint64_t>>("atom.and.b64");
  add<uint32_t, &op_or<uint32_t>>("atom.or.b32");
  add<uint64_t, &op_or<uint64_t>>("atom.or.b64");
  add<uint32_t, &op_xor<uint32_t>>("atom.xor.b32");
  add<uint64_t, &op_xor<uint64_t>>("atom.xor.b64");
  add<uint32_t, &op_exch<uint32_t>>("atom.exch.b32");
  add<uint64_t, &op_exch<uint64_t>>("atom.exch.b64");
  add<Bits128, &op_exch<Bits128>>("atom.exch.b128");
  add_cas<uint16_t>("atom.cas.b16");
  add_cas<uint32_t>("atom.cas.b32");
  add_cas<uint64_t>("atom.cas.b64");
  add_cas<Bits128>("atom.cas.b128");
  add<uint32_t, &op_add<uint32_t>>("atom.add.u32");
  add<uint64_t, &op_add<uint64_t>>("atom.add.u64");
  add<uint32_t, &op_add_f32>("atom.add.f32");
  add<uint64_t, &op_add_f64>("atom.add.f64");
  add<uint32_t, &op_inc>("atom.inc.u32");
  add<uint32_t, &op_dec>("atom.dec.u32");
  add<uint32_t, &op_min<uint32_t>>("atom.min.u32");
  add<uint64_t, &op_min<uint64_t>>("atom.min.u64");
  add<uint32_t, &op_max<uint32_t>>("atom.max.u32");
  add<uint64_t, &op_max<uint64_t>>("atom.max.u64");
  add<uint32_t, &op_signed_min<uint32_t>>("atom.min.s32");
  add<uint64_t, &op_signed_min<uint64_t>>("atom.min.s64");
  add<uint32_t, &op_signed_max<uint32_t>>("atom.max.s32");
  add<uint64_t, &op_signed_max<uint64_t>>("atom.max.s64");
  add_halves<Half::F16>({"atom.add.f16", "atom.min.f16", "atom.max.f16", "atom.add.f16x2", "atom.min.f16x2",
                         "atom.max.f16x2"});
  add_halves<Half::Bf16>({"atom.add.bf16", "atom.min.bf16", "atom.max.bf16", "atom.add.bf16x2", "atom.min.bf16x2",
                          "atom.max.bf16x2"});
  return true;
}

[[maybe_unused]] const bool added = add_all();

}  // namespace

}  // namespace ptxe
