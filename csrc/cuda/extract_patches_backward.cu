// Maths: grad_images[b,c,Y,X] = a_c·Σ grad[b,k,c,y,x] over the patches that hold (Y, X), and where
//   boxes are resized or padded a_c·Σ v_yi w_xj grad[b,k,c,y,x] over the crops' pixels (i, j) that
//   (Y, X) stands for: the transposes of extract_patches.cu and extract_patches_resized.cu.
// Tiling: a thread owns a pixel and asks every box of its image, in the order of k. One writer per
//   element, fixed order, no atomics: two runs are bit-equal. Resized boxes take two launches: one
//   finds the units of all weights, then a block owns 8 rows of 32 pixels, and 40 threads find what
//   the rows and columns are taps of. Grids are 1-D; blocks stride over what is beyond.
// Memory: each gradient is read where it is needed, once for boxes of the image as they are, and
//   every pixel is written once.
// Numerics: sums in float, or double where an element type is double; one rounding at the end.
#include "cuda/channel_maps.h"
#include "cuda/extract_patches.h"
#include "cuda/launch.h"

namespace fastcontrast {
namespace cuda {
namespace {

constexpr int TILE_ROWS = 8;
constexpr int TILE_COLUMNS = WARP;
constexpr int THREADS = TILE_ROWS * TILE_COLUMNS;
constexpr int CHANNELS = 4;  // that share the weights of a resized pixel

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

// 1 over the sum of the numerators of every row, then every column, of every patch.
template <typename T>
__global__ void __launch_bounds__(THREADS) resize_units(const PatchSet set, T* units) {
  const int64_t each = set.height + set.width;
  const int64_t count = set.batch * set.num_patches * each;
  const bool bilinear = set.interpolation == Interpolation::bilinear;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count;
       i += (int64_t)gridDim.x * THREADS) {
    const int64_t patch = i / each, pixel = i - patch * each;
    const Box box = set.coords[patch];
    const bool is_row = pixel < set.height;
    const Resize axis = resize_of(is_row ? box.height : box.width, is_row ? set.height : set.width,
                                  bilinear, set.antialias);
    const int64_t sum = numerators_of(axis, is_row ? pixel : pixel - set.height);
    units[i] = (T)(1.0 / (double)sum);
  }
}

// Pixels of a crop that a pixel of the image stands for, those of the patch they are taps of, and
// for a lone pixel of the crop (2j+1)·out - (2i+1)·in for the first of these.
struct Reach {
  int32_t crop, crop_count, first, count, distance;
};

FC_INLINE Reach reach_of(const Resize& axis, Taps crop) {
  const Taps patch = patch_pixels(axis, crop);
  const int64_t distance = (2 * crop.first + 1) * axis.out - (2 * patch.first + 1) * axis.in;
  return Reach{(int32_t)crop.first, (int32_t)crop.count, (int32_t)patch.first, (int32_t)patch.count,
               axis.single ? 0 : (int32_t)distance};
}

// The sum of the numerators of pixel `n` of the reach, by general means where the crop has several.
template <typename T, bool ranges>
FC_INLINE T numerator_at(const Reach& reach, int32_t n, int32_t in, int32_t out, bool bilinear,
                         bool antialias) {
  if constexpr (ranges) {
    return (T)numerators_within(resize_of(in, out, bilinear, antialias), reach.first + n,
                                Taps{reach.crop, reach.crop_count});
  } else {
    if (!bilinear || in == out) return T(1);
    const int32_t distance = reach.distance - 2 * in * n;
    const int32_t radius = antialias && in > out ? in : out;
    return (T)(2 * radius - (distance < 0 ? -distance : distance));
  }
}

template <typename T>
struct ResizedPlan {
  const Box* coords;
  const uint8_t* flips;
  const void* grad;
  void* grad_images;
  const T* units;
  int64_t grad_stride[5];
  const int64_t* order;
  const int64_t* starts;
  int64_t num_patches;
  int64_t all_channels, channels;  // of an image, and in this launch
  int64_t tiles, tiles_per_image, tiles_across, channel_groups;
  int32_t image_height, image_width, height, width;
  Padding padding;
  bool bilinear, antialias;
  ChannelMaps<T> maps;
};

// `ranges`: pixels of the image stand for several pixels of a crop, beyond an edge that goes on.
template <typename G, typename I, bool ranges>
__global__ void __launch_bounds__(THREADS, 2)  // or some compilers spill for a third block
    gather_resized(const __grid_constant__ ResizedPlan<typename Arithmetic<G, I>::type> plan) {
  using T = typename Arithmetic<G, I>::type;
  __shared__ Reach reaches[TILE_ROWS + TILE_COLUMNS];
  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    const int64_t plane = tile / plan.tiles_per_image, rest = tile - plane * plan.tiles_per_image;
    const int64_t image = plane / plan.channel_groups;
    const int64_t c0 = (plane - image * plan.channel_groups) * CHANNELS;
    const int32_t top = (int32_t)(rest / plan.tiles_across * TILE_ROWS);
    const int32_t left = (int32_t)(rest % plan.tiles_across * TILE_COLUMNS);
    const int32_t y = top + threadIdx.x / TILE_COLUMNS, x = left + threadIdx.x % TILE_COLUMNS;
    const bool exists = y < plan.image_height && x < plan.image_width;
    T sum[CHANNELS] = {T(0), T(0), T(0), T(0)};
    const int64_t end = plan.order ? plan.starts[image + 1] : image + 1;
    for (int64_t n = plan.order ? plan.starts[image] : image; n < end; ++n) {
      const int64_t batch = plan.order ? plan.order[n] : n;
#pragma unroll 1
      for (int64_t k = 0; k < plan.num_patches; ++k) {
        const int64_t patch = batch * plan.num_patches + k;
        const Box box = plan.coords[patch];
        const int flips = plan.flips ? plan.flips[patch] : 0;
        const bool whole = inside(box, plan.image_height, plan.image_width, 0, 0);
        const bool copied = ranges || plan.padding == Padding::reflect;
        const int parts = !whole && copied ? MOST_PARTS : 1;
        const bool apart = box.y0 >= top + TILE_ROWS || box.x0 >= left + TILE_COLUMNS ||
                           (int64_t)box.y0 + box.height <= top ||
                           (int64_t)box.x0 + box.width <= left;
        if (parts == 1 && apart) continue;
        const T* unit = plan.units + patch * ((int64_t)plan.height + plan.width);
        const G* grad = (const G*)plan.grad + batch * plan.grad_stride[0] +
                        k * plan.grad_stride[1] + c0 * plan.grad_stride[2];
#pragma unroll 1
        for (int part = 0; part < parts * parts; ++part) {
          __syncthreads();  // the last part has been read
          if (threadIdx.x < TILE_ROWS + TILE_COLUMNS) {
            const bool is_row = threadIdx.x < TILE_ROWS;
            const int32_t i = (int32_t)threadIdx.x + (is_row ? top : left - TILE_ROWS);
            const int32_t start = is_row ? box.y0 : box.x0;
            const int32_t extent = is_row ? box.height : box.width;
            const Resize axis =
                resize_of(extent, is_row ? plan.height : plan.width, plan.bilinear, plan.antialias);
            const Taps crop =
                positions_of(i, is_row ? part / parts : part % parts, start, extent,
                             is_row ? plan.image_height : plan.image_width, plan.padding);
            reaches[threadIdx.x] = reach_of(axis, crop);
          }
          __syncthreads();
          const Reach rows = reaches[threadIdx.x / TILE_COLUMNS];
          const Reach columns = reaches[TILE_ROWS + threadIdx.x % TILE_COLUMNS];
          if (!exists || rows.crop_count <= 0 || columns.crop_count <= 0) continue;
#pragma unroll 1
          for (int32_t i = 0; i < rows.count; ++i) {
            const int32_t y_patch = rows.first + i;
            const T row_weight =
                unit[y_patch] * numerator_at<T, ranges>(rows, i, box.height, plan.height,
                                                        plan.bilinear, plan.antialias);
            const int32_t row = flips & FLIP_VERTICAL ? plan.height - 1 - y_patch : y_patch;
            const G* line = grad + row * plan.grad_stride[3];
#pragma unroll 1
            for (int32_t j = 0; j < columns.count; ++j) {
              const int32_t x_patch = columns.first + j;
              const T weight =
                  row_weight * (unit[plan.height + x_patch] *
                                numerator_at<T, ranges>(columns, j, box.width, plan.width,
                                                        plan.bilinear, plan.antialias));
              const int32_t column = flips & FLIP_HORIZONTAL ? plan.width - 1 - x_patch : x_patch;
              const G* from = line + column * plan.grad_stride[4];
#pragma unroll
              for (int c = 0; c < CHANNELS; ++c) {
                if (c0 + c >= plan.channels) break;
                sum[c] += weight * (T)widen(from[c * plan.grad_stride[2]]);
              }
            }
          }
        }
      }
    }
    if (!exists) continue;
    const int64_t plane_size = (int64_t)plan.image_height * plan.image_width;
    I* target = (I*)plan.grad_images + (image * plan.all_channels + c0) * plane_size +
                (int64_t)y * plan.image_width + x;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      if (c0 + c >= plan.channels) break;
      narrow(plan.maps.scale[(c0 + c) * plan.maps.scale_step] * sum[c], target + c * plane_size);
    }
  }
}

