// MLA decode for one tile of (token, head) rows and the keys of one split:
//   S = softmax_scale * Q K^T, masked;  P = 2^(S log2 e - max);  O = P V / sum P;  lse = max + log sum P
// with K [keys, 576] and V its first 512 columns. Keys come by TMA, 16 at a time, into a ring, from one warp for all
// others. The rows are one or two groups, each with four warps that go through the tiles on their own, so that the
// mmas of one group run during the softmax of the other. Each warp of a group reduces its part of the head dimension
// of S, octets of rows are summed and exponentiated by one warp each, and each warp has 128 columns of O.
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
  for (int row = block.first_row + threadIdx.x; row < end; row += C::kThreads)
    store_lse(p, block, row, -infinity());
  if (p.num_splits > 1) return;
  for_output(p, block, [&](auto row_at) {
    for (int row = block.first_row + static_cast<int>(threadIdx.x) / 32; row < end; row += C::kThreads / 32) {
      for (int column = threadIdx.x % 32 * 2; column < kLatentDim; column += 64)
        store_pair(row_at(row), column, 0.0f, 0.0f, p.out_aligned);
    }
  });
}

// O times the scale of its row, to the output or the partial results.
template <class C>
__device__ __forceinline__ void store_outputs(const DecodeParams& p, const Block& block, uint32 scales,
                                              const Outputs<C>& out, const Role<C>& role, int lane) {
  for_output(p, block, [&](auto row_at) {
#pragma unroll
    for (int octet = 0; octet < C::kGroupOctets; ++octet) {
      const int tile_row = role.row_group * C::kGroupRows + octet * kOctetRows + lane / 4;
      const int row = block.first_row + tile_row;
      if (row >= block.num_rows) continue;
      const float scale = ld_shared_float(scales + tile_row * 4);
      const auto target = row_at(row);
#pragma unroll
      for (int c = 0; c < C::kColumnTiles / 2; ++c) {
        const float (&o0)[4] = out.o[octet / 2][2 * c];
        const float (&o1)[4] = out.o[octet / 2][2 * c + 1];
        const int column = role.member * C::kWarpChunks * kChunkElements + c * 16;
        const int r = octet % 2 * 2;
        if constexpr (C::kBytes == 1 && !kNativeByteTranspose) {
          store_pair(target, column + lane % 4 * 4, o0[r] * scale, o1[r] * scale, p.out_aligned);
          store_pair(target, column + lane % 4 * 4 + 2, o0[r + 1] * scale, o1[r + 1] * scale, p.out_aligned);
        } else {
          store_pair(target, column + lane % 4 * 2, o0[r] * scale, o0[r + 1] * scale, p.out_aligned);
          store_pair(target, column + 8 + lane % 4 * 2, o1[r] * scale, o1[r + 1] * scale, p.out_aligned);
        }
      }
    }
  });
}

// What a compute warp does with the tiles of its split.
// Waits on: full, and the warps of its group. Signals: empty.
template <class C>
struct Warp {
  Role<C> role;
  Ring<C> ring;
  LaneOffsets<C> offsets;
  uint32 query[kChunks][C::kMTiles][4];
  Outputs<C> out;
  Softmax<C> softmax;

  __device__ __forceinline__ Warp(uint32 smem, int warp, int lane)
      : role(warp), ring(smem), offsets(role, lane), out{} {}

  // Recomputed wherever it is needed, since registers are scarce.
  __device__ __forceinline__ int lane() const { return recomputed(offsets.part) / 8 % 32; }

  __device__ __forceinline__ uint32 weights_read() const {
    return ring.smem + C::kWeightsReadOffset + role.row_group * 8;
  }

  __device__ __forceinline__ uint32 parts() const {
    return group_address<C>(ring.smem, role) + recomputed(offsets.part);
  }

  // S of a tile, shared with the group; `own` is this warp's part of its own octet.
  __device__ __forceinline__ void logits(int tile, float (&own)[kTileKeys / 8][2]) const {
#pragma unroll
    for (int i = 0; i < C::kWarpBoxes; ++i) {
      const int box = C::kKeyGroups == 1 ? i : role.key_group();
      const Ring<C> at = ring.after(box);
      mbar_wait(at.full(), at.phase);
      float s[C::kMTiles][2][4] = {};
      partial_logits<C>(at.box() + offsets.key, query, s);
      if (i == 0) mbar_wait(weights_read(), (tile & 1) ^ 1);
      share_partial_logits<C>(group_address<C>(ring.smem, role), recomputed(offsets.part), role, box, s);
      if constexpr (C::kKeepsOwn) {
        own[2 * i][0] = s[0][0][0], own[2 * i][1] = s[0][0][1];
        own[2 * i + 1][0] = s[0][1][0], own[2 * i + 1][1] = s[0][1][1];
      }
    }
  }

