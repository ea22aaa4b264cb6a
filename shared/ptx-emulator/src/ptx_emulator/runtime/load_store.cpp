// ld, st, address conversions, and the instructions that only hint at what will be accessed.
#include <algorithm>

#include "memory.h"
#include "program.h"
#include "strong.h"

namespace ptxe {

namespace {

struct Bits128 {
  uint64_t low, high;
};

// A register lane of `bits` that holds an element, extended with `fill` (0 or ~0) when it is wider.
template <class T>
void write_register(Warp& w, uint32_t slot, uint32_t bits, int lane, T value, bool is_signed) {
  if constexpr (std::is_same_v<T, Bits128>) {
    (void)bits;
    (void)is_signed;
    w.values<Bits128>(slot)[lane] = value;
  } else {
    const auto wide = is_signed ? static_cast<uint64_t>(static_cast<int64_t>(std::make_signed_t<T>(value)))
                                : static_cast<uint64_t>(value);
    switch (bits) {
      case 8: w.values<uint8_t>(slot)[lane] = static_cast<uint8_t>(wide); break;
      case 16: w.values<uint16_t>(slot)[lane] = static_cast<uint16_t>(wide); break;
      case 32: w.values<uint32_t>(slot)[lane] = static_cast<uint32_t>(wide); break;
      default: w.values<uint64_t>(slot)[lane] = wide; break;
    }
  }
}

template <class T>
T read_register(Warp& w, uint32_t slot, uint32_t bits, int lane) {
  if constexpr (std::is_same_v<T, Bits128>) {
    (void)bits;
    return w.values<Bits128>(slot)[lane];
  } else {
    switch (bits) {
      case 8: return static_cast<T>(w.values<uint8_t>(slot)[lane]);
      case 16: return static_cast<T>(w.values<uint16_t>(slot)[lane]);
      case 32: return static_cast<T>(w.values<uint32_t>(slot)[lane]);
      default: return static_cast<T>(w.values<uint64_t>(slot)[lane]);
    }
  }
}

// Arguments of ld and st: address, space, semantics, scope, is_signed, number of elements, then per element its slot
// and the bits of the slot's lanes.
struct AccessArgs {
  AddressArgs address;
  Space space;
  Strength strength;
  bool is_signed;
  uint32_t num_elements;
  const uint32_t* elements;

