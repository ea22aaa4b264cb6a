// The online softmax: from partial logits to weights.
#pragma once

#include "store.cuh"

namespace mla {

// The softmax of sixteen rows. Run by one warp, whose lanes have of the logits what they would have of an accumulator
// of mma: keys 2 (lane % 4) and the next one of every eight keys, of the rows lane / 4 and lane / 4 + 8.
// Waits on: logits. Signals: weights, for which the logits of the step have been read; with 64 rows also what Loader
// waits on and signals.
template <class C>
struct Softmax {
  uint32 smem;
  int index;  // of the warp, among those that take the softmax
  int lane;
  int key_limit[2];  // keys that the rows see
  float scale_log2;
  float max[2] = {-infinity(), -infinity()};  // log2; -inf until the row has seen a key
  float sum[2] = {0.0f, 0.0f};                // of the lane's keys

  __device__ __forceinline__ Softmax(const DecodeParams& p, const Block& block, uint32 smem_, int index_)
      : smem(smem_),
        index(index_),
        lane(threadIdx.x % 32),
        scale_log2(scale_value(p.softmax_scale_device, p.softmax_scale) * 1.4426950408889634f) {
#pragma unroll
    for (int r = 0; r < 2; ++r) key_limit[r] = block.key_limit(block.first_row + row(r), p.num_heads);
  }

  __device__ __forceinline__ int row(int r) const { return index * kSoftmaxRows + r * 8 + lane / 4; }  // of the tile
  __device__ __forceinline__ int row_group() const { return index / C::kMTiles; }

  // The lane's logits of a step that begins with key `first_key`, -inf for keys that a row does not see.
  __device__ __forceinline__ void logits(const Ring<C>& ring, int first_key, float (&s)[C::kStepBoxes][2][4]) const {
    const uint32 parts = smem + C::kPartialOffset + row_group() * C::kGroupBytes +
                         index % C::kMTiles * 2 * kFragmentBytes + lane * 16;
    // Not kept from one step to the next where registers are scarcest; those of SM121 are scarcer than those of SM90.
    const int limit = (C::kBytes == 1 || kIsSm120) ? static_cast<int>(recomputed(key_limit[0])) : key_limit[0];
    const int lower_limit = C::kBytes == 1 && C::kMerges ? static_cast<int>(recomputed(key_limit[1])) : key_limit[1];
    bool all_seen = true;
#pragma unroll
    for (int box = 0; box < C::kStepBoxes; ++box) {
      const bool absent = ld_shared(ring.after(box).absent()) != 0;
      all_seen &= !absent && min(limit, lower_limit) >= first_key + C::kStepKeys;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32 part = parts + box * C::kKSplits * C::kPartBytes + n * kFragmentBytes;
        float4 total = ld_shared_four(part);
#pragma unroll
        for (int split = 1; split < C::kKSplits; ++split) {
          const float4 more = ld_shared_four(part + split * C::kPartBytes);
          total.x += more.x, total.y += more.y, total.z += more.z, total.w += more.w;
        }
        s[box][n][0] = total.x * scale_log2, s[box][n][1] = total.y * scale_log2;
        s[box][n][2] = total.z * scale_log2, s[box][n][3] = total.w * scale_log2;
      }
    }
    if (__all_sync(0xffffffffu, all_seen)) return;
#pragma unroll
    for (int box = 0; box < C::kStepBoxes; ++box) {
      const bool absent = ld_shared(ring.after(box).absent()) != 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int key = first_key + box * kBoxKeys + i / 4 * 8 + lane % 4 * 2 + i % 2;
        float& logit = s[box][i / 4][i % 4];
        logit = !absent && key < key_limit[i % 4 / 2] ? logit : -infinity();
      }
    }
  }

  // Turns the logits of a step into weights.
  __device__ __forceinline__ void take(const Ring<C>& ring, int step, int first_key) {
    float s[C::kStepBoxes][2][4];
    mbar_wait(smem + C::kLogitsOffset + row_group() * 8, step & 1);
    logits(ring, first_key, s);
    float most[2] = {-infinity(), -infinity()};
#pragma unroll
    for (int box = 0; box < C::kStepBoxes; ++box) {
#pragma unroll
      for (int i = 0; i < 8; ++i) most[i % 4 / 2] = fmaxf(most[i % 4 / 2], s[box][i / 4][i % 4]);
    }
    const auto over_row = [&] {
#pragma unroll
      for (int lanes = 1; lanes <= 2; lanes *= 2) {
        most[0] = fmaxf(most[0], __shfl_xor_sync(0xffffffffu, most[0], lanes));
        most[1] = fmaxf(most[1], __shfl_xor_sync(0xffffffffu, most[1], lanes));
      }
    };
    // What the four lanes of a row have together is needed only where one of them exceeds the maximum so far by more
    // than the lag. With e4m3 registers do not suffice for that, and it is found in every step.
    if constexpr (C::kBytes == 1) over_row();
    const auto grows = [&](int r) { return most[r] > max[r] + C::Element::kMaxLag; };
    const bool any_grows = __any_sync(0xffffffffu, grows(0) || grows(1));
    if (any_grows) {
      if constexpr (C::kBytes == 2) over_row();
      const uint32 decays = smem + C::kDecayOffset + ((step & 1) * C::kTileM + row(0)) * 4;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float decay = grows(r) ? exp2_approx(max[r] - most[r]) : 1.0f;
        max[r] = grows(r) ? most[r] : max[r];
        sum[r] *= decay;
        if (lane % 4 == 0) st_shared(decays + r * 32, decay);
      }
    }
    if (lane == 0) st_shared_byte(grown(smem, row_group(), step) + index % C::kMTiles, any_grows ? 1u : 0u);
    const float shift[2] = {max[0] == -infinity() ? 0.0f : max[0], max[1] == -infinity() ? 0.0f : max[1]};
