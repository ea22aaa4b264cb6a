// cp.async.bulk.tensor, cp.reduce.async.bulk.tensor, prefetch, and changes to tensor maps.
#include <algorithm>

#include "barrier.h"
#include "bulk.h"
#include "program.h"
#include "tensor_map.h"

namespace ptxe {

namespace {

constexpr uint32_t kSharedAlignment = 128;  // of a box in shared memory
constexpr uint32_t kLineBytes = 128;        // that a swizzle maps onto itself
constexpr uint32_t kGatherRows = 4;
constexpr int64_t kUnitBits = 128;  // of global memory

enum class Direction : uint32_t { Load, Store };

// The part of a row of the box that is inside the tensor.
struct Piece {
  uint32_t offset;  // in shared memory, before it is swizzled
  uint32_t bytes;
  uint64_t global;
};

// Rows lie in shared memory one after the other, or each in a line as wide as the swizzle.
struct Box {
  TensorMap map;
  Direction direction = Direction::Load;
  uint32_t num_rows = 0;
  std::vector<Piece> pieces;

  uint32_t row_pitch() const { return std::max(map.row_bytes(), swizzle_span(map.swizzle)); }
  uint32_t bytes() const { return num_rows * map.row_bytes(); }
  uint32_t extent() const { return num_rows * row_pitch(); }
};

// Copies to global memory write whole units of 16 bytes, also where the tensor ends within one.
void add_row(Box& box, const int64_t* at, uint32_t row) {
  const TensorMap& map = box.map;
  for (uint32_t d = 1; d < map.rank; ++d) {
    if (at[d] < 0 || at[d] >= static_cast<int64_t>(map.dims[d])) return;
  }
  const int64_t first = std::max<int64_t>(at[0], 0);
  const int64_t bits = map.element_bits();
  auto end = static_cast<int64_t>(map.dims[0]);
  if (box.direction == Direction::Store) end = (end * bits + kUnitBits - 1) / kUnitBits * kUnitBits / bits;
  const int64_t last = std::min<int64_t>(at[0] + map.box[0], end);
  if (first >= last || first >= static_cast<int64_t>(map.dims[0])) return;
  uint64_t global = map.address + static_cast<uint64_t>(first * bits / 8);
  for (uint32_t d = 1; d < map.rank; ++d) global += static_cast<uint64_t>(at[d]) * map.strides[d];
  const auto skipped = static_cast<uint32_t>((first - at[0]) * bits / 8);
  box.pieces.push_back({row * box.row_pitch() + skipped, static_cast<uint32_t>((last - first) * bits / 8), global});
}

Box tile_box(const TensorMap& map, Direction direction, const int32_t* start) {
  Box box{map, direction, 1, {}};
  for (uint32_t d = 1; d < map.rank; ++d) box.num_rows *= map.box_elements(d);
  for (uint32_t row = 0; row < box.num_rows; ++row) {
    int64_t at[kMaxRank] = {start[0]};
    uint32_t rest = row;
    for (uint32_t d = 1; d < map.rank; ++d) {
      at[d] = start[d] + static_cast<int64_t>(rest % map.box_elements(d)) * map.element_strides[d];
      rest /= map.box_elements(d);
    }
    add_row(box, at, row);
  }
  return box;
}

// tile::gather4 and tile::scatter4: four rows of a matrix, from the same column on.
Box row_box(const TensorMap& map, Direction direction, const int32_t* start) {
  Box box{map, direction, kGatherRows, {}};
  for (uint32_t row = 0; row < kGatherRows; ++row) {
    const int64_t at[kMaxRank] = {start[0], start[1 + row]};
    add_row(box, at, row);
  }
  return box;
}

uint64_t bytes_inside(const Box& box) {
  uint64_t bytes = 0;
  for (const Piece& piece : box.pieces) bytes += piece.bytes;
  return bytes;
}

// Fill of elements outside the tensor: a NaN is 0x7ff7 in every 16 bits, whatever the type, as an H200 writes it.
void fill(const TensorMap& map, std::vector<uint8_t>& buffer) {
  for (size_t k = 0; k < buffer.size(); ++k) buffer[k] = !map.fill_nan ? 0 : k % 2 ? 0x7f : 0xf7;
}

// What a load makes of f32 numbers if the tensor map says tf32: rounded to nearest even, NaN 0x7fffe000.
void round_to_tf32(uint8_t* numbers, uint32_t bytes) {
  for (uint32_t k = 0; k < bytes; k += sizeof(uint32_t)) {
    uint32_t bits;
    std::memcpy(&bits, numbers + k, sizeof bits);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    bits = nan ? 0x7fffe000 : (bits + 0xfff + (bits >> 13 & 1)) & 0xffffe000;
    std::memcpy(numbers + k, &bits, sizeof bits);
  }
}

// The region of shared memory that a box at `address` touches.
uint32_t region_bytes(const Box& box) {
  if (box.map.swizzle == Swizzle::None) return box.bytes();
  return (box.extent() + kLineBytes - 1) / kLineBytes * kLineBytes;
}

struct TensorLoad : AsyncOp {
  Actor actor;
  Box box;
  std::vector<uint32_t> destinations, mbarriers;
  std::vector<uint8_t> buffer;
  size_t next = 0;

