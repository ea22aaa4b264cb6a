// The arithmetic of a tile: partial logits, online softmax, weighted sum of values.
#pragma once

#include "block.cuh"

namespace mla {

// Whether the values of fp8 are transposed by ldmatrix, which only compute capability 12.x can, or by ldmatrix
// of pairs of bytes and byte permutations; MLA_PORTABLE_TRANSPOSE selects the latter everywhere.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200 && !defined(MLA_PORTABLE_TRANSPOSE)
constexpr bool kNativeByteTranspose = true;
#else
constexpr bool kNativeByteTranspose = false;
#endif

// A warp's place in S = Q K^T, and the octet of rows that it takes the softmax of.
template <class C>
struct LogitsRole {
  int row_group;
  int key_group;
  int k_split;

  __device__ __forceinline__ explicit LogitsRole(int warp)
      : row_group(C::kRowGroups == 1 ? 0 : warp / kKSplits),
        key_group(C::kKeyGroups == 1 ? 0 : warp / kKSplits),
        k_split(warp % kKSplits) {}
  __device__ __forceinline__ bool has_octet() const { return key_group == 0 && k_split < C::kWarpOctets; }
  __device__ __forceinline__ int octet_row(int lane) const { return octet() * kOctetRows + lane / 4; }
  __device__ __forceinline__ int octet() const { return row_group * C::kWarpOctets + k_split; }
};

// Where part `slot` of octet `octet` lies for box `box`: 16 bytes per lane, logits of two rows of eight keys.
template <class C>
__device__ __forceinline__ uint32 partial_address(uint32 smem, int octet, int slot, int box) {
  return smem + C::kPartialOffset + (octet * C::kSlots + slot) * C::kSlotBytes + box * (C::kSlotBytes / 2);
}

// S of the warp's rows, keys and k split, left in shared memory for the warps that take the softmax; `own` is
// what this warp keeps of its own octet.
template <class C>
__device__ __forceinline__ void partial_logits(const Ring<C>& ring, const LogitsRole<C>& role, int lane,
                                               const uint32 (&query)[C::kSegments][C::kWarpMTiles][4],
                                               float (&own)[kBoxesPerTile][4]) {
  const int key = lane % 8 + lane / 16 * 8;
  constexpr int kStepsPerChunk = C::kChunkBytes / kKStepBytes;
  const int unit = role.k_split % kStepsPerChunk * 2 + lane / 8 % 2;
  const uint32 lane_offset = role.k_split / kStepsPerChunk * C::kChunkStride + key * C::kChunkBytes +
                             Swizzle<C::kChunkBytes>::place(unit, key) * 16;
#pragma unroll
  for (int i = 0; i < C::kWarpBoxes; ++i) {
    const uint32 keys = (C::kKeyGroups == 1 || role.key_group == i ? ring.box(i) : ring.box(1)) + lane_offset;
    const int box = C::kKeyGroups == 1 ? i : role.key_group;
    float s[C::kWarpMTiles][2][4] = {};
#pragma unroll
    for (int segment = 0; segment < C::kSegments; ++segment) {
      if (segment * kKSplits + role.k_split >= C::kKSteps) continue;
      uint32 b[4];
      ldmatrix4(b, keys + segment * C::kSegmentStride);
#pragma unroll
      for (int m = 0; m < C::kWarpMTiles; ++m) {
        mma(typename C::Element{}, s[m][0], query[segment][m], b[0], b[1]);
        mma(typename C::Element{}, s[m][1], query[segment][m], b[2], b[3]);
      }
    }
#pragma unroll
    for (int o = 0; o < C::kWarpOctets; ++o) {
      const float (&s0)[4] = s[o / 2][0];
      const float (&s1)[4] = s[o / 2][1];
      const int r = o % 2 * 2;
      if (C::kKeepsOwn && o == role.k_split) {
        own[box][0] = s0[r], own[box][1] = s0[r + 1], own[box][2] = s1[r], own[box][3] = s1[r + 1];
      } else {
        const int slot = C::kKeepsOwn ? (role.k_split - o - 1) & (kKSplits - 1) : role.k_split;
        const int octet = role.row_group * C::kWarpOctets + o;
        st_shared(partial_address<C>(ring.smem, octet, slot, box) + lane * 16, s0[r], s0[r + 1], s1[r], s1[r + 1]);
      }
    }
  }
}

// The softmax of one octet of rows: a quad of lanes has a row, a lane the keys 2 (lane % 4) and the next one of
// every eight keys. What is carried from tile to tile lies in shared memory, since registers are scarce.
template <class C>
struct Softmax {
  uint32 row_state;  // address of the row's decay; its maximum, sum and limit are kTileM floats apart

