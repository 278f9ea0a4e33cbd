// Maths: out[b,k,c,y,x] = a_c·images[b,c,Y,X] + b_c, where (Y, X) walks the box of patch (b,k),
//   backwards along a flipped axis. common/crop.h has the draws and the walk; boxes that are
//   resized or padded are those of extract_patches_resized.cu.
// Tiling: a block cuts up to 2048 units of one patch, a unit being 16 bytes along the output's
//   innermost axis where addresses and sizes allow, else one element; where boxes are drawn its
//   first thread draws, and the first block of a patch writes box and flips. Boxes that keep their
//   distance take a launch before: a warp owns an image, its lanes 32 attempts. Grids are 1-D;
//   blocks stride over what is beyond.
// Memory: the output is written once, the boxes' pixels are read in place through their strides,
//   neighbouring threads neighbouring pixels, small ones as whole words. Numbers of the channels
//   come by value, 64 channels at a time: nothing is allocated.
// Numerics: float, or double where an element type is double; one rounding at the end. Same type
//   in and out without an affine map is a copy of bits.
#include "cuda/extract_patches.h"

#include "cuda/channel_maps.h"
#include "cuda/launch.h"
#include "cuda/patch_boxes.h"

namespace fastcontrast {
namespace cuda {
namespace {

constexpr int THREADS = 256;
constexpr uint32_t TILE_UNITS = 8 * THREADS;

// The axes of a patch as the output orders them, from outermost to innermost.
enum AxisKind : int { CHANNEL = 0, ROW = 1, COLUMN = 2 };

template <typename T>
struct CutPlan {
  BoxSource boxes;
  const void* images;
  const int64_t* index;
  void* out;
  int64_t image_stride[4];
  int64_t num_patches;
  int64_t tiles, tiles_per_patch;
  int64_t patch_stride;  // of the output
  AxisKind kind[3];
  int64_t out_stride[3];
  Divisor inner, middle;  // units along the innermost axis, elements along the middle one
  uint32_t units;         // of a patch
  int32_t height, width;
  ChannelMaps<T> maps;
};

FC_INLINE int64_t step_of(AxisKind kind, int64_t channel, int64_t row, int64_t column) {
  return kind == CHANNEL ? channel : kind == ROW ? row : column;
}

// `In` and `Out` are bits of equal size where `copies`.
template <bool copies, typename In, typename Out, int V>
__global__ void __launch_bounds__(THREADS)
    cut_patches(const __grid_constant__ CutPlan<typename Arithmetic<In, Out>::type> plan) {
  using T = typename Arithmetic<In, Out>::type;
  __shared__ PatchBox shared;
  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    const int64_t patch = tile / plan.tiles_per_patch;
    const uint32_t begin = (uint32_t)(tile - patch * plan.tiles_per_patch) * TILE_UNITS;
    const PatchBox found = box_of<false>(plan.boxes, patch, begin == 0, &shared);
    const bool up = found.flips & FLIP_VERTICAL, back = found.flips & FLIP_HORIZONTAL;
    const Walk rows = walk(found.box.y0, plan.height, plan.image_stride[2], up);
    const Walk columns = walk(found.box.x0, plan.width, plan.image_stride[3], back);
    const int64_t batch = patch / plan.num_patches;
    const int64_t image = plan.index ? plan.index[batch] : batch;
    const In* in =
        (const In*)plan.images + image * plan.image_stride[0] + rows.first + columns.first;
    Out* out = (Out*)plan.out + patch * plan.patch_stride;
    const int64_t outer_step = step_of(plan.kind[0], plan.image_stride[1], rows.step, columns.step);
    const int64_t middle_step =
        step_of(plan.kind[1], plan.image_stride[1], rows.step, columns.step);
    const int64_t inner_step = step_of(plan.kind[2], plan.image_stride[1], rows.step, columns.step);
    const uint32_t end = plan.units - begin < TILE_UNITS ? plan.units : begin + TILE_UNITS;
    for (uint32_t unit = begin + threadIdx.x; unit < end; unit += THREADS) {
      const uint32_t line = quotient(unit, plan.inner);
      const uint32_t outer = quotient(line, plan.middle);
      const uint32_t middle = line - outer * plan.middle.divisor;
      const uint32_t inner = (unit - line * plan.inner.divisor) * V;
      const In* from = in + outer * outer_step + middle * middle_step + inner * inner_step;
      Pack<In, V> pixels;
      if (V > 1 && (inner_step == 1 || inner_step == -1)) {
        const Pack<In, V> run = load_run<In, V>(inner_step == 1 ? from : from - (V - 1));
        if (inner_step == 1) {
          pixels = run;
        } else {
#pragma unroll
          for (int i = 0; i < V; ++i) pixels.item[i] = run.item[V - 1 - i];
        }
      } else {
#pragma unroll
        for (int i = 0; i < V; ++i) pixels.item[i] = from[i * inner_step];
      }
      Pack<Out, V> pack;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const In pixel = pixels.item[i];
        if constexpr (copies) {
          pack.item[i] = pixel;
        } else {
          const uint32_t channel = plan.kind[0] == CHANNEL   ? outer
                                   : plan.kind[1] == CHANNEL ? middle
                                                             : inner + i;
          const T a = plan.maps.scale[channel * plan.maps.scale_step];
          const T b = plan.maps.offset[channel * plan.maps.offset_step];
          narrow(a * (T)widen(pixel) + b, &pack.item[i]);
        }
      }
      store_pack(out + outer * plan.out_stride[0] + middle * plan.out_stride[1] +
                     inner * plan.out_stride[2],
                 pack);
    }
    if (plan.boxes.drawn) __syncthreads();  // the next patch is drawn into the same place
  }
}

__global__ void __launch_bounds__(THREADS) draw_boxes(const CropDraws draws) {
  const DrawKey key = key_of(draws);
  const int64_t count = draws.batch * draws.num_patches;
  for (int64_t patch = (int64_t)blockIdx.x * THREADS + threadIdx.x; patch < count;
       patch += (int64_t)gridDim.x * THREADS) {
    const int64_t image = patch / draws.num_patches;
    const int64_t k = patch - image * draws.num_patches;
    draws.coords[patch] = draw_patch(draws, key, image, k, draws.flips + patch);
  }
}

// A warp owns an image: its boxes are placed in the order of k, a lane for every attempt.
__global__ void __launch_bounds__(THREADS) place_boxes(const CropDraws draws) {
  constexpr int64_t warps = THREADS / WARP;
  const DrawKey key = key_of(draws);
  const int lane = (int)(threadIdx.x % WARP);
  for (int64_t image = (int64_t)blockIdx.x * warps + threadIdx.x / WARP; image < draws.batch;
       image += (int64_t)gridDim.x * warps) {
    Box* boxes = draws.coords + image * draws.num_patches;
    for (int64_t k = 0; k < draws.num_patches; ++k) {
      uint8_t flips;
      draw_patch(draws, key, image, k, &flips);
      unsigned votes = 0;
      for (int first = 0; first < CROP_ATTEMPTS && !votes; first += WARP) {
        const Box box = draw_again(draws, key, image, k, first + lane);
        const bool clear = clear_of(draws.rule, box, boxes, k);
        votes = __ballot_sync(ALL_LANES, clear);
        const bool lost = !votes && first + WARP == CROP_ATTEMPTS;
        const bool wins = votes ? clear && !(votes & ((1u << lane) - 1)) : lost && lane == WARP - 1;
        if (!wins) continue;
        boxes[k] = box;
        draws.flips[image * draws.num_patches + k] = (uint8_t)(flips | (lost ? NO_PLACE : 0));
        if (lost) *draws.lost = image << 24 | k;
      }
      __syncwarp();  // the next box is compared with this one
    }
  }
}

template <bool copies, typename In, typename Out, int V, typename T>
void launch_cut(CutPlan<T> plan, const int64_t* size, int64_t patches, Stream stream) {
  plan.inner = divisor((uint32_t)(size[2] / V));
  plan.middle = divisor((uint32_t)size[1]);
  plan.units = checked_size("a patch", size[0], size[1], size[2]) / V;
  plan.tiles_per_patch = (plan.units + TILE_UNITS - 1) / TILE_UNITS;
  plan.tiles = patches * plan.tiles_per_patch;
  const unsigned threads =
      plan.units < (uint32_t)THREADS ? (plan.units + WARP - 1) / WARP * WARP : THREADS;
  FASTCONTRAST_LAUNCH(stream, blocks_for(plan.tiles, 1), threads, 0,
                      (cut_patches<copies, In, Out, V>), plan);
}

template <bool copies, typename In, typename Out>
bool cut(const BoxSource& boxes, const PatchSet& set, const Images& images, const PatchOutput& out,
         Stream stream) {
  using T = typename Arithmetic<In, Out>::type;
  const int64_t patches = set.batch * set.num_patches;
  CutPlan<T> plan;
  plan.boxes = boxes;
  plan.index = images.index;
  plan.num_patches = set.num_patches;
  plan.patch_stride = set.channels * set.height * set.width;
  plan.height = (int32_t)set.height;
  plan.width = (int32_t)set.width;
  for (int i = 0; i < 4; ++i) plan.image_stride[i] = images.stride[i];
  // The axis with the smallest stride is the innermost; of equal ones (of size 1) the last.
  AxisKind order[3] = {CHANNEL, ROW, COLUMN};
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2 - i; ++j) {
      if (out.stride[order[j]] >= out.stride[order[j + 1]]) continue;
      const AxisKind larger = order[j + 1];
      order[j + 1] = order[j];
      order[j] = larger;
    }
  }
  constexpr int V = 16 / sizeof(Out);
  const int64_t group = copies ? set.channels : group_size(set);
  for (int64_t first = 0; first < set.channels; first += group) {
    const int64_t channels = first + group < set.channels ? group : set.channels - first;
    const int64_t sizes[3] = {channels, set.height, set.width};
    int64_t size[3];
    Out* target = (Out*)out.data + first * out.stride[CHANNEL];
    bool vectors = is_aligned(target, 16) && plan.patch_stride % V == 0;
    for (int axis = 0; axis < 3; ++axis) {
      plan.kind[axis] = order[axis];
      plan.out_stride[axis] = out.stride[order[axis]];
      size[axis] = sizes[order[axis]];
      vectors = vectors && (axis == 2 ? plan.out_stride[2] == 1 && size[2] % V == 0
                                      : plan.out_stride[axis] % V == 0);
    }
    plan.maps = maps_of_group<T>(set, first, channels);
    plan.images = (const In*)images.data + first * images.stride[1];
    plan.out = target;
    if (vectors) {
      launch_cut<copies, In, Out, V>(plan, size, patches, stream);
    } else {
      launch_cut<copies, In, Out, 1>(plan, size, patches, stream);
    }
  }
  return true;
}