  bool step(Cluster& cluster) override {
    if (next == 0) read(cluster);
    write(cluster, destinations[next]);
    mbarrier_complete_tx(cluster, mbarriers[next], box.bytes(), actor);
    if (++next < destinations.size()) return false;
    retire(cluster, actor);
    return true;
  }
  std::string describe() const override {
    return "cp.async.bulk.tensor of " + std::to_string(box.bytes()) + " bytes to shared memory";
  }

  void read(Cluster& cluster) {
    buffer.resize(box.extent());
    fill(box.map, buffer);
    for (const Piece& piece : box.pieces) {
      const Place place =
          resolve_async(cluster, actor, Space::Global, piece.global, piece.bytes, 1, AccessKind::Read, actor.site);
      if (place) {
        std::memcpy(buffer.data() + piece.offset, place.data, piece.bytes);
        if (box.map.is_tf32()) round_to_tf32(buffer.data() + piece.offset, piece.bytes);
      } else {
        std::memset(buffer.data() + piece.offset, 0xff, piece.bytes);
      }
    }
  }

  void write(Cluster& cluster, uint32_t destination) {
    const Place place = resolve_async(cluster, actor, Space::SharedCluster, destination, region_bytes(box),
                                      kSharedAlignment, AccessKind::Write, actor.site);
    if (!place) return;
    if (box.map.swizzle == Swizzle::None) {
      std::memcpy(place.data, buffer.data(), box.bytes());
      return;
    }
    const uint32_t atom = swizzle_atom(box.map.swizzle), pitch = box.row_pitch(), row_bytes = box.map.row_bytes();
    for (uint32_t row = 0; row < box.extent(); row += pitch) {
      for (uint32_t k = row; k < row + row_bytes; k += atom) {
        const uint32_t to = swizzle_address(box.map.swizzle, destination + k) - destination;
        std::memcpy(place.data + to, buffer.data() + k, atom);
      }
    }
  }
};

struct TensorStore : GroupedCopy {
  Box box;
  uint32_t source = 0;
  ReduceFunction reduction = nullptr;

  // Only what is inside the tensor is read, row by row: the rest of the box need not have been written.
  void read(Cluster& cluster) override {
    buffer.resize(box.extent());
    if (source % kSharedAlignment) {
      report(*cluster.grid, Report::Misaligned, reader.site,
             "A tensor copy from shared address " + std::to_string(source & kOffsetMask) +
                 "; a multiple of 128 is needed.");
    }
    for (const Piece& piece : box.pieces) {
      const uint32_t atom = swizzle_atom(box.map.swizzle);
      const bool whole_lines = piece.offset % kLineBytes == 0 && piece.bytes % kLineBytes == 0;
      if (box.map.swizzle == Swizzle::None || (whole_lines && source % kLineBytes == 0)) {
        read_whole(cluster, piece, atom);
      } else {
        read_atoms(cluster, piece, atom);
      }
    }
  }

  void read_whole(Cluster& cluster, const Piece& piece, uint32_t atom) {
    const uint32_t from = source + piece.offset;
    const Place place =
        resolve_async(cluster, reader, Space::SharedCluster, from, piece.bytes, 1, AccessKind::Read, reader.site);
    if (!place) {
      std::memset(buffer.data() + piece.offset, 0xff, piece.bytes);
    } else if (box.map.swizzle == Swizzle::None) {
      std::memcpy(buffer.data() + piece.offset, place.data, piece.bytes);
    } else {
      for (uint32_t k = 0; k < piece.bytes; k += atom) {
        const uint32_t to = swizzle_address(box.map.swizzle, from + k) - from;
        std::memcpy(buffer.data() + piece.offset + k, place.data + to, atom);
      }
    }
  }

  void read_atoms(Cluster& cluster, const Piece& piece, uint32_t atom) {
    for (uint32_t k = piece.offset; k < piece.offset + piece.bytes;) {
      const uint32_t end = std::min(piece.offset + piece.bytes, k / atom * atom + atom);
      const uint32_t from = swizzle_address(box.map.swizzle, source + k);
      const Place place =
          resolve_async(cluster, reader, Space::SharedCluster, from, end - k, 1, AccessKind::Read, reader.site);
      if (place) std::memcpy(buffer.data() + k, place.data, end - k);
      k = end;
    }
  }

