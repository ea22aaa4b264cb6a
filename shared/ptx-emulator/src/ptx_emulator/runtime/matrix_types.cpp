#include "matrix_types.h"

namespace ptxe {

namespace {

std::array<float, 256> make_values(Element e) {
  std::array<float, 256> values;
  for (uint32_t code = 0; code < 256; ++code) {
    const auto byte = static_cast<uint8_t>(code);
    switch (e) {
      case Element::E4M3: values[code] = e4m3_to_float(byte); break;
      case Element::E5M2: values[code] = e5m2_to_float(byte); break;
      case Element::E2M3: values[code] = e2m3_to_float(byte); break;
      case Element::E3M2: values[code] = e3m2_to_float(byte); break;
      default: values[code] = e2m1_to_float(byte); break;
    }
  }
  return values;
}

void unpack_f16(const uint8_t* chunk, float* out) {
  uint16_t bits[8];
  std::memcpy(bits, chunk, sizeof bits);
  for (int e = 0; e < 8; ++e) out[e] = fp16_to_float(bits[e]);
}

void unpack_bf16(const uint8_t* chunk, float* out) {
  uint16_t bits[8];
  std::memcpy(bits, chunk, sizeof bits);
  for (int e = 0; e < 8; ++e) out[e] = bf16_to_float(bits[e]);
}

void unpack_tf32(const uint8_t* chunk, float* out) {
  uint32_t bits[4];
  std::memcpy(bits, chunk, sizeof bits);
  for (int e = 0; e < 4; ++e) out[e] = tf32_to_float(bits[e]);
}

template <Element kElement>
void unpack_byte(const uint8_t* chunk, float* out) {
  const auto& values = small_float_values(kElement);
  for (int e = 0; e < 16; ++e) out[e] = values[chunk[e]];
}

template <Element kElement>
void unpack_six(const uint8_t* chunk, float* out) {
  const auto& values = small_float_values(kElement);
  for (int group = 0; group < 4; ++group) {  // four elements in three bytes
    const uint8_t* bytes = chunk + 3 * group;
    const uint32_t bits = bytes[0] | bytes[1] << 8 | bytes[2] << 16;
    for (int e = 0; e < 4; ++e) out[4 * group + e] = values[bits >> (6 * e) & 63];
  }
}

void unpack_four(const uint8_t* chunk, float* out) {
  const auto& values = small_float_values(Element::E2M1);
  for (int e = 0; e < 16; ++e) out[e] = values[chunk[e / 2] >> (4 * (e % 2)) & 15];
}

void unpack_u8(const uint8_t* chunk, int32_t* out) {
  for (int e = 0; e < 16; ++e) out[e] = chunk[e];
}

void unpack_s8(const uint8_t* chunk, int32_t* out) {
  for (int e = 0; e < 16; ++e) out[e] = static_cast<int8_t>(chunk[e]);
}

}  // namespace

const char* element_name(Element e) {
  static const char* const names[] = {"f16", "bf16", "tf32", "e4m3", "e5m2", "e2m3", "e3m2", "e2m1", "u8", "s8"};
  return names[static_cast<int>(e)];
}

const std::array<float, 256>& small_float_values(Element e) {
  static const std::array<float, 256> tables[] = {make_values(Element::E4M3), make_values(Element::E5M2),
                                                  make_values(Element::E2M3), make_values(Element::E3M2),
                                                  make_values(Element::E2M1)};
  return tables[static_cast<int>(e) - static_cast<int>(Element::E4M3)];
}

Unpack<float> float_unpack(Element e) {
  switch (e) {
    case Element::F16: return unpack_f16;
    case Element::BF16: return unpack_bf16;
    case Element::TF32: return unpack_tf32;
    case Element::E4M3: return unpack_byte<Element::E4M3>;
    case Element::E5M2: return unpack_byte<Element::E5M2>;
    case Element::E2M3: return unpack_six<Element::E2M3>;
    case Element::E3M2: return unpack_six<Element::E3M2>;
    default: return unpack_four;
  }
}

Unpack<int32_t> integer_unpack(Element e) { return e == Element::U8 ? unpack_u8 : unpack_s8; }

}  // namespace ptxe
