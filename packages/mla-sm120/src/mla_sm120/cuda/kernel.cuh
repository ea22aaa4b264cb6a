// MLA decode for one tile of (token, head) rows and the keys of one split:
//   S = softmax_scale * Q K^T, masked;  P = 2^(S log2 e - max);  O = P V / sum P;  lse = max + log sum P
// with K [keys, 576] and V its first 512 columns. All eight warps do the same: each reduces a quarter of the
// head dimension of S for its rows, octets of rows are summed and exponentiated by one warp each, and each warp
// has 64 columns of O. Keys come by TMA, 16 at a time, into a ring; the weights P take the place of the rope
// parts of the tile's keys, which nobody reads again.
// Not supported: other head dimensions; pages that are no multiple of 16 keys.
#pragma once

#include "kernel.h"
#include "math.cuh"
#include "store.cuh"

namespace mla {

__device__ __forceinline__ float scale_value(const float* on_device, float value) {
  return on_device != nullptr ? *on_device : value;
}

// Rows of a request in o_partial and lse_partial, where every request has as many as the longest may have.
__device__ __forceinline__ int64 partial_row(const DecodeParams& p, int split, int request, int row) {
  const int64 rows_per_request = static_cast<int64>(p.q_len) * p.num_heads;
  return (split * static_cast<int64>(p.batch) + request) * rows_per_request + row;
}

// LSE of a row: log2 for the combine kernel, natural for the caller.
__device__ __forceinline__ void store_lse(const DecodeParams& p, const Block& block, int row, float lse_log2) {
  if (p.num_splits > 1) {
    p.lse_partial[partial_row(p, blockIdx.y, block.request, row)] = lse_log2;
  } else if (p.lse != nullptr) {
    const int64 at =
        block.offset(row, p.num_heads, p.lse_stride[0], p.lse_stride[1], 1, p.cum_seq_lens_q != nullptr);
    p.lse[at] = lse_log2 * 0.69314718055994531f;
  }
}

// Calls `store` with the function that gives a row's place in what this block writes.
template <class Store>
__device__ __forceinline__ void for_output(const DecodeParams& p, const Block& block, const Store& store) {
  const bool ragged = p.cum_seq_lens_q != nullptr;
  const auto offset = [&](int row) {
    return block.offset(row, p.num_heads, p.out_stride[0], p.out_stride[1], p.out_stride[2], ragged);
  };
  unsigned char* out = static_cast<unsigned char*>(p.out);
  if (p.num_splits > 1) {
    store([&](int row) { return p.o_partial + partial_row(p, blockIdx.y, block.request, row) * kLatentDim; });
  } else if (p.out_type == kOutBf16) {
    store([&](int row) { return OutRow<Bf16>{out + offset(row) * 2}; });
  } else if (p.out_type == kOutFp16) {
    store([&](int row) { return OutRow<Fp16>{out + offset(row) * 2}; });
  } else {
    store([&](int row) { return OutRow<E4m3>{out + offset(row)}; });
  }
}

// A split without keys: zeros, unless the combine kernel sees by the LSE that there is nothing.
template <class C>
__device__ __forceinline__ void store_nothing(const DecodeParams& p, const Block& block) {
  const int end = min(block.first_row + C::kTileM, block.num_rows);
  for (int row = block.first_row + threadIdx.x; row < end; row += kThreads)
    store_lse(p, block, row, -infinity());
  if (p.num_splits > 1) return;
  for_output(p, block, [&](auto row_at) {
    for (int row = block.first_row + static_cast<int>(threadIdx.x) / 32; row < end; row += kWarps) {
      for (int column = threadIdx.x % 32 * 2; column < kLatentDim; column += 64)
        store_pair(row_at(row), column, 0.0f, 0.0f, p.out_aligned);
    }
  });
}

template <class C>
__device__ __forceinline__ void decode(const DecodeParams& p) {
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  const uint32 smem = smem_address(smem_bytes);
  const int thread_lane = threadIdx.x % 32;
  const int thread_warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);  // uniform to the compiler

  if (threadIdx.x == 0) {
    tma_prefetch_map(&p.kv_map);
    for (int slot = 0; slot < C::kNumBoxes; ++slot) {
      mbar_init(smem + C::kFullOffset + slot * 8, 1);
      st_shared(smem + C::kAbsentOffset + slot * 4, 0u);
    }
    fence_mbar_init();
  }
  __syncthreads();
  wait_for_previous_grid();

  Block block = Block::of(p, C::kTileM);
  if (block.first_row >= block.num_rows) return;
  if (block.first_tile == block.end_tile) return store_nothing<C>(p, block);

  const int end_key = block.num_keys();
  BoxLoader<C> loader(p, smem, end_key);
  if (thread_warp >= kFirstLoader && thread_lane == 0)
    loader.fill_ring(block.first_tile * kTileKeys, thread_warp - kFirstLoader);
  __syncwarp();

