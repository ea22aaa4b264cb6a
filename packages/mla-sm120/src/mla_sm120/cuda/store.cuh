// Outputs of any dtype, from float32.
#pragma once

#include "ptx.cuh"

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

}  // namespace mla
