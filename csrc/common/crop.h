// Which pixels a patch holds: random draws of crops, and the walk through one crop with its flips.
// Called by the patch kernels of every device.
//
// Counter layout, version 1. It is frozen: a change of any line changes users' patches and takes a
// new version number.
//   key = seed, 64 bits
//   c0  = step[31:0]
//   c1  = step[47:32] | draw << 16
//   c2  = sample_id[31:0]
//   c3  = sample_id[39:32] | k << 8
// so step < 2^48, draw < 2^16, sample_id < 2^40, k < 2^24. Draw 0 gives words w0..w3:
//   y0 = w0·(H-h+1) >> 32      x0 = w1·(W-w+1) >> 32      in 64-bit integers
//   flip horizontally if w2 < floor(p·2^32), vertically if w3 < floor(q·2^32)
// Later draws belong to crops that need more numbers than four.
#pragma once

#include <stdint.h>

#include "common/macros.h"
#include "common/philox.h"

namespace fastcontrast {

constexpr int FLIP_HORIZONTAL = 1;
constexpr int FLIP_VERTICAL = 2;

// Half-open box in source pixels, as one row of `coords` holds it.
struct Box {
  int32_t y0, x0, height, width;
};

FC_INLINE PhiloxBlock crop_words(uint64_t seed, uint64_t step, uint32_t draw, uint64_t sample_id,
                                 uint32_t k) {
  PhiloxBlock counter;
  counter.word[0] = (uint32_t)step;
  counter.word[1] = ((uint32_t)(step >> 32) & 0xFFFFu) | draw << 16;
  counter.word[2] = (uint32_t)sample_id;
  counter.word[3] = ((uint32_t)(sample_id >> 32) & 0xFFu) | k << 8;
  return philox4x32(counter, seed);
}

// Uniform on 0..range-1 up to a bias of range/2^32; never by way of a float, which rounds up to 1.
FC_INLINE int32_t uniform_below(uint32_t word, int32_t range) {
  return (int32_t)(((uint64_t)word * (uint32_t)range) >> 32);
}

// The rows of a patch, top to bottom as written, walk the source by `step` from `first`; likewise
// its columns. A flip starts at the far end and walks back.
struct Walk {
  int64_t first, step;
};

FC_INLINE Walk walk(int64_t start, int64_t length, int64_t stride, bool flipped) {
  return flipped ? Walk{(start + length - 1) * stride, -stride} : Walk{start * stride, stride};
}

FC_INLINE bool inside(Box box, int64_t image_height, int64_t image_width) {
  return box.y0 >= 0 && box.x0 >= 0 && box.height >= 1 && box.width >= 1 &&
         (int64_t)box.y0 + box.height <= image_height && (int64_t)box.x0 + box.width <= image_width;
}

}  // namespace fastcontrast
