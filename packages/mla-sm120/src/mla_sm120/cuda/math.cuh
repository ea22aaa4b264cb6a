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

// Where the first slot of a row group's partial logits begins. Once they have been taken, the weights are there.
template <class C>
__device__ __forceinline__ uint32 group_address(uint32 smem, const Role<C>& role) {
  return smem + C::kPartialOffset + role.row_group * C::kGroupBytes;
}

// What a warp adds to the address of a box of keys, and where in a slot it has its logits.
template <class C>
struct LaneOffsets {
  uint32 key;   // of the row that the lane reads by ldmatrix, at the warp's k step
  uint32 part;  // of the warp's first octet: 8 bytes per lane, row lane / 4 and keys 2 (lane % 4) and the next one

  __device__ __forceinline__ LaneOffsets(const Role<C>& role, int lane) {
    const int row = lane % 8 + lane / 16 * 8;
    const int unit = role.k_split() * 2 + lane / 8 % 2;
    key = recomputed(row * C::kChunkBytes + Swizzle<C::kChunkBytes>::place(unit, row) * 16);
    part = recomputed(role.octet() % C::kGroupOctets * C::kOctetBytes + lane * 8);
  }
};

// S of the rows of the group, the keys of a box and the warp's k split; `keys` is the lane's address in the box.
template <class C>
__device__ __forceinline__ void partial_logits(uint32 keys, const uint32 (&query)[kChunks][C::kMTiles][4],
                                               float (&s)[C::kMTiles][2][4]) {
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    uint32 b[4];
    ldmatrix4(b, keys + chunk * C::kChunkStride);
#pragma unroll
    for (int m = 0; m < C::kMTiles; ++m) {
      mma(typename C::Element{}, s[m][0], query[chunk][m], b[0], b[1]);
      mma(typename C::Element{}, s[m][1], query[chunk][m], b[2], b[3]);
    }
  }
}

// Leaves the partial logits of a box to the warps that take the softmax, all but those of the warp's own octet.
template <class C>
__device__ __forceinline__ void share_partial_logits(uint32 group, uint32 parts, const Role<C>& role, int box,
                                                     const float (&s)[C::kMTiles][2][4]) {
#pragma unroll
  for (int o = 0; o < C::kGroupOctets; ++o) {
    if (C::kKeepsOwn && o == 0 && role.has_octet()) continue;
    const float (&s0)[4] = s[o / 2][0];
    const float (&s1)[4] = s[o / 2][1];
    const int r = o % 2 * 2;
    // Three warps have parts of an octet that is not theirs: they differ from its warp in one bit or in both.
    const int slot = C::kKeepsOwn ? (role.member & ~(C::kGroupOctets - 1) | o) - 1 : role.k_split();
    const uint32 part = group + ((parts + box * 2 * C::kBlockBytes) ^ (o * C::kOctetBytes)) + slot * C::kSlotBytes;
    st_shared(part, s0[r], s0[r + 1]);
    st_shared(part + C::kBlockBytes, s1[r], s1[r + 1]);
  }
}

// The softmax of one octet of rows: a quad of lanes has a row, a lane the keys 2 (lane % 4) and the next one of
// every eight keys.
template <class C>
struct Softmax {
  static constexpr int kKeyBlocks = kTileKeys / 8;

  float max = -infinity();  // log2; -inf until the row has seen a key
  float sum = 0.0f;         // of the lane's keys

  // Turns the parts of the logits, `s` of them already there, into weights, which take their place.
  __device__ __forceinline__ void tile(const Ring<C>& ring, const Role<C>& role, uint32 parts, int lane,
                                       int first_key, float (&s)[kKeyBlocks][2]) {
    const int row = role.octet() * kOctetRows + lane / 4;
    const float scale_log2 = ld_shared_float(ring.smem + C::kLogitScaleOffset);
    const int key_limit = static_cast<int>(ld_shared(ring.smem + C::kLimitOffset + row * 4));
    const uint32 absent[kBoxesPerTile] = {ld_shared(ring.absent()), ld_shared(ring.after(1).absent())};
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) {
#pragma unroll
      for (int block = 0; block < kKeyBlocks; ++block) {
        const float2 part = ld_shared_pair(parts + slot * C::kSlotBytes + block * C::kBlockBytes);
        s[block][0] += part.x, s[block][1] += part.y;
      }
    }
#pragma unroll
    for (int block = 0; block < kKeyBlocks; ++block) s[block][0] *= scale_log2, s[block][1] *= scale_log2;
    {
#pragma unroll
      for (int block = 0; block < kKeyBlocks; ++block) {
        const int limit = absent[block / 2] != 0 ? 0 : key_limit - first_key - block * 8 - lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 2; ++i) s[block][i] = i < limit ? s[block][i] : -infinity();
      }
    }
    float tile_max = -infinity();
#pragma unroll
    for (int block = 0; block < kKeyBlocks; ++block) tile_max = fmaxf(tile_max, fmaxf(s[block][0], s[block][1]));
    tile_max = fmaxf(tile_max, __shfl_xor_sync(0xffffffffu, tile_max, 1));
    tile_max = fmaxf(tile_max, __shfl_xor_sync(0xffffffffu, tile_max, 2));
    const bool grows = tile_max > max + C::Element::kMaxLag;
    if (__any_sync(0xffffffffu, grows)) {
      const float decay = grows ? exp2_approx(max - tile_max) : 1.0f;
      max = grows ? tile_max : max;
      sum *= decay;
      if (lane % 4 == 0) st_shared(ring.smem + C::kDecayOffset + row * 4, decay);
      if (lane == 0) st_shared_byte(grown(ring.smem, role) + role.member, 1);
    } else if (lane == 0) {
      st_shared_byte(grown(ring.smem, role) + role.member, 0);
    }
    const float shift = max == -infinity() ? 0.0f : max;
