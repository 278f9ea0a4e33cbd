// Maths: box and flips of patch (b, k) by the rule of common/crop.h; a box too close to an earlier
//   one of its image is drawn again, CROP_ATTEMPTS times at most.
// Tiling: one thread; a block of Philox takes 12 ns, less than starting threads saves.
// Memory: 17 bytes written per patch.
// Numerics: integers alone, the same on every machine.
#include "cpu/extract_patches.h"

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_ISA {

int64_t sample_coords(const CropDraws& draws) {
  const CropRule rule = draws.rule;
  const DrawKey key = key_of(draws);
  int64_t lost = -1;
  for (int64_t image = 0; image < draws.batch; ++image) {
    Box* boxes = draws.coords + image * draws.num_patches;
    uint8_t* flips = draws.flips + image * draws.num_patches;
    for (int64_t k = 0; k < draws.num_patches; ++k) {
      boxes[k] = draw_patch(draws, key, image, k, &flips[k]);
      if (!constrained(rule)) continue;
      int attempt = 0;
      while (!clear_of(rule, boxes[k], boxes, k) && ++attempt < CROP_ATTEMPTS) {
        boxes[k] = draw_again(draws, key, image, k, attempt);
      }
      if (attempt == CROP_ATTEMPTS && lost < 0) lost = image * draws.num_patches + k;
    }
  }
  return lost;
}

int64_t first_invalid_box(const PatchSet& set) {
  const int64_t reach_y = padding_reach(set.image_height, set.padding);
  const int64_t reach_x = padding_reach(set.image_width, set.padding);
  for (int64_t i = 0; i < set.batch * set.num_patches; ++i) {
    const Box box = set.coords[i];
    const bool sized = box.height == set.height && box.width == set.width;
    if (!inside(box, set.image_height, set.image_width, reach_y, reach_x) ||
        (set.interpolation == Interpolation::none && !sized)) {
      return i;
    }
  }
  return -1;
}

}  // namespace FASTCONTRAST_ISA
}  // namespace cpu
}  // namespace fastcontrast
