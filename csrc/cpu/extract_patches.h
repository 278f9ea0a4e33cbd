// Arguments of the CPU kernels of `extract_patches`: draw crops, check them, cut them, and return
// gradients to the images. fastcontrast/backends/native/extract_patches.py fills these in.
#pragma once

#include <stdint.h>

#include "common/crop.h"
#include "common/resize.h"
#include "common/scalar.h"
#include "cpu/isa.h"

namespace fastcontrast {
namespace cpu {

struct CropDraws {
  uint64_t seed;
  uint64_t step;
  const int64_t* sample_ids;  // [batch], or null for 0..batch-1
  int64_t batch;
  int64_t num_patches;   // K
  uint32_t first_patch;  // what k = 0 is in the counter
  CropRule rule;
  uint64_t hflip_threshold;  // floor(p·2^32), up to 2^32 itself
  uint64_t vflip_threshold;
  Box* coords;     // [batch, K]
  uint8_t* flips;  // [batch, K]
};

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
  int threads;
};

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

// Both return false for a pair of element types without a kernel, or where memory has run out.
FASTCONTRAST_DECLARE(bool extract_patches_forward(const PatchSet&, const Images&,
                                                  const PatchOutput&))
FASTCONTRAST_DECLARE(bool extract_patches_backward(const PatchSet&, const PatchGradient&,
                                                   const ImageGradient&))

// Index of the first patch that found no place, in the order of `coords`; -1: none.
FASTCONTRAST_DECLARE(int64_t sample_coords(const CropDraws&))

// Index of the first box that leaves the image further than its padding reaches, or that has
// another size than the patches and is not resized; -1: none.
FASTCONTRAST_DECLARE(int64_t first_invalid_box(const PatchSet&))

}  // namespace cpu
}  // namespace fastcontrast