template <typename In>
bool cut_to(const BoxSource& boxes, const PatchSet& set, const Images& images,
            const PatchOutput& out, Stream stream) {
  switch (out.type) {
    case Scalar::float16:
      return cut<false, In, Half>(boxes, set, images, out, stream);
    case Scalar::bfloat16:
      return cut<false, In, BFloat16>(boxes, set, images, out, stream);
    case Scalar::float32:
      return cut<false, In, float>(boxes, set, images, out, stream);
    case Scalar::float64:
      return cut<false, In, double>(boxes, set, images, out, stream);
    default:
      return false;
  }
}

bool copy_bits(const BoxSource& boxes, const PatchSet& set, const Images& images,
               const PatchOutput& out, Stream stream) {
  switch (images.type) {
    case Scalar::uint8:
      return cut<true, uint8_t, uint8_t>(boxes, set, images, out, stream);
    case Scalar::float16:
    case Scalar::bfloat16:
      return cut<true, uint16_t, uint16_t>(boxes, set, images, out, stream);
    case Scalar::float32:
      return cut<true, uint32_t, uint32_t>(boxes, set, images, out, stream);
    case Scalar::float64:
      return cut<true, uint64_t, uint64_t>(boxes, set, images, out, stream);
  }
  return false;
}

bool extract(const BoxSource& boxes, const PatchSet& set, const Images& images,
             const PatchOutput& out, Stream stream) {
  if (!is_plain(set)) {
    return extract_resized(boxes, set, images, out, stream);
  }
  if (images.type == out.type && !set.scale && !set.offset) {
    return copy_bits(boxes, set, images, out, stream);
  }
  switch (images.type) {
    case Scalar::uint8:
      return cut_to<uint8_t>(boxes, set, images, out, stream);
    case Scalar::float16:
      return cut_to<Half>(boxes, set, images, out, stream);
    case Scalar::bfloat16:
      return cut_to<BFloat16>(boxes, set, images, out, stream);
    case Scalar::float32:
      return cut_to<float>(boxes, set, images, out, stream);
    case Scalar::float64:
      return cut_to<double>(boxes, set, images, out, stream);
  }
  return false;
}

}  // namespace

