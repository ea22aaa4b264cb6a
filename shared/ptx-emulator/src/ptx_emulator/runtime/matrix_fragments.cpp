// ldmatrix, stmatrix, movmatrix: matrices of 8 or 16 rows of 16 bytes, spread over the lanes of a warp.
#include "memory.h"

namespace ptxe {

namespace {

constexpr uint32_t kRowBytes = 16;
constexpr uint32_t kRowAlignment = 16;

// As in matrix_fragments.py. How the bytes of a register are found in the rows; lane = 4 * group + member.
enum class Fragment : uint32_t {
  Rows,            // register r: row 8 r + group, bytes 4 member to 4 member + 3
  Columns16,       // register r: rows 8 r + 2 member and the next one, 16-bit column `group`
  Columns8,        // registers 2 m and 2 m + 1: rows 16 m + 4 member to + 3, columns `group` and `group` + 8
  ColumnPairs8,    // register r: rows 8 r + 2 member and the next one, first column `group`, then `group` + 8
};
enum class Packing : uint32_t { None, Six, Four };  // of 16 elements in a row; the rest of its 16 bytes is padding

struct Source {
  uint32_t row, byte;
};

// Which byte of which row is byte `k` of register `r` in `lane`, for the 8-bit fragments.
Source source_of(Fragment fragment, uint32_t r, uint32_t lane, uint32_t k) {
  const uint32_t group = lane / 4, member = lane % 4;
  if (fragment == Fragment::Columns8) return {16 * (r / 2) + 4 * member + k, group + 8 * (r % 2)};
  return {8 * r + 2 * member + k % 2, group + 8 * (k / 2)};
}

using Rows = uint8_t[kLanes][kRowBytes];

// Two 16-bit elements of a register of Fragment::Columns16.
struct Pair {
  uint8_t *low, *high;
  Pair(Rows& rows, uint32_t r, uint32_t lane)
      : low(rows[8 * r + 2 * (lane % 4)] + 2 * (lane / 4)), high(low + kRowBytes) {}
};

void gather_register(Rows& rows, Fragment fragment, uint32_t r, uint32_t lane, uint8_t* out) {
  if (fragment == Fragment::Rows) {
    std::memcpy(out, rows[8 * r] + 4 * lane, 4);  // rows adjoin
  } else if (fragment == Fragment::Columns16) {
    const Pair pair(rows, r, lane);
    std::memcpy(out, pair.low, 2);
    std::memcpy(out + 2, pair.high, 2);
  } else {
    for (uint32_t k = 0; k < 4; ++k) {
      const Source s = source_of(fragment, r, lane, k);
      out[k] = rows[s.row][s.byte];
    }
  }
}

void scatter_register(Rows& rows, Fragment fragment, uint32_t r, uint32_t lane, const uint8_t* in) {
  if (fragment == Fragment::Rows) {
    std::memcpy(rows[8 * r] + 4 * lane, in, 4);
  } else if (fragment == Fragment::Columns16) {
    const Pair pair(rows, r, lane);
    std::memcpy(pair.low, in, 2);
    std::memcpy(pair.high, in + 2, 2);
  } else {
    for (uint32_t k = 0; k < 4; ++k) {
      const Source s = source_of(fragment, r, lane, k);
      rows[s.row][s.byte] = in[k];
    }
  }
}

void unpack(uint8_t (&row)[kRowBytes], Packing packing) {
  if (packing == Packing::None) return;
  const uint32_t bits = packing == Packing::Six ? 6 : 4;
  uint8_t packed[kRowBytes + 1] = {};
  std::memcpy(packed, row, kRowBytes);
  for (uint32_t element = 0; element < kRowBytes; ++element) {
    const uint32_t at = element * bits;
    const uint32_t two = packed[at / 8] | static_cast<uint32_t>(packed[at / 8 + 1]) << 8;
    row[element] = static_cast<uint8_t>(two >> (at % 8) & ((1u << bits) - 1));
  }
}

// Arguments: address, space, fragment, packing, number of rows, number of registers, their slots.
struct MatrixArgs {
  AddressArgs address;
  Space space;
  Fragment fragment;
  Packing packing;
  uint32_t num_rows, num_registers;
  const uint32_t* slots;

