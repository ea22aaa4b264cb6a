// Element-wise reductions of bulk copies, atomic against other clusters.
#include <algorithm>
#include <cmath>

#include "bulk.h"
#include "numeric.h"

namespace ptxe {

namespace {

// How the bits W of an element are a number V.
template <class W>
struct Plain {
  using Word = W;
  using Value = W;
  static Value value(Word bits) { return bits; }
  static Word bits(Value value) { return value; }
};
template <class W, class V>
struct Cast {
  using Word = W;
  using Value = V;
  static Value value(Word bits) {
    Value v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  }
  static Word bits(Value value) {
    Word w;
    std::memcpy(&w, &value, sizeof w);
    return w;
  }
};
struct Half {
  using Word = uint16_t;
  using Value = float;
  static Value value(Word bits) { return fp16_to_float(bits); }
  static Word bits(Value value) { return float_to_fp16(value); }
};
struct Brain {
  using Word = uint16_t;
  using Value = float;
  static Value value(Word bits) { return bf16_to_float(bits); }
  static Word bits(Value value) { return float_to_bf16(value); }
};

// Minimum and maximum of floats: a NaN loses against a number, and -0 is below +0.
template <class V>
bool float_less(V a, V b) {
  return a < b || (a == b && std::signbit(a) && !std::signbit(b));
}

template <ReduceOp Op, class V>
V combine(V a, V b) {
  if constexpr (Op == ReduceOp::Add) {
    if constexpr (std::is_signed_v<V> && std::is_integral_v<V>) {
      using U = std::make_unsigned_t<V>;
      return static_cast<V>(static_cast<U>(a) + static_cast<U>(b));
    } else if constexpr (std::is_same_v<V, float>) {
      const float sum = a + b;
      return sum == sum ? sum : as_float(kCanonicalNan);
    } else {
      return static_cast<V>(a + b);
    }
  } else if constexpr (Op == ReduceOp::Min || Op == ReduceOp::Max) {
    if constexpr (std::is_floating_point_v<V>) {
      if (std::isnan(a)) return b;
      if (std::isnan(b)) return a;
      return (Op == ReduceOp::Min) == float_less(a, b) ? a : b;
    } else {
      return Op == ReduceOp::Min ? std::min(a, b) : std::max(a, b);
    }
  } else if constexpr (Op == ReduceOp::Inc) {
    return a >= b ? V{0} : static_cast<V>(a + 1);
  } else if constexpr (Op == ReduceOp::Dec) {
    return a == 0 || a > b ? b : static_cast<V>(a - 1);
  } else if constexpr (Op == ReduceOp::And) {
    return a & b;
  } else if constexpr (Op == ReduceOp::Or) {
    return a | b;
  } else {
    return a ^ b;
  }
}

template <ReduceOp Op, class Format>
void apply(uint8_t* destination, const uint8_t* source, uint32_t bytes) {
  using Word = typename Format::Word;
  auto* words = reinterpret_cast<Word*>(destination);
  for (uint32_t k = 0; k < bytes / sizeof(Word); ++k) {
    Word operand;
    std::memcpy(&operand, source + k * sizeof(Word), sizeof(Word));
    Word old = __atomic_load_n(&words[k], __ATOMIC_RELAXED);
    Word updated;
    do {
      updated = Format::bits(combine<Op>(Format::value(old), Format::value(operand)));
    } while (!__atomic_compare_exchange_n(&words[k], &old, updated, true, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
  }
}

template <class Format>
ReduceFunction arithmetic(ReduceOp op) {
  switch (op) {
    case ReduceOp::Add: return &apply<ReduceOp::Add, Format>;
    case ReduceOp::Min: return &apply<ReduceOp::Min, Format>;
    case ReduceOp::Max: return &apply<ReduceOp::Max, Format>;
    default: return nullptr;
  }
}

template <class Format>
ReduceFunction counting(ReduceOp op) {
  switch (op) {
    case ReduceOp::Inc: return &apply<ReduceOp::Inc, Format>;
    case ReduceOp::Dec: return &apply<ReduceOp::Dec, Format>;
    case ReduceOp::And: return &apply<ReduceOp::And, Format>;
    case ReduceOp::Or: return &apply<ReduceOp::Or, Format>;
    case ReduceOp::Xor: return &apply<ReduceOp::Xor, Format>;
    default: return arithmetic<Format>(op);
  }
}

}  // namespace

ReduceFunction find_reduction(ReduceOp op, ElementType type) {
  const bool bitwise = op == ReduceOp::And || op == ReduceOp::Or || op == ReduceOp::Xor;
  switch (type) {
    case ElementType::U32: return counting<Plain<uint32_t>>(op);
    case ElementType::U64: return counting<Plain<uint64_t>>(op);
    case ElementType::S32: return bitwise ? counting<Plain<uint32_t>>(op) : arithmetic<Cast<uint32_t, int32_t>>(op);
    case ElementType::S64: return bitwise ? counting<Plain<uint64_t>>(op) : arithmetic<Cast<uint64_t, int64_t>>(op);
    case ElementType::F16: return arithmetic<Half>(op);
    case ElementType::BF16: return arithmetic<Brain>(op);
    case ElementType::F32: return arithmetic<Cast<uint32_t, float>>(op);
    case ElementType::F64: return arithmetic<Cast<uint64_t, double>>(op);
    default: return nullptr;
  }
}

}  // namespace ptxe
