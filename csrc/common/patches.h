// Arguments of the kernels of `extract_patches` on every device: draw crops, cut them, and return
// gradients to the images. fastcontrast/backends/native/extract_patches.py fills these in by way of
// csrc/arguments.h. Pointers are the device's, but for `scale`, `offset` and `fill`.
#pragma once

#include <stdint.h>

#include "common/crop.h"
#include "common/macros.h"
#include "common/resize.h"
#include "common/scalar.h"

namespace fastcontrast {

struct CropDraws {
  uint64_t seed;
  uint64_t step;
  const int64_t* key;         // (seed, step) instead of the two above, or null: a graph that is
                              // replayed reads it anew
  const int64_t* sample_ids;  // [batch], or null for 0..batch-1
  int64_t batch;
  int64_t num_patches;   // K
  uint32_t first_patch;  // what k = 0 is in the counter
  CropRule rule;
  uint64_t hflip_threshold;  // floor(p·2^32), up to 2^32 itself
  uint64_t vflip_threshold;
  Box* coords;     // [batch, K]
  uint8_t* flips;  // [batch, K]
  int64_t* lost;   // of a CUDA call, memory of the host: image << 24 | k of a patch without a place
};

struct DrawKey {
  uint64_t seed, step;
};

FC_INLINE DrawKey key_of(const CropDraws& draws) {
  if (!draws.key) return DrawKey{draws.seed, draws.step};
  return DrawKey{(uint64_t)draws.key[0], (uint64_t)draws.key[1]};
}

FC_INLINE uint64_t sample_id_of(const CropDraws& draws, int64_t image) {
  return draws.sample_ids ? (uint64_t)draws.sample_ids[image] : (uint64_t)image;
}

// The box of a later attempt at patch k of an image.
FC_INLINE Box draw_again(const CropDraws& draws, DrawKey key, int64_t image, int64_t k,
                         int attempt) {
  return draw_box(draws.rule, key.seed, key.step, sample_id_of(draws, image),
                  draws.first_patch + (uint32_t)k, k, attempt);
}

// The box of the first attempt, and the flips. Where no size is drawn, `sized` false leaves out the
// code that would.
template <bool sized = true>
FC_INLINE Box draw_patch(const CropDraws& draws, DrawKey key, int64_t image, int64_t k,
                         uint8_t* flips) {
  const CropRule& rule = draws.rule;
  const PhiloxBlock words = crop_words(key.seed, key.step, 0, sample_id_of(draws, image),
                                       draws.first_patch + (uint32_t)k);
  *flips = (uint8_t)((words.word[2] < draws.hflip_threshold ? FLIP_HORIZONTAL : 0) |
                     (words.word[3] < draws.vflip_threshold ? FLIP_VERTICAL : 0));
  if constexpr (sized) {
    if (rule.row_factors) return draw_again(draws, key, image, k, 0);
  }
  return place(crop_region(rule, k), rule.height, rule.width, words.word[0], words.word[1]);
}

enum class Interpolation { none = 0, nearest = 1, bilinear = 2 };

// What forward and backward share: boxes, how they become patches of one size, and the channels'
// affine map.
struct PatchSet {
  const Box* coords;     // [batch, K]
  const uint8_t* flips;  // [batch, K], or null
  int64_t batch;
  int64_t num_patches;  // K
  int64_t channels;
  int64_t image_height;
  int64_t image_width;
  int64_t height;        // of a patch
  int64_t width;         //
  const double* scale;   // [scale_count], or null for 1
  int64_t scale_count;   // 1 or channels
  const double* offset;  // [offset_count], or null for 0
  int64_t offset_count;
  const double* fill;  // [fill_count], or null for 0: the pixels beyond an image
  int64_t fill_count;
  Interpolation interpolation;
  bool antialias;
  Padding padding;
  int threads;  // of a CPU call
};

// Whether every patch is a box of the image as it is.
FC_INLINE bool is_plain(const PatchSet& set) {
  return set.interpolation == Interpolation::none && set.padding == Padding::error;
}

struct Images {
  const void* data;
  Scalar type;
  int64_t stride[4];     // batch, channel, row, column; in elements, any value
  const int64_t* index;  // [batch], image of each row of `coords`, or null for 0..batch-1
};

// Patches are written one after the other; within a patch by these strides.
struct PatchOutput {
  void* data;
  Scalar type;
  int64_t stride[3];  // channel, row, column
};

struct PatchGradient {
  const void* data;
  Scalar type;
  int64_t stride[5];  // batch, patch, channel, row, column
};

struct ImageGradient {
  void* data;
  Scalar type;
  int64_t count;  // of images
  // Rows of `coords` that belong to image i: order[starts[i]] .. order[starts[i+1]-1]; null: i.
  const int64_t* order;
  const int64_t* starts;
};

}  // namespace fastcontrast
