// Points moved to the mean of the columns before the products, and what gradients need after them.
// Included by kernel files only, like score_rows.h.
#pragma once

#include <stdint.h>

#include "cpu/isa.h"

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_ISA {
namespace {

template <typename T>
void center(const T* x, const T* mean, int64_t rows, int64_t dim, int threads, T* out, T* sqnorm) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = x + row * dim;
    T* to = out + row * dim;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < dim; ++k) {
      const T m = mean[k];
      const T value = from[k] - (m - m == T(0) ? m : T(0));  // inf and NaN: m - m is NaN
      to[k] = value;
      sum += value * value;
    }
    sqnorm[row] = sum;
  }
}

template <typename T>
void subtract_scaled(const T* points, const double* sums, int64_t rows, int64_t dim, int threads,
                     T* grad) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const T sum = (T)sums[row];
#pragma omp simd
    for (int64_t k = 0; k < dim; ++k) grad[row * dim + k] -= sum * points[row * dim + k];
  }
}

}  // namespace
}  // namespace FASTCONTRAST_ISA
}  // namespace cpu
}  // namespace fastcontrast
