// Shared memory matrix descriptors of wgmma and tcgen05, and the tiles of operands they describe.
//
// All is done in chunks of 16 bytes. A tile is `extent` rows (M of A, N of B) by `depth` elements of K, and lies in
// one of the canonical layouts. Strides in bytes, W the swizzle width (32, 64, 128), E the elements of a chunk:
//   K-major, no swizzle:   row % 8 -> 16,  row / 8 -> SBO,  chunk of K -> LBO
//   K-major, swizzled:     row % 8 -> W,   row / 8 -> SBO,  chunk of K -> 16
//   MN-major, no swizzle:  chunk of rows -> SBO,  k % 8 -> 16,  k / 8 -> LBO
//   MN-major, swizzled:    chunk % (W/16) -> 16,  chunk / (W/16) -> LBO,  k % 8 -> W,  k / 8 -> SBO
//   MN-major, 128 bytes in atoms of 32: as 128 bytes, with 4 in the place of 8 for k
// A swizzle then exchanges bits of the final address: of the 16-byte chunk within W with the 128-byte row.
#pragma once

#include "checker.h"
#include "core.h"
#include "matrix_types.h"

namespace ptxe {

enum class Swizzle : uint8_t { None, Bytes32, Bytes64, Bytes128, Bytes128Atom32 };

struct MatrixDescriptor {
  uint32_t start, leading, stride;  // bytes
  uint32_t base_offset;             // row of 128 bytes at which the swizzle pattern starts
  Swizzle swizzle;
  const char* refused;  // why it cannot be used, or null
};
MatrixDescriptor decode_tcgen05_descriptor(uint64_t bits);
MatrixDescriptor decode_wgmma_descriptor(uint64_t bits);

struct OperandTile {
  MatrixDescriptor at;
  Element element;
  bool mn_major;
  uint32_t extent;  // rows of A, columns of B
  uint32_t depth;   // elements of K
  uint32_t first = 0;  // row that the tile starts with, a multiple of the elements of a chunk
};

// Offset in shared memory of a chunk, after swizzling: K-major (row, chunk of K), MN-major (chunk of rows, k).
uint32_t chunk_offset(const OperandTile& tile, uint32_t row, uint32_t k);

// Offset of chunk `chunk` of 16 bytes in row `row` of a K-major matrix (tcgen05.cp).
uint32_t row_chunk_offset(const MatrixDescriptor& at, uint32_t row, uint32_t chunk);

// Tells the checker that `actor` reads these chunks of the CTA's shared memory: one access per contiguous run, one
// for the whole span when nothing is checked. False if any is refused (reported).
bool read_chunks(Cluster& cluster, const Actor& actor, Cta& cta, const uint32_t* offsets, uint32_t count);

// Reads an operand tile as numbers to out[row * row_step + k * k_step]. T is float, or int32_t for integer elements.
// A refused tile gives NaN (-1 for integers).
template <class T>
void read_operand(Cluster& cluster, const Actor& actor, Cta& cta, const OperandTile& tile, T* out, uint32_t row_step,
                  uint32_t k_step);

}  // namespace ptxe
