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
  int first_key;    // of the split
  int end_key;

  // The request alone, for the place of a row where queries are not ragged.
  __device__ __forceinline__ static Block at(int request) {
    Block b{};
    b.request = request;
    return b;
  }

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
    const int64 units = (b.seq_len + kTileKeys - 1) / kTileKeys;
    b.first_key = static_cast<int>(units * blockIdx.y / p.num_splits) * kTileKeys;
    b.end_key = min(static_cast<int>(units * (blockIdx.y + 1) / p.num_splits) * kTileKeys, b.seq_len);
    return b;
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

// A compute warp's place: its row group, and its part of S = Q K^T.
template <class C>
struct Role {
  int row_group;
  int member;  // of the row group

  __device__ __forceinline__ explicit Role(int warp)
      : row_group(C::kRowGroups == 1 ? 0 : warp / kGroupWarps),
        member(C::kRowGroups == 1 ? warp : warp % kGroupWarps) {}
  __device__ __forceinline__ int warp() const { return row_group * kGroupWarps + member; }
  __device__ __forceinline__ int k_split() const { return member % C::kKSplits; }
  __device__ __forceinline__ int step_box() const { return C::kStepBoxes == 1 ? 0 : member / C::kKSplits; }
};

// 16 bytes from memory that may start at any element.
template <int kBytes>
__device__ __forceinline__ uint4 gather_16_bytes(const unsigned char* from) {
  uint32 words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 16; i += kBytes) {
    const uint32 element = kBytes == 2 ? *reinterpret_cast<const unsigned short*>(from + i) : from[i];
    words[i / 4] |= element << (8 * (i % 4));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// The query of a warp as mma operands: the rows of its group, and its k step of every chunk. Passes through the
// memory of partial logits; all compute warps call it, and none may touch that memory until the barrier at its end.
template <class C>
__device__ __forceinline__ void load_query(const DecodeParams& p, const Block& block, uint32 staging,
                                           const Role<C>& role, uint32 (&query)[kChunks][C::kMTiles][4]) {
  constexpr int kUnits = C::kChunkBytes / 16;
  constexpr int kRowsAtOnce = C::kComputeThreads / kUnits;
  constexpr int kRowsPerThread = (C::kTileM + kRowsAtOnce - 1) / kRowsAtOnce;
  using Place = Swizzle<C::kChunkBytes>;
  const int lane = threadIdx.x % 32;
  const int unit = threadIdx.x % kUnits;
  uint4 raw[kChunks][kRowsPerThread] = {};
  const auto read = [&](const auto& load) {
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const int tile_row = threadIdx.x / kUnits + i * kRowsAtOnce;
      const int row = block.first_row + tile_row;
      if (tile_row >= C::kTileM || row >= block.num_rows) continue;
      const int64 offset = block.offset(row, p.num_heads, p.query_stride[0], p.query_stride[1], p.query_stride[2],
                                        p.cum_seq_lens_q != nullptr);
      const unsigned char* from = static_cast<const unsigned char*>(p.query) + offset * C::kBytes + unit * 16;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) raw[chunk][i] = load(from + chunk * C::kChunkBytes);
    }
  };
  if (p.query_aligned) {
    read([](const unsigned char* from) { return __ldg(reinterpret_cast<const uint4*>(from)); });
  } else {
    read([](const unsigned char* from) { return gather_16_bytes<C::kBytes>(from); });
  }
#pragma unroll
  for (int pass = 0; pass < C::kPasses; ++pass) {
    constexpr int kPerPass = C::kChunksPerPass;
    const auto place = [&](int chunk, int row, int chunk_unit) {
      const uint32 rows = staging + (chunk - pass * kPerPass) * C::kTileM * C::kChunkBytes;
      return rows + row * C::kChunkBytes + Place::place(chunk_unit, row) * 16;
    };
    if (pass > 0) named_barrier(kComputeBarrier, C::kComputeThreads);
#pragma unroll
    for (int chunk = pass * kPerPass; chunk < (pass + 1) * kPerPass && chunk < kChunks; ++chunk) {
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i) {
        const int row = threadIdx.x / kUnits + i * kRowsAtOnce;
        if (row < C::kTileM) st_shared(place(chunk, row, unit), raw[chunk][i]);
      }
    }
    named_barrier(kComputeBarrier, C::kComputeThreads);
#pragma unroll
    for (int chunk = pass * kPerPass; chunk < (pass + 1) * kPerPass && chunk < kChunks; ++chunk) {
#pragma unroll
      for (int m = 0; m < C::kMTiles; ++m) {
        const int row = role.row_group * C::kGroupRows + m * 16 + lane % 16;
        ldmatrix4(query[chunk][m], place(chunk, row, role.k_split() * 2 + lane / 16));
      }
    }
  }
  named_barrier(kComputeBarrier, C::kComputeThreads);
}

