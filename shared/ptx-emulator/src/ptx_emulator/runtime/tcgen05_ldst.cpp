// tcgen05.ld and tcgen05.st: registers of a warp from and to its quarter of the tensor memory lanes.
//
// Where the lane and column of a register are, for thread t and register r:
//   32x32b    lane t,                     column r
//   16x64b    lane t/4 + 8*(t%2),         column t/2%2 + 2r
//   16x128b   lane t/4 + 8*(r%2),         column t%4 + 4*(r/2)
//   16x256b   lane t/4 + 8*(r/2%2),       column 2*(t%4) + r%2 + 8*(r/4)
//   16x32bx2  lane t%16,                  column r + (t<16 ? 0 : the given offset)
// With pack::16b and unpack::16b a register holds the low halves of columns 2c and 2c+1 in the place of column c.
//
// The quarter is that of the warp. The address names it in lane bits 5 and 6, or leaves them 0 as published kernels
// do. One names another warp's quarter, and is right on a GPU, so that such an address is a finding of its own kind.
// The shapes of 16 lanes use bit 4. Values are in the registers at once: what a missing tcgen05.wait::ld does is for
// the checker to say.
#include <algorithm>
#include <cmath>

#include "numeric.h"
#include "program.h"
#include "tcgen05.h"

namespace ptxe {

namespace {

enum Shape : uint32_t { k32x32b, k16x64b, k16x128b, k16x256b, k16x32bx2 };  // as SHAPES in lower/tcgen05.py
enum Reduction : uint32_t { kNoReduction, kMin, kMax };
enum ReductionFlags : uint32_t { kAbs = 1, kNan = 2, kSigned = 4, kUnsigned = 8 };

struct Transfer {
  Shape shape;
  bool packed;
  uint32_t split;  // of 16x32bx2
  const uint32_t* slots;
  uint32_t num_registers;
  uint32_t lane, column;  // of the address, lane in the whole tensor memory

