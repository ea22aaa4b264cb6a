// Tile shapes, the division of work among the warps of a block, and the plan of shared memory.
#pragma once

#include "params.h"

namespace mla {

constexpr int kHeadDim = 576;   // of a query head and of a key: latent, then rope
constexpr int kLatentDim = 512;  // of a value, which is the first part of its key
constexpr int kMaxSmemBytes = 101376;  // dynamic shared memory of a block on compute capability 12.x

constexpr int kGroupWarps = 4;  // compute warps of a row group; one more group of warps copies keys and takes softmaxes
constexpr int kGroupThreads = kGroupWarps * 32;
constexpr int kComputeRegisters = 232;  // of a thread, where a block has 64 rows
constexpr int kOtherRegisters = 40;
constexpr int kLaunchRegisters = 65536 / (3 * kGroupThreads) / 8 * 8;  // what such a block starts with
static_assert(2 * kComputeRegisters + kOtherRegisters <= 3 * kLaunchRegisters, "a block has no others to share out");
// Lanes of a warp that arrive on an mbarrier: one, after the others have met it. With MLA_EVERY_LANE_ARRIVES all, which
// is slower, and an order that compute-sanitizer's racecheck follows.
#if defined(MLA_EVERY_LANE_ARRIVES)
constexpr int kWarpArrivals = 32;
#else
constexpr int kWarpArrivals = 1;
#endif
constexpr int kComputeBarrier = 1;  // named barrier of all compute warps; 0 is __syncthreads

constexpr int kTileKeys = 32;  // splits begin at multiples of this
constexpr int kBoxKeys = 16;  // keys of one TMA copy; divides every page size, a power of two: a box lies in one page
constexpr int kChunkElements = 64;  // columns that lie together in shared memory; one swizzle span per key
constexpr int kChunks = kHeadDim / kChunkElements;

constexpr int kMaxCluster = 8;  // blocks whose results are merged in shared memory; more is not portable

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr bool kIsSm120 = true;
#else
constexpr bool kIsSm120 = false;
#endif

constexpr int kKStepBytes = 32;  // reduced per mma: 16 elements of two bytes or 32 of one
constexpr int kOctetRows = 8;    // rows of a half of an mma accumulator
constexpr int kFragmentBytes = 32 * 16;  // 16 bytes of every lane: an accumulator of mma, or its first operand

struct Bf16 {
  static constexpr int kBytes = 2;
  static constexpr float kWeightScale = 1.0f;  // weights are stored multiplied by this
  static constexpr float kMaxLag = 8.0f;       // log2; how far a logit may exceed the running maximum
};
struct Fp16 {
  static constexpr int kBytes = 2;
  static constexpr float kWeightScale = 1.0f;
  static constexpr float kMaxLag = 8.0f;
};
struct E4m3 {
  static constexpr int kBytes = 1;
  static constexpr float kWeightScale = 128.0f;  // with the lag at most 256, of the 448 that e4m3 holds
  static constexpr float kMaxLag = 1.0f;
};

// Swizzles of TMA: 16-byte units of a span of 128 or 64 bytes change places with the row.
template <int kSpanBytes>
struct Swizzle {
  static_assert(kSpanBytes == 128 || kSpanBytes == 64, "a chunk must be 128 or 64 bytes wide");
  // Where unit `unit` of row `row` lies in its span.
  static __device__ __forceinline__ int place(int unit, int row) {
    return kSpanBytes == 128 ? unit ^ (row & 7) : unit ^ ((row >> 1) & 3);
  }
};

constexpr int kSoftmaxRows = 16;  // of a warp that takes the softmax

template <typename Element_, int kTileM_, bool kMerges_>
struct Config {
  using Element = Element_;
  static constexpr bool kMerges = kMerges_;  // whether a cluster merges what its blocks have, each of other keys
  static constexpr int kTileM = kTileM_;  // (token, head) rows of a block
  static_assert(kTileM == 16 || kTileM == 32 || kTileM == 64, "rows per block");

