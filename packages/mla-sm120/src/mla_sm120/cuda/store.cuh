// Outputs of any dtype, from float32, and the LSE.
#pragma once

#include "block.cuh"

namespace mla {

// Two values to columns `column` and the next one of a row; `aligned`: an even column may be written with it.
__device__ __forceinline__ void store_pair(float* row, int column, float a, float b, bool) {
  *reinterpret_cast<float2*>(row + column) = make_float2(a, b);
}

template <class Element>
struct OutRow {  // a row of elements of one dtype
  unsigned char* bytes;
};

template <class Element>
__device__ __forceinline__ void store_pair(OutRow<Element> row, int column, float a, float b, bool aligned) {
  const uint32 packed = pack(Element{}, a, b);
  unsigned char* target = row.bytes + column * Element::kBytes;
  if constexpr (Element::kBytes == 2) {
    if (aligned) {
      *reinterpret_cast<uint32*>(target) = packed;
    } else {
      reinterpret_cast<unsigned short*>(target)[0] = static_cast<unsigned short>(packed);
      reinterpret_cast<unsigned short*>(target)[1] = static_cast<unsigned short>(packed >> 16);
    }
  } else {
    if (aligned) {
      *reinterpret_cast<unsigned short*>(target) = static_cast<unsigned short>(packed);
    } else {
      target[0] = static_cast<unsigned char>(packed);
      target[1] = static_cast<unsigned char>(packed >> 8);
    }
  }
}

constexpr float kLn2 = 0.69314718055994531f;

__device__ __forceinline__ float scale_value(const float* on_device, float value) {
  return on_device != nullptr ? *on_device : value;
}

// Rows of a request in o_partial and lse_partial, where every request has as many as the longest may have.
template <class C>
__device__ __forceinline__ int64 partial_row(const DecodeParams& p, int request, int row) {
  const int partial = C::kMerges ? cluster_y() : static_cast<int>(blockIdx.y);
  const int64 rows_per_request = static_cast<int64>(p.q_len) * p.num_heads;
  return (partial * static_cast<int64>(p.batch) + request) * rows_per_request + row;
}

// Calls `store` with the function that gives a row's place in what this block writes, but for gathered partial results.
template <class C, class Store>
__device__ __forceinline__ void for_output(const DecodeParams& p, const Block& block, const Store& store) {
  const bool ragged = p.cum_seq_lens_q != nullptr;
  const auto offset = [&](int row) {
    return block.offset(row, p.num_heads, p.out_stride[0], p.out_stride[1], p.out_stride[2], ragged);
  };
  unsigned char* out = static_cast<unsigned char*>(p.out);
  if (!C::kGathersPartials && p.num_partials > 1) {
    store([&](int row) { return p.o_partial + partial_row<C>(p, block.request, row) * kLatentDim; });
  } else if (p.out_type == kOutBf16) {
    store([&](int row) { return OutRow<Bf16>{out + offset(row) * 2}; });
  } else if (p.out_type == kOutFp16) {
    store([&](int row) { return OutRow<Fp16>{out + offset(row) * 2}; });
  } else {
    store([&](int row) { return OutRow<E4m3>{out + offset(row)}; });
  }
}

// LSE of a row: log2 for the combine kernel, natural for the caller.
template <class C>
__device__ __forceinline__ void store_lse(const DecodeParams& p, const Block& block, int row, float lse_log2) {
  if (p.num_partials > 1) {
    p.lse_partial[partial_row<C>(p, block.request, row)] = lse_log2;
  } else if (p.lse != nullptr) {
    const int64 at =
        block.offset(row, p.num_heads, p.lse_stride[0], p.lse_stride[1], 1, p.cum_seq_lens_q != nullptr);
    p.lse[at] = lse_log2 * kLn2;
  }
}

}  // namespace mla
