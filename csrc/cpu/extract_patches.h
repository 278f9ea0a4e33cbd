// Arguments of the CPU kernels of `extract_patches`: draw crops, check them, cut them, and return
// gradients to the images. fastcontrast/backends/native/extract_patches.py fills these in.
#pragma once

#include <stdint.h>

#include "common/crop.h"
#include "common/scalar.h"
#include "cpu/isa.h"

namespace fastcontrast {
namespace cpu {

struct CropDraws {
  uint64_t seed;
  uint64_t step;
  const int64_t* sample_ids;  // [batch], or null for 0..batch-1
  int64_t batch;
  int64_t num_patches;  // K
  int32_t y_range;      // image height - patch height + 1
  int32_t x_range;
  int32_t height;  // of a patch
  int32_t width;
  uint64_t hflip_threshold;  // floor(p·2^32), up to 2^32 itself
  uint64_t vflip_threshold;
  Box* coords;     // [batch, K]
  uint8_t* flips;  // [batch, K]
};

// What forward and backward share: one box of one size per patch, and the channels' affine map.
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
  int threads;
};

struct Images {
  const void* data;
  Scalar type;
  int64_t stride[4];  // batch, channel, row, column; in elements, any value
};

struct PatchGradient {
  const void* data;
  Scalar type;
  int64_t stride[5];  // batch, patch, channel, row, column
};

// Both return false for a pair of element types without a kernel.
FASTCONTRAST_DECLARE(bool extract_patches_forward(const PatchSet&, const Images&, void* out,
                                                  Scalar out_type))
// `sums` is room for [threads, image_height, image_width] in the type of arithmetic.
FASTCONTRAST_DECLARE(bool extract_patches_backward(const PatchSet&, const PatchGradient&,
                                                   void* grad_images, Scalar image_type,
                                                   void* sums))

FASTCONTRAST_DECLARE(void sample_coords(const CropDraws&))

// Index of the first box that leaves the image or has another size than `height`×`width`; -1: none.
FASTCONTRAST_DECLARE(int64_t first_invalid_box(const Box* coords, int64_t count,
                                               int64_t image_height, int64_t image_width,
                                               int64_t height, int64_t width))

}  // namespace cpu
}  // namespace fastcontrast