  static constexpr int kBytes = Element::kBytes;
  static constexpr int kChunkBytes = kChunkElements * kBytes;
  static constexpr int kChunkStride = kBoxKeys * kChunkBytes;
  static constexpr int kBoxBytes = kChunks * kChunkStride;
  static_assert(kBoxBytes % 1024 == 0, "a swizzle pattern repeats every 1024 bytes");

  // Row groups of four warps work on their own, with their own rows and all keys; one or two more take their softmax.
  static constexpr int kRowGroups = kTileM == 16 ? 1 : 2;
  static constexpr int kGroupRows = kTileM / kRowGroups;
  static constexpr int kMTiles = kGroupRows / 16;
  static constexpr int kGroupOctets = kGroupRows / kOctetRows;
  static constexpr int kComputeWarps = kRowGroups * kGroupWarps;
  static constexpr int kComputeThreads = kComputeWarps * 32;
  static constexpr int kThreads = kComputeThreads + kGroupThreads;
  static constexpr int kSoftmaxWarps = kTileM / kSoftmaxRows;
  static constexpr bool kOwnLoader = kSoftmaxWarps < kGroupWarps;  // else they copy the keys too

  // S = Q K^T: warps are [box of the step][k split]; a split takes one k step of every chunk.
  static constexpr int kKSplits = kChunkBytes / kKStepBytes;
  static constexpr int kStepBoxes = kGroupWarps / kKSplits;
  static constexpr int kStepKeys = kStepBoxes * kBoxKeys;  // of one step of the online softmax
  static_assert(kTileKeys % kStepKeys == 0, "a split has whole steps, but for the last keys");

  // S of 64 rows of e4m3 is made in two turns, sixteen rows of each group after the other, where mma.sync of e4m3 is
  // made of conversions, for whose results there are no registers otherwise; keys are then loaded twice.
  static constexpr int kTurns = kTileM == 64 && kBytes == 1 && !kIsSm120 ? 2 : 1;
  static constexpr int kTurnTiles = kMTiles / kTurns;

  // O = P V: a warp has the rows of its group and two latent chunks.
  static constexpr int kWarpChunks = 2;
  static_assert(kGroupWarps * kWarpChunks * kChunkElements == kLatentDim, "the chunks of a group are all there are");
  static constexpr int kColumnTiles = kWarpChunks * kChunkElements / 8;
  static constexpr int kColumnPairs = kColumnTiles / 2;  // what one load brings, and the unit that clusters share out
  static_assert(kStepKeys * kBytes == kKStepBytes, "a step is one k step of P V");
  // Whether a fragment of a warp's query, the first chunk of its last sixteen rows, is in shared memory: 64 rows leave
  // too few registers for keys to be loaded ahead of their products.
  static constexpr bool kStoresQuery = kTileM == 64 && kBytes == 2;
  // Whether it is loaded before keys are waited for; where clusters merge, that was slower.
  static constexpr bool kLoadsQueryAhead = kStoresQuery && !kMerges;
  // Loads of keys or values that are under way while one is multiplied. More than one need more registers than e4m3
  // has. The registers that the compiler then chooses matter as much as the loads: "Loads ahead" in docs/speed.md has
  // times of an H100.
  static constexpr int kAhead = kBytes == 1 ? 1 : kStoresQuery ? 2 : kMerges ? 3 : 1;

  // Whether partial results pass through shared memory, to be stored as whole lines; with fewer rows no faster.
  static constexpr bool kGathersPartials = kTileM == 64 && !kMerges;

