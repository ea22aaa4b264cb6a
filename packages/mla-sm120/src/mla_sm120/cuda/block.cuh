// What a block works on, and how queries and keys come to it.
#pragma once

#include "ptx.cuh"

namespace mla {

// One row tile of one request against the keys of one split.
struct Block {
  int request;
  int first_row;    // of the tile, in the request
  int num_rows;     // of the request
  int q_len;        // of the request
  int seq_len;      // of the request
  int first_token;  // of the request, in a ragged query; else 0
  int first_tile;   // of the split, in tiles of kTileKeys keys
  int end_tile;

  __device__ __forceinline__ static Block of(const DecodeParams& p, int tile_m) {
    Block b;
    b.request = static_cast<int>(blockIdx.z);
    b.first_row = static_cast<int>(blockIdx.x) * tile_m;
    b.first_token = 0;
    b.q_len = p.q_len;
    if (p.cum_seq_lens_q != nullptr) {
      b.first_token = p.cum_seq_lens_q[b.request];
      b.q_len = p.cum_seq_lens_q[b.request + 1] - b.first_token;
    }
    b.num_rows = b.q_len * p.num_heads;
    b.seq_len = p.seq_lens[b.request];
    const int64 tiles = (b.seq_len + kTileKeys - 1) / kTileKeys;
    b.first_tile = static_cast<int>(tiles * blockIdx.y / p.num_splits);
    b.end_tile = static_cast<int>(tiles * (blockIdx.y + 1) / p.num_splits);
    return b;
  }

  __device__ __forceinline__ int num_keys() const {  // up to the end of the split
    return min(end_tile * kTileKeys, seq_len);
  }

  // Keys that a row of the request sees; none where there is no such row.
  __device__ __forceinline__ int key_limit(int row, int num_heads) const {
    return row < num_rows ? seq_len - q_len + row / num_heads + 1 : 0;
  }

