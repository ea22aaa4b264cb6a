// Tile shapes, the division of work among the warps of a block, and the plan of shared memory.
#pragma once

#include "params.h"

namespace mla {

constexpr int kHeadDim = 576;   // of a query head and of a key: latent, then rope
constexpr int kLatentDim = 512;  // of a value, which is the first part of its key
constexpr int kMaxSmemBytes = 101376;  // dynamic shared memory of a block on compute capability 12.x

constexpr int kGroupWarps = 4;  // compute warps of a row group; one more group of warps copies keys
constexpr int kGroupThreads = kGroupWarps * 32;
constexpr int kComputeRegisters = 240;  // of a thread, where a block has 64 rows
constexpr int kLoaderRegisters = 24;
constexpr int kLaunchRegisters = 65536 / (3 * kGroupThreads) / 8 * 8;  // what such a block starts with
static_assert(2 * kComputeRegisters + kLoaderRegisters <= 3 * kLaunchRegisters, "a block has no others to share out");
// Named barriers; 0 is __syncthreads.
constexpr int kGroupBarriers = 1;   // one of each row group
constexpr int kComputeBarrier = 3;  // of all compute warps

constexpr int kTileKeys = 32;  // keys of one step of the online softmax
constexpr int kBoxKeys = 16;  // keys of one TMA copy; divides every page size, a power of two: a box lies in one page
constexpr int kBoxesPerTile = kTileKeys / kBoxKeys;
constexpr int kChunkElements = 64;  // columns that lie together in shared memory; one swizzle span per key
constexpr int kChunks = kHeadDim / kChunkElements;

constexpr int kKStepBytes = 32;  // reduced per mma: 16 elements of two bytes or 32 of one
constexpr int kOctetRows = 8;    // rows of a half of an mma accumulator: what one warp takes the softmax of

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

// Swizzles of TMA: 16-byte units of a span of 128, 64 or 32 bytes change places with the row.
template <int kSpanBytes>
struct Swizzle {
  static_assert(kSpanBytes == 128 || kSpanBytes == 64, "a chunk must be 128 or 64 bytes wide");
  // Where unit `unit` of row `row` lies in its span.
  static __device__ __forceinline__ int place(int unit, int row) {
    return kSpanBytes == 128 ? unit ^ (row & 7) : unit ^ ((row >> 1) & 3);
  }
};

// Rows of weights, 64 bytes of two-byte elements or 32 of one: without bank conflicts for ldmatrix.
template <int kRowBytes>
struct WeightSwizzle {
  static_assert(kRowBytes == 64 || kRowBytes == 32, "32 keys of two bytes or of one");
  static __device__ __forceinline__ int place(int unit, int row) {
    return kRowBytes == 64 ? unit ^ ((row >> 1) & 3) : unit ^ ((row >> 2) & 1);
  }
};

template <typename Element_, int kTileM_>
struct Config {
  using Element = Element_;
  static constexpr int kTileM = kTileM_;  // (token, head) rows of a block
  static_assert(kTileM == 16 || kTileM == 32 || kTileM == 64, "rows per block");

  static constexpr int kBytes = Element::kBytes;
  static constexpr int kChunkBytes = kChunkElements * kBytes;
  static constexpr int kChunkStride = kBoxKeys * kChunkBytes;
  static constexpr int kBoxBytes = kChunks * kChunkStride;
  static_assert(kBoxBytes % 1024 == 0, "a swizzle pattern repeats every 1024 bytes");

  // Row groups of four warps work on their own, with their own rows and all keys.
  static constexpr int kRowGroups = kTileM == 16 ? 1 : 2;
  static constexpr int kGroupRows = kTileM / kRowGroups;
  static constexpr int kMTiles = kGroupRows / 16;
  static constexpr int kGroupOctets = kGroupRows / kOctetRows;
  static constexpr int kOctets = kTileM / kOctetRows;
  static_assert(kGroupOctets <= kGroupWarps, "a warp takes the softmax of one octet at most");
  static constexpr int kComputeThreads = kRowGroups * kGroupThreads;
  static constexpr int kThreads = kComputeThreads + kGroupThreads;

