// The CUDA kernels of `extract_patches`: draw crops, cut them, and return gradients to the images.
// common/patches.h has their arguments.
#pragma once

#include "common/patches.h"
#include "cuda/stream.h"

namespace fastcontrast {
namespace cuda {

// Without a least distance or a largest overlap.
void sample_coords(const CropDraws&, Stream);
// Both return false for a pair of element types without a kernel.
bool extract_patches_forward(const PatchSet&, const Images&, const PatchOutput&, Stream);
bool extract_patches_backward(const PatchSet&, const PatchGradient&, const ImageGradient&, Stream);

}  // namespace cuda
}  // namespace fastcontrast