  explicit MatrixArgs(const Instruction& i)
      : address(i, 0), space(static_cast<Space>(i.args[4])), fragment(static_cast<Fragment>(i.args[5])),
        packing(static_cast<Packing>(i.args[6])), num_rows(i.args[7]), num_registers(i.args[8]), slots(i.args + 9) {}
  Lanes row_lanes() const { return num_rows == kLanes ? kAllLanes : (1u << num_rows) - 1; }
  uint32_t row_bytes() const {
    return packing == Packing::Six ? 12 : packing == Packing::Four ? 8 : kRowBytes;
  }
};

}  // namespace

PTXE_OP("ldmatrix") {
  if (const Step step = gather(w, i, w.live); step != Step::Execute) return step;
  const MatrixArgs args(i);
  const LaneAddresses from(w, args.address, w.lanes & args.row_lanes());
  const LanePlaces to =
      resolve_lanes(w, args.space, from, args.row_bytes(), kRowAlignment, AccessKind::Read);
  Rows rows;
  std::memset(rows, 0xff, sizeof rows);
  for (Lanes rest = to.granted; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    std::memcpy(rows[lane], to.data[lane], args.row_bytes());
    unpack(rows[lane], args.packing);
  }
  for (uint32_t r = 0; r < args.num_registers; ++r) {
    uint32_t* out = w.values<uint32_t>(args.slots[r]);
    each_lane(w, [&](int lane) {
      gather_register(rows, args.fragment, r, static_cast<uint32_t>(lane), reinterpret_cast<uint8_t*>(&out[lane]));
    });
  }
  return Step::Next;
}

PTXE_OP("stmatrix") {
  if (const Step step = gather(w, i, w.live); step != Step::Execute) return step;
  const MatrixArgs args(i);
  const LaneAddresses from(w, args.address, w.lanes & args.row_lanes());
  const LanePlaces to = resolve_lanes(w, args.space, from, kRowBytes, kRowAlignment, AccessKind::Write);
  Rows rows;
  std::memset(rows, 0, sizeof rows);
  for (uint32_t r = 0; r < args.num_registers; ++r) {
    const uint32_t* in = w.values<uint32_t>(args.slots[r]);
    each_lane(w, [&](int lane) {
      scatter_register(rows, args.fragment, r, static_cast<uint32_t>(lane),
                       reinterpret_cast<const uint8_t*>(&in[lane]));
    });
  }
  for (Lanes rest = to.granted; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    std::memcpy(to.data[lane], rows[lane], kRowBytes);
  }
  ++w.cluster->progress;
  return Step::Next;
}

// Arguments: destination, source. The 8x8 matrix of 16-bit elements is transposed.
PTXE_OP("movmatrix") {
  if (const Step step = gather(w, i, w.live); step != Step::Execute) return step;
  const uint32_t* in = w.values<uint32_t>(i.args[1]);
  uint32_t* out = w.values<uint32_t>(i.args[0]);
  uint16_t matrix[8][8];
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    matrix[lane / 4][lane % 4 * 2] = static_cast<uint16_t>(in[lane]);
    matrix[lane / 4][lane % 4 * 2 + 1] = static_cast<uint16_t>(in[lane] >> 16);
  }
  each_lane(w, [&](int lane) {
    const uint32_t row = static_cast<uint32_t>(lane) / 4, column = static_cast<uint32_t>(lane) % 4 * 2;
    out[lane] = static_cast<uint32_t>(matrix[column + 1][row]) << 16 | matrix[column][row];
  });
  return Step::Next;
}

}  // namespace ptxe
