// Arguments of the CUDA kernels of `extract_patches`: draw crops, cut them, and return gradients to
// the images. fastcontrast/backends/native/extract_patches.py fills these in. Pointers are the
// GPU's, but for `scale` and `offset`.
#pragma once

#include <stdint.h>

#include "common/crop.h"
#include "common/scalar.h"
#include "cuda/stream.h"

namespace fastcontrast {
namespace cuda {

struct CropDraws {
  uint64_t seed;
  uint64_t step;
  const int64_t* key;         // (seed, step) instead of the two above, or null: a graph that is
                              // replayed reads it anew
  const int64_t* sample_ids;  // [batch], or null for 0..batch-1
  int64_t batch;
  int64_t num_patches;       // K
  uint32_t first_patch;      // what k = 0 is in the counter
  CropRule rule;             // without a least distance or a largest overlap
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
};

struct Images {
  const void* data;
  Scalar type;
  int64_t stride[4];     // batch, channel, row, column; in elements, any value
  const int64_t* index;  // [batch], image of each row of `coords`, or null for 0..batch-1
};

// Patches follow one another without gaps; within a patch any layout.
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

void sample_coords(const CropDraws&, Stream);
// Both return false for a pair of element types without a kernel.
bool extract_patches_forward(const PatchSet&, const Images&, const PatchOutput&, Stream);
bool extract_patches_backward(const PatchSet&, const PatchGradient&, const ImageGradient&, Stream);

}  // namespace cuda
}  // namespace fastcontrast