  explicit AccessArgs(const Instruction& i)
      : address(i, 0), space(static_cast<Space>(i.args[4])), strength(i.args[5], i.args[6]),
        is_signed(i.args[7] != 0), num_elements(i.args[8]), elements(i.args + 9) {}
  uint32_t slot(uint32_t element) const { return elements[2 * element]; }
  uint32_t bits(uint32_t element) const { return elements[2 * element + 1]; }
};

template <class T>
void load_lanes(Warp& w, const AccessArgs& args, const LanePlaces& to) {
  for (uint32_t element = 0; element < args.num_elements; ++element) {
    const uint32_t slot = args.slot(element), bits = args.bits(element), at = element * sizeof(T);
    if (to.adjoining && bits == 8 * sizeof(T) && args.num_elements == 1) {
      std::memcpy(w.values<T>(slot), to.data[0], kLanes * sizeof(T));
      continue;
    }
    if (to.granted == kAllLanes && bits == 8 * sizeof(T)) {
      T* out = w.values<T>(slot);
      for (int lane = 0; lane < kLanes; ++lane) std::memcpy(&out[lane], to.data[lane] + at, sizeof(T));
      continue;
    }
    each_lane(w, [&](int lane) {
      T value;
      std::memset(&value, 0xff, sizeof value);
      if (to.granted >> lane & 1) std::memcpy(&value, to.data[lane] + at, sizeof value);
      write_register<T>(w, slot, bits, lane, value, args.is_signed);
    });
  }
}

template <class T>
Step load(Warp& w, const Instruction& i) {
  const AccessArgs args(i);
  const bool strong = args.strength.strong;
  const uint32_t bytes = args.num_elements * sizeof(T);
  const LaneAddresses from(w, args.address, w.lanes);
  const LanePlaces to =
      resolve_lanes(w, args.space, from, bytes, bytes, strong ? AccessKind::StrongRead : AccessKind::Read);
  load_lanes<T>(w, args, to);
  if (!strong) return Step::Next;
  each_place(w, args.space, from, to, [&](const Place& place) {
    observe(w, place, args.strength.order, args.strength.scope);
  });
  return Step::Yield;  // perhaps a poll
}

template <class T>
Step store(Warp& w, const Instruction& i) {
  const AccessArgs args(i);
  const bool strong = args.strength.strong;
  const uint32_t bytes = args.num_elements * sizeof(T);
  const LaneAddresses from(w, args.address, w.lanes);
  const LanePlaces to =
      resolve_lanes(w, args.space, from, bytes, bytes, strong ? AccessKind::StrongWrite : AccessKind::Write);
  if (strong) {
    each_place(w, args.space, from, to, [&](const Place& place) {
      publish(w, place, args.strength.order, args.strength.scope);
    });
  }
  for (uint32_t element = 0; element < args.num_elements; ++element) {
    const uint32_t slot = args.slot(element), bits = args.bits(element), at = element * sizeof(T);
    if (!strong && to.granted == kAllLanes && bits == 8 * sizeof(T)) {
      const T* in = w.values<T>(slot);
      for (int lane = 0; lane < kLanes; ++lane) std::memcpy(to.data[lane] + at, &in[lane], sizeof(T));
      continue;
    }
    for (Lanes rest = to.granted; rest; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      T value = read_register<T>(w, slot, bits, lane);  // not const: clang's __atomic_store asks for that
      if constexpr (sizeof(T) <= 8) {
        if (strong) {
          __atomic_store(reinterpret_cast<T*>(to.data[lane] + at), &value, __ATOMIC_RELEASE);
          continue;
        }
      }
      std::memcpy(to.data[lane] + at, &value, sizeof value);
    }
  }
  ++w.cluster->progress;
  return Step::Next;
}

const Register load8("ld.b8", &load<uint8_t>), load16("ld.b16", &load<uint16_t>), load32("ld.b32", &load<uint32_t>),
    load64("ld.b64", &load<uint64_t>), load128("ld.b128", &load<Bits128>);
const Register store8("st.b8", &store<uint8_t>), store16("st.b16", &store<uint16_t>),
    store32("st.b32", &store<uint32_t>), store64("st.b64", &store<uint64_t>), store128("st.b128", &store<Bits128>);

uint64_t read_address(Warp& w, uint32_t slot, uint32_t bits, int lane) {
  return bits == 64 ? w.values<uint64_t>(slot)[lane] : w.values<uint32_t>(slot)[lane];
}
void write_address(Warp& w, uint32_t slot, uint32_t bits, int lane, uint64_t value) {
  if (bits == 64) {
    w.values<uint64_t>(slot)[lane] = value;
  } else {
    w.values<uint32_t>(slot)[lane] = static_cast<uint32_t>(value);
  }
}

bool is_shared_of_cta(const Warp& w, uint64_t generic) {
  return in_shared_window(generic) && static_cast<uint32_t>(generic) >> kCtaShift == w.cta->rank;
}

bool is_in_space(Warp& w, uint64_t generic, Space space) {
  const MemoryMap& memory = w.cluster->machine->memory;
  const bool windowed = in_shared_window(generic) || in_local_window(generic);
  switch (space) {
    case Space::Shared: return is_shared_of_cta(w, generic);
    case Space::SharedCluster: return in_shared_window(generic);
    case Space::Local: return in_local_window(generic);
    case Space::Param: {
      const auto base = reinterpret_cast<uint64_t>(w.grid->params_base);
      return generic >= base && generic < base + w.grid->params.size();
    }
    case Space::Const: {
      const MemoryMap::Range* range = windowed ? nullptr : memory.find(generic, 1);
      return range && (range->flags & MemoryMap::kConstant);
    }
    default: return !windowed && !is_in_space(w, generic, Space::Const);
  }
}

// Where refusing leaves addresses: in no range of any space.
constexpr uint64_t kNoAddress = ~0ull;

uint64_t mapped_address(Warp& w, uint64_t address, uint32_t rank, bool generic, int lane) {
  if (generic && !in_shared_window(address)) {
    report(w, Report::OutOfBounds, lane, "mapa of a generic address that is not in shared memory");
    return kNoAddress;
  }
  if (rank >= w.cluster->ctas.size()) {
    report(w, Report::OutOfBounds, lane,
           "mapa to CTA rank " + std::to_string(rank) + ", the cluster has " + std::to_string(w.cluster->ctas.size()) +
               " CTAs");
    return kNoAddress;
  }
  const uint64_t upper = generic ? kSharedWindow : 0;
  return upper | static_cast<uint64_t>(rank) << kCtaShift | (address & kOffsetMask);
}

}  // namespace

// Arguments: destination, its bits, source, its bits, window to add.
PTXE_OP("cvta.from") {
  const uint64_t window = static_cast<uint64_t>(i.args[4]) << 48;
  each_lane(w, [&](int lane) {
    const uint64_t address = read_address(w, i.args[2], i.args[3], lane);
    write_address(w, i.args[0], i.args[1], lane, window ? window | static_cast<uint32_t>(address) : address);
  });
  return Step::Next;
}

// Arguments: destination, its bits, source, its bits, window to remove (0: none may be there).
PTXE_OP("cvta.to") {
  const uint64_t window = i.args[4];
  each_lane(w, [&](int lane) {
    const uint64_t address = read_address(w, i.args[2], i.args[3], lane);
    write_address(w, i.args[0], i.args[1], lane, window && address >> 48 == window ? address & 0xffffffffu : address);
  });
  return Step::Next;
}

// Arguments: predicate, address, its bits, space.
PTXE_OP("isspacep") {
  Lanes inside = 0;
  each_lane(w, [&](int lane) {
    const uint64_t address = read_address(w, i.args[1], i.args[2], lane);
    inside |= static_cast<Lanes>(is_in_space(w, address, static_cast<Space>(i.args[3]))) << lane;
  });
  w.set_predicate(i.args[0], inside);
  return Step::Next;
}

// Arguments: destination, its bits, address, its bits, rank, whether the addresses are generic.
PTXE_OP("mapa") {
  const uint32_t* rank = w.values<uint32_t>(i.args[4]);
  each_lane(w, [&](int lane) {
    const uint64_t address = read_address(w, i.args[2], i.args[3], lane);
    write_address(w, i.args[0], i.args[1], lane, mapped_address(w, address, rank[lane], i.args[5] != 0, lane));
  });
  return Step::Next;
}

// Arguments: destination, address, its bits.
PTXE_OP("getctarank") {
  uint32_t* rank = w.values<uint32_t>(i.args[0]);
  each_lane(w, [&](int lane) {
    rank[lane] = static_cast<uint32_t>(read_address(w, i.args[1], i.args[2], lane)) >> kCtaShift;
  });
  return Step::Next;
}

PTXE_OP("memory.hint") { return Step::Next; }

// Arguments: destination, low word, high word.
PTXE_OP("memory.policy") {
  const uint64_t policy = static_cast<uint64_t>(i.args[2]) << 32 | i.args[1];
  uint64_t* out = w.values<uint64_t>(i.args[0]);
  each_lane(w, [&](int lane) { out[lane] = policy; });
  return Step::Next;
}

// Arguments: address, bytes. What is there may be thrown away: a write of unknown values.
PTXE_OP("memory.discard") {
  const uint32_t bytes = i.args[4];
  resolve_lanes(w, Space::Generic, LaneAddresses(w, AddressArgs(i, 0), w.lanes), bytes, bytes, AccessKind::Write);
  return Step::Next;
}

}  // namespace ptxe
