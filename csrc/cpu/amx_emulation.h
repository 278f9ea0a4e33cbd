// AMX tiles in software, for tests on processors without them: what the instructions of amx_tiles.h
// do, value for value, by the pseudo-code in Intel's manual. A use that the processor would refuse
// ends the process with its reason. Included by amx_tiles.h only.
//
// Numerics: TDPBF16PS sums the even and the odd terms of a row's dot product each by fused
// multiply-adds, then adds their sum to the accumulator; round to nearest, denormals are 0 on the
// way in and out.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/macros.h"
#include "common/scalar.h"

namespace fastcontrast {
namespace cpu {

struct EmulatedTiles {
  TileConfig config;  // palette 0: not configured, or released
  uint8_t data[8][16][64];
};

// One state per thread, as each has its own registers.
FC_INLINE EmulatedTiles* emulated_tiles() {
  static thread_local EmulatedTiles tiles;
  return &tiles;
}

FC_INLINE void emulated_require(bool condition, const char* what) {
  if (condition) return;
  fprintf(stderr, "emulated AMX: %s\n", what);
  abort();
}

FC_INLINE EmulatedTiles* configured_tiles(int tile) {
  EmulatedTiles* tiles = emulated_tiles();
  emulated_require(tiles->config.palette == 1, "a tile is used without a configuration");
  emulated_require(tile >= 0 && tile < 8 && tiles->config.rows[tile] > 0,
                   "a tile is used that the configuration leaves out");
  return tiles;
}

FC_INLINE void emulated_loadconfig(const TileConfig* config) {
  emulated_require(config->palette == 1, "palette 1 is the only one");
  emulated_require(config->start_row == 0, "start_row is not 0");
  for (int i = 0; i < 14; ++i) emulated_require(config->reserved[i] == 0, "reserved is not 0");
  for (int tile = 0; tile < 16; ++tile) {
    const int rows = config->rows[tile], bytes = config->bytes_per_row[tile];
    emulated_require((rows == 0) == (bytes == 0), "a tile has rows without columns");
    emulated_require(rows <= 16, "a tile has more than 16 rows");
    emulated_require(bytes <= 64, "a row has more than 64 bytes");
    emulated_require(tile < 8 || rows == 0, "there are 8 tiles");
  }
  EmulatedTiles* tiles = emulated_tiles();
  memset(tiles, 0, sizeof *tiles);
  tiles->config = *config;
}

FC_INLINE void emulated_release() { memset(emulated_tiles(), 0, sizeof(EmulatedTiles)); }

FC_INLINE void emulated_zero(int tile) {
  memset(configured_tiles(tile)->data[tile], 0, sizeof(EmulatedTiles::data[0]));
}

FC_INLINE void emulated_load(int tile, const void* from, int64_t stride) {
  EmulatedTiles* tiles = configured_tiles(tile);
  memset(tiles->data[tile], 0, sizeof tiles->data[tile]);
  for (int row = 0; row < tiles->config.rows[tile]; ++row) {
    memcpy(tiles->data[tile][row], (const char*)from + row * stride,
           tiles->config.bytes_per_row[tile]);
  }
}

FC_INLINE void emulated_store(int tile, void* to, int64_t stride) {
  const EmulatedTiles* tiles = configured_tiles(tile);
  for (int row = 0; row < tiles->config.rows[tile]; ++row) {
    memcpy((char*)to + row * stride, tiles->data[tile][row], tiles->config.bytes_per_row[tile]);
  }
}

FC_INLINE float without_denormals(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

// Value `index` of a row of bfloat16.
FC_INLINE float bf16_of_row(const uint8_t* row, int index) {
  BFloat16 value;
  memcpy(&value, row + 2 * index, sizeof value);
  return without_denormals(widen(value));
}

FC_INLINE void emulated_dpbf16ps(int sum, int left, int right) {
  EmulatedTiles* tiles = configured_tiles(sum);
  configured_tiles(left);
  configured_tiles(right);
  emulated_require(sum != left && sum != right && left != right, "operands are the same tile");
  const TileConfig& config = tiles->config;
  emulated_require(config.rows[sum] == config.rows[left], "rows of result and left differ");
  emulated_require(config.bytes_per_row[sum] == config.bytes_per_row[right],
                   "columns of result and right differ");
  emulated_require(config.bytes_per_row[left] == 4 * config.rows[right],
                   "pairs of left and rows of right differ");
  const int columns = config.bytes_per_row[sum] / 4;
  for (int m = 0; m < config.rows[sum]; ++m) {
    float even[16] = {0}, odd[16] = {0}, c[16];
    for (int k = 0; k < config.bytes_per_row[left] / 4; ++k) {
      const float a0 = bf16_of_row(tiles->data[left][m], 2 * k);
      const float a1 = bf16_of_row(tiles->data[left][m], 2 * k + 1);
      for (int n = 0; n < columns; ++n) {
        const uint8_t* b = tiles->data[right][k];
        even[n] = without_denormals(fmaf(a0, bf16_of_row(b, 2 * n), even[n]));
        odd[n] = without_denormals(fmaf(a1, bf16_of_row(b, 2 * n + 1), odd[n]));
      }
    }
    memcpy(c, tiles->data[sum][m], sizeof c);
    for (int n = 0; n < columns; ++n) {
      const float both = without_denormals(even[n] + odd[n]);
      c[n] = without_denormals(without_denormals(c[n]) + both);
    }
    memcpy(tiles->data[sum][m], c, sizeof c);
  }
}

}  // namespace cpu
}  // namespace fastcontrast
