// Conversions between the number formats of the PTX and float, by value.
#pragma once

#include <cstdint>
#include <cstring>

namespace ptxe {

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline double as_double(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}
inline uint64_t as_bits(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, 8);
  return bits;
}

inline float bf16_to_float(uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }
inline float fp16_to_float(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}
float e4m3_to_float(uint8_t bits);
float e5m2_to_float(uint8_t bits);
float e2m1_to_float(uint8_t bits);            // low four bits
inline float tf32_to_float(uint32_t bits) { return as_float(bits & 0xffffe000u); }  // operand of an MMA

uint16_t float_to_bf16(float value);          // round to nearest even, NaN becomes 0x7fff
uint16_t float_to_fp16(float value);          // round to nearest even, NaN becomes 0x7fff
uint8_t float_to_e4m3(float value);           // round to nearest even, saturating to +-448, NaN becomes 0x7f
uint8_t float_to_e5m2(float value);           // round to nearest even, saturating to +-57344, NaN becomes 0x7f
uint8_t float_to_e2m1(float value);           // round to nearest even, saturating to +-6

}  // namespace ptxe