  __device__ __forceinline__ Softmax(uint32 smem, int row) : row_state(smem + C::kDecayOffset + row * 4) {}

  __device__ __forceinline__ void begin(int lane, int key_limit) const {
    if (lane % 4 != 0) return;
    st_shared(row_state + (C::kMaxOffset - C::kDecayOffset), -infinity());
    st_shared(row_state + (C::kSumOffset - C::kDecayOffset), 0.0f);
    st_shared(row_state + (C::kLimitOffset - C::kDecayOffset), static_cast<uint32>(key_limit));
  }
  __device__ __forceinline__ float row_max() const {  // log2; -inf until the row has seen a key
    return ld_shared_float(row_state + (C::kMaxOffset - C::kDecayOffset));
  }
  __device__ __forceinline__ float row_sum() const {
    return ld_shared_float(row_state + (C::kSumOffset - C::kDecayOffset));
  }

  // Weights of the tile to shared memory, and by how much the sums so far shrink; whether any does.
  __device__ __forceinline__ bool tile(const Ring<C>& ring, int octet, int lane, int first_key,
                                       const float (&own)[kBoxesPerTile][4]) const {
      float4 parts[kBoxesPerTile][C::kSlots];
#pragma unroll
    for (int box = 0; box < kBoxesPerTile; ++box) {
#pragma unroll
      for (int slot = 0; slot < C::kSlots; ++slot)
        parts[box][slot] = ld_shared4(partial_address<C>(ring.smem, octet, slot, box) + lane * 16);
    }
    const float scale_log2 = ld_shared_float(ring.smem + C::kLogitScaleOffset);
    const int key_limit = static_cast<int>(ld_shared(row_state + (C::kLimitOffset - C::kDecayOffset)));
    float max = row_max();
    float s[kBoxesPerTile][4];
    float tile_max = -infinity();
#pragma unroll
    for (int box = 0; box < kBoxesPerTile; ++box) {
      const bool absent = ld_shared(ring.smem + C::kAbsentOffset + ring.slot(box) * 4) != 0;
      const int limit = absent ? 0 : key_limit - first_key - box * kBoxKeys - lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 4; ++i) s[box][i] = C::kKeepsOwn ? own[box][i] : 0.0f;
#pragma unroll
      for (int slot = 0; slot < C::kSlots; ++slot) {
        const float4 part = parts[box][slot];
        s[box][0] += part.x, s[box][1] += part.y, s[box][2] += part.z, s[box][3] += part.w;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[box][i] = i / 2 * 8 + i % 2 < limit ? s[box][i] * scale_log2 : -infinity();
        tile_max = fmaxf(tile_max, s[box][i]);
      }
    }
    tile_max = fmaxf(tile_max, __shfl_xor_sync(0xffffffffu, tile_max, 1));
    tile_max = fmaxf(tile_max, __shfl_xor_sync(0xffffffffu, tile_max, 2));
    const bool grows = tile_max > max + C::Element::kMaxLag;
    const float decay = grows ? exp2_approx(max - tile_max) : 1.0f;
    max = grows ? tile_max : max;
    const float shift = max == -infinity() ? 0.0f : max;
    float tile_sum = 0.0f;
#pragma unroll
    for (int box = 0; box < kBoxesPerTile; ++box) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[box][i] = exp2_approx(s[box][i] - shift);
        tile_sum += s[box][i];
      }
    }
    store_weights(ring, octet * kOctetRows + lane / 4, lane % 4, s);
    tile_sum += __shfl_xor_sync(0xffffffffu, tile_sum, 1);
    tile_sum += __shfl_xor_sync(0xffffffffu, tile_sum, 2);
    __syncwarp();  // the quad has read the row's maximum
    if (lane % 4 == 0) {
      st_shared(row_state, decay);
      st_shared(row_state + (C::kMaxOffset - C::kDecayOffset), max);
      st_shared(row_state + (C::kSumOffset - C::kDecayOffset), row_sum() * decay + tile_sum);
    }
    return grows;
  }

  // Weights of one-byte elements lie in the order in which values are transposed: byte 4 q + i of sixteen keys
  // is key 8 (i / 2) + 2 q + i % 2.
  __device__ __forceinline__ static void store_weights(const Ring<C>& ring, int row, int quad_lane,
                                                       const float (&w)[kBoxesPerTile][4]) {
    const typename C::Element element{};
    const uint32 rows = row < C::kWeightRowsPerBox ? ring.weights(0) : ring.weights(1);
    const uint32 target = rows + row % C::kWeightRowsPerBox * C::kWeightRowBytes + quad_lane * 4;
#pragma unroll
    for (int box = 0; box < kBoxesPerTile; ++box) {
      if constexpr (C::kBytes == 2) {
        st_shared(target + WeightSwizzle<64>::place(box * 2, row) * 16, pack(element, w[box][0], w[box][1]));
        st_shared(target + WeightSwizzle<64>::place(box * 2 + 1, row) * 16, pack(element, w[box][2], w[box][3]));
      } else {
        constexpr float k = C::Element::kWeightScale;
        const uint32 low = pack(element, w[box][0] * k, w[box][1] * k);
        const uint32 high = pack(element, w[box][2] * k, w[box][3] * k);
        st_shared(target + WeightSwizzle<32>::place(box, row) * 16, low | high << 16);
      }
    }
  }
};

