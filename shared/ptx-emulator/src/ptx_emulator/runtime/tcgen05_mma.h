// tcgen05.mma: its instruction descriptor, and one instruction in flight.
#pragma once

#include <bitset>

#include "matrix_descriptor.h"
#include "tcgen05.h"

namespace ptxe {

enum class MmaKind : uint32_t { F16, Tf32, F8f6f4, I8 };  // as KINDS in lower/tcgen05.py
enum class Accumulator : uint32_t { F16, F32, S32 };

struct MmaShape {
  uint32_t m, n, k;
  Element a, b;
  Accumulator d;
  bool negate_a, negate_b, mn_major_a, mn_major_b, saturate;
};

// Decodes the 32-bit instruction descriptor. Returns why it is not possible, or an empty string.
std::string decode_instruction(uint32_t bits, MmaKind kind, uint32_t group_size, MmaShape& shape);

using TmemLanes = std::bitset<kTmemLanes>;

struct MmaOp : AsyncOp {
  Actor actor;
  CtaGroup group;
  MmaKind kind;
  MmaShape shape;
  TmemAddress d{0}, a_tmem{0};
  bool a_in_tmem = false, accumulate = false;
  MatrixDescriptor a_shared, b_shared;
  uint32_t scale_shift = 0;  // D is multiplied by 2^-scale_shift first
  TmemLanes disabled[2];     // of each CTA
  bool step(Cluster& cluster) override;
  std::string describe() const override;

 private:
  bool rows_split() const { return group.size == 2 && shape.m == 128; }  // 64 rows a CTA, N halved over the lanes
  bool rows_interleaved() const { return group.size == 1 && shape.m == 64; }
  uint32_t d_columns() const { return rows_split() ? shape.n / 2 : shape.n; }
  TmemLanes lanes_of(const TmemAddress& at) const;
  bool permitted(Cluster& cluster, uint32_t member);
  template <class T>
  void read_a(Cluster& cluster, Cta& cta, T* out);
  template <class T>
  void read_a_tmem(Cta& cta, T* out);
  template <class T>
  void read_b(Cluster& cluster, T* out);
  template <class T>
  void compute(uint32_t member, const T* a, const T* b);
  template <class T>
  void execute(Cluster& cluster);
};

}  // namespace ptxe
