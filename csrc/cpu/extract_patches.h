// The CPU kernels of `extract_patches`: draw crops, check them, cut them, and return gradients to
// the images. common/patches.h has their arguments.
#pragma once

#include <stdint.h>

#include "common/patches.h"
#include "cpu/isa.h"

namespace fastcontrast {
namespace cpu {

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
