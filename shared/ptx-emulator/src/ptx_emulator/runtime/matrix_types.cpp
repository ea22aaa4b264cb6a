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

}  // namespace ptxe
