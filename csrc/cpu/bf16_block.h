// Micro-kernel: one block of at most 32 × 32 results from packed panels, for the unit that the file
// is compiled for. Included by bf16_products.cpp only.
//
// `terms` pairs of factors are summed in the order given; rows and columns are whole panels.
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/macros.h"
#include "cpu/bf16_products.h"

#if defined(FASTCONTRAST_BF16_TILES)
#include "cpu/amx_tiles.h"
#else
#include <immintrin.h>
#endif

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_BF16_UNIT {
namespace {

constexpr int64_t BLOCK = 2 * PANEL;

// Terms of left and right factors, from the first panel and block of depth of the result on.
struct BlockFactors {
  const BFloat16* left[3];
  const BFloat16* right[3];
  int terms;
  int64_t left_stride, right_stride;  // from a panel to the next
  int64_t depth_blocks;
};

#if defined(FASTCONTRAST_BF16_TILES)

FC_INLINE void begin_blocks() { FC_TILE_CONFIG(); }
FC_INLINE void end_blocks() { FC_TILE_RELEASE(); }

// Tiles 0 to 3 hold the results, 4 and 5 the left factor, 6 and 7 the right one.
template <bool two_rows, bool two_columns>
FC_INLINE void block_of_tiles(const BlockFactors& f, bool accumulate, float* c, int64_t stride) {
  const int64_t bytes = stride * (int64_t)sizeof(float);
  if (accumulate) {
    FC_TILE_LOAD(0, c, bytes);
    if (two_columns) FC_TILE_LOAD(1, c + PANEL, bytes);
    if (two_rows) FC_TILE_LOAD(2, c + PANEL * stride, bytes);
    if (two_rows && two_columns) FC_TILE_LOAD(3, c + PANEL * stride + PANEL, bytes);
  } else {
    FC_TILE_ZERO(0);
    if (two_columns) FC_TILE_ZERO(1);
    if (two_rows) FC_TILE_ZERO(2);
    if (two_rows && two_columns) FC_TILE_ZERO(3);
  }
  for (int term = 0; term < f.terms; ++term) {
    const BFloat16* left = f.left[term];
    const BFloat16* right = f.right[term];
    for (int64_t block = 0; block < f.depth_blocks; ++block) {
      FC_TILE_LOAD(6, right, 64);
      FC_TILE_LOAD(4, left, 64);
      FC_TILE_DPBF16PS(0, 4, 6);
      if (two_columns) {
        FC_TILE_LOAD(7, right + f.right_stride, 64);
        FC_TILE_DPBF16PS(1, 4, 7);
      }
      if (two_rows) {
        FC_TILE_LOAD(5, left + f.left_stride, 64);
        FC_TILE_DPBF16PS(2, 5, 6);
        if (two_columns) FC_TILE_DPBF16PS(3, 5, 7);
      }
      left += PANEL_BLOCK;
      right += PANEL_BLOCK;
    }
  }
  FC_TILE_STORE(0, c, bytes);
  if (two_columns) FC_TILE_STORE(1, c + PANEL, bytes);
  if (two_rows) FC_TILE_STORE(2, c + PANEL * stride, bytes);
  if (two_rows && two_columns) FC_TILE_STORE(3, c + PANEL * stride + PANEL, bytes);
}

FC_INLINE void block_product(const BlockFactors& f, int row_panels, int column_panels,
                             bool accumulate, float* c, int64_t stride) {
  if (row_panels == 2 && column_panels == 2) block_of_tiles<true, true>(f, accumulate, c, stride);
  if (row_panels == 2 && column_panels == 1) block_of_tiles<true, false>(f, accumulate, c, stride);
  if (row_panels == 1 && column_panels == 2) block_of_tiles<false, true>(f, accumulate, c, stride);
  if (row_panels == 1 && column_panels == 1) block_of_tiles<false, false>(f, accumulate, c, stride);
}

#else  // AVX512_BF16

FC_INLINE void begin_blocks() {}
FC_INLINE void end_blocks() {}

// Eight rows by one or two panels: 16 sums in flight hide the latency of vdpbf16ps.
constexpr int GROUP_ROWS = 8;

template <int panels>
FC_INLINE void block_of_vectors(const BlockFactors& f, int64_t first_row, bool accumulate, float* c,
                                int64_t stride) {
  __m512 sum[GROUP_ROWS][panels];
#pragma GCC unroll 8
  for (int r = 0; r < GROUP_ROWS; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < panels; ++p) {
      sum[r][p] = accumulate ? _mm512_loadu_ps(c + r * stride + p * PANEL) : _mm512_setzero_ps();
    }
  }
  for (int term = 0; term < f.terms; ++term) {
    const BFloat16* left =
        f.left[term] + first_row / PANEL * f.left_stride + first_row % PANEL * DEPTH_BLOCK;
    const BFloat16* right = f.right[term];
    for (int64_t block = 0; block < f.depth_blocks; ++block) {
      for (int64_t pair = 0; pair < PANEL; ++pair) {
        __m512bh columns[panels];
#pragma GCC unroll 2
        for (int p = 0; p < panels; ++p) {
          columns[p] = (__m512bh)_mm512_loadu_si512(right + p * f.right_stride + pair * BLOCK);
        }
#pragma GCC unroll 8
        for (int r = 0; r < GROUP_ROWS; ++r) {
          int32_t two;
          memcpy(&two, left + r * DEPTH_BLOCK + 2 * pair, sizeof two);
          const __m512bh row = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 2
          for (int p = 0; p < panels; ++p) {
            sum[r][p] = _mm512_dpbf16_ps(sum[r][p], row, columns[p]);
          }
        }
      }
      left += PANEL_BLOCK;
      right += PANEL_BLOCK;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < GROUP_ROWS; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < panels; ++p) _mm512_storeu_ps(c + r * stride + p * PANEL, sum[r][p]);
  }
}

FC_INLINE void block_product(const BlockFactors& f, int row_panels, int column_panels,
                             bool accumulate, float* c, int64_t stride) {
  for (int64_t row = 0; row < row_panels * PANEL; row += GROUP_ROWS) {
    if (column_panels == 2) {
      block_of_vectors<2>(f, row, accumulate, c + row * stride, stride);
    } else {
      block_of_vectors<1>(f, row, accumulate, c + row * stride, stride);
    }
  }
}

#endif

}  // namespace
}  // namespace FASTCONTRAST_BF16_UNIT
}  // namespace cpu
}  // namespace fastcontrast
