// Decoding and editing tensor maps; swizzles.
#include "tensor_map.h"

#include <cstring>

namespace ptxe {

namespace {

// Byte offsets of fields, and bits of the word at kFlags.
constexpr uint32_t kFlags = 8;
constexpr uint32_t kStrides = 12;        // low 32 bits of strides 1 to 4, in units of 16 bytes
constexpr uint32_t kStridesHigh = 28;    // their upper 4 bits, a nibble each
constexpr uint32_t kDims = 32;           // less 1
constexpr uint32_t kElementStrides = 52; // less 1, 3 bits each
constexpr uint32_t kBox = 55;            // less 1, a byte each
constexpr uint32_t kStrideUnit = 16;
constexpr uint32_t kElementStrideBits = 3;

struct Bits {
  uint32_t first, count;
  uint32_t mask() const { return (1u << count) - 1; }
  uint32_t in(uint32_t word) const { return word >> first & mask(); }
};
constexpr Bits kRank{4, 3};  // less 1
constexpr Bits kType{7, 4};
constexpr Bits kInterleave{11, 2};
constexpr Bits kSwizzle{13, 2};
constexpr Bits kFill{15, 1};
constexpr Bits kTf32{16, 1};
constexpr Bits kAtomicity{19, 2};

uint32_t load_word(const uint8_t* bytes, uint32_t offset) {
  uint32_t word;
  std::memcpy(&word, bytes + offset, sizeof word);
  return word;
}
void store_word(uint8_t* bytes, uint32_t offset, uint32_t word) { std::memcpy(bytes + offset, &word, sizeof word); }

void store_bits(uint8_t* bytes, uint32_t offset, Bits bits, uint32_t value) {
  const uint32_t word = load_word(bytes, offset) & ~(bits.mask() << bits.first);
  store_word(bytes, offset, word | (value & bits.mask()) << bits.first);
}

bool decode_swizzle(uint32_t mode, uint32_t atomicity, Swizzle& swizzle) {
  if (mode == 3) {
    constexpr Swizzle kOfAtom[] = {Swizzle::B128, Swizzle::B128Atom32, Swizzle::B128Atom32Flip8, Swizzle::B128Atom64};
    swizzle = kOfAtom[atomicity];
    return true;
  }
  swizzle = static_cast<Swizzle>(mode);
  return atomicity == 0;
}

bool check(const TensorMap& map, std::string& why) {
  if (map.rank > kMaxRank) why = "its rank is " + std::to_string(map.rank);
  else if (map.interleave) why = "interleaved layouts are not emulated";
  else if (map.type == ElementType::B4x16P64 || map.type == ElementType::B6x16P32)
    why = "padded sub-byte types are not emulated";
  else if (map.address % 16) why = "its address is not a multiple of 16";
  else if (map.box[0] * map.element_bits() % 128) why = "the rows of its box are no multiple of 16 bytes";
  const uint32_t span = swizzle_span(map.swizzle);
  if (why.empty() && span && map.row_bytes() > span) {
    why = "the rows of its box are " + std::to_string(map.row_bytes()) + " bytes, the swizzle allows " +
          std::to_string(span);
  }
  return why.empty();
}

}  // namespace

uint32_t TensorMap::element_bits() const {
  switch (type) {
    case ElementType::U8: return 8;
    case ElementType::U16:
    case ElementType::F16:
    case ElementType::BF16: return 16;
    case ElementType::U64:
    case ElementType::S64:
    case ElementType::F64: return 64;
    case ElementType::B4x16:
    case ElementType::B4x16P64: return 4;
    case ElementType::B6x16P32: return 6;
    default: return 32;
  }
}

bool decode_tensor_map(const uint8_t* bytes, TensorMap& map, std::string& why) {
  const uint32_t flags = load_word(bytes, kFlags);
  std::memcpy(&map.address, bytes, sizeof map.address);
  if (!map.address) {
    why = "there is no tensor map: its address is null";
    return false;
  }
  map.rank = kRank.in(flags) + 1;
  map.type = static_cast<ElementType>(kType.in(flags));
  if (kTf32.in(flags)) map.type = map.type == ElementType::F32Ftz ? ElementType::TF32Ftz : ElementType::TF32;
  map.interleave = kInterleave.in(flags);
  map.fill_nan = kFill.in(flags);
  if (!decode_swizzle(kSwizzle.in(flags), kAtomicity.in(flags), map.swizzle)) {
    why = "its swizzle atomicity needs the swizzle of 128 bytes";
    return false;
  }
  const uint32_t high = load_word(bytes, kStridesHigh);
  const uint32_t steps = load_word(bytes, kElementStrides);
  for (uint32_t d = 0; d < kMaxRank && d < map.rank; ++d) {
    map.dims[d] = load_word(bytes, kDims + 4 * d) + 1ull;
    map.box[d] = bytes[kBox + d] + 1u;
    const bool ignored = d == 0 && !map.interleave;
    map.element_strides[d] = ignored ? 1 : (steps >> kElementStrideBits * d & 7) + 1;
    if (d == 0) continue;
    const uint64_t high_bits = high >> 4 * (d - 1) & 15;
    const uint64_t units = load_word(bytes, kStrides + 4 * (d - 1)) | high_bits << 32;
    map.strides[d] = units * kStrideUnit;
  }
  return check(map, why);
}

bool replace_tensor_map_field(uint8_t* bytes, TensorMapField field, uint32_t ordinal, uint64_t value) {
  const auto word = static_cast<uint32_t>(value);
  switch (field) {
    case TensorMapField::GlobalAddress: std::memcpy(bytes, &value, sizeof value); return value % 16 == 0;
    case TensorMapField::Rank: store_bits(bytes, kFlags, kRank, word); return word < kMaxRank;
    case TensorMapField::BoxDim:
      if (ordinal >= kMaxRank || word == 0 || word > 256) return false;
      bytes[kBox + ordinal] = static_cast<uint8_t>(word - 1);
      return true;
    case TensorMapField::GlobalDim:
      if (ordinal >= kMaxRank) return false;
      store_word(bytes, kDims + 4 * ordinal, word - 1);
      return true;
    case TensorMapField::GlobalStride:
      if (ordinal >= kMaxRank - 1 || value % kStrideUnit || value >> 40) return false;
      store_word(bytes, kStrides + 4 * ordinal, static_cast<uint32_t>(value / kStrideUnit));
      store_bits(bytes, kStridesHigh, Bits{4 * ordinal, 4}, static_cast<uint32_t>(value / kStrideUnit >> 32));
      return true;
    case TensorMapField::ElementStride:
      if (ordinal >= kMaxRank || word == 0 || word > 8) return false;
      store_bits(bytes, kElementStrides, Bits{kElementStrideBits * ordinal, kElementStrideBits}, word - 1);
      return true;
    case TensorMapField::ElementType: {
      const auto type = static_cast<ElementType>(word);
      const bool tf32 = type == ElementType::TF32 || type == ElementType::TF32Ftz;
      const auto plain = type == ElementType::TF32 ? ElementType::F32 : ElementType::F32Ftz;
      store_bits(bytes, kFlags, kType, tf32 ? static_cast<uint32_t>(plain) : word);
      store_bits(bytes, kFlags, kTf32, tf32);
      return word < 16;
    }
    case TensorMapField::Interleave: store_bits(bytes, kFlags, kInterleave, word); return word < 3;
    case TensorMapField::SwizzleMode: store_bits(bytes, kFlags, kSwizzle, word); return word < 4;
    case TensorMapField::SwizzleAtomicity: store_bits(bytes, kFlags, kAtomicity, word); return word < 4;
    case TensorMapField::FillMode: store_bits(bytes, kFlags, kFill, word); return word < 2;
  }
  return false;
}

uint32_t swizzle_address(Swizzle swizzle, uint32_t address) {
  const uint32_t line = address >> 7;  // of 128 bytes
  switch (swizzle) {
    case Swizzle::None: return address;
    case Swizzle::B32: return address ^ (line & 1) << 4;
    case Swizzle::B64: return address ^ (line & 3) << 4;
    case Swizzle::B128: return address ^ (line & 7) << 4;
    case Swizzle::B128Atom32: return address ^ (line & 3) << 5;
    case Swizzle::B128Atom32Flip8: return address ^ (line & 3) << 5 ^ (line & 1) << 3;
    case Swizzle::B128Atom64: return address ^ (line & 1) << 6;
  }
  return address;
}

uint32_t swizzle_span(Swizzle swizzle) {
  constexpr uint32_t kSpans[] = {0, 32, 64, 128, 128, 128, 128};
  return kSpans[static_cast<uint32_t>(swizzle)];
}

uint32_t swizzle_atom(Swizzle swizzle) { return swizzle == Swizzle::B128Atom32Flip8 ? 8 : 16; }

}  // namespace ptxe
