// wgmma.mma_async, fence, commit_group, wait_group.
//
// Each warp of a warpgroup computes its own 16 rows of D, which lie in its registers. The result is in the registers
// at once, and shared memory is read at issue; that both are only promised at wait_group is for the checker: until
// then the reads count as unfinished, so that whoever overwrites an operand early is found. A program that touches
// accumulators in flight is made to wait by the assembler (it serialises such code), which this gives as well.
//
// Where thread t of the warp has D in register r: row t/4 + 8*(r/2%2), column 8*(r/4) + 2*(t%4) + r%2 (32-bit types);
// f16: row t/4 + 8*(r%2), columns 8*(r/2) + 2*(t%4) and the next. A in register r: row t/4 + 8*(r%2), four bytes of K
// from 16*(r/2) + 4*(t%4).
#include <algorithm>
#include <deque>
#include <limits>

#include "matrix_descriptor.h"
#include "matrix_kernel.h"

namespace ptxe {

namespace {

constexpr uint32_t kWarpRows = 16;
constexpr uint32_t kWarpsOfGroup = 4;
// Dense f16 FLOP per cycle of one SM of sm_90: 989 TFLOP/s on 132 SMs at 1.83 GHz. Eight-bit types take half the
// time, tf32 twice.
constexpr uint64_t kWgmmaF16FlopsPerCycle = 4096;

enum class Result : uint32_t { F16, F32, S32 };                            // as RESULTS in lower/wgmma.py
enum Flags : uint32_t { kAInRegisters = 1, kTransA = 2, kTransB = 4, kNegate = 8, kSaturate = 16 };

// Arguments of wgmma.mma_async.
enum Args : uint32_t { kFlags, kN, kElementA, kElementB, kResult, kScaleD, kB, kA, kD = kA + 4 };

struct WgmmaCta : GroupState {
  uint64_t busy_until = 0;
};

struct WgmmaWarp : GroupState {
  std::vector<Actor> open;                 // since the last commit_group
  std::deque<std::vector<Actor>> groups;   // committed, oldest first
  bool fenced = false;
};

uint64_t flops_per_cycle(Element e) {
  if (e == Element::TF32) return kWgmmaF16FlopsPerCycle / 2;
  return chunk_elements(e) == 8 ? kWgmmaF16FlopsPerCycle : kWgmmaF16FlopsPerCycle * 2;
}

struct Multiply {
  Warp& w;
  const Instruction& i;
  uint32_t flags, n, depth;
  Element a, b;
  Result result;

  Multiply(Warp& warp, const Instruction& instruction)
      : w(warp), i(instruction), flags(i.args[kFlags]), n(i.args[kN]), a(static_cast<Element>(i.args[kElementA])),
        b(static_cast<Element>(i.args[kElementB])), result(static_cast<Result>(i.args[kResult])) {
    depth = kTileBytesK / (kChunkBytes / chunk_elements(a));
  }

  uint32_t num_registers() const { return result == Result::F16 ? n / 4 : n / 2; }

  // f(value at [column][row], register, lane, half)
  template <class T, class F>
  void each_element(T* d, F f) {
    for (uint32_t r = 0; r < num_registers(); ++r) {
      uint32_t* values = w.values<uint32_t>(i.args[kD + r]);
      each_lane(w, [&](int lane) {
        const uint32_t t = static_cast<uint32_t>(lane);
        if (result == Result::F16) {
          const uint32_t row = t / 4 + 8 * (r % 2), column = 8 * (r / 2) + 2 * (t % 4);
          f(d[column * kWarpRows + row], values[lane], 0);
          f(d[(column + 1) * kWarpRows + row], values[lane], 16);
        } else {
          const uint32_t row = t / 4 + 8 * (r / 2 % 2), column = 8 * (r / 4) + 2 * (t % 4) + r % 2;
          f(d[column * kWarpRows + row], values[lane], 0);
        }
      });
    }
  }

  template <class T>
  void load_d(T* d) {
    each_element(d, [&](T& value, uint32_t bits, uint32_t shift) {
      if constexpr (std::is_same_v<T, float>) {
        value = result == Result::F16 ? fp16_to_float(static_cast<uint16_t>(bits >> shift)) : as_float(bits);
      } else {
        value = static_cast<int32_t>(bits);
      }
    });
  }

  template <class T>
  void store_d(T* d, bool add_saturating) {
    each_element(d, [&](T& value, uint32_t& bits, uint32_t shift) {
      if constexpr (std::is_same_v<T, float>) {
        if (result == Result::F16) {
          const uint32_t half = float_to_fp16(value);
          bits = (bits & ~(0xffffu << shift)) | half << shift;
        } else {
          bits = as_bits(value);
        }
      } else {
        int64_t sum = value;
        if (add_saturating) sum += static_cast<int32_t>(bits);
        if (flags & kSaturate) {
          sum = std::clamp<int64_t>(sum, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max());
        }
        bits = static_cast<uint32_t>(sum);
      }
    });
  }

  template <class T>
  void read_a_registers(T* out) {
    uint8_t rows[kWarpRows][kTileBytesK];
    for (uint32_t r = 0; r < 4; ++r) {
      const uint32_t* values = w.values<uint32_t>(i.args[kA + r]);
      for (uint32_t t = 0; t < kLanes; ++t) {
        std::memcpy(&rows[t / 4 + 8 * (r % 2)][16 * (r / 2) + 4 * (t % 4)], &values[t], 4);
      }
    }
    with_unpacker<T>(a, [&](const auto& unpacker) {
      constexpr uint32_t kElements = std::decay_t<decltype(unpacker)>::elements;
      for (uint32_t row = 0; row < kWarpRows; ++row) {
        for (uint32_t chunk = 0; chunk < kTileBytesK / kChunkBytes; ++chunk) {
          T values[kElements];
          unpacker.run(rows[row] + chunk * kChunkBytes, values);
          for (uint32_t e = 0; e < kElements; ++e) out[(chunk * kElements + e) * kWarpRows + row] = values[e];
        }
      }
    });
  }

