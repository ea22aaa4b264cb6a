// mma.sync on fragments of 16 x 8 results.
//
// With g = lane / 4, t = lane % 4 and n elements in a register, a lane holds
//   A [16 x K]: register r, element j: row g + 8 (r % 2), column n t + 4 n (r / 2) + j
//   B [K x 8]:  register r, element j: row n t + 4 n r + j, column g
//   C, D [16 x 8] of 32 bits: register r: row g + 8 (r / 2), column 2 t + r % 2
//   C, D of f16: register r, half j: row g + 8 r, column 2 t + j
//
// Products of floats are added up in double and rounded once. The hardware keeps fewer bits: compare with bounds.
#include <cmath>
#include <limits>

#include "lanewise.h"

namespace ptxe {
namespace {

// As mma.py numbers them.
enum class Element : uint32_t { F16, BF16, TF32, E4M3, E5M2, E2M1, E2M3, E3M2, S8, U8 };
enum class Accumulator : uint32_t { F32, F16, S32, S32Saturating };

constexpr int kRows = 16, kColumns = 8, kMaxDepth = 32;

int elements_per_register(Element element) {
  switch (element) {
    case Element::F16: case Element::BF16: return 2;
    case Element::TF32: return 1;
    default: return 4;
  }
}

template <class F> void decode_register(const uint32_t* bits, int shift, double* out, F decode) {
  for (int lane = 0; lane < kLanes; ++lane) out[lane] = decode(bits[lane] >> shift);
}

// Element j of a register, of all lanes.
void decode(const uint32_t* bits, Element element, int j, double* out) {
  const int shift = j * 32 / elements_per_register(element);
  const auto each = [&](auto f) { decode_register(bits, shift, out, f); };
  switch (element) {
    case Element::F16: return each([](uint32_t b) { return fp16_to_float(static_cast<uint16_t>(b)); });
    case Element::BF16: return each([](uint32_t b) { return bf16_to_float(static_cast<uint16_t>(b)); });
    case Element::TF32: return each([](uint32_t b) { return tf32_to_float(b); });
    case Element::E4M3: return each([](uint32_t b) { return e4m3_to_float(static_cast<uint8_t>(b)); });
    case Element::E5M2: return each([](uint32_t b) { return e5m2_to_float(static_cast<uint8_t>(b)); });
    // In a byte of kind::f8f6f4, four bits stand at bits 2 to 5, six bits at bits 0 to 5.
    case Element::E2M1: return each([](uint32_t b) { return e2m1_to_float(static_cast<uint8_t>(b >> 2 & 0xf)); });
    case Element::E2M3: return each([](uint32_t b) { return e2m3_to_float(static_cast<uint8_t>(b)); });
    case Element::E3M2: return each([](uint32_t b) { return e3m2_to_float(static_cast<uint8_t>(b)); });
    case Element::S8: return each([](uint32_t b) { return static_cast<int8_t>(b); });
    case Element::U8: return each([](uint32_t b) { return static_cast<uint8_t>(b); });
  }
}

using Row = double __attribute__((vector_size(kColumns * sizeof(double))));  // as GCC and clang have it

struct Matrices {
  Row b[kMaxDepth];
  Row d[kRows];  // C, then the result
  double a[kRows][kMaxDepth];
};

// Arguments: depth, element of A, element of B, accumulator, then the registers of D, A, B, C.
struct Shape {
  int depth;
  Element a, b;
  Accumulator accumulator;
  uint32_t num_a, num_b, num_d, first_d, first_a, first_b, first_c;
  explicit Shape(const Instruction& i)
      : depth(static_cast<int>(i.args[0])), a(static_cast<Element>(i.args[1])), b(static_cast<Element>(i.args[2])),
        accumulator(static_cast<Accumulator>(i.args[3])) {
    num_a = static_cast<uint32_t>(kRows * depth / elements_per_register(a) / kLanes);
    num_b = static_cast<uint32_t>(kColumns * depth / elements_per_register(b) / kLanes);
    num_d = accumulator == Accumulator::F16 ? 2 : 4;
    first_d = 4;
    first_a = first_d + num_d;
    first_b = first_a + num_a;
    first_c = first_b + num_b;
  }
};

void load_factors(Warp& w, const Instruction& i, const Shape& shape, Matrices& m) {
  double values[kLanes];
  const int num_a = elements_per_register(shape.a), num_b = elements_per_register(shape.b);
  for (uint32_t r = 0; r < shape.num_a; ++r)
    for (int j = 0; j < num_a; ++j) {
      decode(w.values<uint32_t>(i.args[shape.first_a + r]), shape.a, j, values);
      for (int lane = 0; lane < kLanes; ++lane)
        m.a[lane / 4 + 8 * (r % 2)][num_a * (lane % 4) + 4 * num_a * static_cast<int>(r / 2) + j] = values[lane];
    }
  for (uint32_t r = 0; r < shape.num_b; ++r)
    for (int j = 0; j < num_b; ++j) {
      decode(w.values<uint32_t>(i.args[shape.first_b + r]), shape.b, j, values);
      for (int lane = 0; lane < kLanes; ++lane)
        m.b[num_b * (lane % 4) + 4 * num_b * static_cast<int>(r) + j][lane / 4] = values[lane];
    }
}

// Element n of C and D of all lanes, n from 0 to 3.
int row_of(int lane, int n) { return lane / 4 + 8 * (n / 2); }
int column_of(int lane, int n) { return 2 * (lane % 4) + n % 2; }

// Register and shift of element n.
struct Home {
  uint32_t reg;
  int shift;
  Home(const Shape& shape, int n)
      : reg(static_cast<uint32_t>(shape.accumulator == Accumulator::F16 ? n / 2 : n)),
        shift(shape.accumulator == Accumulator::F16 ? 16 * (n % 2) : 0) {}
};

void load_accumulator(Warp& w, const Instruction& i, const Shape& shape, Matrices& m) {
  double values[kLanes];
  for (int n = 0; n < 4; ++n) {
    const Home home(shape, n);
    const uint32_t* bits = w.values<uint32_t>(i.args[shape.first_c + home.reg]);
    switch (shape.accumulator) {
      case Accumulator::F32: decode_register(bits, 0, values, [](uint32_t b) { return as_float(b); }); break;
      case Accumulator::F16: decode(bits, Element::F16, n % 2, values); break;
      default: decode_register(bits, 0, values, [](uint32_t b) { return static_cast<int32_t>(b); });
    }
    for (int lane = 0; lane < kLanes; ++lane) m.d[row_of(lane, n)][column_of(lane, n)] = values[lane];
  }
}

void multiply(const Shape& shape, Matrices& m) {
  for (int row = 0; row < kRows; ++row) {
    Row sums = m.d[row];
    for (int k = 0; k < shape.depth; ++k) sums += m.a[row][k] * m.b[k];
    m.d[row] = sums;
  }
}

template <class F> void encode_register(const double* values, uint32_t* out, F encode) {
  for (int lane = 0; lane < kLanes; ++lane) out[lane] = encode(values[lane]);
}

void encode(const double* values, Accumulator accumulator, uint32_t* out) {
  const auto each = [&](auto f) { encode_register(values, out, f); };
  switch (accumulator) {
    case Accumulator::F32:
      return each([](double v) { return v == v ? as_bits(static_cast<float>(v)) : kCanonicalNan; });
    case Accumulator::F16: return each([](double v) { return uint32_t{float_to_fp16(to_odd_float(v))}; });
    case Accumulator::S32: return each([](double v) { return static_cast<uint32_t>(static_cast<int64_t>(v)); });
    case Accumulator::S32Saturating:
      return each([](double v) {
        constexpr double low = std::numeric_limits<int32_t>::min(), high = std::numeric_limits<int32_t>::max();
        return static_cast<uint32_t>(static_cast<int32_t>(v < low ? low : v > high ? high : v));
      });
  }
}

void store_result(Warp& w, const Instruction& i, const Shape& shape, Matrices& m) {
  double values[kLanes];
  uint32_t encoded[kLanes];
  for (int n = 0; n < 4; ++n) {
    const Home home(shape, n);
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = m.d[row_of(lane, n)][column_of(lane, n)];
    encode(values, shape.accumulator, encoded);
    const uint32_t kept = shape.accumulator == Accumulator::F16 ? 0xffffu << (16 - home.shift) : 0;
    uint32_t* bits = w.values<uint32_t>(i.args[shape.first_d + home.reg]);
    each_lane_vector(w, [&](int lane) { bits[lane] = (bits[lane] & kept) | encoded[lane] << home.shift; });
  }
}

PTXE_OP("mma") {
  const Step step = gather(w, i, w.live);
  if (step != Step::Execute) return step;
  const Shape shape(i);
  Matrices m;
  load_factors(w, i, shape, m);
  load_accumulator(w, i, shape, m);
  multiply(shape, m);
  store_result(w, i, shape, m);
  count(w, Count::MmaFlops, static_cast<uint64_t>(2 * kRows * kColumns * shape.depth));
  return Step::Next;
}

}  // namespace
}  // namespace ptxe
