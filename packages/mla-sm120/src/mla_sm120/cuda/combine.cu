// Merges the partial results of a row, one of every cluster: weights 2^(lse_partial - lse), in a fixed order.
// An item is a row and a quarter of the columns, of which lane i has columns 4 i to 4 i + 3. Block (32, warps, items):
// warp w of an item has the partials w, w + warps, ..., a batch of which are on their way before the weights are known.
#include "block.cuh"
#include "kernel.h"
#include "store.cuh"

namespace mla {

constexpr int kCombineWarps = 16;  // of a block, over all its items
constexpr int kQuarters = 4;
constexpr int kQuarterColumns = kLatentDim / kQuarters;

template <class Element>
__device__ __forceinline__ void store_four(unsigned char* row, int column, float4 v, bool aligned) {
  store_pair(OutRow<Element>{row}, column, v.x, v.y, aligned);
  store_pair(OutRow<Element>{row}, column + 2, v.z, v.w, aligned);
}

template <int kBatch>
__device__ __forceinline__ void combine(const DecodeParams& p) {
  __shared__ float4 sums[kCombineWarps][32];
  const int lane = threadIdx.x;
  const int warp = threadIdx.y;
  const int stride = blockDim.y;
  const int rows_per_request = p.q_len * p.num_heads;
  const int total_rows = rows_per_request * p.batch;
  const int item = static_cast<int>(blockIdx.x * blockDim.z + threadIdx.z);
  const int partial_row = min(item / kQuarters, total_rows - 1);
  const int column = item % kQuarters * kQuarterColumns + lane * 4;
  launch_dependents();  // they wait for the end of this grid
  wait_for_previous_grid();

  const float* lse_partial = p.lse_partial + partial_row;
  const float* o_partial = p.o_partial + static_cast<int64>(partial_row) * kLatentDim + column;
  float4 o[kBatch];
  float lse[kBatch];
  const auto load = [&](int first) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int partial = first + i * stride;
      const int64 at = static_cast<int64>(partial) * total_rows;
      lse[i] = partial < p.num_partials ? lse_partial[at] : -infinity();
      o[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (partial < p.num_partials) o[i] = *reinterpret_cast<const float4*>(o_partial + at * kLatentDim);
    }
  };
  load(warp);
  float lse_max = -infinity();
  for (int partial = lane; partial < p.num_partials; partial += 32)
    lse_max = fmaxf(lse_max, lse_partial[static_cast<int64>(partial) * total_rows]);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2)
    lse_max = fmaxf(lse_max, __shfl_xor_sync(0xffffffffu, lse_max, lanes));
  if (lse_max == -infinity()) lse_max = 0.0f;  // no partial result has a key
  float total = 0.0f;
  for (int partial = lane; partial < p.num_partials; partial += 32)
    total += exp2_approx(lse_partial[static_cast<int64>(partial) * total_rows] - lse_max);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_xor_sync(0xffffffffu, total, lanes);

  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int partial = warp;;) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (lse[i] == -infinity()) continue;  // nothing was written there
      const float weight = exp2_approx(lse[i] - lse_max);
      sum.x += weight * o[i].x, sum.y += weight * o[i].y, sum.z += weight * o[i].z, sum.w += weight * o[i].w;
    }
    partial += kBatch * stride;
    if (partial >= p.num_partials) break;
    load(partial);
  }
  const int first = threadIdx.z * stride;
  sums[first + warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || item >= total_rows * kQuarters) return;
  Block block;
  block.request = partial_row / rows_per_request;
  const int row = partial_row - block.request * rows_per_request;
  const bool ragged = p.cum_seq_lens_q != nullptr;
  block.first_token = ragged ? p.cum_seq_lens_q[block.request] : 0;
  const int q_len = ragged ? p.cum_seq_lens_q[block.request + 1] - block.first_token : p.q_len;
  if (row >= q_len * p.num_heads) return;
  for (int other = 1; other < stride; ++other) {
    const float4 more = sums[first + other][lane];
    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
  }
  const float output_scale = p.output_scale_device != nullptr ? *p.output_scale_device : p.output_scale;
  const float scale = total == 0.0f ? 0.0f : output_scale / total;
  sum.x *= scale, sum.y *= scale, sum.z *= scale, sum.w *= scale;
  const int64 offset =
      block.offset(row, p.num_heads, p.out_stride[0], p.out_stride[1], p.out_stride[2], ragged);
  unsigned char* out = static_cast<unsigned char*>(p.out);
  if (p.out_type == kOutBf16) store_four<Bf16>(out + offset * 2, column, sum, p.out_aligned);
  if (p.out_type == kOutFp16) store_four<Fp16>(out + offset * 2, column, sum, p.out_aligned);
  if (p.out_type == kOutE4m3) store_four<E4m3>(out + offset, column, sum, p.out_aligned);
  if (p.lse != nullptr && column == 0) {
    const float lse_log2 = total == 0.0f ? -infinity() : lse_max + log2_approx(total);
    p.lse[block.offset(row, p.num_heads, p.lse_stride[0], p.lse_stride[1], 1, ragged)] = lse_log2 * kLn2;
  }
}

}  // namespace mla

extern "C" __global__ void __launch_bounds__(32 * mla::kCombineWarps, 1)
    mla_combine(const __grid_constant__ mla::DecodeParams params) {
  mla::combine<8>(params);
}

extern "C" __global__ void __launch_bounds__(32 * mla::kCombineWarps, 2)
    mla_combine_many(const __grid_constant__ mla::DecodeParams params) {
  mla::combine<6>(params);
}