void sample_coords(const CropDraws& draws, Stream stream) {
  const int64_t count = draws.batch * draws.num_patches;
  if (count == 0) return;
  if (constrained(draws.rule)) {
    FASTCONTRAST_LAUNCH(stream, blocks_for(draws.batch, THREADS / WARP), THREADS, 0, place_boxes,
                        draws);
  } else {
    FASTCONTRAST_LAUNCH(stream, blocks_for(count, THREADS), THREADS, 0, draw_boxes, draws);
  }
}

bool extract_patches_forward(const PatchSet& set, const Images& images, const PatchOutput& out,
                             Stream stream) {
  if (set.batch * set.num_patches * set.channels == 0) return true;
  return extract(read_boxes(set), set, images, out, stream);
}

bool random_patches_forward(const CropDraws& draws, const PatchSet& set, const Images& images,
                            const PatchOutput& out, Stream stream) {
  const bool sized = draws.rule.row_factors && is_plain(set);  // what no kernel that cuts draws
  if (constrained(draws.rule) || set.channels == 0 || sized) {
    sample_coords(draws, stream);
    return extract_patches_forward(set, images, out, stream);
  }
  if (set.batch * set.num_patches == 0) return true;
  return extract(drawn_boxes(draws), set, images, out, stream);
}

}  // namespace cuda
}  // namespace fastcontrast
