// The inner loop of all matrix instructions: D[row, n] += sum over k of A[row, k] * B[n, k].
#pragma once

#include <cstdint>

namespace ptxe {

constexpr uint32_t kVectorRows = 16;  // rows of A are taken 16 at a time
constexpr uint32_t kMaxDepth = 32;    // elements of K
constexpr uint32_t kMaxColumns = 256;

// D lies column by column: d + n * column_step, and there the rows of vector v at vector_at[v].
template <class T>
struct MatrixWork {
  const T* a;           // element (row, k) at k * a_step + row; num_vectors * 16 rows
  uint32_t a_step;
  const T* b;           // [columns][kMaxDepth]
  T* d;
  uint32_t column_step;
  uint32_t depth;
  uint32_t columns;     // a multiple of 4
  uint32_t num_vectors; // 1 or 4
  uint32_t vector_at[4];
  bool accumulate;      // false: D is overwritten
};

// Float sums are taken in fp32, k ascending, each product exact and each sum rounded to nearest even. The hardware
// aligns the products of a block of k to the largest exponent, truncates, adds them at once and then adds the
// accumulator: results differ by rounding, so compare with bounds.
void multiply(const MatrixWork<float>& work);
void multiply(const MatrixWork<int32_t>& work);  // wraps around

}  // namespace ptxe
