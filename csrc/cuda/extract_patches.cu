// Maths: out[b,k,c,y,x] = a_c·images[b,c,Y,X] + b_c, where (Y, X) walks the box of patch (b,k),
//   backwards along a flipped axis; its transpose: grad_images[b,c,Y,X] = a_c·Σ grad[b,k,c,y,x]
//   over the patches that hold (Y, X). common/crop.h has the draws and the walk.
// Tiling: forward, a block cuts up to 2048 units of one patch, a unit being 16 bytes along the
//   output's innermost axis where addresses and sizes allow, else one element; backward, a thread
//   owns a pixel and asks every box of its image, in the order of k. One writer per element, fixed
//   order. Grids are 1-D; blocks stride over what is beyond.
// Memory: the output is written once, the boxes' pixels are read in place through their strides,
//   neighbouring threads neighbouring pixels; backward reads each gradient once and writes every
//   pixel. Numbers of the channels come by value, 64 channels at a time: nothing is allocated.
// Numerics: float, or double where an element type is double; one rounding at the end. Same type
//   in and out without an affine map is a copy of bits.
#include "cuda/extract_patches.h"

#include "cuda/channel_maps.h"
#include "cuda/launch.h"

namespace fastcontrast {
namespace cuda {
namespace {

constexpr int THREADS = 256;
constexpr uint32_t TILE_UNITS = 8 * THREADS;

// The axes of a patch as the output orders them, from outermost to innermost.
enum AxisKind : int { CHANNEL = 0, ROW = 1, COLUMN = 2 };

template <typename T>
struct CutPlan {
  const Box* coords;
  const uint8_t* flips;
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
  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    const int64_t patch = tile / plan.tiles_per_patch;
    const uint32_t begin = (uint32_t)(tile - patch * plan.tiles_per_patch) * TILE_UNITS;
    const Box box = plan.coords[patch];
    const int flips = plan.flips ? plan.flips[patch] : 0;
    const Walk rows = walk(box.y0, plan.height, plan.image_stride[2], flips & FLIP_VERTICAL);
    const Walk columns = walk(box.x0, plan.width, plan.image_stride[3], flips & FLIP_HORIZONTAL);
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
      Pack<Out, V> pack;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const In pixel = from[i * inner_step];
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
  }
}

template <typename T>
struct GatherPlan {
  const Box* coords;
  const uint8_t* flips;
  const void* grad;
  void* grad_images;
  int64_t grad_stride[5];
  const int64_t* order;
  const int64_t* starts;
  int64_t num_patches;
  int64_t tiles, tiles_per_plane;
  int64_t channels, group;  // of an image, and in this launch
  uint32_t plane_size;
  Divisor image_width;
  int32_t height, width;
  ChannelMaps<T> maps;
};

template <typename G, typename I>
__global__ void __launch_bounds__(THREADS)
    gather_gradients(const __grid_constant__ GatherPlan<typename Arithmetic<G, I>::type> plan) {
  using T = typename Arithmetic<G, I>::type;
  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    const int64_t plane = tile / plan.tiles_per_plane;
    const uint32_t pixel = (uint32_t)(tile - plane * plan.tiles_per_plane) * THREADS + threadIdx.x;
    if (pixel >= plan.plane_size) continue;
    const int64_t image = plane / plan.group;
    const int64_t channel = plane - image * plan.group;
    const int32_t y = (int32_t)quotient(pixel, plan.image_width);
    const int32_t x = (int32_t)(pixel - y * plan.image_width.divisor);
    T sum = T(0);
    const int64_t end = plan.order ? plan.starts[image + 1] : image + 1;
    for (int64_t i = plan.order ? plan.starts[image] : image; i < end; ++i) {
      const int64_t batch = plan.order ? plan.order[i] : i;
      const G* grad =
          (const G*)plan.grad + batch * plan.grad_stride[0] + channel * plan.grad_stride[2];
#pragma unroll 1  // unrolled, its strides do not fit the registers of sm_100
      for (int64_t k = 0; k < plan.num_patches; ++k) {
        const int64_t patch = batch * plan.num_patches + k;
        const Box box = plan.coords[patch];
        int32_t row = y - box.y0, column = x - box.x0;
        if ((uint32_t)row >= (uint32_t)plan.height || (uint32_t)column >= (uint32_t)plan.width) {
          continue;
        }
        const int flips = plan.flips ? plan.flips[patch] : 0;
        if (flips & FLIP_VERTICAL) row = plan.height - 1 - row;
        if (flips & FLIP_HORIZONTAL) column = plan.width - 1 - column;
        sum += (T)widen(grad[k * plan.grad_stride[1] + row * plan.grad_stride[3] +
                             column * plan.grad_stride[4]]);
      }
    }
    I* target = (I*)plan.grad_images + (image * plan.channels + channel) * plan.plane_size;
    narrow(plan.maps.scale[channel * plan.maps.scale_step] * sum, target + pixel);
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

// Indices within a patch or a plane are 32-bit numbers below 2^31.
uint32_t checked_size(const char* what, int64_t a, int64_t b, int64_t c) {
  constexpr int64_t limit = 0x7FFFFFFF;
  if (a * b > limit || a * b * c > limit) {
    throw std::invalid_argument(std::string(what) + " of " + std::to_string(a) + "x" +
                                std::to_string(b) + "x" + std::to_string(c) +
                                " elements is larger than the CUDA kernels' limit of 2^31");
  }
  return (uint32_t)(a * b * c);
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
bool cut(const PatchSet& set, const Images& images, const PatchOutput& out, Stream stream) {
  using T = typename Arithmetic<In, Out>::type;
  const int64_t patches = set.batch * set.num_patches;
  CutPlan<T> plan;
  plan.coords = set.coords;
  plan.flips = set.flips;
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
bool cut_to(const PatchSet& set, const Images& images, const PatchOutput& out, Stream stream) {
  switch (out.type) {
    case Scalar::float16:
      return cut<false, In, Half>(set, images, out, stream);
    case Scalar::bfloat16:
      return cut<false, In, BFloat16>(set, images, out, stream);
    case Scalar::float32:
      return cut<false, In, float>(set, images, out, stream);
    case Scalar::float64:
      return cut<false, In, double>(set, images, out, stream);
    default:
      return false;
  }
}

bool copy_bits(const PatchSet& set, const Images& images, const PatchOutput& out, Stream stream) {
  switch (images.type) {
    case Scalar::uint8:
      return cut<true, uint8_t, uint8_t>(set, images, out, stream);
    case Scalar::float16:
    case Scalar::bfloat16:
      return cut<true, uint16_t, uint16_t>(set, images, out, stream);
    case Scalar::float32:
      return cut<true, uint32_t, uint32_t>(set, images, out, stream);
    case Scalar::float64:
      return cut<true, uint64_t, uint64_t>(set, images, out, stream);
  }
  return false;
}

template <typename G, typename I>
bool gather(const PatchSet& set, const PatchGradient& grad, const ImageGradient& images,
            Stream stream) {
  using T = typename Arithmetic<G, I>::type;
  GatherPlan<T> plan;
  plan.coords = set.coords;
  plan.flips = set.flips;
  plan.order = images.order;
  plan.starts = images.starts;
  plan.num_patches = set.num_patches;
  plan.channels = set.channels;
  plan.height = (int32_t)set.height;
  plan.width = (int32_t)set.width;
  plan.plane_size = checked_size("an image", set.image_height, set.image_width, 1);
  plan.image_width = divisor((uint32_t)set.image_width);
  plan.tiles_per_plane = ((int64_t)plan.plane_size + THREADS - 1) / THREADS;
  for (int i = 0; i < 5; ++i) plan.grad_stride[i] = grad.stride[i];
  const int64_t group = group_size(set);
  for (int64_t first = 0; first < set.channels; first += group) {
    plan.group = first + group < set.channels ? group : set.channels - first;
    plan.maps = maps_of_group<T>(set, first, plan.group);
    plan.grad = (const G*)grad.data + first * grad.stride[2];
    plan.grad_images = (I*)images.data + first * plan.plane_size;
    plan.tiles = images.count * plan.group * plan.tiles_per_plane;
    FASTCONTRAST_LAUNCH(stream, blocks_for(plan.tiles, 1), THREADS, 0, (gather_gradients<G, I>),
                        plan);
  }
  return true;
}

template <typename G>
bool gather_to(const PatchSet& set, const PatchGradient& grad, const ImageGradient& images,
               Stream stream) {
  switch (images.type) {
    case Scalar::float16:
      return gather<G, Half>(set, grad, images, stream);
    case Scalar::bfloat16:
      return gather<G, BFloat16>(set, grad, images, stream);
    case Scalar::float32:
      return gather<G, float>(set, grad, images, stream);
    case Scalar::float64:
      return gather<G, double>(set, grad, images, stream);
    default:
      return false;
  }
}

}  // namespace

void sample_coords(const CropDraws& draws, Stream stream) {
  const int64_t count = draws.batch * draws.num_patches;
  if (count == 0) return;
  FASTCONTRAST_LAUNCH(stream, blocks_for(count, THREADS), THREADS, 0, draw_boxes, draws);
}

bool extract_patches_forward(const PatchSet& set, const Images& images, const PatchOutput& out,
                             Stream stream) {
  if (set.batch * set.num_patches * set.channels == 0) return true;
  if (images.type == out.type && !set.scale && !set.offset) {
    return copy_bits(set, images, out, stream);
  }
  switch (images.type) {
    case Scalar::uint8:
      return cut_to<uint8_t>(set, images, out, stream);
    case Scalar::float16:
      return cut_to<Half>(set, images, out, stream);
    case Scalar::bfloat16:
      return cut_to<BFloat16>(set, images, out, stream);
    case Scalar::float32:
      return cut_to<float>(set, images, out, stream);
    case Scalar::float64:
      return cut_to<double>(set, images, out, stream);
  }
  return false;
}

bool extract_patches_backward(const PatchSet& set, const PatchGradient& grad,
                              const ImageGradient& images, Stream stream) {
  if (images.count * set.channels * set.image_height * set.image_width == 0) return true;
  switch (grad.type) {
    case Scalar::float16:
      return gather_to<Half>(set, grad, images, stream);
    case Scalar::bfloat16:
      return gather_to<BFloat16>(set, grad, images, stream);
    case Scalar::float32:
      return gather_to<float>(set, grad, images, stream);
    case Scalar::float64:
      return gather_to<double>(set, grad, images, stream);
    default:
      return false;
  }
}

}  // namespace cuda
}  // namespace fastcontrast
