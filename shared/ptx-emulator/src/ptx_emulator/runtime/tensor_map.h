// The 128-byte tensor map of a tensor copy. tensor_map.py has the same layout, and says where it comes from.
#pragma once

#include <cstdint>
#include <string>

#include "bulk.h"

namespace ptxe {

constexpr uint32_t kTensorMapBytes = 128;
constexpr uint32_t kMaxRank = 5;

enum class Swizzle : uint32_t { None, B32, B64, B128, B128Atom32, B128Atom32Flip8, B128Atom64 };

struct TensorMap {
  uint64_t address = 0;
  ElementType type = ElementType::U8;
  uint32_t rank = 1;
  Swizzle swizzle = Swizzle::None;
  uint32_t interleave = 0;  // 0: none
  bool fill_nan = false;
  uint64_t dims[kMaxRank] = {1, 1, 1, 1, 1};             // elements
  uint64_t strides[kMaxRank] = {};                       // bytes; [0] is not used
  uint32_t box[kMaxRank] = {1, 1, 1, 1, 1};              // elements
  uint32_t element_strides[kMaxRank] = {1, 1, 1, 1, 1};  // every n-th element is copied

  uint32_t element_bits() const;
  uint32_t box_elements(uint32_t d) const {  // that are copied
    return d == 0 ? box[0] : (box[d] + element_strides[d] - 1) / element_strides[d];
  }
  bool is_tf32() const { return type == ElementType::TF32 || type == ElementType::TF32Ftz; }
  uint32_t row_bytes() const { return box[0] * element_bits() / 8; }
};

// Decodes a tensor map; false, and why not, if it is none or has something that is not emulated.
bool decode_tensor_map(const uint8_t* bytes, TensorMap& map, std::string& why);

// Fields as tensormap.replace names them.
enum class TensorMapField : uint32_t {
  GlobalAddress, Rank, BoxDim, GlobalDim, GlobalStride, ElementStride, ElementType, Interleave, SwizzleMode,
  SwizzleAtomicity, FillMode,
};
// False if the value or the ordinal is out of range.
bool replace_tensor_map_field(uint8_t* bytes, TensorMapField field, uint32_t ordinal, uint64_t value);

// Where the byte that an unswizzled copy would put at `address` goes. All patterns are functions of the shared
// memory address, whatever the start of the box: the "swizzle base offset" of the PTX ISA.
uint32_t swizzle_address(Swizzle swizzle, uint32_t address);
// Bytes of the lines in which rows are swizzled; 0 without a swizzle.
uint32_t swizzle_span(Swizzle swizzle);
// Bytes that a pattern keeps together.
uint32_t swizzle_atom(Swizzle swizzle);

}  // namespace ptxe
