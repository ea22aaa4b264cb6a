#include "matrix_descriptor.h"

#include <algorithm>
#include <limits>

namespace ptxe {

namespace {

constexpr uint32_t kMaxChunks = 512;  // of a tile: 256 rows of 32 bytes

uint32_t swizzle_bytes(Swizzle s) {
  static const uint32_t widths[] = {16, 32, 64, 128, 128};
  return widths[static_cast<int>(s)];
}

uint32_t swizzled(uint32_t address, const MatrixDescriptor& at) {
  const uint32_t row = ((address >> 7) - at.base_offset) & 7;
  switch (at.swizzle) {
    case Swizzle::None: return address;
    case Swizzle::Bytes32: return address ^ (row & 1) << 4;
    case Swizzle::Bytes64: return address ^ (row & 3) << 4;
    case Swizzle::Bytes128: return address ^ row << 4;
    case Swizzle::Bytes128Atom32: return address ^ (row & 3) << 5;
  }
  return address;
}

uint32_t mn_chunk_offset(const MatrixDescriptor& at, uint32_t chunk, uint32_t k) {
  if (at.swizzle == Swizzle::None) return chunk * at.stride + k % 8 * kChunkBytes + k / 8 * at.leading;
  const uint32_t width = swizzle_bytes(at.swizzle), chunks = width / kChunkBytes;
  const uint32_t depth = at.swizzle == Swizzle::Bytes128Atom32 ? 4 : 8;
  return chunk % chunks * kChunkBytes + chunk / chunks * at.leading + k % depth * width + k / depth * at.stride;
}

MatrixDescriptor common_fields(uint64_t bits) {
  const auto field = [bits](int shift) { return static_cast<uint32_t>(bits >> shift & 0x3fff) << 4; };
  return {field(0), field(16), field(32), static_cast<uint32_t>(bits >> 49 & 7), Swizzle::None, nullptr};
}

}  // namespace

MatrixDescriptor decode_tcgen05_descriptor(uint64_t bits) {
  MatrixDescriptor d = common_fields(bits);
  switch (bits >> 61) {
    case 0: d.swizzle = Swizzle::None; break;
    case 1: d.swizzle = Swizzle::Bytes128Atom32; break;
    case 2: d.swizzle = Swizzle::Bytes128; break;
    case 4: d.swizzle = Swizzle::Bytes64; break;
    case 6: d.swizzle = Swizzle::Bytes32; break;
    default: d.refused = "its swizzle mode (bits 61 to 63) is reserved"; break;
  }
  if (bits >> 52 & 1) d.refused = "its leading dimension is an absolute address (bit 52), which is not emulated";
  if ((bits >> 46 & 7) != 1) d.refused = "bits 46 to 48 must hold 0b001";
  return d;
}

MatrixDescriptor decode_wgmma_descriptor(uint64_t bits) {
  static const Swizzle swizzles[] = {Swizzle::None, Swizzle::Bytes128, Swizzle::Bytes64, Swizzle::Bytes32};
  MatrixDescriptor d = common_fields(bits);
  d.swizzle = swizzles[bits >> 62];
  return d;
}

uint32_t row_chunk_offset(const MatrixDescriptor& at, uint32_t row, uint32_t chunk) {
  const bool plain = at.swizzle == Swizzle::None;
  const uint32_t linear = row / 8 * at.stride + row % 8 * swizzle_bytes(at.swizzle) +
                          chunk * (plain ? at.leading : kChunkBytes);
  return swizzled(at.start + linear, at);
}

uint32_t chunk_offset(const OperandTile& tile, uint32_t row, uint32_t k) {
  if (!tile.mn_major) return row_chunk_offset(tile.at, row, k);
  return swizzled(tile.at.start + mn_chunk_offset(tile.at, row, k), tile.at);
}

bool read_chunks(Cluster& cluster, const Actor& actor, Cta& cta, const uint32_t* offsets, uint32_t count) {
  const auto read = [&](uint32_t offset, uint32_t bytes) {
    return static_cast<bool>(resolve_async(cluster, actor, Space::SharedCluster, own_shared_address(cta, offset),
                                           bytes, kChunkBytes, AccessKind::Read, actor.site));
  };
  const auto [least, most] = std::minmax_element(offsets, offsets + count);
  const uint32_t first = *least, end = *most + kChunkBytes;
  if (!cluster.checker || end > cta.shared.size()) return read(first, end - first);

  constexpr uint32_t kMapChunks = (1 << 18) / kChunkBytes;  // of the largest shared memory a descriptor reaches
  uint64_t used[kMapChunks / 64 + 1];
  const uint32_t first_word = first / kChunkBytes / 64, last_word = end / kChunkBytes / 64;
  if (last_word > kMapChunks / 64) return read(first, end - first);
  std::fill(used + first_word, used + last_word + 1, 0);
  for (uint32_t n = 0; n < count; ++n) {
    const uint32_t chunk = offsets[n] / kChunkBytes;
    used[chunk / 64] |= uint64_t{1} << chunk % 64;
  }
  const auto in_use = [&](uint32_t chunk) { return used[chunk / 64] >> chunk % 64 & 1; };
  bool granted = true;
  for (uint32_t chunk = first / kChunkBytes; chunk < end / kChunkBytes;) {
    if (!in_use(chunk)) {
      ++chunk;
      continue;
    }
    const uint32_t begin = chunk;
    while (chunk < end / kChunkBytes && in_use(chunk)) ++chunk;
    granted &= read(begin * kChunkBytes, (chunk - begin) * kChunkBytes);
  }
  return granted;
}

template <class T>
void read_operand(Cluster& cluster, const Actor& actor, Cta& cta, const OperandTile& tile, T* out, uint32_t row_step,
                  uint32_t k_step) {
  const uint32_t elements = chunk_elements(tile.element);
  const uint32_t rows = tile.mn_major ? tile.extent / elements : tile.extent;
  const uint32_t depth = tile.mn_major ? tile.depth : tile.depth / elements;
  const uint32_t first = tile.mn_major ? tile.first / elements : tile.first;
  uint32_t offsets[kMaxChunks];
  for (uint32_t row = 0, n = 0; row < rows; ++row) {
    for (uint32_t k = 0; k < depth; ++k) offsets[n++] = chunk_offset(tile, first + row, k);
  }
  if (!read_chunks(cluster, actor, cta, offsets, rows * depth)) {
    const T refused = std::is_same_v<T, float> ? static_cast<T>(std::numeric_limits<float>::quiet_NaN()) : T(-1);
    for (uint32_t row = 0; row < tile.extent; ++row) {
      for (uint32_t k = 0; k < tile.depth; ++k) out[row * row_step + k * k_step] = refused;
    }
    return;
  }
  with_unpacker<T>(tile.element, [&](const auto& unpacker) {
    constexpr uint32_t kElements = std::decay_t<decltype(unpacker)>::elements;
    const uint8_t* shared = cta.shared.data();
    const uint32_t chunk_row_step = row_step * (tile.mn_major ? kElements : 1);
    const uint32_t chunk_k_step = k_step * (tile.mn_major ? 1 : kElements);
    const uint32_t step = tile.mn_major ? row_step : k_step;  // between the elements of a chunk
    for (uint32_t row = 0, n = 0; row < rows; ++row) {
      for (uint32_t k = 0; k < depth; ++k) {
        T* to = out + row * chunk_row_step + k * chunk_k_step;
        if (step == 1) {
          unpacker.run(shared + offsets[n++], to);
        } else {
          T values[kElements];
          unpacker.run(shared + offsets[n++], values);
          for (uint32_t e = 0; e < kElements; ++e) to[e * step] = values[e];
        }
      }
    }
  });
}

template void read_operand(Cluster&, const Actor&, Cta&, const OperandTile&, float*, uint32_t, uint32_t);
template void read_operand(Cluster&, const Actor&, Cta&, const OperandTile&, int32_t*, uint32_t, uint32_t);

}  // namespace ptxe