#pragma unroll
    for (int block = 0; block < kKeyBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        s[block][i] = exp2_approx(s[block][i] - shift);
        sum += s[block][i];
      }
    }
    __syncwarp();  // all lanes have taken their parts
    store_weights(parts - lane * 8, lane / 4, lane % 4, s);
  }

  // Four bytes, one per octet of the group: whether its sums so far shrink.
  __device__ __forceinline__ static uint32 grown(uint32 smem, const Role<C>& role) {
    return smem + C::kGrownOffset + role.row_group * 4;
  }

  __device__ __forceinline__ float row_sum() const {
    const float pair = sum + __shfl_xor_sync(0xffffffffu, sum, 1);
    return pair + __shfl_xor_sync(0xffffffffu, pair, 2);
  }

  // Weights of one-byte elements lie in the order in which values are transposed: byte 4 q + i of sixteen keys
  // is key 8 (i / 2) + 2 q + i % 2.
  __device__ __forceinline__ static void store_weights(uint32 octet, int row, int quad_lane,
                                                       const float (&w)[kKeyBlocks][2]) {
    using Place = WeightSwizzle<C::kWeightRowBytes>;
    const typename C::Element element{};
    const uint32 target = octet + row * C::kWeightRowBytes + quad_lane * 4;
    if constexpr (C::kBytes == 2) {
#pragma unroll
      for (int block = 0; block < kKeyBlocks; ++block)
        st_shared(target + Place::place(block, row) * 16, pack(element, w[block][0], w[block][1]));
    } else {
#pragma unroll
      for (int box = 0; box < kBoxesPerTile; ++box) {
        constexpr float k = C::Element::kWeightScale;
        const uint32 low = pack(element, w[2 * box][0] * k, w[2 * box][1] * k);
        const uint32 high = pack(element, w[2 * box + 1][0] * k, w[2 * box + 1][1] * k);
        st_shared(target + Place::place(box, row) * 16, low | high << 16);
      }
    }
  }
};

constexpr int kColumnPairs = kChunkElements / 16;  // of a chunk: pairs of mma tiles

// Values of sixteen columns as operands of two mmas: b[0], b[1] of one with eight columns, b[2], b[3] of the other.
// Columns of the pair: two-byte elements and the native transpose 8 e + n, the portable one 2 n + e.
template <class C>
struct Values {
  uint32 address;  // of the lane's row in the warp's first chunk, swizzled for the first 16 columns

  __device__ __forceinline__ Values(const Ring<C>& ring, const Role<C>& role, int k_step, int lane) {
    const int r = lane % 16;
    if constexpr (C::kBytes == 2) {
      address = ring.after(k_step).box() + r * C::kChunkBytes + Swizzle<128>::place(lane / 16, r) * 16;
    } else {
      const int key = kNativeByteTranspose ? r % 4 / 2 * 8 + r / 4 * 2 + r % 2 : r;
      address = (lane < 16 ? ring.box() : ring.after(1).box()) + key * C::kChunkBytes +
                Swizzle<64>::place(0, key) * 16;
    }
    address += role.member * C::kWarpChunks * C::kChunkStride;
  }

  __device__ __forceinline__ void load(uint32 (&b)[4], int columns) const {
    const uint32 chunk = address + columns / kColumnPairs * C::kChunkStride;
    const int pair = columns % kColumnPairs;
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

// Weights of a k step as operands, for all rows of the group.
template <class C>
__device__ __forceinline__ void load_weights(uint32 smem, const Role<C>& role, int k_step, int lane,
                                             uint32 (&a)[C::kMTiles][4]) {
  const int unit = WeightSwizzle<C::kWeightRowBytes>::place(k_step * 2 + lane / 16, lane % 8);
  const uint32 octets = group_address<C>(smem, role) + lane / 8 % 2 * C::kOctetBytes;
#pragma unroll
  for (int m = 0; m < C::kMTiles; ++m)
    ldmatrix4(a[m], octets + m * 2 * C::kOctetBytes + lane % 8 * C::kWeightRowBytes + unit * 16);
}

template <class C>
struct Outputs {  // of the rows of the group and the warp's columns
  float o[C::kMTiles][C::kColumnTiles][4];

  // O += P V of a k step.
  __device__ __forceinline__ void add(const uint32 (&a)[C::kMTiles][4], const Values<C>& values) {
#pragma unroll
    for (int columns = 0; columns < C::kColumnTiles / 2; ++columns) {
      uint32 b[4];
      values.load(b, columns);
#pragma unroll
      for (int m = 0; m < C::kMTiles; ++m) {
        mma(typename C::Element{}, o[m][2 * columns], a[m], b[0], b[1]);
        mma(typename C::Element{}, o[m][2 * columns + 1], a[m], b[2], b[3]);
      }
    }
  }

  // Applies the decays of the group's rows.
  __device__ __forceinline__ void shrink(uint32 smem, const Role<C>& role, uint32 grown, int lane) {
    const uint32 decays = smem + C::kDecayOffset + (role.row_group * C::kGroupRows + lane / 4) * 4;
#pragma unroll
    for (int m = 0; m < C::kMTiles; ++m) {
      const float upper = grown >> (16 * m) & 0xff ? ld_shared_float(decays + m * 64) : 1.0f;
      const float lower = grown >> (16 * m) & 0xff00 ? ld_shared_float(decays + m * 64 + 32) : 1.0f;
#pragma unroll
      for (int n = 0; n < C::kColumnTiles; ++n) {
        o[m][n][0] *= upper, o[m][n][1] *= upper;
        o[m][n][2] *= lower, o[m][n][3] *= lower;
      }
    }
  }
};

}  // namespace mla
