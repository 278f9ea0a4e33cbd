// The seven AMX operations that bf16_block.h is written in: instructions, or their emulation where
// FASTCONTRAST_AMX_EMULATED_TILES is defined. Tile numbers are literals. Included by bf16_block.h
// only.
#pragma once

#include <stdint.h>

#include "common/macros.h"

namespace fastcontrast {
namespace cpu {

// What ldtilecfg reads.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
};

// Eight tiles of 16 rows of 64 bytes: 16 × 32 bfloat16, 16 × 16 pairs of them, or 16 × 16 float32.
FC_INLINE TileConfig full_tiles() {
  TileConfig config = {};
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config.bytes_per_row[tile] = 64;
    config.rows[tile] = 16;
  }
  return config;
}

}  // namespace cpu
}  // namespace fastcontrast

#if defined(FASTCONTRAST_AMX_EMULATED_TILES)
#include "cpu/amx_emulation.h"
#define FC_TILE_LOADCONFIG(config) ::fastcontrast::cpu::emulated_loadconfig(config)
#define FC_TILE_LOAD(tile, from, stride) ::fastcontrast::cpu::emulated_load(tile, from, stride)
#define FC_TILE_ZERO(tile) ::fastcontrast::cpu::emulated_zero(tile)
#define FC_TILE_DPBF16PS(sum, left, right) ::fastcontrast::cpu::emulated_dpbf16ps(sum, left, right)
#define FC_TILE_STORE(tile, to, stride) ::fastcontrast::cpu::emulated_store(tile, to, stride)
#define FC_TILE_RELEASE() ::fastcontrast::cpu::emulated_release()
#else
#include <immintrin.h>
#define FC_TILE_LOADCONFIG(config) _tile_loadconfig(config)
#define FC_TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define FC_TILE_ZERO(tile) _tile_zero(tile)
#define FC_TILE_DPBF16PS(sum, left, right) _tile_dpbf16ps(sum, left, right)
#define FC_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define FC_TILE_RELEASE() _tile_release()
#endif
#define FC_TILE_CONFIG()                                                              \
  do {                                                                                \
    const ::fastcontrast::cpu::TileConfig config = ::fastcontrast::cpu::full_tiles(); \
    FC_TILE_LOADCONFIG(&config);                                                      \
  } while (false)