  template <class T>
  void execute(const Actor& actor) {
    alignas(64) T a_values[kMaxDepth * kWarpRows];
    alignas(64) T b_values[kMaxColumns * kMaxDepth];
    alignas(64) T d[kMaxColumns * kWarpRows];
    const int lane = w.first_lane();
    if (flags & kAInRegisters) {
      read_a_registers(a_values);
    } else {
      const auto at = decode_wgmma_descriptor(w.values<uint64_t>(i.args[kA])[lane]);
      const OperandTile tile{at, a, (flags & kTransA) != 0, kWarpRows, depth, w.index % kWarpsOfGroup * kWarpRows};
      read_operand(*w.cluster, actor, *w.cta, tile, a_values, 1u, kWarpRows);
    }
    const auto at = decode_wgmma_descriptor(w.values<uint64_t>(i.args[kB])[lane]);
    const OperandTile tile{at, b, (flags & kTransB) != 0, n, depth, 0};
    read_operand(*w.cluster, actor, *w.cta, tile, b_values, kMaxDepth, 1u);
    if (flags & kNegate) {
      for (uint32_t column = 0; column < n; ++column) {
        for (uint32_t k = 0; k < depth; ++k) b_values[column * kMaxDepth + k] = -b_values[column * kMaxDepth + k];
      }
    }
    const bool accumulate = w.predicate(i.args[kScaleD]) >> lane & 1;
    const bool add_saturating = accumulate && (flags & kSaturate);
    MatrixWork<T> work{a_values, kWarpRows, b_values, d, kWarpRows, depth, n, 1, {0, 0, 0, 0},
                       accumulate && !add_saturating};
    if (work.accumulate) load_d(d);
    multiply(work);
    store_d(d, add_saturating);
  }
};

// Tells the checker which instructions have accumulators in flight.
void note_in_flight(Warp& w, const WgmmaWarp& state) {
  if (!w.cluster->checker) return;
  std::vector<uint32_t> pcs;
  const auto add = [&](const std::vector<Actor>& actors) {
    for (const Actor& actor : actors) {
      if (std::find(pcs.begin(), pcs.end(), actor.site.pc) == pcs.end()) pcs.push_back(actor.site.pc);
    }
  };
  for (const auto& group : state.groups) add(group);
  add(state.open);
  registers_in_flight(w, std::move(pcs));
}

void finish_groups(Warp& w, WgmmaWarp& state, size_t left) {
  const uint64_t begin = w.time;
  while (state.groups.size() > left) {
    for (const Actor& actor : state.groups.front()) {
      finish(*w.cluster, actor, w);
      retire(*w.cluster, actor);
      w.time = std::max(w.time, actor.time);
    }
    state.groups.pop_front();
  }
  if (w.track && w.time > begin) {
    w.waits_for = "wgmma groups";
    trace_wait(w, begin, w.time);
    w.waits_for.clear();
  }
}

}  // namespace

// flags, N, types of A, B and D, scale-d, B descriptor, A (4 registers, or a descriptor and three unused), D registers
PTXE_OP("wgmma.mma_async") {
  const Step step = gather(w, i, w.live);
  if (step != Step::Execute) return step;
  WgmmaWarp& state = w.state.get<WgmmaWarp>();
  if (!state.fenced) {
    report(w, Report::BarrierMisuse, -1, "wgmma.mma_async without a wgmma.fence since the warp began");
    state.fenced = true;
  }
  Multiply multiplication(w, i);
  Actor actor = issue(w, Proxy::Async);
  if (multiplication.result == Result::S32) {
    multiplication.execute<int32_t>(actor);
  } else {
    multiplication.execute<float>(actor);
  }
  const uint64_t flops = uint64_t{2} * kWarpRows * multiplication.n * multiplication.depth;
  count(w, Count::MmaFlops, flops);
  WgmmaCta& engine = w.cta->state.get<WgmmaCta>();
  const uint64_t begin = std::max(w.time, engine.busy_until);
  actor.time = begin + std::max<uint64_t>(1, flops / flops_per_cycle(multiplication.a));
  engine.busy_until = actor.time;
  trace_engine(*w.cta, "mma", "wgmma", i.line, begin, actor.time);
  state.open.push_back(std::move(actor));
  note_in_flight(w, state);
  return Step::Next;
}

PTXE_OP("wgmma.use") { return run_early_use(w, i, Report::WgmmaOrder); }

PTXE_OP("wgmma.fence") {
  const Step step = gather(w, i, w.live);
  if (step != Step::Execute) return step;
  w.state.get<WgmmaWarp>().fenced = true;
  return Step::Next;
}

PTXE_OP("wgmma.commit_group") {
  const Step step = gather(w, i, w.live);
  if (step != Step::Execute) return step;
  WgmmaWarp& state = w.state.get<WgmmaWarp>();
  state.groups.push_back(std::move(state.open));
  state.open.clear();
  return Step::Next;
}

// number of groups that may stay in flight
PTXE_OP("wgmma.wait_group") {
  const Step step = gather(w, i, w.live);
  if (step != Step::Execute) return step;
  WgmmaWarp& state = w.state.get<WgmmaWarp>();
  finish_groups(w, state, i.args[0]);
  note_in_flight(w, state);
  return Step::Next;
}

}  // namespace ptxe
