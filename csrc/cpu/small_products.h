// Matrix products of operands that fit in the first two caches, where calling a GEMM library costs
// more than the product. Included by kernel files only, like score_rows.h.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cpu/isa.h"

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_ISA {
namespace {

// Vectors of the instruction set, by the extension that GCC and Clang share.
#if defined(__AVX512F__)
constexpr int64_t VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int64_t VECTOR_BYTES = 32;
#else
constexpr int64_t VECTOR_BYTES = 16;
#endif
template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(VECTOR_BYTES)));
};

// A block of the result, kept in registers: 4 rows of 2 vectors.
constexpr int64_t BLOCK_ROWS = 4;
template <typename T>
constexpr int64_t BLOCK_COLUMNS = 2 * VECTOR_BYTES / (int64_t)sizeof(T);

// Element [i, k] is data[i * row_stride + k * column_stride].
template <typename T>
struct Strided {
  const T* data;
  int64_t row_stride, column_stride;
};

// sums = a's four rows times the panel [depth, BLOCK_COLUMNS].
template <typename T>
FC_INLINE void multiply_block(const T* const* rows, int64_t stride, const T* panel, int64_t depth,
                              T* sums) {
  typedef typename VectorOf<T>::type Vector;
  Vector left[BLOCK_ROWS] = {}, right[BLOCK_ROWS] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector b0, b1;
    memcpy(&b0, panel + k * BLOCK_COLUMNS<T>, sizeof b0);
    memcpy(&b1, panel + k * BLOCK_COLUMNS<T> + BLOCK_COLUMNS<T> / 2, sizeof b1);
#pragma GCC unroll 4
    for (int64_t r = 0; r < BLOCK_ROWS; ++r) {
      const T factor = rows[r][k * stride];
      left[r] += factor * b0;
      right[r] += factor * b1;
    }
  }
  for (int64_t r = 0; r < BLOCK_ROWS; ++r) {
    memcpy(sums + r * BLOCK_COLUMNS<T>, &left[r], sizeof left[r]);
    memcpy(sums + r * BLOCK_COLUMNS<T> + BLOCK_COLUMNS<T> / 2, &right[r], sizeof right[r]);
  }
}

// Numbers that add_product needs as scratch.
template <typename T>
FC_INLINE int64_t panel_size(int64_t depth) {
  return depth * BLOCK_COLUMNS<T>;
}

// c[rows, columns] += a[rows, depth] b[depth, columns].
template <typename T>
void add_product(Strided<T> a, Strided<T> b, T* c, int64_t rows, int64_t depth, int64_t columns,
                 T* panel) {
  constexpr int64_t WIDTH = BLOCK_COLUMNS<T>;
  for (int64_t j = 0; j < columns; j += WIDTH) {
    const int64_t width = columns - j < WIDTH ? columns - j : WIDTH;
    for (int64_t k = 0; k < depth; ++k) {
      const T* from = b.data + k * b.row_stride + j * b.column_stride;
      for (int64_t l = 0; l < width; ++l) panel[k * WIDTH + l] = from[l * b.column_stride];
      for (int64_t l = width; l < WIDTH; ++l) panel[k * WIDTH + l] = T(0);
    }
    for (int64_t i = 0; i < rows; i += BLOCK_ROWS) {
      const int64_t height = rows - i < BLOCK_ROWS ? rows - i : BLOCK_ROWS;
      const T* row[BLOCK_ROWS];  // beyond the last one that again, its sums unused
      for (int64_t r = 0; r < BLOCK_ROWS; ++r) {
        row[r] = a.data + (i + (r < height ? r : height - 1)) * a.row_stride;
      }
      T sums[BLOCK_ROWS * WIDTH];
      multiply_block(row, a.column_stride, panel, depth, sums);
      for (int64_t r = 0; r < height; ++r) {
        T* to = c + (i + r) * columns + j;
#pragma omp simd
        for (int64_t l = 0; l < width; ++l) to[l] += sums[r * WIDTH + l];
      }
    }
  }
}

}  // namespace
}  // namespace FASTCONTRAST_ISA
}  // namespace cpu
}  // namespace fastcontrast
