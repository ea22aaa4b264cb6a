// Element types of matrix operands, and their unpacking from chunks of 16 bytes.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#include "numeric.h"

namespace ptxe {

// As ELEMENTS in lower/wgmma.py.
enum class Element : uint8_t { F16, BF16, TF32, E4M3, E5M2, E2M3, E3M2, E2M1, U8, S8 };

constexpr uint32_t kChunkBytes = 16;
constexpr uint32_t kTileBytesK = 32;  // every dense MMA of wgmma and tcgen05 takes 32 bytes of K

inline bool is_integer(Element e) { return e == Element::U8 || e == Element::S8; }
// Elements of a chunk. The six- and four-bit types are padded: 16 elements packed from the start of the chunk.
inline uint32_t chunk_elements(Element e) {
  return e == Element::TF32 ? 4 : e == Element::F16 || e == Element::BF16 ? 8 : 16;
}
const char* element_name(Element e);

// Values of all codes of the 8-, 6- and 4-bit float types.
const std::array<float, 256>& small_float_values(Element e);

// Unpacks one chunk to chunk_elements(e) numbers.
template <class T>
using Unpack = void (*)(const uint8_t* chunk, T* out);
Unpack<float> float_unpack(Element e);
Unpack<int32_t> integer_unpack(Element e);

}  // namespace ptxe
