// Tile shapes, the division of work among the warps of a block, and the plan of shared memory.
#pragma once

#include "params.h"

namespace mla {

constexpr int kHeadDim = 576;   // of a query head and of a key: latent, then rope
constexpr int kLatentDim = 512;  // of a value, which is the first part of its key
constexpr int kMaxSmemBytes = 101376;  // dynamic shared memory of a block on compute capability 12.x

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;

constexpr int kTileKeys = 32;  // keys of one step of the online softmax
constexpr int kBoxKeys = 16;   // keys of one TMA copy; divides every page size, a power of two, so a box lies in one page
constexpr int kBoxesPerTile = kTileKeys / kBoxKeys;
constexpr int kChunkElements = 64;  // columns that lie together in shared memory; one swizzle span per key
constexpr int kChunks = kHeadDim / kChunkElements;
constexpr int kRopeChunk = kLatentDim / kChunkElements;

constexpr int kFirstLoader = kWarps - kBoxesPerTile;  // warps from here on issue the copies

constexpr int kKStepBytes = 32;  // reduced per mma: 16 elements of two bytes or 32 of one
constexpr int kKSplits = 4;      // warps that share the reduction over the head dimension
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

// The weights P lie where the rope parts of the tile's own keys were, kBoxKeys * kChunkBytes per box:
// 32 rows of 64 bytes (two-byte elements) or of 32 bytes.
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
  static constexpr int kWeightRowBytes = kTileKeys * kBytes;
  static constexpr int kWeightRowsPerBox = kChunkStride / kWeightRowBytes;
  static_assert(kWeightRowsPerBox * kBoxesPerTile >= kTileM, "the weights fit into the rope chunks of a tile");

  // S = Q K^T: warps are [row group][key group][k split].
  static constexpr int kRowGroups = kTileM == 64 ? 2 : 1;
  static constexpr int kKeyGroups = kWarps / kKSplits / kRowGroups;
  static constexpr int kWarpRows = kTileM / kRowGroups;
  static constexpr int kWarpMTiles = kWarpRows / 16;
  static constexpr int kWarpOctets = kWarpRows / kOctetRows;
  static constexpr int kWarpBoxes = kBoxesPerTile / kKeyGroups;
  // A split takes every fourth k step; a segment is the four of them, 128 bytes of a row.
  static constexpr int kSegmentBytes = kKSplits * kKStepBytes;
  static constexpr int kKSteps = kHeadDim * kBytes / kKStepBytes;
  static constexpr int kSegments = (kKSteps + kKSplits - 1) / kKSplits;
  static constexpr int kSegmentStride = kSegmentBytes / kChunkBytes * kChunkStride;
  // A warp that has all keys of its rows keeps its own part of one octet, so that three others remain.
  static constexpr bool kKeepsOwn = kKeyGroups == 1;
  static constexpr int kSlots = kKeepsOwn ? kKSplits - 1 : kKSplits;
  static constexpr int kOctets = kTileM / kOctetRows;

  // O = P V: a warp has all rows and the 64 columns of one latent chunk.
  static_assert(kWarps * kChunkElements == kLatentDim, "one latent chunk per warp");
  static constexpr int kMTiles = kTileM / 16;
  static constexpr int kWeightKSteps = kWeightRowBytes / kKStepBytes;

  // Shared memory: ring of boxes | partial logits | state.
  static constexpr int kSlotBytes = kOctetRows * kTileKeys * 4;
  static constexpr int kPartialBytes = kOctets * kSlots * kSlotBytes;
  static constexpr int kMaxBoxes = 10;
  static constexpr int kStateBytes = kTileM * 4 * 4 + kMaxBoxes * (8 + 4) + kBoxesPerTile * 4 + 8;
  static constexpr int kFittingBoxes = (kMaxSmemBytes - kPartialBytes - kStateBytes) / kBoxBytes;
  static constexpr int kNumBoxes = kFittingBoxes < kMaxBoxes ? kFittingBoxes : kMaxBoxes;
  static_assert(kNumBoxes >= 2 * kBoxesPerTile, "a tile in use and a tile in flight");
  static constexpr int kPartialOffset = kNumBoxes * kBoxBytes;
  static constexpr int kDecayOffset = kPartialOffset + kPartialBytes;  // float [kTileM]
  static constexpr int kMaxOffset = kDecayOffset + kTileM * 4;         // float [kTileM]
  static constexpr int kSumOffset = kMaxOffset + kTileM * 4;           // float [kTileM]
  static constexpr int kLimitOffset = kSumOffset + kTileM * 4;         // int32 [kTileM]
  static constexpr int kFullOffset = kLimitOffset + kTileM * 4;        // uint64 [kNumBoxes]
  static constexpr int kAbsentOffset = kFullOffset + kMaxBoxes * 8;    // int32 [kNumBoxes]
  static constexpr int kPageOffset = kAbsentOffset + kMaxBoxes * 4;    // int32 [kBoxesPerTile]
  static constexpr int kLogitScaleOffset = kPageOffset + kBoxesPerTile * 4;  // float, log2
  static constexpr int kSmemBytes = kDecayOffset + kStateBytes;
  static_assert(kLogitScaleOffset + 8 == kSmemBytes, "the state is what it says");
  static_assert(kSmemBytes <= kMaxSmemBytes, "shared memory of a block");
  static_assert(kBoxBytes % 1024 == 0, "a swizzle pattern repeats every 1024 bytes");

  // The query passes through the partial logits' memory on its way to registers.
  static constexpr int kSegmentsPerPass = kPartialBytes / (kTileM * kSegmentBytes);
  static constexpr int kPasses = (kSegments + kSegmentsPerPass - 1) / kSegmentsPerPass;
  static_assert(kSegmentsPerPass >= 1, "a segment of the query fits");
};

}  // namespace mla
