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
// for a crop of the image itself. In general H, W and the origin are those of a region: the padded
// image, or of a grid of R×C the cell (k / C, k % C), whose rows run from r·H/R to (r+1)·H/R.
// Attempt a at a crop that keeps its distance from earlier ones takes draw 16·a for y0 and x0.
// Crops of random size take draws 16·a + 1 + t, t = 0..9, until one fits into the region:
//   s = low + (w0·(high-low+1) >> 32)      share of the region's area, in units of 2^-30
//   m = floor(sqrt(s·H·W))                 side of a square of that area, in units of 2^-15
//   h = (m·row[w1 >> 22] + 2^38) >> 39     w = (m·column[w1 >> 22] + 2^38) >> 39
//   y0 = w2·(H-h+1) >> 32      x0 = w3·(W-w+1) >> 32
// `column` holds sqrt(r) and `row` 1/sqrt(r) in units of 2^-24, rounded, for 1024 aspect ratios
// r = width/height, the midpoints of equal steps of log r. Without success the crop is the largest
// centred one whose ratio is within the limits, as torchvision has it. Flips are those of draw 0.
#pragma once

#include <math.h>
#include <stdint.h>

#include "common/macros.h"
#include "common/philox.h"

namespace fastcontrast {

constexpr int FLIP_HORIZONTAL = 1;
constexpr int FLIP_VERTICAL = 2;
// Beside them, from a device that nobody waits for: the box found no place and lies too close.
constexpr int NO_PLACE = 128;

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

// How boxes are drawn: within what, of what size, and how far from those of the same image.
struct CropRule {
  int32_t image_height, image_width;
  int32_t pad_y, pad_x;             // pixels that a box may reach beyond each end
  int32_t height, width;            // of a patch, where `row_factors` is null
  int32_t grid_rows, grid_columns;  // 1, 1: no grid
  int64_t area_low, area_range;     // share of the area, units of 2^-30; range is high-low+1
  const int64_t* row_factors;       // [1024], or null for boxes of the patch's size
  const int64_t* column_factors;    // [1024]
  int64_t limits[3];     // width/height at least, at most, and 1/least, in units of 2^-24
  int64_t min_distance;  // ceil(4·d²) between centres, in pixels; 0: none
  int64_t max_iou;       // units of 2^-29; -1: none
};

constexpr int CROP_TRIES = 10;      // of a random size
constexpr int CROP_ATTEMPTS = 128;  // of a crop that keeps its distance
constexpr int DRAWS_PER_ATTEMPT = 16;

FC_INLINE int64_t integer_root(int64_t n) {
  int64_t root = (int64_t)sqrt((double)n);  // off by one at most, which the next lines mend
  while (root * root > n) --root;
  while ((root + 1) * (root + 1) <= n) ++root;
  return root;
}

FC_INLINE Box crop_region(const CropRule& rule, int64_t k) {
  const int64_t height = (int64_t)rule.image_height + 2 * rule.pad_y;
  const int64_t width = (int64_t)rule.image_width + 2 * rule.pad_x;
  const int64_t row = k / rule.grid_columns % rule.grid_rows, column = k % rule.grid_columns;
  const int64_t y0 = row * height / rule.grid_rows, y1 = (row + 1) * height / rule.grid_rows;
  const int64_t x0 = column * width / rule.grid_columns;
  const int64_t x1 = (column + 1) * width / rule.grid_columns;
  return Box{(int32_t)(y0 - rule.pad_y), (int32_t)(x0 - rule.pad_x), (int32_t)(y1 - y0),
             (int32_t)(x1 - x0)};
}

FC_INLINE Box place(Box region, int32_t height, int32_t width, uint32_t y_word, uint32_t x_word) {
  return Box{region.y0 + uniform_below(y_word, region.height - height + 1),
             region.x0 + uniform_below(x_word, region.width - width + 1), height, width};
}

FC_INLINE int32_t clamped_side(int64_t side, int32_t most) {
  return side < 1 ? 1 : side > most ? most : (int32_t)side;
}

FC_INLINE Box largest_centred(const CropRule& rule, Box region) {
  int32_t height = region.height, width = region.width;
  const int64_t half = (int64_t)1 << 23;
  if (((int64_t)width << 24) < height * rule.limits[0]) {  // too narrow
    height = clamped_side((width * rule.limits[2] + half) >> 24, height);
  } else if (((int64_t)width << 24) > height * rule.limits[1]) {
    width = clamped_side((height * rule.limits[1] + half) >> 24, width);
  }
  return Box{region.y0 + (region.height - height) / 2, region.x0 + (region.width - width) / 2,
             height, width};
}

// `k` counts the patches of this call, `counter_k` is its place in the counter.
FC_INLINE Box draw_box(const CropRule& rule, uint64_t seed, uint64_t step, uint64_t sample_id,
                       uint32_t counter_k, int64_t k, int attempt) {
  const Box region = crop_region(rule, k);
  const uint32_t draw = (uint32_t)(attempt * DRAWS_PER_ATTEMPT);
  if (!rule.row_factors) {
    const PhiloxBlock words = crop_words(seed, step, draw, sample_id, counter_k);
    return place(region, rule.height, rule.width, words.word[0], words.word[1]);
  }
  for (int t = 0; t < CROP_TRIES; ++t) {
    const PhiloxBlock words = crop_words(seed, step, draw + 1 + t, sample_id, counter_k);
    const int64_t share =
        rule.area_low + (int64_t)(((uint64_t)words.word[0] * (uint64_t)rule.area_range) >> 32);
    const int64_t side = integer_root(share * region.height * region.width);
    const uint32_t ratio = words.word[1] >> 22;
    const int64_t height = (side * rule.row_factors[ratio] + ((int64_t)1 << 38)) >> 39;
    const int64_t width = (side * rule.column_factors[ratio] + ((int64_t)1 << 38)) >> 39;
    if (height >= 1 && width >= 1 && height <= region.height && width <= region.width) {
      return place(region, (int32_t)height, (int32_t)width, words.word[2], words.word[3]);
    }
  }
  return largest_centred(rule, region);
}

// Whether two boxes of one image are as far apart as the rule asks.
FC_INLINE bool far_apart(const CropRule& rule, Box a, Box b) {
  if (rule.min_distance > 0) {
    const int64_t dy = (2 * (int64_t)a.y0 + a.height) - (2 * (int64_t)b.y0 + b.height);
    const int64_t dx = (2 * (int64_t)a.x0 + a.width) - (2 * (int64_t)b.x0 + b.width);
    if (dy * dy + dx * dx < rule.min_distance) return false;
  }
  if (rule.max_iou >= 0) {
    const int64_t top = a.y0 > b.y0 ? a.y0 : b.y0, left = a.x0 > b.x0 ? a.x0 : b.x0;
    const int64_t a_bottom = (int64_t)a.y0 + a.height, b_bottom = (int64_t)b.y0 + b.height;
    const int64_t a_right = (int64_t)a.x0 + a.width, b_right = (int64_t)b.x0 + b.width;
    const int64_t rows = (a_bottom < b_bottom ? a_bottom : b_bottom) - top;
    const int64_t columns = (a_right < b_right ? a_right : b_right) - left;
    const int64_t both = rows > 0 && columns > 0 ? rows * columns : 0;
    const int64_t either = (int64_t)a.height * a.width + (int64_t)b.height * b.width - both;
    if ((both << 29) > rule.max_iou * either) return false;
  }
  return true;
}

FC_INLINE bool constrained(const CropRule& rule) {
  return rule.min_distance > 0 || rule.max_iou >= 0;
}

// Whether a box is far enough from the first `count` boxes of its image.
FC_INLINE bool clear_of(const CropRule& rule, Box box, const Box* earlier, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (!far_apart(rule, box, earlier[i])) return false;
  }
  return true;
}

// The rows of a patch, top to bottom as written, walk the source by `step` from `first`; likewise
// its columns. A flip starts at the far end and walks back.
struct Walk {
  int64_t first, step;
};

FC_INLINE Walk walk(int64_t start, int64_t length, int64_t stride, bool flipped) {
  return flipped ? Walk{(start + length - 1) * stride, -stride} : Walk{start * stride, stride};
}

// Whether a box stays within the image, or at most `reach` pixels beyond each of its ends.
FC_INLINE bool inside(Box box, int64_t image_height, int64_t image_width, int64_t reach_y,
                      int64_t reach_x) {
  return box.y0 >= -reach_y && box.x0 >= -reach_x && box.height >= 1 && box.width >= 1 &&
         (int64_t)box.y0 + box.height <= image_height + reach_y &&
         (int64_t)box.x0 + box.width <= image_width + reach_x;
}

}  // namespace fastcontrast