  // How memory changes hands. No phase of an mbarrier can end before all who wait for the phase before have seen that:
  // each of them has a part in what the later one needs.
  //   box: copied -> compute, by full; back by empty, of every compute warp, after O of the step. With two boxes a step
  //     a warp waits for the one that it reads for S; all four have waited when weights are there.
  //   absent: as the box, and read by the softmax warps between logits and weights, hence before empty.
  //   partial logits: compute -> softmax, by logits; back by weights. Before that the query passes through them, which
  //     ends with a barrier of the compute warps.
  //   weights, decays, grown: softmax -> compute, by weights; back by logits of two steps later, which a compute warp
  //     signals after O of this one. Hence two of each.
  //   scales, and lse where a cluster merges: softmax -> compute, by weights of the last step. What merging does with
  //     the memory before the state is said in merge.cuh.
  //   stored query: a lane's own, written before its first step.
  //   gathered partial results: a warp's own, over the boxes, after a barrier of the compute warps, who have read them.
  // Shared memory: ring of boxes | partial logits | weights | stored query | unused | state, at the end. Partial logits
  // are fragments [row group][warp][16 rows][8 keys], weights fragments [parity of the step][row group][16 rows].
  static constexpr int kPartBytes = 2 * kMTiles * kFragmentBytes;  // of a warp
  static constexpr int kGroupBytes = kGroupWarps * kPartBytes;
  static constexpr int kPartialBytes = kRowGroups * kGroupBytes;
  static constexpr int kGroupWeightBytes = kMTiles * kFragmentBytes;
  static constexpr int kStepWeightBytes = kRowGroups * kGroupWeightBytes;
  static constexpr int kMaxBoxes = 10;
  static constexpr int kStateBytes =
      kMaxBoxes * (8 + 8) + 5 * 8 + 2 * kTileM * 4 + 3 * kTileM * 4 + kMaxBoxes * 4 + 2 * kRowGroups * 4;
  static constexpr int kFittingBoxes =
      (kMaxSmemBytes - kPartialBytes - 2 * kStepWeightBytes - kStateBytes) / kBoxBytes;
  static constexpr int kNumBoxes = kFittingBoxes < kMaxBoxes ? kFittingBoxes : kMaxBoxes;
  static_assert(kNumBoxes >= 4 * kStepBoxes, "keys of one step, values of the step before, and as many in flight");
  static constexpr int kPartialOffset = kNumBoxes * kBoxBytes;
  static constexpr int kWeightOffset = kPartialOffset + kPartialBytes;
  static constexpr int kFullOffset = (kMaxSmemBytes - kStateBytes) / 8 * 8;  // uint64 [kMaxBoxes]
  static constexpr int kQueryOffset = kWeightOffset + 2 * kStepWeightBytes;
  static constexpr int kQueryBytes = kStoresQuery ? kComputeWarps * kFragmentBytes : 0;
  static_assert(kQueryOffset + kQueryBytes <= kFullOffset, "the ring, logits, weights, query and state fit");
  static constexpr int kEmptyOffset = kFullOffset + kMaxBoxes * 8;    // uint64 [kMaxBoxes]
  static constexpr int kLogitsOffset = kEmptyOffset + kMaxBoxes * 8;  // uint64 [2 row groups]: logits are there
  static constexpr int kWeightsOffset = kLogitsOffset + 2 * 8;        // uint64 [2 row groups]: weights are there
  static constexpr int kLastOffset = kWeightsOffset + 2 * 8;          // uint64: the last keys are there
  static constexpr int kDecayOffset = kLastOffset + 8;                // float [parity of the step][kTileM]
  static constexpr int kScaleOffset = kDecayOffset + 2 * kTileM * 4;  // float [kTileM], of the outputs
  static constexpr int kLseOffset = kScaleOffset + kTileM * 4;        // float [kTileM], log2, of the block's keys
  static constexpr int kSharedLseOffset = kLseOffset + kTileM * 4;    // float [kTileM], that other blocks read
  static constexpr int kAbsentOffset = kSharedLseOffset + kTileM * 4;  // int32 [kMaxBoxes]
  static constexpr int kGrownOffset = kAbsentOffset + kMaxBoxes * 4;  // uint8 [parity of the step][kRowGroups][4]
  static constexpr int kSmemBytes = kGrownOffset + 2 * kRowGroups * 4;
  static_assert(kSmemBytes == kFullOffset + kStateBytes, "the state is what it says");
  static_assert(kSmemBytes <= kMaxSmemBytes, "shared memory of a block");

  // The query passes through the partial logits' memory on its way to registers.
  static constexpr int kChunksPerPass = kPartialBytes / (kTileM * kChunkBytes);
  static constexpr int kPasses = (kChunks + kChunksPerPass - 1) / kChunksPerPass;
  static_assert(kChunksPerPass >= 1, "a chunk of the query fits");
};

}  // namespace mla