  // S = Q K^T: warps are [key group][k split]; a split takes one k step of every chunk.
  static constexpr int kKSplits = kChunkBytes / kKStepBytes;
  static constexpr int kKeyGroups = kGroupWarps / kKSplits;
  static constexpr int kWarpBoxes = kBoxesPerTile / kKeyGroups;
  // A warp that has all keys of its rows keeps its own part of the octet that it takes the softmax of.
  static constexpr bool kKeepsOwn = kKeyGroups == 1;
  static constexpr int kSlots = kKeepsOwn ? kKSplits - 1 : kKSplits;

  // O = P V: a warp has the rows of its group and two latent chunks.
  static constexpr int kWarpChunks = 2;
  static_assert(kGroupWarps * kWarpChunks * kChunkElements == kLatentDim, "the chunks of a group are all there are");
  static constexpr int kColumnTiles = kWarpChunks * kChunkElements / 8;
  static constexpr int kWeightRowBytes = kTileKeys * kBytes;
  static constexpr int kWeightKSteps = kWeightRowBytes / kKStepBytes;
  static constexpr int kBoxesPerKStep = kBoxesPerTile / kWeightKSteps;

  // Shared memory: ring of boxes | partial logits, and then weights | state. Partial logits are
  // [row group][slot][octet][key / 8][row][key % 8].
  static constexpr int kBlockBytes = kOctetRows * 8 * 4;
  static constexpr int kOctetBytes = kTileKeys / 8 * kBlockBytes;
  static_assert(kOctetRows * kWeightRowBytes <= kOctetBytes, "weights take the place of a slot's logits");
  static constexpr int kSlotBytes = kGroupOctets * kOctetBytes;
  static constexpr int kGroupBytes = kSlots * kSlotBytes;
  static constexpr int kPartialBytes = kRowGroups * kGroupBytes;
  static constexpr int kMaxBoxes = 10;
  static constexpr int kStateBytes =
      kMaxBoxes * (8 + 8) + 3 * 8 + kTileM * (4 + 4) + kMaxBoxes * 4 + kRowGroups * 4 + 8;
  static constexpr int kFittingBoxes = (kMaxSmemBytes - kPartialBytes - kStateBytes) / kBoxBytes;
  static constexpr int kNumBoxes = kFittingBoxes < kMaxBoxes ? kFittingBoxes : kMaxBoxes;
  static_assert(kNumBoxes >= 2 * kBoxesPerTile, "a tile in use and a tile in flight");
  static constexpr int kPartialOffset = kNumBoxes * kBoxBytes;
  static constexpr int kFullOffset = kPartialOffset + kPartialBytes;  // uint64 [kMaxBoxes]
  static constexpr int kEmptyOffset = kFullOffset + kMaxBoxes * 8;    // uint64 [kMaxBoxes]
  static constexpr int kWeightsReadOffset = kEmptyOffset + kMaxBoxes * 8;  // uint64 [2 row groups]
  static constexpr int kLastOffset = kWeightsReadOffset + 2 * 8;           // uint64: the last keys are there
  static constexpr int kDecayOffset = kLastOffset + 8;                     // float [kTileM]
  static constexpr int kLimitOffset = kDecayOffset + kTileM * 4;           // int32 [kTileM]
  static constexpr int kAbsentOffset = kLimitOffset + kTileM * 4;          // int32 [kMaxBoxes]
  static constexpr int kGrownOffset = kAbsentOffset + kMaxBoxes * 4;       // uint8 [kRowGroups][4]
  static constexpr int kLogitScaleOffset = kGrownOffset + kRowGroups * 4;  // float, log2
  static constexpr int kSmemBytes = kLogitScaleOffset + 8;
  static_assert(kSmemBytes == kFullOffset + kStateBytes, "the state is what it says");
  static_assert(kSmemBytes <= kMaxSmemBytes, "shared memory of a block");

  // The query passes through the partial logits' memory on its way to registers.
  static constexpr int kChunksPerPass = kPartialBytes / (kTileM * kChunkBytes);
  static constexpr int kPasses = (kChunks + kChunksPerPass - 1) / kChunksPerPass;
  static_assert(kChunksPerPass >= 1, "a chunk of the query fits");
};

}  // namespace mla