  // O += P V of a tile, with what its softmax made of the sums so far.
  __device__ __forceinline__ void weigh(int lane) {
    role.group_barrier();  // weights and decays are there
    const uint32 grown = ld_shared(Softmax<C>::grown(ring.smem, role));
    uint32 a[C::kMTiles][4];
    load_weights<C>(ring.smem, role, 0, lane, a);
    if (grown != 0) out.shrink(ring.smem, role, grown, lane);
#pragma unroll
    for (int k_step = 0; k_step < C::kWeightKSteps; ++k_step) {
      if (k_step > 0) load_weights<C>(ring.smem, role, k_step, lane, a);
      if (k_step == C::kWeightKSteps - 1) {
        __syncwarp();
        if (lane == 0) mbar_arrive(weights_read());
      }
      out.add(a, Values<C>(ring, role, k_step, lane));
      __syncwarp();
      if (lane == 0) {
#pragma unroll
        for (int box = 0; box < C::kBoxesPerKStep; ++box)
          mbar_arrive(ring.after(k_step * C::kBoxesPerKStep + box).empty());
      }
    }
  }

  __device__ __forceinline__ void run(int first_key, int end_key) {
    int tile = 0;
    for (int key = first_key; key < end_key; key += kTileKeys, ++tile) {
      float s[kTileKeys / 8][2] = {};
      logits(tile, s);
      role.group_barrier();  // the parts of the logits are there
      if (role.has_octet()) softmax.tile(ring, role, parts(), lane(), key, s);
      weigh(lane());
      ring = ring.after(kBoxesPerTile);
    }
  }

  __device__ __forceinline__ void store(const DecodeParams& p, const Block& block) const {
    const uint32 scales = ring.smem + C::kDecayOffset;
    const int lane = this->lane();
    role.group_barrier();  // the last decays have been read
    if (role.has_octet()) {
      const int tile_row = role.octet() * kOctetRows + lane / 4;
      const float sum = softmax.row_sum();
      const float output_scale = p.num_splits > 1 ? 1.0f : scale_value(p.output_scale_device, p.output_scale);
      const float unit = output_scale / C::Element::kWeightScale;
      const int row = block.first_row + tile_row;
      if (lane % 4 == 0) {
        st_shared(scales + tile_row * 4, sum == 0.0f ? 0.0f : unit / sum);
        if (row < block.num_rows)
          store_lse(p, block, row, sum == 0.0f ? -infinity() : softmax.max + log2_approx(sum));
      }
    }
    role.group_barrier();
    store_outputs<C>(p, block, scales, out, role, lane);
  }
};

template <class C>
__device__ __forceinline__ void init_state(const DecodeParams& p, uint32 smem) {
  tma_prefetch_map(&p.kv_map);
  for (int slot = 0; slot < C::kNumBoxes; ++slot) {
    mbar_init(smem + C::kFullOffset + slot * 8, 1);
    mbar_init(smem + C::kEmptyOffset + slot * 8, C::kRowGroups * kGroupWarps);
    st_shared(smem + C::kAbsentOffset + slot * 4, 0u);
  }
  mbar_init(smem + C::kLastOffset, 1);
  for (int group = 0; group < C::kRowGroups; ++group) {
    mbar_init(smem + C::kWeightsReadOffset + group * 8, kGroupWarps);
    st_shared(smem + C::kGrownOffset + group * 4, 0u);
  }
  fence_mbar_init();
}

template <class C>
__device__ __forceinline__ void decode(const DecodeParams& p) {
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  const uint32 smem = smem_address(smem_bytes);
  const int lane = threadIdx.x % 32;
  const int warp = uniform(threadIdx.x / 32);

  launch_dependents();  // they wait for the end of this grid
  if (threadIdx.x == 0) init_state<C>(p, smem);
  __syncthreads();
  wait_for_previous_grid();

  Block block = Block::of(p, C::kTileM);
  if (block.first_row >= block.num_rows) return;
  if (block.first_key >= block.end_key) return store_nothing<C>(p, block);

  if (warp >= C::kRowGroups * kGroupWarps) {
    if constexpr (C::kTileM == 64) give_registers_back<kLoaderRegisters>();
    if (warp == C::kRowGroups * kGroupWarps) load_keys<C>(p, smem, block.first_key, block.end_key);
    return;
  }
  if constexpr (C::kTileM == 64) take_registers<kComputeRegisters>();
  if (threadIdx.x == 0) {
    const float softmax_scale = scale_value(p.softmax_scale_device, p.softmax_scale);
    st_shared(smem + C::kLogitScaleOffset, softmax_scale * 1.4426950408889634f);
  }
  if (threadIdx.x < C::kTileM) {
    const int limit = block.key_limit(block.first_row + threadIdx.x, p.num_heads);
    st_shared(smem + C::kLimitOffset + threadIdx.x * 4, static_cast<uint32>(limit));
  }
  Warp<C> state(smem, warp, lane);
  load_query<C>(p, block, smem + C::kPartialOffset, state.role, state.query);
  state.run(uniform(block.first_key), uniform(block.end_key));
  state.store(p, Block::of(p, C::kTileM));  // read again rather than kept in registers all the while
}

}  // namespace mla

#define MLA_DEFINE_DECODE(name, Element, tile_m)                                           \
  MLA_DECLARE_DECODE(name);                                                                \
  extern "C" __global__ void                                                               \
      __launch_bounds__(mla::Config<mla::Element, tile_m>::kThreads, 1)                    \
          name(const __grid_constant__ mla::DecodeParams params) {                         \
    mla::decode<mla::Config<mla::Element, tile_m>>(params);                                \
  }