  if (threadIdx.x == kThreads - 1) {
    const float softmax_scale = scale_value(p.softmax_scale_device, p.softmax_scale);
    st_shared(smem + C::kLogitScaleOffset, softmax_scale * 1.4426950408889634f);
  }
  uint32 query[C::kSegments][C::kWarpMTiles][4];
  {
    const LogitsRole<C> role(thread_warp);
    load_query<C>(p, block, smem + C::kPartialOffset, role.row_group, role.k_split, query);
    const int row = block.first_row + role.octet_row(thread_lane);
    if (role.has_octet()) Softmax<C>(smem, role.octet_row(thread_lane)).begin(thread_lane, block.key_limit(row, p.num_heads));
  }
  const uint32 scales = smem + C::kDecayOffset;
  float o[C::kMTiles][2 * kColumnPairs][4] = {};
  Ring<C> ring(smem);

  for (int tile_key = block.first_tile * kTileKeys; tile_key < end_key; tile_key += kTileKeys) {
    const int lane = recomputed(thread_lane);
    const int warp = recomputed(thread_warp);
    const LogitsRole<C> role(warp);
    const int num_keys = end_key - tile_key;
    mbar_wait(ring.full(0), ring.phase(0));
    if (num_keys > kBoxKeys) mbar_wait(ring.full(1), ring.phase(1));
    if (num_keys < kTileKeys) {
      zero_keys_from<C>(ring, num_keys);
      __syncthreads();
    }
    float own[kBoxesPerTile][4] = {};
    partial_logits<C>(ring, role, lane, query, own);
    __syncthreads();  // partial logits are there, and nobody reads rope parts or earlier weights any more
    if (warp >= kFirstLoader && lane == 0 && ring.tile > 0) loader.refill(ring, tile_key, warp - kFirstLoader);
    bool shrinks = false;
    if (role.has_octet())
      shrinks = Softmax<C>(smem, role.octet_row(lane)).tile(ring, role.octet(), lane, tile_key, own);
    if (__syncthreads_or(shrinks)) {  // weights and scales are there
#pragma unroll
      for (int m = 0; m < C::kMTiles; ++m) {
        const float upper = ld_shared_float(scales + (m * 16 + lane / 4) * 4);
        const float lower = ld_shared_float(scales + (m * 16 + lane / 4 + 8) * 4);
#pragma unroll
        for (int n = 0; n < 2 * kColumnPairs; ++n) {
          o[m][n][0] *= upper, o[m][n][1] *= upper;
          o[m][n][2] *= lower, o[m][n][3] *= lower;
        }
      }
    }
    weigh_values<C>(ring, warp, lane, o);
    fence_proxy_async();  // TMA writes over the weights next
    ring.advance();
  }

  if (p.num_splits > 1) launch_dependents();
  block = Block::of(p, C::kTileM);  // read again rather than kept in registers all the while
  __syncthreads();  // the last scales have been read
  const LogitsRole<C> role(thread_warp);
  if (role.has_octet() && thread_lane % 4 == 0) {
    const int octet_row = role.octet_row(thread_lane);
    const Softmax<C> softmax(smem, octet_row);
    const float sum = softmax.row_sum();
    const float output_scale = p.num_splits > 1 ? 1.0f : scale_value(p.output_scale_device, p.output_scale);
    const float unit = output_scale / C::Element::kWeightScale;
    st_shared(scales + octet_row * 4, sum == 0.0f ? 0.0f : unit / sum);
    const int row = block.first_row + octet_row;
    if (row < block.num_rows)
      store_lse(p, block, row, sum == 0.0f ? -infinity() : softmax.row_max() + log2_approx(sum));
  }
  __syncthreads();
  for_output(p, block, [&](auto row_at) {
#pragma unroll
    for (int octet = 0; octet < C::kOctets; ++octet) {
      const int tile_row = octet * kOctetRows + thread_lane / 4;
      const int row = block.first_row + tile_row;
      if (row >= block.num_rows) continue;
      const float scale = ld_shared_float(scales + tile_row * 4);
      const auto target = row_at(row);
#pragma unroll
      for (int c = 0; c < kColumnPairs; ++c) {
        const float (&o0)[4] = o[octet / 2][2 * c];
        const float (&o1)[4] = o[octet / 2][2 * c + 1];
        const int column = thread_warp * kChunkElements + c * 16;
        const int r = octet % 2 * 2;
        if constexpr (C::kBytes == 1 && !kNativeByteTranspose) {
          store_pair(target, column + thread_lane % 4 * 4, o0[r] * scale, o1[r] * scale, p.out_aligned);
          store_pair(target, column + thread_lane % 4 * 4 + 2, o0[r + 1] * scale, o1[r + 1] * scale, p.out_aligned);
        } else {
          store_pair(target, column + thread_lane % 4 * 2, o0[r] * scale, o0[r + 1] * scale, p.out_aligned);
          store_pair(target, column + 8 + thread_lane % 4 * 2, o1[r] * scale, o1[r + 1] * scale, p.out_aligned);
        }
      }
    }
  });
}

}  // namespace mla

#define MLA_DEFINE_DECODE(name, Element, tile_m)                                          \
  MLA_DECLARE_DECODE(name);                                                               \
  extern "C" __global__ void __launch_bounds__(mla::kThreads, 1)                          \
      name(const __grid_constant__ mla::DecodeParams params) {                            \
    mla::decode<mla::Config<mla::Element, tile_m>>(params);                               \
  }
