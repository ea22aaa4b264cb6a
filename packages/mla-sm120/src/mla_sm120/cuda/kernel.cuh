// MLA decode for one tile of (token, head) rows and the keys of one split:
//   S = softmax_scale * Q K^T, masked;  P = 2^(S log2 e - max);  O = P V / sum P;  lse = max + log sum P
// with K [keys, 576] and V its first 512 columns. Keys come by TMA, 16 at a time, into a ring. The rows are one or two
// groups that go through the keys on their own, each with four warps that multiply, and one for every sixteen rows that
// takes the softmax. Each of the four reduces its part of the head dimension of S and has 128 columns of O. They
// compute S of a step, in one turn or two, before O of the step before it, so that its softmax is taken meanwhile.
// Splits are blocks, whose results are merged in clusters, see merge.cuh, or stored, and merged by the combine kernel.
// Not supported: other head dimensions; pages that are no multiple of 16 keys.
#pragma once

#include "kernel.h"
#include "math.cuh"
#include "merge.cuh"
#include "softmax.cuh"

namespace mla {

// A split without keys: zeros, unless the combine kernel sees by the LSE that there is nothing.
template <class C>
__device__ __forceinline__ void store_nothing(const DecodeParams& p, const Block& block) {
  const int end = min(block.first_row + C::kTileM, block.num_rows);
  for (int row = block.first_row + threadIdx.x; row < end; row += C::kThreads)
    store_lse<C>(p, block, row, -infinity());
  if (p.num_partials > 1) return;
  for_output<C>(p, block, [&](auto row_at) {
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
  for_output<C>(p, block, [&](auto row_at) {
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

// The same to the partial results: a warp gathers sixteen rows at a time over the keys, and stores whole lines.
template <class C>
__device__ __forceinline__ void gather_partials(const DecodeParams& p, const Block& block, uint32 smem,
                                                const Outputs<C>& out, const Role<C>& role, int lane) {
  constexpr int kRows = 16;
  constexpr int kColumns = C::kWarpChunks * kChunkElements;
  constexpr int kRowBytes = (kColumns + 8) * 4;  // eight more, for rows that are written at once begin in other banks
  static_assert(C::kComputeWarps * kRows * kRowBytes <= C::kPartialOffset, "sixteen rows of every warp fit");
  static_assert(kColumns == 32 * 4, "four columns a lane");
  const uint32 gathered = smem + role.warp() * kRows * kRowBytes;
  named_barrier(kComputeBarrier, C::kComputeThreads);
#pragma unroll
  for (int m = 0; m < C::kMTiles; ++m) {
    const int tile_row = role.row_group * C::kGroupRows + m * kRows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = half * kOctetRows + lane / 4;
      const float scale = ld_shared_float(smem + C::kScaleOffset + (tile_row + row) * 4);
#pragma unroll
      for (int pair = 0; pair < C::kColumnPairs; ++pair) {
        const float (&o0)[4] = out.o[m][2 * pair];
        const float (&o1)[4] = out.o[m][2 * pair + 1];
        const float2 a = make_float2(o0[2 * half] * scale, o0[2 * half + 1] * scale);
        const float2 b = make_float2(o1[2 * half] * scale, o1[2 * half + 1] * scale);
        const uint32 to = gathered + row * kRowBytes + pair * 64;
        if constexpr (C::kBytes == 1 && !kNativeByteTranspose) {
          st_shared(to + lane % 4 * 16, make_float4(a.x, b.x, a.y, b.y));
        } else {
          st_shared(to + lane % 4 * 8, a);
          st_shared(to + lane % 4 * 8 + 32, b);
        }
      }
    }
    __syncwarp();
    const int first_row = block.first_row + tile_row;
    const int num_rows = min(kRows, block.num_rows - first_row);
    const int column = role.member * kColumns + lane * 4;
    float* to = p.o_partial + partial_row<C>(p, block.request, first_row) * kLatentDim + column;
#pragma unroll 1
    for (int row = 0; row < num_rows; ++row)
      *reinterpret_cast<float4*>(to + row * kLatentDim) = ld_shared_four(gathered + row * kRowBytes + lane * 16);
    __syncwarp();
  }
}

// Brings to the L2 cache what the block begins with, as far as it can tell before the grid before it has ended and
// before it has read the length of its request, which it takes to be the longest there may be.
template <class C>
__device__ __forceinline__ void prefetch(const DecodeParams& p) {
  constexpr int kLineBytes = 128;
  constexpr int kRowLines = (kHeadDim * C::kBytes + kLineBytes - 1) / kLineBytes;
  if (p.cum_seq_lens_q == nullptr) {
    for (int line = threadIdx.x; line < C::kTileM * kRowLines; line += C::kThreads) {
      const int row = static_cast<int>(blockIdx.x) * C::kTileM + line / kRowLines;
      if (row >= p.q_len * p.num_heads) break;
      const int64 offset = Block::at(blockIdx.z).offset(row, p.num_heads, p.query_stride[0], p.query_stride[1],
                                                        p.query_stride[2], false);
      prefetch_l2(static_cast<const unsigned char*>(p.query) + offset * C::kBytes + line % kRowLines * kLineBytes);
    }
  }
  const int64 first_tile = static_cast<int64>(p.key_tiles) * blockIdx.y / p.num_splits;
  if (threadIdx.x == C::kComputeThreads) prefetch_l2(p.seq_lens + blockIdx.z);
  if (threadIdx.x == C::kComputeThreads + 32)
    prefetch_l2(p.block_tables + blockIdx.z * p.table_stride + (first_tile * kTileKeys >> p.page_size_log2));
}

// What a compute warp does with the keys of its split.
// Waits on: full, weights. Signals: logits, empty.
template <class C>
struct Warp {
  Role<C> role;
  Ring<C> ahead;   // where the keys of the next S are
  Ring<C> behind;  // where the values of the next O are
  uint32 lane_;
  uint32 key;      // what the lane adds to the address of a box
  uint32 grown;    // of the step whose values are next, see Softmax
  uint32 query[kChunks][C::kMTiles][4];
  Outputs<C> out;

  __device__ __forceinline__ Warp(uint32 smem, int warp, int lane)
      : role(warp), ahead(smem), behind(smem), lane_(kept(lane)), key(key_offset(role, lane)), out{} {}

  // Keeps what depends on it from being held in registers, which are scarce.
  __device__ __forceinline__ uint32 lane() const { return recomputed(lane_); }

  __device__ __forceinline__ uint32 stored_query() const {
    return ahead.smem + C::kQueryOffset + role.warp() * kFragmentBytes + lane() * 16;
  }

  __device__ __forceinline__ void store_query() const {
    if constexpr (C::kStoresQuery) {
      const uint32 (&a)[4] = query[0][C::kMTiles - 1];
      st_shared(stored_query(), make_uint4(a[0], a[1], a[2], a[3]));
    }
  }

  // A chunk of sixteen rows of the query, as an operand.
  __device__ __forceinline__ void load_query_fragment(int chunk, int m, uint32 (&a)[4]) const {
    if (C::kStoresQuery && chunk == 0 && m == C::kMTiles - 1) {
      const uint4 fragment = ld_shared_fragment(stored_query());
      a[0] = fragment.x, a[1] = fragment.y, a[2] = fragment.z, a[3] = fragment.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = query[chunk][m][i];
    }
  }

  // The warp's part of S of a step, of the rows of a turn.
  template <int kTurn>
  __device__ __forceinline__ void logits(float (&s)[C::kTurnTiles][2][4]) {
    const Ring<C> at = ahead.after(role.step_box());
    const uint32 keys = at.box() + key;
    uint32 first[4];  // the query's first chunk of the last sixteen rows
    if constexpr (C::kLoadsQueryAhead) load_query_fragment(0, C::kMTiles - 1, first);
    uint32 b[C::kAhead + 1][4];
    if constexpr (kTurn == 0) mbar_wait(at.full(), at.phase);
#pragma unroll
    for (int chunk = 0; chunk < C::kAhead; ++chunk) ldmatrix4(b[chunk], keys + chunk * C::kChunkStride);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int next = chunk + C::kAhead;
      if (next < kChunks) ldmatrix4(b[next % (C::kAhead + 1)], keys + next * C::kChunkStride);
      const uint32 (&now)[4] = b[chunk % (C::kAhead + 1)];
#pragma unroll
      for (int m = 0; m < C::kTurnTiles; ++m) {
        uint32 a[4];
        const bool is_first = C::kLoadsQueryAhead && chunk == 0 && m == C::kMTiles - 1;
        if (!is_first) load_query_fragment(chunk, kTurn * C::kTurnTiles + m, a);
        const uint32 (&q)[4] = is_first ? first : a;
        mma(typename C::Element{}, s[m][0], q, now[0], now[1]);
        mma(typename C::Element{}, s[m][1], q, now[2], now[3]);
      }
    }
    if constexpr (kTurn == C::kTurns - 1) ahead = ahead.after(C::kStepBoxes);
  }

  template <int kTurn>
  __device__ __forceinline__ void share(const float (&s)[C::kTurnTiles][2][4]) const {
    share_partial_logits<C>(ahead.smem, role, kTurn, lane(), s);
    if constexpr (kTurn == C::kTurns - 1)
      mbar_arrive_warp(ahead.smem + C::kLogitsOffset + role.row_group * 8, lane());
  }

  // The rows of S that are left once the first turn has been shared.
  __device__ __forceinline__ void other_turn() {
    if constexpr (C::kTurns > 1) {
      float s[C::kTurnTiles][2][4] = {};
      logits<1>(s);
      share<1>(s);
    }
  }

  // After this the weights of a step are there, and the memory of its logits is free.
  __device__ __forceinline__ void wait_for_weights(int index) {
    mbar_wait(ahead.smem + C::kWeightsOffset + role.row_group * 8, index & 1);
    if constexpr (C::kTurns == 1) read_grown(index);
  }

  __device__ __forceinline__ void read_grown(int index) {
    grown = ld_shared(Softmax<C>::grown(behind.smem, role.row_group, index));
  }

  // O += P V of a step, with what its softmax made of the sums so far.
  __device__ __forceinline__ void weigh(int index) {
    const uint32 smem = behind.smem;
    if constexpr (C::kTurns > 1) read_grown(index);  // so that no register has it during the second turn
    uint32 a[C::kMTiles][4];
    load_weights<C>(smem, role, index, lane(), a);
    const Values<C> values(behind, role, lane());
    uint32 b[C::kAhead + 1][4];
#pragma unroll
    for (int pair = 0; pair < C::kAhead; ++pair) values.load(b[pair], pair);
    if (grown != 0) out.shrink(smem, role, grown, index, lane());
#pragma unroll
    for (int pair = 0; pair < C::kColumnPairs; ++pair) {
      const int next = pair + C::kAhead;
      if (next < C::kColumnPairs) values.load(b[next % (C::kAhead + 1)], next);
      out.add(a, b[pair % (C::kAhead + 1)], pair);
    }
#pragma unroll
    for (int box = 0; box < C::kStepBoxes; ++box) mbar_arrive_warp(behind.after(box).empty(), lane());
    behind = behind.after(C::kStepBoxes);
  }

  __device__ __forceinline__ void run(int num_steps) {
    {
      float s[C::kTurnTiles][2][4] = {};
      logits<0>(s);
      share<0>(s);
    }
    other_turn();
    int index = 0;
    for (; index + 1 < num_steps; ++index) {
      {
        float s[C::kTurnTiles][2][4] = {};
        logits<0>(s);
        wait_for_weights(index);
        share<0>(s);
      }
      other_turn();
      weigh(index);
    }
    wait_for_weights(index);
    weigh(index);
  }

  __device__ __forceinline__ void store(const DecodeParams& p, const Block& block) {
    if constexpr (C::kMerges) {
      merge_results<C>(p, block, behind.smem, role, out, lane());
    } else if (C::kGathersPartials && p.num_partials > 1) {
      gather_partials<C>(p, block, behind.smem, out, role, lane());
    } else {
      store_outputs<C>(p, block, behind.smem + C::kScaleOffset, out, role, lane());
    }
  }
};

template <class C>
__device__ __forceinline__ void init_state(const DecodeParams& p, uint32 smem) {
  tma_prefetch_map(&p.kv_map);
  for (int slot = 0; slot < C::kNumBoxes; ++slot) {
    mbar_init(smem + C::kFullOffset + slot * 8, kWarpArrivals);
    mbar_init(smem + C::kEmptyOffset + slot * 8, C::kComputeWarps * kWarpArrivals);
    st_shared(smem + C::kAbsentOffset + slot * 4, 0u);
  }
  for (int word = 0; word < 2 * C::kRowGroups; ++word) st_shared(smem + C::kGrownOffset + word * 4, 0u);
  mbar_init(smem + C::kLastOffset, kWarpArrivals);
  for (int group = 0; group < C::kRowGroups; ++group) {
    mbar_init(smem + C::kLogitsOffset + group * 8, kGroupWarps * kWarpArrivals);
    mbar_init(smem + C::kWeightsOffset + group * 8, C::kMTiles * kWarpArrivals);
  }
  fence_mbar_init();
}

// What the compute warps of a block without keys merge with the others of its cluster, who wait for it.
template <class C>
__device__ __forceinline__ void merge_nothing(const DecodeParams& p, uint32 smem, int warp, int lane) {
  const Role<C> role(warp);
  Outputs<C> out{};
  if (threadIdx.x < C::kTileM) {
    st_shared(smem + C::kScaleOffset + threadIdx.x * 4, 0.0f);
    st_shared(smem + C::kLseOffset + threadIdx.x * 4, -infinity());
  }
  named_barrier(kComputeBarrier, C::kComputeThreads);
  merge_results<C>(p, Block::of(p, C::kTileM), smem, role, out, lane);
}

template <class C>
__device__ __forceinline__ void decode(const DecodeParams& p) {
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  const uint32 smem = smem_address(smem_bytes);
  const int lane = threadIdx.x % 32;
  const int warp = uniform(threadIdx.x / 32);

  launch_dependents();  // they wait for the end of this grid
  if (threadIdx.x == 0) init_state<C>(p, smem);
  if constexpr (C::kMerges) prefetch<C>(p);
  __syncthreads();
  wait_for_previous_grid();

  Block block = Block::of(p, C::kTileM);
  if (block.first_row >= block.num_rows) return;
  if constexpr (!C::kMerges) {
    if (block.first_key >= block.end_key) return store_nothing<C>(p, block);
  }

  const int first_key = uniform(block.first_key), end_key = uniform(block.end_key);
  if (warp >= C::kComputeWarps) {
    if constexpr (C::kTileM == 64) give_registers_back<kOtherRegisters>();
    const int index = warp - C::kComputeWarps;
    if (index > C::kSoftmaxWarps || (C::kMerges && first_key >= end_key)) return;
    Loader<C> loader(p, smem, first_key, end_key);
    if (index < C::kSoftmaxWarps) {
      Softmax<C>(p, block, smem, index).run(p, first_key, end_key, loader);
    } else {
      while (loader.more()) loader.load();
    }
    return;
  }
  if constexpr (C::kTileM == 64) take_registers<kComputeRegisters>();
  if constexpr (C::kMerges) {
    if (first_key >= end_key) return merge_nothing<C>(p, smem, warp, lane);
  }
  Warp<C> state(smem, warp, lane);
  load_query<C>(p, block, smem + C::kPartialOffset, state.role, state.query);
  state.store_query();
  state.run((end_key - first_key + C::kStepKeys - 1) / C::kStepKeys);
  state.store(p, Block::of(p, C::kTileM));  // read again rather than kept in registers all the while
}

}  // namespace mla

#define MLA_DEFINE_KERNEL(name, Element, tile_m, merges)                                   \
  MLA_DECLARE_DECODE(name);                                                                \
  extern "C" __global__ void                                                               \
      __launch_bounds__(mla::Config<mla::Element, tile_m, merges>::kThreads, 1)            \
          name(const __grid_constant__ mla::DecodeParams params) {                         \
    mla::decode<mla::Config<mla::Element, tile_m, merges>>(params);                        \
  }
#define MLA_DEFINE_DECODE(tile, Element, tile_m)                \
  MLA_DEFINE_KERNEL(mla_decode_##tile, Element, tile_m, false)  \
  MLA_DEFINE_KERNEL(mla_merge_##tile, Element, tile_m, true)