// The ring of boxes, which are counted from 0 in a split.
template <class C>
struct Ring {
  uint32 smem;
  int slot = 0;
  uint32 phase = 0;  // of full in the slot

  __device__ __forceinline__ explicit Ring(uint32 smem_) : smem(smem_) {}
  __device__ __forceinline__ uint32 box() const { return smem + slot * C::kBoxBytes; }
  __device__ __forceinline__ uint32 full() const { return smem + C::kFullOffset + slot * 8; }
  __device__ __forceinline__ uint32 empty() const { return smem + C::kEmptyOffset + slot * 8; }
  __device__ __forceinline__ uint32 absent() const { return smem + C::kAbsentOffset + slot * 4; }
  __device__ __forceinline__ void advance() {
    if (++slot == C::kNumBoxes) slot = 0, phase ^= 1;
  }
  __device__ __forceinline__ Ring after(int boxes) const {
    Ring ring = *this;
    for (int i = 0; i < boxes; ++i) ring.advance();
    return ring;
  }
};

// Zeros in place of a box's keys from `num_keys` on, which are past the sequence: TMA brought what the page holds
// there, or nothing. A weight of zero is not enough, since 0 * NaN is NaN. Run by a warp.
template <class C>
__device__ __forceinline__ void zero_keys_from(uint32 box, int num_keys) {
  constexpr int kUnits = C::kChunkBytes / 16;
  const int units = (kBoxKeys - num_keys) * kUnits;
#pragma unroll 1
  for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < units; i += 32)
      st_shared(box + chunk * C::kChunkStride + num_keys * C::kChunkBytes + i * 16, make_uint4(0, 0, 0, 0));
  }
}

// Owns: the TMA copies of the split's keys. Run by one warp, a box at a time.
// Waits on: empty. Signals: full, of every box of every step.
template <class C>
struct Loader {
  Ring<C> ring;
  const DecodeParams& p;
  const int32* table;
  int key;  // of the next box
  int end_key;
  int end_step;
  int box = 0;  // of those whose pages the lanes have
  int pages;  // of 32 boxes, and of the next 32
  int next_pages;

  __device__ __forceinline__ Loader(const DecodeParams& p_, uint32 smem, int first_key, int end_key_)
      : ring(smem),
        p(p_),
        table(p_.block_tables + blockIdx.z * p_.table_stride),
        key(first_key),
        end_key(end_key_),
        end_step((end_key_ + C::kStepKeys - 1) / C::kStepKeys * C::kStepKeys) {
    const int lane = threadIdx.x % 32;
    pages = page_of(first_key + lane * kBoxKeys);
    next_pages = page_of(first_key + (lane + 32) * kBoxKeys);
  }

  __device__ __forceinline__ int page_of(int of_key) const {
    return of_key < end_key ? __ldg(table + (of_key >> p.page_size_log2)) : -1;
  }

  __device__ __forceinline__ bool more() const { return key < end_step; }

  // On to the next box.
  __device__ __forceinline__ void skip() {
    key += kBoxKeys;
    ring.advance();
    if (++box == 32) {
      box = 0;
      pages = next_pages;
      next_pages = page_of(key + (static_cast<int>(threadIdx.x) % 32 + 32) * kBoxKeys);
    }
  }

  __device__ __forceinline__ void load() {
    const int lane = threadIdx.x % 32;
    const int page = __shfl_sync(0xffffffffu, pages, box);
    const bool whole = key + kBoxKeys <= end_key;
    const uint32 arrived = whole ? ring.full() : ring.smem + C::kLastOffset;
    mbar_wait(ring.empty(), ring.phase ^ 1);  // at once where nothing was there yet
    if (lane == 0) {
      st_shared(ring.absent(), page < 0 ? 1u : 0u);
      if (key < end_key) {
        const int in_page = key & ((1 << p.page_size_log2) - 1);
        mbar_arrive_expect_tx(arrived, C::kBoxBytes);
        tma_load_box(ring.box(), &p.kv_map, arrived, in_page, max(page, -1));
      }
    } else if (key < end_key && kWarpArrivals > 1) {
      mbar_arrive(arrived);
    }
    __syncwarp();
    if (!whole) {
      if (key < end_key) mbar_wait(arrived, 0);
      zero_keys_from<C>(ring.box(), max(end_key - key, 0));
      mbar_arrive_warp(ring.full(), lane);
    }
    skip();
  }
};

}  // namespace mla