  void write(Cluster& cluster) override {
    const AccessKind kind = reduction ? AccessKind::Atomic : AccessKind::Write;
    for (const Piece& piece : box.pieces) {
      const Place place =
          resolve_async(cluster, writer, Space::Global, piece.global, piece.bytes, 1, kind, writer.site);
      if (!place) continue;
      if (reduction) {
        reduction(place.data, buffer.data() + piece.offset, piece.bytes);
      } else {
        std::memcpy(place.data, buffer.data() + piece.offset, piece.bytes);
      }
    }
  }
  std::string describe() const override {
    return "cp.async.bulk.tensor of " + std::to_string(box.bytes()) + " bytes to global memory";
  }
};

enum class Mode : uint32_t { Tile, Rows };

// Reports coordinates that make a GPU stop with an illegal instruction.
void check_coordinates(Warp& w, const TensorMap& map, const int32_t* start, bool is_store, int lane) {
  const int64_t first_bits = int64_t{start[0]} * map.element_bits();
  if (first_bits % (16 * 8)) {
    report(w, Report::Misaligned, lane,
           "The first coordinate of a tensor copy, " + std::to_string(start[0]) + ", is " +
               std::to_string(first_bits / 8) + " bytes from the start of a row; it must be a multiple of 16 bytes.");
  }
  for (uint32_t d = 0; is_store && d < map.rank; ++d) {
    if (start[d] >= 0) continue;
    report(w, Report::OutOfBounds, lane,
           "Coordinate " + std::to_string(d) + " of a tensor copy to global memory is " + std::to_string(start[d]) +
               "; only copies from global memory may begin before the tensor.");
  }
}

// The box that a lane names by a tensor map and coordinates; no bytes if the map cannot be used, which is reported.
Box read_box(Warp& w, const Instruction& i, Direction direction, uint64_t map_address, uint32_t rank, Mode mode,
             uint32_t first_coordinate, int lane) {
  Box none;
  const Place place = locate(w, Space::Generic, map_address, kTensorMapBytes, 64, lane);
  if (!place) return none;
  TensorMap map;
  std::string why;
  bool usable = decode_tensor_map(place.data, map, why);
  if (usable && map.swizzle > Swizzle::B128 && w.cluster->grid->machine->target.sm < 100) {
    usable = false;
    why = "its swizzle atom of more than 16 bytes needs sm_100";
  }
  if (!usable) {
    report(w, Report::Unsupported, lane, "The tensor map cannot be used: " + why + ".");
    return none;
  }
  if (map.rank != rank) {
    report(w, Report::OutOfBounds, lane,
           "A tensor copy of rank " + std::to_string(rank) + " with a tensor map of rank " +
               std::to_string(map.rank) + ".");
    return none;
  }
  int32_t start[kMaxRank] = {};
  const uint32_t num_coordinates = mode == Mode::Tile ? rank : 1 + kGatherRows;
  for (uint32_t d = 0; d < num_coordinates; ++d) start[d] = w.values<int32_t>(i.args[first_coordinate + d])[lane];
  check_coordinates(w, map, start, direction == Direction::Store && mode == Mode::Tile, lane);
  if (mode == Mode::Tile) return tile_box(map, direction, start);
  if (map.box[1] != 1) {
    report(w, Report::OutOfBounds, lane,
           "Four rows are copied with a box of " + std::to_string(map.box[1]) + " rows; the box must have one.");
  }
  return row_box(map, direction, start);
}

// The CTA whose mbarrier is signalled for a copy into `destination`: its own, or with .cta_group::2 the CTA of its
// pair that has the parity of the one in which the operand is.
uint32_t signalled_rank(const Cta& destination, uint32_t mbarrier, uint32_t cta_group) {
  if (cta_group != 2) return destination.rank;
  return (destination.rank & ~1u) | (mbarrier >> kCtaShift & 1);
}

void check_signal(Warp& w, uint32_t destination, uint32_t mbarrier, uint32_t cta_group, int lane) {
  const uint32_t from = destination >> kCtaShift, to = mbarrier >> kCtaShift;
  if (cta_group == 2 ? from / 2 == to / 2 : from == to) return;
  report(w, Report::BarrierMisuse, lane,
         "A copy into CTA rank " + std::to_string(from) + " signals an mbarrier of rank " + std::to_string(to) +
             (cta_group == 2 ? ", which is not of its pair." : "; it must be in the CTA of the destination."));
}

}  // namespace

// destination, space, map, mbarrier, rank, mode, CTA group (0: none), mask, bits of the mask (0: none), coordinates
PTXE_OP("tensor.load") {
  const AddressArgs destination(i, 0), map(i, 5), mbarrier(i, 9);
  const auto space = static_cast<Space>(i.args[4]);
  const uint32_t cta_group = i.args[15], mask_bits = i.args[17];
  each_lane(w, [&](int lane) {
    auto op = std::make_unique<TensorLoad>();
    op->box = read_box(w, i, Direction::Load, map.at(w, lane), i.args[13], static_cast<Mode>(i.args[14]), 18, lane);
    if (!op->box.bytes()) return;
    const uint32_t to = shared_operand(w, space, destination.at(w, lane), lane);
    const uint32_t signal = shared_operand(w, Space::SharedCluster, mbarrier.at(w, lane), lane);
    if (mask_bits) {
      const uint32_t mask = cta_mask(w, i.args[16], mask_bits, lane);
      for (const Cta& cta : w.cluster->ctas) {
        if (!(mask >> cta.rank & 1)) continue;
        const uint32_t rank = signalled_rank(cta, signal, cta_group);
        op->destinations.push_back(own_shared_address(cta, to & kOffsetMask));
        op->mbarriers.push_back(rank << kCtaShift | (signal & kOffsetMask));
      }
    } else {
      check_signal(w, to, signal, cta_group, lane);
      op->destinations.push_back(to);
      op->mbarriers.push_back(signal);
    }
    if (op->destinations.empty()) return;
    count(w, Count::TmaLoadBytes, op->box.bytes());
    const uint64_t completion = through_copy_engine(w, op->box.bytes(), "tensor load");
    op->actor = issue(w, Proxy::Async);
    op->actor.site = site_of(w, lane);
    op->actor.time = completion;
    start_async(w, std::move(op));
  });
  return Step::Next;
}

// map, source, rank, mode, reduction, coordinates
PTXE_OP("tensor.store") {
  const AddressArgs map(i, 0), source(i, 4);
  const auto reduction = static_cast<ReduceOp>(i.args[10]);
  each_lane(w, [&](int lane) {
    auto op = std::make_unique<TensorStore>();
    op->box = read_box(w, i, Direction::Store, map.at(w, lane), i.args[8], static_cast<Mode>(i.args[9]), 11, lane);
    if (!op->box.bytes()) return;
    op->source = shared_operand(w, Space::Shared, source.at(w, lane), lane);
    op->reduction = find_reduction(reduction, op->box.map.type);
    if (reduction != ReduceOp::None && !op->reduction) {
      report(w, Report::Unsupported, lane, "The reduction does not exist for the element type of the tensor map.");
      return;
    }
    count(w, Count::TmaStoreBytes, bytes_inside(op->box));
    const char* name = op->reduction ? "tensor reduce" : "tensor store";
    op->join_group(w, lane, through_copy_engine(w, op->box.bytes(), name));
    start_async(w, std::move(op));
  });
  return Step::Next;
}

PTXE_OP("tensor.prefetch") {  // map, rank, mode, coordinates: only that the copy would be possible
  const AddressArgs map(i, 0);
  each_lane(w, [&](int lane) {
    read_box(w, i, Direction::Load, map.at(w, lane), i.args[4], static_cast<Mode>(i.args[5]), 6, lane);
  });
  return Step::Next;
}

PTXE_OP("tensormap.replace") {  // address, space, field, ordinal, value, bits of the value
  const AddressArgs address(i, 0);
  each_lane(w, [&](int lane) {
    const Place place = resolve(w, static_cast<Space>(i.args[4]), address.at(w, lane), kTensorMapBytes, 64,
                                AccessKind::Write, lane);
    if (!place) return;
    const uint64_t value =
        i.args[8] == 64 ? w.values<uint64_t>(i.args[7])[lane] : w.values<uint32_t>(i.args[7])[lane];
    if (replace_tensor_map_field(place.data, static_cast<TensorMapField>(i.args[5]), i.args[6], value)) return;
    report(w, Report::OutOfBounds, lane,
           "The new value of the tensor map's field is not allowed: " + std::to_string(value));
  });
  ++w.cluster->progress;
  return Step::Next;
}

// destination in global memory, source in shared memory, scope of the release that follows: by one lane for all
PTXE_OP("tensormap.copy") {
  const AddressArgs destination(i, 0), source(i, 4);
  const Step step = gather(w, i, w.live);
  if (step != Step::Execute) return step;
  const int lane = w.first_lane();
  const Place from =
      resolve(w, Space::Shared, source.at(w, lane), kTensorMapBytes, kTensorMapBytes, AccessKind::Read, lane);
  const Place to =
      resolve(w, Space::Global, destination.at(w, lane), kTensorMapBytes, kTensorMapBytes, AccessKind::Write, lane);
  if (from && to) std::memcpy(to.data, from.data, kTensorMapBytes);
  fence_memory(w, Order::Release, static_cast<Scope>(i.args[8]));
  ++w.cluster->progress;
  return Step::Next;
}

}  // namespace ptxe
