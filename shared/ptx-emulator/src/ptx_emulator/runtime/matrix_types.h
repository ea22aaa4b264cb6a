// Element types of matrix operands, and their unpacking from chunks of 16 bytes.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__F16C__) && defined(__clang__)
#include <immintrin.h>
#endif

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

// Unpacks one chunk to `elements` numbers, which is chunk_elements() of its type.
struct UnpackF16 {
  static constexpr uint32_t elements = 8;
  static void run(const uint8_t* chunk, float* out) {
#if defined(__F16C__) && defined(__clang__)
    _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(chunk))));
#elif defined(__F16C__)  // _mm256_cvtph_ps of GCC, whose <immintrin.h> takes long to compile
    typedef short Halves __attribute__((vector_size(16)));
    Halves halves;
    std::memcpy(&halves, chunk, sizeof halves);
    const auto values = __builtin_ia32_vcvtph2ps256(halves);
    std::memcpy(out, &values, sizeof values);
#else
    uint16_t bits[elements];
    std::memcpy(bits, chunk, sizeof bits);
    for (uint32_t e = 0; e < elements; ++e) out[e] = fp16_to_float(bits[e]);
#endif
  }
};

struct UnpackBf16 {
  static constexpr uint32_t elements = 8;
  static void run(const uint8_t* chunk, float* out) {
    uint16_t bits[elements];
    std::memcpy(bits, chunk, sizeof bits);
    for (uint32_t e = 0; e < elements; ++e) out[e] = bf16_to_float(bits[e]);
  }
};

struct UnpackTf32 {
  static constexpr uint32_t elements = 4;
  static void run(const uint8_t* chunk, float* out) {
    uint32_t bits[elements];
    std::memcpy(bits, chunk, sizeof bits);
    for (uint32_t e = 0; e < elements; ++e) out[e] = tf32_to_float(bits[e]);
  }
};

struct UnpackBytes {
  static constexpr uint32_t elements = 16;
  const float* values;
  void run(const uint8_t* chunk, float* out) const {
    for (uint32_t e = 0; e < elements; ++e) out[e] = values[chunk[e]];
  }
};

struct UnpackSixBits {
  static constexpr uint32_t elements = 16;
  const float* values;
  void run(const uint8_t* chunk, float* out) const {
    for (uint32_t group = 0; group < 4; ++group) {  // four elements in three bytes
      const uint8_t* bytes = chunk + 3 * group;
      const uint32_t bits = bytes[0] | bytes[1] << 8 | bytes[2] << 16;
      for (uint32_t e = 0; e < 4; ++e) out[4 * group + e] = values[bits >> (6 * e) & 63];
    }
  }
};

struct UnpackFourBits {
  static constexpr uint32_t elements = 16;
  const float* values;
  void run(const uint8_t* chunk, float* out) const {
    for (uint32_t e = 0; e < elements; ++e) out[e] = values[chunk[e / 2] >> (4 * (e % 2)) & 15];
  }
};

template <class Byte>
struct UnpackIntegers {
  static constexpr uint32_t elements = 16;
  static void run(const uint8_t* chunk, int32_t* out) {
    for (uint32_t e = 0; e < elements; ++e) out[e] = static_cast<Byte>(chunk[e]);
  }
};

// Calls f(unpacker) with the one that gives numbers of T from elements of type e.
template <class T, class F>
void with_unpacker(Element e, F f) {
  if constexpr (std::is_same_v<T, int32_t>) {
    if (e == Element::U8) return f(UnpackIntegers<uint8_t>{});
    return f(UnpackIntegers<int8_t>{});
  } else {
    switch (e) {
      case Element::F16: return f(UnpackF16{});
      case Element::BF16: return f(UnpackBf16{});
      case Element::TF32: return f(UnpackTf32{});
      case Element::E4M3:
      case Element::E5M2: return f(UnpackBytes{small_float_values(e).data()});
      case Element::E2M3:
      case Element::E3M2: return f(UnpackSixBits{small_float_values(e).data()});
      default: return f(UnpackFourBits{small_float_values(Element::E2M1).data()});
    }
  }
}

}  // namespace ptxe
