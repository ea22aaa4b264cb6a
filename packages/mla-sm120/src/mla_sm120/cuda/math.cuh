// The arithmetic of a compute warp: partial logits, weighted sum of values.
#pragma once

#include "block.cuh"

namespace mla {

// Whether the values of fp8 are transposed by ldmatrix, which only compute capability 12.x can, or by ldmatrix
// of pairs of bytes and byte permutations; MLA_PORTABLE_TRANSPOSE selects the latter everywhere.
#if defined(MLA_PORTABLE_TRANSPOSE)
constexpr bool kNativeByteTranspose = false;
#else
constexpr bool kNativeByteTranspose = kIsSm120;
#endif

// What a warp adds to the address of a box of keys: that of the row that the lane reads by ldmatrix, at the warp's
// k step.
template <class C>
__device__ __forceinline__ uint32 key_offset(const Role<C>& role, int lane) {
  const int row = lane % 8 + lane / 16 * 8;
  const int unit = role.k_split() * 2 + lane / 8 % 2;
  return recomputed(row * C::kChunkBytes + Swizzle<C::kChunkBytes>::place(unit, row) * 16);
}

// Leaves a warp's partial logits of a box, of the rows of a turn, to the warps that take the softmax.
template <class C>
__device__ __forceinline__ void share_partial_logits(uint32 smem, const Role<C>& role, int turn, uint32 lane,
                                                     const float (&s)[C::kTurnTiles][2][4]) {
  const uint32 part =
      smem + C::kPartialOffset + role.row_group * C::kGroupBytes + role.member * C::kPartBytes + lane * 16;
#pragma unroll
  for (int m = 0; m < C::kTurnTiles; ++m) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
      st_shared(part + ((turn * C::kTurnTiles + m) * 2 + n) * kFragmentBytes,
                make_float4(s[m][n][0], s[m][n][1], s[m][n][2], s[m][n][3]));
  }
}

constexpr int kChunkPairs = kChunkElements / 16;  // of mma tiles

// Values of sixteen columns as operands of two mmas: b[0], b[1] of one with eight columns, b[2], b[3] of the other.
// Columns of the pair: two-byte elements and the native transpose 8 e + n, the portable one 2 n + e.
template <class C>
struct Values {
  uint32 address;  // of the lane's row in the warp's first chunk, swizzled for the first 16 columns

  __device__ __forceinline__ Values(const Ring<C>& ring, const Role<C>& role, uint32 lane) {
    const int r = lane % 16;
    if constexpr (C::kBytes == 2) {
      address = ring.box() + r * C::kChunkBytes + Swizzle<C::kChunkBytes>::place(lane / 16, r) * 16;
    } else {
      const int key = kNativeByteTranspose ? r % 4 / 2 * 8 + r / 4 * 2 + r % 2 : r;
      address = (lane < 16 ? ring.box() : ring.after(1).box()) + key * C::kChunkBytes +
                Swizzle<C::kChunkBytes>::place(0, key) * 16;
    }
    address += role.member * C::kWarpChunks * C::kChunkStride;
  }

  __device__ __forceinline__ void load(uint32 (&b)[4], int columns) const {
    const uint32 chunk = address + columns / kChunkPairs * C::kChunkStride;
    const int pair = columns % kChunkPairs;
    if constexpr (C::kBytes == 2) {
      ldmatrix4_trans(b, chunk ^ (pair * 32));
    } else if constexpr (kNativeByteTranspose) {
      uint32 r[4];
      ldmatrix2_trans_bytes(r, chunk ^ (pair * 16));
      b[0] = r[0], b[1] = r[2], b[2] = r[1], b[3] = r[3];
    } else {
      uint32 r[4];
      ldmatrix4_trans(r, chunk ^ (pair * 16));
      b[0] = __byte_perm(r[0], r[1], 0x6420), b[1] = __byte_perm(r[2], r[3], 0x6420);
      b[2] = __byte_perm(r[0], r[1], 0x7531), b[3] = __byte_perm(r[2], r[3], 0x7531);
    }
  }
};

// Weights of a step as operands, for all rows of the group.
template <class C>
__device__ __forceinline__ void load_weights(uint32 smem, const Role<C>& role, int index, uint32 lane,
                                             uint32 (&a)[C::kMTiles][4]) {
  const uint32 weights = smem + C::kWeightOffset + (index & 1) * C::kStepWeightBytes +
                         role.row_group * C::kGroupWeightBytes + lane * 16;
#pragma unroll
  for (int m = 0; m < C::kMTiles; ++m) {
    const uint4 fragment = ld_shared_fragment(weights + m * kFragmentBytes);
    a[m][0] = fragment.x, a[m][1] = fragment.y, a[m][2] = fragment.z, a[m][3] = fragment.w;
  }
}

template <class C>
struct Outputs {  // of the rows of the group and the warp's columns
  float o[C::kMTiles][C::kColumnTiles][4];

  // O += P V of a k step and a pair of column tiles.
  __device__ __forceinline__ void add(const uint32 (&a)[C::kMTiles][4], const uint32 (&b)[4], int columns) {
#pragma unroll
    for (int m = 0; m < C::kMTiles; ++m) {
      mma(typename C::Element{}, o[m][2 * columns], a[m], b[0], b[1]);
      mma(typename C::Element{}, o[m][2 * columns + 1], a[m], b[2], b[3]);
    }
  }

  // Applies the decays of the rows of a step.
  __device__ __forceinline__ void shrink(uint32 smem, const Role<C>& role, uint32 grown, int index, uint32 lane) {
    const uint32 decays = smem + C::kDecayOffset +
                          ((index & 1) * C::kTileM + role.row_group * C::kGroupRows + lane / 4) * 4;
#pragma unroll
    for (int m = 0; m < C::kMTiles; ++m) {
      if ((grown >> 8 * m & 0xff) == 0) continue;
      const float upper = ld_shared_float(decays + m * 64);
      const float lower = ld_shared_float(decays + m * 64 + 32);
#pragma unroll
      for (int n = 0; n < C::kColumnTiles; ++n) {
        o[m][n][0] *= upper, o[m][n][1] *= upper;
        o[m][n][2] *= lower, o[m][n][3] *= lower;
      }
    }
  }
};

}  // namespace mla
