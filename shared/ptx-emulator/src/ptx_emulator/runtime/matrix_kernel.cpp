#include "matrix_kernel.h"

#include <cstring>

// Products of the operand types are exact in fp32, so a fused multiply-add gives what two instructions would.
#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")
#endif

namespace ptxe {

namespace {

template <class T>
struct VectorOf {
  typedef T Type __attribute__((vector_size(kVectorRows * 4), aligned(4), may_alias));
};

// kColumns columns of kVectors * 16 rows; all sums stay in registers.
template <class T, int kVectors, int kColumns>
inline void block(const MatrixWork<T>& work, uint32_t column) {
  using Vector = typename VectorOf<T>::Type;
  Vector sums[kColumns][kVectors];
  T* d = work.d + static_cast<size_t>(column) * work.column_step;
  for (int n = 0; n < kColumns; ++n) {
    for (int v = 0; v < kVectors; ++v) {
      const T* from = d + n * work.column_step + work.vector_at[v];
      sums[n][v] = work.accumulate ? *reinterpret_cast<const Vector*>(from) : Vector{};
    }
  }
  const T* b = work.b + static_cast<size_t>(column) * kMaxDepth;
  for (uint32_t k = 0; k < work.depth; ++k) {
    Vector a[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      a[v] = *reinterpret_cast<const Vector*>(work.a + k * work.a_step + v * kVectorRows);
    }
    for (int n = 0; n < kColumns; ++n) {
      for (int v = 0; v < kVectors; ++v) sums[n][v] += a[v] * b[n * kMaxDepth + k];
    }
  }
  for (int n = 0; n < kColumns; ++n) {
    for (int v = 0; v < kVectors; ++v) {
      *reinterpret_cast<Vector*>(d + n * work.column_step + work.vector_at[v]) = sums[n][v];
    }
  }
}

template <class T>
void multiply_any(const MatrixWork<T>& work) {
  uint32_t column = 0;
  if (work.num_vectors == 4) {
    for (; column + 4 <= work.columns; column += 4) block<T, 4, 4>(work, column);
  } else {
    for (; column + 8 <= work.columns; column += 8) block<T, 1, 8>(work, column);
    for (; column + 4 <= work.columns; column += 4) block<T, 1, 4>(work, column);
  }
}

}  // namespace

void multiply(const MatrixWork<float>& work) { multiply_any(work); }

void multiply(const MatrixWork<int32_t>& work) {
  MatrixWork<uint32_t> bits;
  static_assert(sizeof bits == sizeof work);
  std::memcpy(static_cast<void*>(&bits), &work, sizeof work);
  multiply_any(bits);
}

}  // namespace ptxe