#pragma unroll
    for (int box = 0; box < C::kStepBoxes; ++box) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& weight = s[box][i / 4][i % 4];
        weight = exp2_approx(weight - shift[i % 4 / 2]);
        sum[i % 4 / 2] += weight;
      }
    }
    store_weights(step, s);
  }

  // A byte for each sixteen rows of the group: whether their sums so far shrink by the decays of a step.
  __device__ __forceinline__ static uint32 grown(uint32 smem, int row_group, int step) {
    return smem + C::kGrownOffset + ((step & 1) * C::kRowGroups + row_group) * 4;
  }

  // As the first operand of mma. Bytes of a lane are keys of a box in the order in which values are transposed:
  // byte 4 q + i is key 8 (i / 2) + 2 q + i % 2.
  __device__ __forceinline__ void store_weights(int step, const float (&w)[C::kStepBoxes][2][4]) const {
    const typename C::Element element{};
    uint32 a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i % 2 * 2;
      if constexpr (C::kBytes == 2) {
        a[i] = pack(element, w[0][i / 2][r], w[0][i / 2][r + 1]);
      } else {
        constexpr float k = C::Element::kWeightScale;
        const uint32 low = pack(element, w[i / 2][0][r] * k, w[i / 2][0][r + 1] * k);
        a[i] = low | static_cast<uint32>(pack(element, w[i / 2][1][r] * k, w[i / 2][1][r + 1] * k)) << 16;
      }
    }
    st_shared(smem + C::kWeightOffset + (step & 1) * C::kStepWeightBytes + index * kFragmentBytes + lane * 16,
              make_uint4(a[0], a[1], a[2], a[3]));
  }

  // The scales of the outputs, to the compute warps, and the LSE, to them too where it is merged.
  __device__ __forceinline__ void finish(const DecodeParams& p, const Block& block) const {
    const float output_scale = p.num_partials > 1 ? 1.0f : scale_value(p.output_scale_device, p.output_scale);
    const float unit = output_scale / C::Element::kWeightScale;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float pair = sum[r] + __shfl_xor_sync(0xffffffffu, sum[r], 1);
      const float total = pair + __shfl_xor_sync(0xffffffffu, pair, 2);
      const int row_of_request = block.first_row + row(r);
      if (lane % 4 != 0) continue;
      st_shared(smem + C::kScaleOffset + row(r) * 4, total == 0.0f ? 0.0f : unit / total);
      const float lse = total == 0.0f ? -infinity() : max[r] + log2_approx(total);
      if constexpr (C::kMerges) {
        st_shared(smem + C::kLseOffset + row(r) * 4, lse);
      } else if (row_of_request < block.num_rows) {
        store_lse<C>(p, block, row_of_request, lse);
      }
    }
  }

  // Owns: the weights of all steps, and the LSE and the scales of the outputs; where no other warp copies keys, these
  // do so in turn, two steps ahead.
  __device__ __forceinline__ void run(const DecodeParams& p, int first_key, int end_key, Loader<C>& loader) {
    const auto load = [&](bool mine) {
#pragma unroll 1
      for (int i = 0; i < C::kStepBoxes; ++i) {
        if (mine && loader.more()) {
          loader.load();
        } else {
          loader.skip();
        }
      }
    };
    if (!C::kOwnLoader) load(index == 0), load(index == 1);
    Ring<C> ring(smem);
    int step = 0;
    for (int key = first_key; key < end_key; key += C::kStepKeys, ++step) {
      if (!C::kOwnLoader) load(step % C::kSoftmaxWarps == index);
      take(ring, step, key);
      if (key + C::kStepKeys >= end_key) finish(p, Block::of(p, C::kTileM));  // read again, as registers are scarce
      mbar_arrive_warp(smem + C::kWeightsOffset + row_group() * 8, lane);
      ring = ring.after(C::kStepBoxes);
    }
  }
};

}  // namespace mla
