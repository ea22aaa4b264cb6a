// From a compute warp's sums to what is stored: those of the block's keys, or of all keys of its cluster.
//   scale_i = 2^(lse_i - lse) / sum_i, with lse that of the keys of all blocks i of the cluster; O = sum of scale_i O_i
// A cluster's blocks have the same rows. A pair of column tiles of every warp is added up and stored by one of them, to
// which the same warp of all blocks sends its part, over the memory of the keys, which are no longer needed there.
//   keys' memory: compute -> received parts, in every block, by the first barrier; lse of every block, by the same.
//   parts of sixteen rows of every row group: sender -> receiver by a barrier, and back by another.
// No block ends before the others have read or written its memory: after the last barrier they do not. What a block has
// itself takes the same way: loops over shared memory are less code than stores from registers, and code comes cold.
#pragma once

#include "math.cuh"
#include "store.cuh"

namespace mla {

constexpr int kLanesOfRow = 4;  // of an mma accumulator

template <class C>
struct Results {
  static constexpr int kPairBytes = C::kComputeWarps * 2 * kFragmentBytes;  // of sixteen rows of every row group
  static_assert(kMaxCluster <= 2 * kLanesOfRow, "each lane of a row has the LSE of two blocks");
  static_assert(C::kColumnPairs * kPairBytes <= C::kFullOffset, "the parts fit before the state");

  uint32 smem;
  Role<C> role;
  int lane;
  int size = cluster_size();
  int rank = cluster_rank();
  int pairs = C::kColumnPairs / size;  // of every warp, that this block adds up

  __device__ __forceinline__ Results(uint32 smem_, const Role<C>& role_, int lane_)
      : smem(smem_), role(role_), lane(lane_) {}

  __device__ __forceinline__ int tile_row(int octet) const {
    return role.row_group * C::kGroupRows + octet * kOctetRows + lane / 4;
  }

  // Where the lane's part of a pair is that a block sent, one of those that the receiver adds up.
  __device__ __forceinline__ uint32 received(int sender, int place) const {
    return smem + (sender * pairs + place) * kPairBytes + role.warp() * 2 * kFragmentBytes + lane * 16;
  }

  // The LSE of the group's rows, to where the cluster reads it. What other blocks read is written by warps that meet
  // them at the cluster's barrier, which those that take the softmax do not.
  __device__ __forceinline__ void publish_lse() const {
    if (role.member > 0 || lane >= C::kGroupRows) return;
    const int row = role.row_group * C::kGroupRows + lane;
    st_shared(smem + C::kSharedLseOffset + row * 4, ld_shared_float(smem + C::kLseOffset + row * 4));
  }

  // The LSE of a row's keys in the block of a rank.
  __device__ __forceinline__ float lse_of(int octet, int other) const {
    if (other >= size) return -infinity();
    return ld_cluster_float(cluster_address(smem + C::kSharedLseOffset + tile_row(octet) * 4, other));
  }

  // From the scale and the LSE of the block's keys to those of the cluster's. The four lanes of a row have two of the
  // cluster's LSE each.
  __device__ __forceinline__ void weigh(float first, float second, float& scale, float& lse) const {
    float most = fmaxf(first, second);
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
    if (most == -infinity()) most = 0.0f;  // no key for this row
    float total = exp2_approx(first - most) + exp2_approx(second - most);
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    scale *= total == 0.0f ? 0.0f : __fdividef(exp2_approx(lse - most), total);
    lse = total == 0.0f ? -infinity() : most + log2_approx(total);
  }

  __device__ __forceinline__ void send(const float (&o)[C::kColumnTiles][4], float upper, float lower) const {
#pragma unroll
    for (int pair = 0; pair < C::kColumnPairs; ++pair) {
      const int owner = static_cast<int>(static_cast<uint32>(pair * size) / C::kColumnPairs);
      const uint32 here = received(rank, pair - owner * pairs);
      const uint32 to = owner == rank ? here : cluster_address(here, owner);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float (&t)[4] = o[2 * pair + i];
        st_cluster(to + i * kFragmentBytes, make_float4(t[0] * upper, t[1] * upper, t[2] * lower, t[3] * lower));
      }
    }
  }