  uint32_t lane_of(uint32_t t, uint32_t r) const {
    switch (shape) {
      case k32x32b: return t;
      case k16x64b: return t / 4 + 8 * (t % 2);
      case k16x128b: return t / 4 + 8 * (r % 2);
      case k16x256b: return t / 4 + 8 * (r / 2 % 2);
      case k16x32bx2: return t % 16;
    }
    return 0;
  }
  uint32_t column_of(uint32_t t, uint32_t r) const {
    const uint32_t width = packed ? 2 : 1;
    switch (shape) {
      case k32x32b: return width * r;
      case k16x64b: return width * (t / 2 % 2 + 2 * r);
      case k16x128b: return width * (t % 4 + 4 * (r / 2));
      case k16x256b: return width * (2 * (t % 4) + r % 2 + 8 * (r / 4));
      case k16x32bx2: return width * r + (t < 16 ? 0 : split);
    }
    return 0;
  }
  uint32_t num_lanes() const { return shape == k32x32b ? 32 : 16; }
  uint32_t num_columns() const {  // contiguous ones
    const uint32_t columns = shape == k16x64b ? 2 * num_registers
                             : shape == k16x128b || shape == k16x256b ? 2 * num_registers
                                                                      : num_registers;
    return packed ? 2 * columns : columns;
  }
};

// Arguments: shape, packed, split, number of registers, taddr (4), registers
constexpr uint32_t kFirstRegister = 8;

Transfer make_transfer(Warp& w, const Instruction& i) {
  Transfer t{};
  t.shape = static_cast<Shape>(i.args[0]);
  t.packed = i.args[1] != 0;
  t.split = i.args[2];
  t.num_registers = i.args[3];
  t.slots = i.args + kFirstRegister;
  const AddressArgs args(i, 4);
  const int first = w.first_lane();
  const auto bits = static_cast<uint32_t>(args.at(w, first));
  each_lane(w, [&](int lane) {
    if (static_cast<uint32_t>(args.at(w, lane)) != bits && lane != first) {
      report(w, Report::TmemMisuse, lane, "the lanes of the warp give different tensor memory addresses");
    }
  });
  const TmemAddress address(bits);
  const uint32_t quarter = w.index % 4;
  if (w.cluster->checker && address.lane >= 32 && address.lane / 32 != quarter) {
    report(w, Report::TmemLanes, -1,
           "lane " + std::to_string(address.lane) + " of the tensor memory address is not one that warp " +
               std::to_string(w.index) + " can access: lanes " + std::to_string(32 * quarter) + " to " +
               std::to_string(32 * quarter + 31) + " are");
  }
  t.lane = quarter * 32;
  t.column = address.column;
  if (t.shape != k32x32b) t.lane += address.lane & 16;
  const uint32_t granularity = t.shape == k32x32b ? 32 : 16;
  if (address.lane % granularity != 0) {
    report(w, Report::Misaligned, -1,
           "lane " + std::to_string(address.lane) + " of the tensor memory address is not a multiple of " +
               std::to_string(granularity));
  }
  return t;
}

// Checks the columns and tells the checker. False: refused.
bool permitted(Warp& w, const Transfer& t, AccessKind kind) {
  const uint32_t parts = t.shape == k16x32bx2 && t.split != t.num_columns() ? 2 : 1;
  const uint32_t columns = parts == 1 && t.shape == k16x32bx2 ? 2 * t.num_columns() : t.num_columns();
  for (uint32_t part = 0; part < parts; ++part) {
    const uint32_t column = t.column + part * t.split;
    const std::string why = tmem_refusal(*w.cta, column, columns);
    if (!why.empty()) {
      report(w, Report::TmemMisuse, -1,
             "columns " + std::to_string(column) + " to " + std::to_string(column + columns - 1) +
                 " are accessed, but " + why);
      return false;
    }
  }
  for (uint32_t part = 0; part < parts; ++part) {
    access_tmem(w, *w.cta, t.lane, t.num_lanes(), t.column + part * t.split, columns, kind);
  }
  return true;
}

void load(Warp& w, const Transfer& t) {
  const bool whole_rows = t.shape == k32x32b && !t.packed && w.lanes == kAllLanes;
  for (uint32_t r = 0; r < t.num_registers; ++r) {
    uint32_t* to = w.values<uint32_t>(t.slots[r]);
    if (whole_rows) {
      std::memcpy(to, tmem_column(*w.cta, t.column + r) + t.lane, kLanes * 4);
      continue;
    }
    each_lane(w, [&](int lane) {
      const uint32_t row = t.lane + t.lane_of(lane, r);
      const uint32_t* from = tmem_column(*w.cta, t.column + t.column_of(lane, r)) + row;
      to[lane] = t.packed ? (from[0] & 0xffff) | from[kTmemLanes] << 16 : from[0];
    });
  }
}

void store(Warp& w, const Transfer& t) {
  const bool whole_rows = t.shape == k32x32b && !t.packed && w.lanes == kAllLanes;
  for (uint32_t r = 0; r < t.num_registers; ++r) {
    const uint32_t* from = w.values<uint32_t>(t.slots[r]);
    if (whole_rows) {
      std::memcpy(tmem_column(*w.cta, t.column + r) + t.lane, from, kLanes * 4);
      continue;
    }
    each_lane(w, [&](int lane) {
      const uint32_t row = t.lane + t.lane_of(lane, r);
      uint32_t* to = tmem_column(*w.cta, t.column + t.column_of(lane, r)) + row;
      to[0] = t.packed ? from[lane] & 0xffff : from[lane];
      if (t.packed) to[kTmemLanes] = from[lane] >> 16;
    });
  }
}

template <class T>
T pick(T a, T b, bool max) {
  return max ? std::max(a, b) : std::min(a, b);
}

// One step of tcgen05.ld.red on floats: without .NaN the number wins over a NaN, with it the NaN does.
float reduce_float(float a, float b, bool max, bool nan) {
  if (std::isnan(a) || std::isnan(b)) {
    if (nan || (std::isnan(a) && std::isnan(b))) return as_float(0x7fffffffu);
    return std::isnan(a) ? b : a;
  }
  if (a == b) return std::signbit(a) == max ? b : a;  // -0 is less than +0
  return pick(a, b, max);
}

uint32_t reduced(Warp& w, const Transfer& t, int lane, bool max, uint32_t flags) {
  const auto value = [&](uint32_t r) {
    const uint32_t bits = w.values<uint32_t>(t.slots[r])[lane];
    return flags & kAbs ? bits & 0x7fffffffu : bits;
  };
  uint32_t result = value(0);
  for (uint32_t r = 1; r < t.num_registers; ++r) {
    if (flags & kSigned) {
      result = static_cast<uint32_t>(pick(static_cast<int32_t>(result), static_cast<int32_t>(value(r)), max));
    } else if (flags & kUnsigned) {
      result = pick(result, value(r), max);
    } else {
      result = as_bits(reduce_float(as_float(result), as_float(value(r)), max, flags & kNan));
    }
  }
  return result;
}

}  // namespace

// shape, packed, split, number of registers, taddr (4), registers; then reduction, its flags and its result if any
PTXE_OP("tcgen05.ld") {
  const Step step = gather(w, i, w.live);
  if (step != Step::Execute) return step;
  const Transfer t = make_transfer(w, i);
  count(w, Count::TmemLoadBytes, uint64_t{4} * kLanes * t.num_registers);
  tcgen05_load(w);
  if (permitted(w, t, AccessKind::Read)) {
    load(w, t);
  } else {
    for (uint32_t r = 0; r < t.num_registers; ++r) {
      each_lane(w, [&](int lane) { w.values<uint32_t>(t.slots[r])[lane] = ~0u; });
    }
  }
  const uint32_t* reduction = i.args + kFirstRegister + t.num_registers;
  if (reduction[0] != kNoReduction) {
    uint32_t* to = w.values<uint32_t>(reduction[2]);
    each_lane(w, [&](int lane) { to[lane] = reduced(w, t, lane, reduction[0] == kMax, reduction[1]); });
  }
  return Step::Next;
}

// shape, packed, split, number of registers, taddr (4), registers
PTXE_OP("tcgen05.st") {
  const Step step = gather(w, i, w.live);
  if (step != Step::Execute) return step;
  const Transfer t = make_transfer(w, i);
  count(w, Count::TmemStoreBytes, uint64_t{4} * kLanes * t.num_registers);
  if (permitted(w, t, AccessKind::Write)) store(w, t);
  ++w.cluster->progress;
  return Step::Next;
}

PTXE_OP("tcgen05.use") { return run_early_use(w, i, Report::Tcgen05Order); }

PTXE_OP("tcgen05.wait.ld") {
  const Step step = gather(w, i, w.live);
  if (step != Step::Execute) return step;
  tcgen05_wait_ld(w);
  return Step::Next;
}

PTXE_OP("tcgen05.wait.st") {
  const Step step = gather(w, i, w.live);
  if (step != Step::Execute) return step;
  tcgen05_wait_st(w);
  return Step::Next;
}

PTXE_OP("tcgen05.fence.before") {
  tcgen05_fence_before(w);
  return Step::Next;
}

PTXE_OP("tcgen05.fence.after") {
  tcgen05_fence_after(w);
  return Step::Next;
}

}  // namespace ptxe
