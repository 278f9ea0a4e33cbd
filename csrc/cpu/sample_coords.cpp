// Maths: box and flips of patch (b, k) from one block of Philox, as common/crop.h lays it out.
// Tiling: one thread; a block takes 12 ns, less than starting threads saves.
// Memory: 17 bytes written per patch.
// Numerics: integers alone, the same on every machine.
#include "cpu/extract_patches.h"

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_ISA {

void sample_coords(const CropDraws& draws) {
  for (int64_t image = 0; image < draws.batch; ++image) {
    const uint64_t id = draws.sample_ids ? (uint64_t)draws.sample_ids[image] : (uint64_t)image;
    for (int64_t k = 0; k < draws.num_patches; ++k) {
      const PhiloxBlock words = crop_words(draws.seed, draws.step, 0, id, (uint32_t)k);
      const int64_t patch = image * draws.num_patches + k;
      draws.coords[patch] =
          Box{uniform_below(words.word[0], draws.y_range),
              uniform_below(words.word[1], draws.x_range), draws.height, draws.width};
      draws.flips[patch] = (uint8_t)((words.word[2] < draws.hflip_threshold ? FLIP_HORIZONTAL : 0) |
                                     (words.word[3] < draws.vflip_threshold ? FLIP_VERTICAL : 0));
    }
  }
}

int64_t first_invalid_box(const Box* coords, int64_t count, int64_t image_height,
                          int64_t image_width, int64_t height, int64_t width) {
  for (int64_t i = 0; i < count; ++i) {
    const Box box = coords[i];
    if (!inside(box, image_height, image_width) || box.height != height || box.width != width) {
      return i;
    }
  }
  return -1;
}

}  // namespace FASTCONTRAST_ISA
}  // namespace cpu
}  // namespace fastcontrast