template <typename G, typename I>
bool gather_plain_boxes(const PatchSet& set, const PatchGradient& grad, const ImageGradient& images,
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

template <typename G, typename I>
bool gather_boxes_of_any_size(const PatchSet& set, const PatchGradient& grad,
                              const ImageGradient& images, void* units, Stream stream) {
  using T = typename Arithmetic<G, I>::type;
  const int64_t count = set.batch * set.num_patches * (set.height + set.width);
  if (count > 0) {
    FASTCONTRAST_LAUNCH(stream, blocks_for(count, THREADS), THREADS, 0, resize_units<T>, set,
                        (T*)units);
  }
  ResizedPlan<T> plan;
  plan.coords = set.coords;
  plan.flips = set.flips;
  plan.units = (const T*)units;
  for (int i = 0; i < 5; ++i) plan.grad_stride[i] = grad.stride[i];
  plan.order = images.order;
  plan.starts = images.starts;
  plan.num_patches = set.num_patches;
  plan.all_channels = set.channels;
  plan.tiles_across = (set.image_width + TILE_COLUMNS - 1) / TILE_COLUMNS;
  plan.tiles_per_image = plan.tiles_across * ((set.image_height + TILE_ROWS - 1) / TILE_ROWS);
  plan.image_height = (int32_t)set.image_height;
  plan.image_width = (int32_t)set.image_width;
  plan.height = (int32_t)set.height;
  plan.width = (int32_t)set.width;
  plan.padding = set.padding;
  plan.bilinear = set.interpolation == Interpolation::bilinear;
  plan.antialias = set.antialias;
  const int64_t plane_size = set.image_height * set.image_width;
  const int64_t group = group_size(set);
  for (int64_t first = 0; first < set.channels; first += group) {
    plan.channels = first + group < set.channels ? group : set.channels - first;
    plan.channel_groups = (plan.channels + CHANNELS - 1) / CHANNELS;
    plan.maps = maps_of_group<T>(set, first, plan.channels);
    plan.grad = (const G*)grad.data + first * grad.stride[2];
    plan.grad_images = (I*)images.data + first * plane_size;
    plan.tiles = images.count * plan.channel_groups * plan.tiles_per_image;
    if (set.padding == Padding::edge) {
      FASTCONTRAST_LAUNCH(stream, blocks_for(plan.tiles, 1), THREADS, 0,
                          (gather_resized<G, I, true>), plan);
    } else {
      FASTCONTRAST_LAUNCH(stream, blocks_for(plan.tiles, 1), THREADS, 0,
                          (gather_resized<G, I, false>), plan);
    }
  }
  return true;
}

template <typename G, typename I>
bool gather(const PatchSet& set, const PatchGradient& grad, const ImageGradient& images,
            void* units, Stream stream) {
  return is_plain(set) ? gather_plain_boxes<G, I>(set, grad, images, stream)
                       : gather_boxes_of_any_size<G, I>(set, grad, images, units, stream);
}

template <typename G>
bool gather_to(const PatchSet& set, const PatchGradient& grad, const ImageGradient& images,
               void* units, Stream stream) {
  switch (images.type) {
    case Scalar::float16:
      return gather<G, Half>(set, grad, images, units, stream);
    case Scalar::bfloat16:
      return gather<G, BFloat16>(set, grad, images, units, stream);
    case Scalar::float32:
      return gather<G, float>(set, grad, images, units, stream);
    case Scalar::float64:
      return gather<G, double>(set, grad, images, units, stream);
    default:
      return false;
  }
}

}  // namespace

bool extract_patches_backward(const PatchSet& set, const PatchGradient& grad,
                              const ImageGradient& images, void* units, Stream stream) {
  if (images.count * set.channels * set.image_height * set.image_width == 0) return true;
  switch (grad.type) {
    case Scalar::float16:
      return gather_to<Half>(set, grad, images, units, stream);
    case Scalar::bfloat16:
      return gather_to<BFloat16>(set, grad, images, units, stream);
    case Scalar::float32:
      return gather_to<float>(set, grad, images, units, stream);
    case Scalar::float64:
      return gather_to<double>(set, grad, images, units, stream);
    default:
      return false;
  }
}

}  // namespace cuda
}  // namespace fastcontrast