  // Where a row lies in a tensor of these strides (batch, token, head).
  __device__ __forceinline__ int64 offset(int row, int num_heads, int64 batch, int64 token, int64 head, bool ragged)
      const {
    const int t = row / num_heads;
    return (ragged ? 0 : request * batch) + (first_token + t) * token + (row - t * num_heads) * head;
  }
};

// 16 bytes from memory that may start at any element.
template <int kBytes>
__device__ __forceinline__ uint4 load_16_bytes(const unsigned char* from, bool aligned) {
  if (aligned) return __ldg(reinterpret_cast<const uint4*>(from));
  uint32 words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 16; i += kBytes) {
    const uint32 element = kBytes == 2 ? *reinterpret_cast<const unsigned short*>(from + i) : from[i];
    words[i / 4] |= element << (8 * (i % 4));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// The query of a warp as mma operands: its rows, and its k split of every segment. Passes through the partial
// logits' memory; all warps call it, and none may touch that memory until the barrier at its end.
template <class C>
__device__ __forceinline__ void load_query(const DecodeParams& p, const Block& block, uint32 staging, int row_group,
                                           int k_split, uint32 (&query)[C::kSegments][C::kWarpMTiles][4]) {
  constexpr int kUnits = C::kSegmentBytes / 16;
  constexpr int kRowsAtOnce = kThreads / kUnits;
  constexpr int kRowsPerThread = (C::kTileM + kRowsAtOnce - 1) / kRowsAtOnce;
  const int lane = threadIdx.x % 32;
  const int unit = threadIdx.x % kUnits;
  uint4 raw[C::kSegments][kRowsPerThread];
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    const int tile_row = threadIdx.x / kUnits + i * kRowsAtOnce;
    const int row = block.first_row + tile_row;
    const bool present = tile_row < C::kTileM && row < block.num_rows;
    const int64 offset = block.offset(row, p.num_heads, p.query_stride[0], p.query_stride[1], p.query_stride[2],
                                      p.cum_seq_lens_q != nullptr);
    const unsigned char* from = static_cast<const unsigned char*>(p.query) + offset * C::kBytes + unit * 16;
#pragma unroll
    for (int s = 0; s < C::kSegments; ++s) {
      raw[s][i] = make_uint4(0, 0, 0, 0);
      if (present && s * C::kSegmentBytes + unit * 16 < kHeadDim * C::kBytes)
        raw[s][i] = load_16_bytes<C::kBytes>(from + s * C::kSegmentBytes, p.query_aligned);
    }
  }
#pragma unroll
  for (int pass = 0; pass < C::kPasses; ++pass) {
    if (pass > 0) __syncthreads();
#pragma unroll
    for (int s = pass * C::kSegmentsPerPass; s < (pass + 1) * C::kSegmentsPerPass && s < C::kSegments; ++s) {
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i) {
        const int row = threadIdx.x / kUnits + i * kRowsAtOnce;
        const uint32 segment = staging + (s - pass * C::kSegmentsPerPass) * C::kTileM * C::kSegmentBytes;
        if (row < C::kTileM)
          st_shared(segment + row * C::kSegmentBytes + Swizzle<128>::place(unit, row) * 16, raw[s][i]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int s = pass * C::kSegmentsPerPass; s < (pass + 1) * C::kSegmentsPerPass && s < C::kSegments; ++s) {
      if (s * kKSplits + k_split >= C::kKSteps) continue;
#pragma unroll
      for (int m = 0; m < C::kWarpMTiles; ++m) {
        const int row = row_group * C::kWarpRows + m * 16 + lane % 16;
        const uint32 segment = staging + (s - pass * C::kSegmentsPerPass) * C::kTileM * C::kSegmentBytes;
        ldmatrix4(query[s][m], segment + row * C::kSegmentBytes + Swizzle<128>::place(k_split * 2 + lane / 16, row) * 16);
      }
    }
  }
  __syncthreads();
}

// The ring of boxes. A tile has two, in consecutive slots.
template <class C>
struct Ring {
  uint32 smem;
  uint32 tile = 0;  // of the split, counted from 0

  __device__ __forceinline__ explicit Ring(uint32 smem_) : smem(smem_) {}
  __device__ __forceinline__ void advance() { ++tile; }
  __device__ __forceinline__ int slot(int i) const { return (tile * kBoxesPerTile + i) % C::kNumBoxes; }
  __device__ __forceinline__ int earlier_slot(int i) const {  // of the tile before
    return ((tile - 1) * kBoxesPerTile + i) % C::kNumBoxes;
  }
  __device__ __forceinline__ uint32 phase(int i) const { return (tile * kBoxesPerTile + i) / C::kNumBoxes & 1; }
  __device__ __forceinline__ uint32 box(int i) const { return smem + slot(i) * C::kBoxBytes; }
  __device__ __forceinline__ uint32 weights(int i) const { return box(i) + kRopeChunk * C::kChunkStride; }
  __device__ __forceinline__ uint32 full(int i) const { return smem + C::kFullOffset + slot(i) * 8; }
};

// Owns: the TMA copies of the split's keys. Run by a lane each of the last two warps, which with few rows have no
// softmax to take: one has the first boxes of tiles, the other the second.
// Waits on: nothing, the block's barriers say when slots are free. Signals: full.
// Does not own: zeros in place of keys past the sequence.
template <class C>
struct BoxLoader {
  const DecodeParams& p;
  uint32 smem;
  int end_key;

  __device__ __forceinline__ BoxLoader(const DecodeParams& p_, uint32 smem_, int end_key_)
      : p(p_), smem(smem_), end_key(end_key_) {}

  __device__ __forceinline__ const int32* table() const { return p.block_tables + blockIdx.z * p.table_stride; }

  // Starts to fetch the page of the box from `key` on, for the next copy.
  __device__ __forceinline__ void look_up(int key, int box_of_tile) const {
    if (key >= end_key) return;
    copy_async(smem + C::kPageOffset + box_of_tile * 4, table() + (key >> p.page_size_log2));
  }

  __device__ __forceinline__ void load(int key, int slot, int page) const {
    const uint32 full = smem + C::kFullOffset + slot * 8;
    st_shared(smem + C::kAbsentOffset + slot * 4, page < 0 ? 1u : 0u);
    mbar_arrive_expect_tx(full, C::kBoxBytes);
    const int key_in_page = key & ((1 << p.page_size_log2) - 1);
    tma_load_box(smem + slot * C::kBoxBytes, &p.kv_map, full, key_in_page, max(page, -1));
  }

  __device__ __forceinline__ void fill_ring(int first_key, int box_of_tile) const {
    constexpr int kMostBoxes = (C::kNumBoxes + kBoxesPerTile - 1) / kBoxesPerTile;
    int pages[kMostBoxes];
#pragma unroll
    for (int i = 0; i < kMostBoxes; ++i) {
      const int key = first_key + (box_of_tile + i * kBoxesPerTile) * kBoxKeys;
      pages[i] = key < end_key ? __ldg(table() + (key >> p.page_size_log2)) : 0;
    }
#pragma unroll
    for (int i = 0; i < kMostBoxes; ++i) {
      const int slot = box_of_tile + i * kBoxesPerTile;
      const int key = first_key + slot * kBoxKeys;
      if (slot < C::kNumBoxes && key < end_key) load(key, slot, pages[i]);
    }
    look_up(first_key + (box_of_tile + C::kNumBoxes) * kBoxKeys, box_of_tile);
  }

  // Refills the slot of a box of the tile before the one that starts at `tile_key`. All warps are done with that
  // tile, and have ordered their accesses before those of TMA.
  __device__ __forceinline__ void refill(const Ring<C>& ring, int tile_key, int box_of_tile) const {
    const int key = tile_key - kTileKeys + (box_of_tile + C::kNumBoxes) * kBoxKeys;
    if (key >= end_key) return;
    wait_for_copies();
    const int page = static_cast<int>(ld_shared(smem + C::kPageOffset + box_of_tile * 4));
    load(key, ring.earlier_slot(box_of_tile), page);
    look_up(key + kTileKeys, box_of_tile);
  }
};

// Zeros in place of the tile's keys from `num_keys` on, which are past the sequence: TMA brought what the page
// holds there, or nothing. A weight of zero is not enough, since 0 * NaN is NaN.
template <class C>
__device__ __forceinline__ void zero_keys_from(const Ring<C>& ring, int num_keys) {
  constexpr int kUnits = C::kChunkBytes / 16;
  const int missing = kTileKeys - num_keys;
  for (int i = threadIdx.x; i < missing * kChunks * kUnits; i += kThreads) {
    const int key = num_keys + i / (kChunks * kUnits);
    const int unit = i % (kChunks * kUnits);
    const uint32 box = key < kBoxKeys ? ring.box(0) : ring.box(1);
    const uint32 chunk = box + unit / kUnits * C::kChunkStride;
    st_shared(chunk + key % kBoxKeys * C::kChunkBytes + unit % kUnits * 16, make_uint4(0, 0, 0, 0));
  }
}

}  // namespace mla
