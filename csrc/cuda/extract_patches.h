// The CUDA kernels of `extract_patches`: draw crops, cut them, and return gradients to the images.
// common/patches.h has their arguments.
#pragma once

#include "common/patches.h"
#include "cuda/stream.h"

namespace fastcontrast {
namespace cuda {

// An unconstrained draw takes one launch, one under constraints too. A patch without a place keeps
// the box of its last attempt, NO_PLACE is among its flips, and `lost` names it.
void sample_coords(const CropDraws&, Stream);

// These return false for a pair of element types without a kernel.
bool extract_patches_forward(const PatchSet&, const Images&, const PatchOutput&, Stream);
// Draws and cuts, in one launch for up to 64 channels, and one before under constraints. The coords
// and flips of the set are those that the draws write.
bool random_patches_forward(const CropDraws&, const PatchSet&, const Images&, const PatchOutput&,
                            Stream);
// `units` has batch·K·(height + width) numbers of the type of arithmetic, for boxes that are
// resized: memory that the call needs.
bool extract_patches_backward(const PatchSet&, const PatchGradient&, const ImageGradient&,
                              void* units, Stream);

}  // namespace cuda
}  // namespace fastcontrast