  // Adds up what was received of a tile of sixteen rows, and stores it to those rows that are asked for.
  template <class Row>
  __device__ __forceinline__ void store(const Row& upper, const Row& lower, bool has_upper, bool has_lower,
                                        bool aligned) const {
#pragma unroll 1
    for (int place = 0; place < pairs; ++place) {
      float4 a = ld_shared_four(received(0, place));
      float4 b = ld_shared_four(received(0, place) + kFragmentBytes);
#pragma unroll 1
      for (int sender = 1; sender < size; ++sender) {
        const float4 c = ld_shared_four(received(sender, place));
        const float4 d = ld_shared_four(received(sender, place) + kFragmentBytes);
        a.x += c.x, a.y += c.y, a.z += c.z, a.w += c.w;
        b.x += d.x, b.y += d.y, b.z += d.z, b.w += d.w;
      }
      const int column = role.member * C::kWarpChunks * kChunkElements + (rank * pairs + place) * 16;
      if constexpr (C::kBytes == 1 && !kNativeByteTranspose) {
        const int first = column + lane % 4 * 4;
        if (has_upper) store_pair(upper, first, a.x, b.x, aligned), store_pair(upper, first + 2, a.y, b.y, aligned);
        if (has_lower) store_pair(lower, first, a.z, b.z, aligned), store_pair(lower, first + 2, a.w, b.w, aligned);
      } else {
        const int first = column + lane % 4 * 2;
        if (has_upper) store_pair(upper, first, a.x, a.y, aligned), store_pair(upper, first + 8, b.x, b.y, aligned);
        if (has_lower) store_pair(lower, first, a.z, a.w, aligned), store_pair(lower, first + 8, b.z, b.w, aligned);
      }
    }
  }
};

// The block's part of O and the LSE, to the output or the partial results. The combine kernel sees by the LSE which
// partial rows have no keys, and have not been written. All compute warps of all blocks of the cluster call it.
template <class C>
__device__ __forceinline__ void merge_results(const DecodeParams& p, const Block& block, uint32 smem,
                                              const Role<C>& role, const Outputs<C>& out, int lane) {
  const Results<C> results(smem, role, lane);
  results.publish_lse();
  // A cluster always has other blocks. Without these branches the compiler chooses registers for the main loop that
  // were not measured.
  if (results.size > 1) cluster_barrier();
  float first[C::kGroupOctets], second[C::kGroupOctets], scale[C::kGroupOctets];
#pragma unroll
  for (int octet = 0; octet < C::kGroupOctets; ++octet) {  // all loads before the first result is needed
    first[octet] = results.lse_of(octet, lane % kLanesOfRow);
    second[octet] = results.lse_of(octet, lane % kLanesOfRow + kLanesOfRow);
  }
  uint32 wanted = 0;  // octets, whether the lane's row is stored
#pragma unroll
  for (int octet = 0; octet < C::kGroupOctets; ++octet) {
    const int row = block.first_row + results.tile_row(octet);
    scale[octet] = ld_shared_float(smem + C::kScaleOffset + results.tile_row(octet) * 4);
    float lse = ld_shared_float(smem + C::kLseOffset + results.tile_row(octet) * 4);
    if (results.size > 1) results.weigh(first[octet], second[octet], scale[octet], lse);
    if (row >= block.num_rows) continue;
    if (results.rank == 0 && role.member == 0 && lane % 4 == 0) store_lse<C>(p, block, row, lse);
    wanted |= static_cast<uint32>(p.num_partials == 1 || lse != -infinity()) << octet;
  }
#pragma unroll 1
  for (int m = 0; m < C::kMTiles; ++m) {
    if (m == 0) {
      results.send(out.o[0], scale[0], scale[1]);
    } else {
      cluster_barrier();
      results.send(out.o[C::kMTiles - 1], scale[C::kGroupOctets - 2], scale[C::kGroupOctets - 1]);
    }
    cluster_barrier();
    const bool has_upper = wanted >> 2 * m & 1, has_lower = wanted >> 2 * m & 2;
    const int row = block.first_row + results.tile_row(2 * m);
    for_output<C>(p, block, [&](auto row_at) {
      results.store(row_at(row), row_at(row + kOctetRows), has_upper, has_lower, p.out_aligned);
    });
  }
}

}  // namespace mla
