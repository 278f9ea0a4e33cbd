// Maths: box and flips of patch (b, k) by the rule of common/crop.h; a box too close to an earlier
//   one of its image is drawn again, CROP_ATTEMPTS times at most.
// Tiling: one thread; a block of Philox takes 12 ns, less than starting threads saves.
// Memory: 17 bytes written per patch.
// Numerics: integers alone, the same on every machine.
#include "cpu/extract_patches.h"

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_ISA {
namespace {

bool clear_of(const CropRule& rule, Box box, const Box* earlier, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (!far_apart(rule, box, earlier[i])) return false;
  }
  return true;
}

}  // namespace

int64_t sample_coords(const CropDraws& draws) {
  const CropRule rule = draws.rule;
  const bool constrained = rule.min_distance > 0 || rule.max_iou >= 0;
  int64_t lost = -1;
  for (int64_t image = 0; image < draws.batch; ++image) {
    const uint64_t id = draws.sample_ids ? (uint64_t)draws.sample_ids[image] : (uint64_t)image;
    Box* boxes = draws.coords + image * draws.num_patches;
    uint8_t* flips = draws.flips + image * draws.num_patches;
    for (int64_t k = 0; k < draws.num_patches; ++k) {
      const uint32_t counter_k = draws.first_patch + (uint32_t)k;
      const PhiloxBlock words = crop_words(draws.seed, draws.step, 0, id, counter_k);
      flips[k] = (uint8_t)((words.word[2] < draws.hflip_threshold ? FLIP_HORIZONTAL : 0) |
                           (words.word[3] < draws.vflip_threshold ? FLIP_VERTICAL : 0));
      if (!constrained && !rule.row_factors) {
        boxes[k] =
            place(crop_region(rule, k), rule.height, rule.width, words.word[0], words.word[1]);
        continue;
      }
      int attempt = 0;
      do {
        boxes[k] = draw_box(rule, draws.seed, draws.step, id, counter_k, k, attempt);
      } while (constrained && !clear_of(rule, boxes[k], boxes, k) && ++attempt < CROP_ATTEMPTS);
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