// Values of a k step as operands of two mmas: b[0], b[1] of one with eight columns, b[2], b[3] of the other.
// Columns of the pair: two-byte elements and the native transpose 8 e + n, the portable one 2 n + e.
template <class C>
struct Values {
  uint32 address[kBoxesPerTile];  // of the lane's row in the warp's chunk, swizzled for the first 16 columns

  __device__ __forceinline__ Values(const Ring<C>& ring, int warp, int lane) {
    const uint32 chunk = warp * C::kChunkStride;
    if constexpr (C::kBytes == 2) {
      const uint32 row = chunk + lane % 16 * C::kChunkBytes + Swizzle<128>::place(lane / 16, lane % 16) * 16;
      address[0] = ring.box(0) + row;
      address[1] = ring.box(1) + row;
    } else {
      const int r = lane % 16;
      const int key = kNativeByteTranspose ? r % 4 / 2 * 8 + r / 4 * 2 + r % 2 : r;
      const uint32 row = chunk + key * C::kChunkBytes + Swizzle<64>::place(0, key) * 16;
      address[0] = (lane < 16 ? ring.box(0) : ring.box(1)) + row;
      address[1] = address[0];
    }
  }

  __device__ __forceinline__ void load(uint32 (&b)[4], int k_step, int columns) const {
    if constexpr (C::kBytes == 2) {
      ldmatrix4_trans(b, address[k_step] ^ (columns * 32));
    } else if constexpr (kNativeByteTranspose) {
      uint32 r[4];
      ldmatrix2_trans_bytes(r, address[0] ^ (columns * 16));
      b[0] = r[0], b[1] = r[2], b[2] = r[1], b[3] = r[3];
    } else {
      uint32 r[4];
      ldmatrix4_trans(r, address[0] ^ (columns * 16));
      b[0] = __byte_perm(r[0], r[1], 0x6420), b[1] = __byte_perm(r[2], r[3], 0x6420);
      b[2] = __byte_perm(r[0], r[1], 0x7531), b[3] = __byte_perm(r[2], r[3], 0x7531);
    }
  }
};

constexpr int kColumnPairs = kChunkElements / 16;  // pairs of mma tiles of a warp's columns

// O += P V for all rows and the warp's columns.
template <class C>
__device__ __forceinline__ void weigh_values(const Ring<C>& ring, int warp, int lane,
                                             float (&o)[C::kMTiles][2 * kColumnPairs][4]) {
  const Values<C> values(ring, warp, lane);
#pragma unroll
  for (int k = 0; k < C::kWeightKSteps; ++k) {
    uint32 a[C::kMTiles][4];
#pragma unroll
    for (int m = 0; m < C::kMTiles; ++m) {
      constexpr int kTilesPerBox = C::kWeightRowsPerBox / 16;
      const int row = m % kTilesPerBox * 16 + lane % 16;
      const int unit = WeightSwizzle<C::kWeightRowBytes>::place(k * 2 + lane / 16, row);
      ldmatrix4(a[m], ring.weights(m / kTilesPerBox) + row * C::kWeightRowBytes + unit * 16);
    }
#pragma unroll
    for (int c = 0; c < kColumnPairs; ++c) {
      uint32 b[4];
      values.load(b, k, c);
#pragma unroll
      for (int m = 0; m < C::kMTiles; ++m) {
        mma(typename C::Element{}, o[m][2 * c], a[m], b[0], b[1]);
        mma(typename C::Element{}, o[m][2 * c + 1], a[m], b[2], b[3]);
      }
    }
  }
}

}  // namespace mla
