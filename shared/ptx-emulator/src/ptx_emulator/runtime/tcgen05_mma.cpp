// tcgen05.mma. Where row r and column n of D are in tensor memory:
//   one CTA,  M 128   lane r,                    column n
//   one CTA,  M 64    lane r%16 + 32*(r/16),     column n         (plus 16 lanes if the address says so)
//   two CTAs, M 256   CTA r/128, lane r%128,     column n
//   two CTAs, M 128   CTA r/64, lane r%64 + 64*(n / (N/2)), column n % (N/2)
// A in tensor memory has the lanes of D; with two CTAs and M 128 it is there twice, for either half of the lanes. An
// f16 accumulator is the low half of its column. B of two CTAs lies half in each, in the order of n.
#include "tcgen05_mma.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "matrix_kernel.h"
#include "program.h"

namespace ptxe {

namespace {

constexpr uint32_t kTmemOperandColumns = kTileBytesK / 4;
constexpr uint32_t kTileRows = 64;  // rows of D that one call of multiply() takes

std::string with_number(const char* text, uint32_t n) { return text + std::to_string(n); }

bool decode_elements(uint32_t bits, MmaKind kind, Element& element) {
  static const Element f8f6f4[] = {Element::E4M3, Element::E5M2, Element::E4M3, Element::E2M3,
                                   Element::E3M2, Element::E2M1, Element::E4M3, Element::E4M3};
  switch (kind) {
    case MmaKind::F16:
      element = bits ? Element::BF16 : Element::F16;
      return bits < 2;
    case MmaKind::Tf32:
      element = Element::TF32;
      return bits == 2;
    case MmaKind::F8f6f4:
      element = f8f6f4[bits];
      return bits < 2 || (bits >= 3 && bits <= 5);
    case MmaKind::I8:
      element = bits ? Element::S8 : Element::U8;
      return bits < 2;
  }
  return false;
}

bool accumulator_possible(MmaKind kind, Accumulator d) {
  if (kind == MmaKind::I8) return d == Accumulator::S32;
  return d == Accumulator::F32 || (d == Accumulator::F16 && kind != MmaKind::Tf32);
}

}  // namespace

// Bits: 0-1 sparsity selector, 2 sparse, 3 saturate, 4-5 D, 7-9 A, 10-12 B, 13 and 14 negate A and B, 15 and 16
// transpose (MN-major) A and B, 17-22 N/8, 24-28 M/16, 30-31 maximum shift of .ws.
std::string decode_instruction(uint32_t bits, MmaKind kind, uint32_t group_size, MmaShape& s) {
  const auto field = [bits](int first, int width) { return bits >> first & ((1u << width) - 1); };
  s = {field(24, 5) * 16, field(17, 6) * 8, 0,
       Element::F16, Element::F16, static_cast<Accumulator>(field(4, 2)),
       field(13, 1) != 0, field(14, 1) != 0, field(15, 1) != 0, field(16, 1) != 0, field(3, 1) != 0};
  if (field(2, 1) || field(0, 2)) return "it asks for a sparse MMA, which is not emulated";
  if (field(30, 2)) return "its maximum shift (bits 30 and 31) is for .ws only";
  if (!decode_elements(field(7, 3), kind, s.a)) return with_number("its type of A cannot be ", field(7, 3));
  if (!decode_elements(field(10, 3), kind, s.b)) return with_number("its type of B cannot be ", field(10, 3));
  if (!accumulator_possible(kind, s.d)) return with_number("its type of D cannot be ", field(4, 2));
  if (s.saturate && kind != MmaKind::I8) return "only integers saturate (bit 3)";
  if ((s.negate_a || s.negate_b) && kind == MmaKind::I8) return "integers cannot be negated (bits 13 and 14)";
  s.k = kind == MmaKind::Tf32 ? 8 : kind == MmaKind::F16 ? 16 : 32;
  if (s.m != 64 * group_size && s.m != 128 * group_size) {
    return with_number("M cannot be ", s.m) + with_number(" for cta_group::", group_size);
  }
  // N a multiple of 8 (one CTA) or 16 (two); the manual asks for more in some combinations.
  if (s.n < 8 * group_size || s.n > kMaxColumns || s.n % (8 * group_size) != 0) {
    return with_number("N cannot be ", s.n) + with_number(" for cta_group::", group_size);
  }
  return {};
}

std::string MmaOp::describe() const {
  return "tcgen05.mma " + std::to_string(shape.m) + "x" + std::to_string(shape.n) + "x" + std::to_string(shape.k) +
         " of CTA " + std::to_string(actor.site.cta) + ", PTX instruction " + std::to_string(actor.site.pc);
}

TmemLanes MmaOp::lanes_of(const TmemAddress& at) const {
  TmemLanes lanes;
  if (!rows_interleaved()) return lanes.set();
  for (uint32_t r = 0; r < kTileRows; ++r) lanes.set((at.lane & 16) + r % 16 + 32 * (r / 16));
  return lanes;
}

// Columns allocated, lanes as the layout asks; then tells the checker about the tensor memory that is used.
bool MmaOp::permitted(Cluster& cluster, uint32_t member) {
  Cta& cta = *group.ctas[member];
  const auto refuse = [&](const char* what, const std::string& why) {
    report(*cta.grid, Report::TmemMisuse, actor.site, std::string("tcgen05.mma: ") + what + " is refused: " + why);
    return false;
  };
  const uint32_t lane_mask = rows_interleaved() ? ~16u : ~0u;
  if (d.lane & lane_mask) return refuse("D", with_number("it cannot start at lane ", d.lane));
  const std::string why_d = tmem_refusal(cta, d.column, d_columns());
  if (!why_d.empty()) return refuse("D", why_d);
  if (a_in_tmem) {
    if (a_tmem.lane & lane_mask) return refuse("A", with_number("it cannot start at lane ", a_tmem.lane));
    const std::string why_a = tmem_refusal(cta, a_tmem.column, kTmemOperandColumns);
    if (!why_a.empty()) return refuse("A", why_a);
  }
  const auto access = [&](const TmemLanes& lanes, uint32_t column, uint32_t columns, AccessKind access_kind) {
    for (uint32_t lane = 0; lane < kTmemLanes;) {
      const uint32_t begin = lane;
      while (lane < kTmemLanes && lanes[lane]) ++lane;
      if (lane > begin) access_tmem(cluster, actor, cta, begin, lane - begin, column, columns, access_kind);
      if (lane == begin) ++lane;
    }
  };
  if (a_in_tmem) access(lanes_of(a_tmem), a_tmem.column, kTmemOperandColumns, AccessKind::Read);
  access(lanes_of(d) & ~disabled[member], d.column, d_columns(), accumulate ? AccessKind::Atomic : AccessKind::Write);
  return true;
}

template <class T>
void MmaOp::read_a_tmem(Cta& cta, T* out) {
  uint32_t rows[kTmemLanes];  // their lanes
  uint32_t num_rows = 0;
  const TmemLanes lanes = lanes_of(a_tmem);
  for (uint32_t lane = 0; lane < kTmemLanes; ++lane) {
    if (lanes[lane]) rows[num_rows++] = lane;
  }
  with_unpacker<T>(shape.a, [&](const auto& unpacker) {
    constexpr uint32_t kElements = std::decay_t<decltype(unpacker)>::elements;
    constexpr uint32_t kWords = kChunkBytes / 4;
    for (uint32_t chunk = 0; chunk < kTmemOperandColumns / kWords; ++chunk) {
      const uint32_t* columns = tmem_column(cta, a_tmem.column + kWords * chunk);
      for (uint32_t row = 0; row < num_rows; ++row) {
        uint32_t words[kWords];
        for (uint32_t c = 0; c < kWords; ++c) words[c] = columns[c * kTmemLanes + rows[row]];
        T values[kElements];
        unpacker.run(reinterpret_cast<const uint8_t*>(words), values);
        for (uint32_t e = 0; e < kElements; ++e) out[(chunk * kElements + e) * kTmemLanes + row] = values[e];
      }
    }
  });
}

template <class T>
void MmaOp::read_a(Cluster& cluster, Cta& cta, T* out) {
  if (a_in_tmem) return read_a_tmem(cta, out);
  const OperandTile tile{a_shared, shape.a, shape.mn_major_a, shape.m / group.size, shape.k, 0};
  read_operand(cluster, actor, cta, tile, out, 1, kTmemLanes);
}

template <class T>
void MmaOp::read_b(Cluster& cluster, T* out) {
  const uint32_t part = shape.n / group.size;
  const OperandTile tile{b_shared, shape.b, shape.mn_major_b, part, shape.k, 0};
  for (uint32_t member = 0; member < group.size; ++member) {
    read_operand(cluster, actor, *group.ctas[member], tile, out + member * part * kMaxDepth, kMaxDepth, 1u);
  }
  if (shape.negate_a != shape.negate_b) {
    for (uint32_t n = 0; n < shape.n * kMaxDepth; ++n) out[n] = -out[n];
  }
}

namespace {

// D of one call of multiply(), outside of tensor memory.
template <class T>
struct Staged {
  T values[kMaxColumns * kTileRows];  // [column][row]
};

template <class T>
T load_accumulator(uint32_t bits, Accumulator d, float scale) {
  if constexpr (std::is_same_v<T, int32_t>) {
    return static_cast<int32_t>(bits);
  } else {
    const float value = d == Accumulator::F16 ? fp16_to_float(static_cast<uint16_t>(bits)) : as_float(bits);
    return value * scale;
  }
}

int32_t saturating_sum(int32_t a, int32_t b) {
  const int64_t sum = static_cast<int64_t>(a) + b;
  return static_cast<int32_t>(std::clamp<int64_t>(sum, std::numeric_limits<int32_t>::min(),
                                                  std::numeric_limits<int32_t>::max()));
}

uint32_t store_accumulator(float value, Accumulator d) {
  return d == Accumulator::F16 ? float_to_fp16(value) : as_bits(value);
}
uint32_t store_accumulator(int32_t value, Accumulator) { return static_cast<uint32_t>(value); }

}  // namespace

// Multiplies for one CTA; a is [k][128 rows], b is [n][kMaxDepth].
template <class T>
void MmaOp::compute(uint32_t member, const T* a, const T* b) {
  Cta& cta = *group.ctas[member];
  const uint32_t num_tiles = rows_interleaved() ? 1 : 2;
  const bool direct = shape.d != Accumulator::F16 && !shape.saturate && !scale_shift && disabled[member].none();
  for (uint32_t tile = 0; tile < num_tiles; ++tile) {
    const bool second_a = tile == 1 && (!rows_split() || a_in_tmem);
    MatrixWork<T> work{};
    work.a = a + (second_a ? kTileRows : 0);
    work.a_step = kTmemLanes;
    work.b = b + (rows_split() ? tile * d_columns() * kMaxDepth : 0);
    work.depth = shape.k;
    work.columns = d_columns();
    work.num_vectors = 4;
    work.accumulate = accumulate;
    uint32_t lanes[4];
    for (uint32_t v = 0; v < 4; ++v) {
      lanes[v] = rows_interleaved() ? (d.lane & 16) + 32 * v : tile * kTileRows + kVectorRows * v;
    }
    if (direct) {
      work.d = reinterpret_cast<T*>(tmem_column(cta, d.column));
      work.column_step = kTmemLanes;
      std::copy(lanes, lanes + 4, work.vector_at);
      multiply(work);
      continue;
    }
    alignas(64) Staged<T> staged;
    work.d = staged.values;
    work.column_step = kTileRows;
    for (uint32_t v = 0; v < 4; ++v) work.vector_at[v] = kVectorRows * v;
    const float scale = std::ldexp(1.0f, -static_cast<int>(scale_shift));
    const auto each = [&](auto f) {
      for (uint32_t n = 0; n < work.columns; ++n) {
        uint32_t* column = tmem_column(cta, d.column + n);
        for (uint32_t row = 0; row < kTileRows; ++row) {
          f(staged.values[n * kTileRows + row], column, lanes[row / kVectorRows] + row % kVectorRows);
        }
      }
    };
    const bool add_later = shape.saturate && accumulate;
    work.accumulate = accumulate && !add_later;
    if (work.accumulate) {
      each([&](T& value, uint32_t* column, uint32_t lane) {
        value = load_accumulator<T>(column[lane], shape.d, scale);
      });
    }
    multiply(work);
    each([&](T& value, uint32_t* column, uint32_t lane) {
      if (disabled[member][lane]) return;
      if constexpr (std::is_same_v<T, int32_t>) {
        if (add_later) value = saturating_sum(value, static_cast<int32_t>(column[lane]));
      }
      column[lane] = store_accumulator(value, shape.d);
    });
  }
}

template <class T>
void MmaOp::execute(Cluster& cluster) {
  alignas(64) T a[kMaxDepth * kTmemLanes];
  alignas(64) T b[kMaxColumns * kMaxDepth];
  if (a_in_tmem || shape.m / group.size == kTileRows) std::fill(a, a + kMaxDepth * kTmemLanes, T{});
  read_b(cluster, b);
  for (uint32_t member = 0; member < group.size; ++member) {
    read_a(cluster, *group.ctas[member], a);
    compute(member, a, b);
  }
}

namespace {

// Dense f16 FLOP per cycle of one SM of sm_100: 2.25 PFLOP/s on 148 SMs at 1.85 GHz. Eight-bit types take half
// the time, tf32 twice.
constexpr uint64_t kTcgen05F16FlopsPerCycle = 8192;

uint64_t flops_per_cycle(MmaKind kind) {
  switch (kind) {
    case MmaKind::F16: return kTcgen05F16FlopsPerCycle;
    case MmaKind::Tf32: return kTcgen05F16FlopsPerCycle / 2;
    default: return kTcgen05F16FlopsPerCycle * 2;
  }
}

const char* trace_name(MmaKind kind) {
  static const char* const names[] = {"mma f16", "mma tf32", "mma f8f6f4", "mma i8"};
  return names[static_cast<uint32_t>(kind)];
}

}  // namespace

bool MmaOp::step(Cluster& cluster) {
  bool granted = true;
  for (uint32_t member = 0; member < group.size; ++member) granted &= permitted(cluster, member);
  if (granted) {
    if (kind == MmaKind::I8) {
      execute<int32_t>(cluster);
    } else {
      execute<float>(cluster);
    }
  }
  const uint64_t flops = uint64_t{2} * shape.m * shape.n * shape.k;
  Tcgen05Cta& state = tcgen05_state(group.leader());
  const uint64_t begin = std::max(actor.time, state.mma_busy_until);
  const uint64_t end = begin + std::max<uint64_t>(1, flops / (flops_per_cycle(kind) * group.size));
  state.mma_busy_until = end;
  const uint32_t line = cluster.grid->program->code[actor.site.pc].line;
  for (uint32_t member = 0; member < group.size; ++member) {
    trace_engine(*group.ctas[member], "mma", trace_name(kind), line, begin, end);
  }
  retire(cluster, actor);
  ++cluster.progress;
  return true;
}

namespace {

// Arguments of tcgen05.mma.
enum MmaArgs : uint32_t {
  kKind, kGroup, kAInTmem, kD, kA = kD + 4, kB = kA + 4, kDescriptor, kEnableD, kScale, kNumDisabled, kDisabled
};

bool check_shared_operand(Warp& w, int lane, const char* name, const MatrixDescriptor& at, bool mn_major) {
  const char* why = at.refused;
  if (!why && at.swizzle == Swizzle::Bytes128Atom32 && !mn_major) why = "atoms of 32 bytes are for MN-major tiles";
  if (!why) return true;
  report(w, Report::Unsupported, lane, std::string("the shared memory descriptor of ") + name + ": " + why);
  return false;
}

void issue_mma(Warp& w, const Instruction& i, int lane) {
  const auto kind = static_cast<MmaKind>(i.args[kKind]);
  auto op = std::make_unique<MmaOp>();
  op->kind = kind;
  op->group = cta_group(w, i.args[kGroup]);
  if (!op->group.size) return;
  const uint32_t descriptor = w.values<uint32_t>(i.args[kDescriptor])[lane];
  const std::string why = decode_instruction(descriptor, kind, op->group.size, op->shape);
  if (!why.empty()) {
    char number[16];
    std::snprintf(number, sizeof number, "0x%08x", descriptor);
    report(w, Report::Unsupported, lane, std::string("the instruction descriptor ") + number + ": " + why);
    return;
  }
  op->d = TmemAddress(static_cast<uint32_t>(AddressArgs(i, kD).at(w, lane)));
  op->a_in_tmem = i.args[kAInTmem] != 0;
  if (op->a_in_tmem) {
    op->a_tmem = TmemAddress(static_cast<uint32_t>(AddressArgs(i, kA).at(w, lane)));
    const bool padded = op->shape.a == Element::E2M3 || op->shape.a == Element::E3M2 || op->shape.a == Element::E2M1;
    if (padded || op->shape.mn_major_a) {
      report(w, Report::Unsupported, lane,
             padded ? "A of six- or four-bit elements in tensor memory is not emulated"
                    : "A in tensor memory cannot be MN-major (bit 15 of the instruction descriptor)");
      return;
    }
  } else {
    op->a_shared = decode_tcgen05_descriptor(w.values<uint64_t>(i.args[kA])[lane]);
    if (!check_shared_operand(w, lane, "A", op->a_shared, op->shape.mn_major_a)) return;
  }
  op->b_shared = decode_tcgen05_descriptor(w.values<uint64_t>(i.args[kB])[lane]);
  if (!check_shared_operand(w, lane, "B", op->b_shared, op->shape.mn_major_b)) return;
  op->accumulate = w.predicate(i.args[kEnableD]) >> lane & 1;
  op->scale_shift = i.args[kScale];
  for (uint32_t word = 0; word < i.args[kNumDisabled]; ++word) {
    const uint32_t bits = w.values<uint32_t>(i.args[kDisabled + word])[lane];
    for (uint32_t bit = 0; bit < 32; ++bit) op->disabled[word / 4][word % 4 * 32 + bit] = bits >> bit & 1;
  }
  op->actor = issue(w, Proxy::Tcgen05);
  op->order = pipeline_order(op->group);
  count(w, Count::MmaFlops, uint64_t{2} * op->shape.m * op->shape.n * op->shape.k);
  start_async(w, std::move(op));
}

}  // namespace

// kind, cta_group, A in tensor memory?, D (4), A (address: 4, or the slot of a descriptor and three unused),
// B descriptor, instruction descriptor, enable-input-d, scale-input-d, number of disabled-lane words, these
PTXE_OP("tcgen05.mma") {
  each_lane(w, [&](int lane) { issue_mma(w, i, lane); });
  return Step::Next;
}

}  // namespace ptxe
