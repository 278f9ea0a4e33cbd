// Maths: out[b,k,c,y,x] = a_c·Σ_ij v_yi w_xj crop[c,i,j] + b_c, where the crop is the box of patch
//   (b,k), and beyond the image its padding; a flipped axis is written from its end. The weights
//   are those of common/resize.h.
// Tiling: a block owns 8 rows of 32 pixels of one patch, a thread one pixel, four channels at a
//   time. 40 threads find the taps of the rows and columns first; where boxes are drawn, one thread
//   draws before. Grids are 1-D; blocks stride over what is beyond.
// Memory: crops are read in place through their strides, pixels that several taps share from the
//   cache; the output is written once. Nothing is allocated.
// Numerics: weights are integers times the reciprocal of their sum, a lone tap has weight 1, and no
//   tap has weight 0. Sums in float, or double where an element type is double; one rounding at the
//   end. Numerators are 32-bit numbers: boxes and patches are below 2^30 pixels a side.
#include "cuda/channel_maps.h"
#include "cuda/extract_patches.h"
#include "cuda/launch.h"
#include "cuda/patch_boxes.h"

namespace fastcontrast {
namespace cuda {
namespace {

constexpr int TILE_ROWS = 8;
constexpr int TILE_COLUMNS = WARP;
constexpr int THREADS = TILE_ROWS * TILE_COLUMNS;
constexpr int CHANNELS = 4;  // that share the weights of a pixel

template <typename T>
struct ResizePlan {
  BoxSource boxes;
  const void* images;
  const int64_t* index;
  void* out;
  int64_t image_stride[4];
  int64_t out_stride[3];
  int64_t num_patches, channels;
  int64_t tiles, tiles_per_patch, tiles_across;
  int64_t patch_stride;  // of the output
  int32_t image_height, image_width, height, width;
  Padding padding;
  bool bilinear, antialias;
  ChannelMaps<T> maps;
  T fill[GROUP];
  int fill_step;
};

// The taps of one pixel of an axis: the t-th has numerator 2R - |distance + 2·out·t|.
template <typename T>
struct PixelTaps {
  int32_t first, count, distance;
  T unit;
};

template <typename T>
FC_INLINE PixelTaps<T> pixel_taps(const Resize& axis, int64_t i) {
  const Taps taps = taps_of(axis, i);
  const int64_t distance = (2 * taps.first + 1) * axis.out - (2 * i + 1) * axis.in;
  return {(int32_t)taps.first, (int32_t)taps.count, axis.single ? 0 : (int32_t)distance,
          (T)(1.0 / (double)numerators_of(axis, i))};
}

template <typename T>
FC_INLINE T tap_weight(const PixelTaps<T>& taps, int32_t t, int32_t in, int32_t out,
                       bool antialias) {
  if (taps.count == 1) return T(1);
  const int32_t distance = taps.distance + 2 * out * t;
  const int32_t radius = antialias && in > out ? in : out;
  return (T)(2 * radius - (distance < 0 ? -distance : distance)) * taps.unit;
}

template <typename In, typename Out>
__global__ void __launch_bounds__(THREADS, 2)  // or some compilers spill for a fourth block
    resize_patches(const __grid_constant__ ResizePlan<typename Arithmetic<In, Out>::type> plan) {
  using T = typename Arithmetic<In, Out>::type;
  __shared__ PatchBox shared;
  __shared__ PixelTaps<T> taps[TILE_ROWS + TILE_COLUMNS];
  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    const int64_t patch = tile / plan.tiles_per_patch;
    const int64_t rest = tile - patch * plan.tiles_per_patch;
    const int32_t top = (int32_t)(rest / plan.tiles_across * TILE_ROWS);
    const int32_t left = (int32_t)(rest % plan.tiles_across * TILE_COLUMNS);
    const PatchBox found = box_of<true>(plan.boxes, patch, rest == 0, &shared);
    const Box box = found.box;
    if (threadIdx.x < TILE_ROWS + TILE_COLUMNS) {
      const bool is_row = threadIdx.x < TILE_ROWS;
      const int32_t size = is_row ? plan.height : plan.width;
      const Resize axis =
          resize_of(is_row ? box.height : box.width, size, plan.bilinear, plan.antialias);
      const int32_t i = is_row ? top + threadIdx.x : left + threadIdx.x - TILE_ROWS;
      const bool flipped = found.flips & (is_row ? FLIP_VERTICAL : FLIP_HORIZONTAL);
      if (i < size) {
        taps[threadIdx.x] = pixel_taps<T>(axis, flipped ? size - 1 - i : i);
      }
    }
    __syncthreads();
    const int32_t y = top + threadIdx.x / TILE_COLUMNS, x = left + threadIdx.x % TILE_COLUMNS;
    if (y < plan.height && x < plan.width) {
      const PixelTaps<T> row = taps[threadIdx.x / TILE_COLUMNS];
      const PixelTaps<T> column = taps[TILE_ROWS + threadIdx.x % TILE_COLUMNS];
      const int64_t batch = patch / plan.num_patches;
      const In* in =
          (const In*)plan.images + (plan.index ? plan.index[batch] : batch) * plan.image_stride[0];
      Out* out = (Out*)plan.out + patch * plan.patch_stride + y * plan.out_stride[1] +
                 x * plan.out_stride[2];
      for (int64_t c0 = 0; c0 < plan.channels; c0 += CHANNELS) {
        T sum[CHANNELS] = {T(-0.0), T(-0.0), T(-0.0), T(-0.0)};  // -0 + x is x for both zeros
        for (int s = 0; s < row.count; ++s) {
          const T row_weight = tap_weight(row, s, box.height, plan.height, plan.antialias);
          const int64_t i =
              padded_position((int64_t)box.y0 + row.first + s, plan.image_height, plan.padding);
#pragma unroll 1
          for (int t = 0; t < column.count; ++t) {
            const T weight =
                row_weight * tap_weight(column, t, box.width, plan.width, plan.antialias);
            const int64_t j =
                padded_position((int64_t)box.x0 + column.first + t, plan.image_width, plan.padding);
            const bool filled = i < 0 || j < 0;
            const In* from = in + c0 * plan.image_stride[1] + i * plan.image_stride[2] +
                             j * plan.image_stride[3];
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) {
              if (c0 + c >= plan.channels) break;
              sum[c] += weight * (filled ? plan.fill[(c0 + c) * plan.fill_step]
                                         : (T)widen(from[c * plan.image_stride[1]]));
            }
          }
        }
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
          const int64_t channel = c0 + c;
          if (channel >= plan.channels) break;
          const T a = plan.maps.scale[channel * plan.maps.scale_step];
          const T b = plan.maps.offset[channel * plan.maps.offset_step];
          narrow(a * sum[c] + b, out + channel * plan.out_stride[0]);
        }
      }
    }
    __syncthreads();  // the next tile has other taps, and maybe another box
  }
}

template <typename In, typename Out>
bool resize(const BoxSource& boxes, const PatchSet& set, const Images& images,
            const PatchOutput& out, Stream stream) {
  using T = typename Arithmetic<In, Out>::type;
  ResizePlan<T> plan;
  plan.boxes = boxes;
  plan.index = images.index;
  for (int i = 0; i < 4; ++i) plan.image_stride[i] = images.stride[i];
  for (int i = 0; i < 3; ++i) plan.out_stride[i] = out.stride[i];
  plan.num_patches = set.num_patches;
  plan.tiles_across = (set.width + TILE_COLUMNS - 1) / TILE_COLUMNS;
  plan.tiles_per_patch = plan.tiles_across * ((set.height + TILE_ROWS - 1) / TILE_ROWS);
  plan.tiles = set.batch * set.num_patches * plan.tiles_per_patch;
  plan.patch_stride = set.channels * set.height * set.width;
  plan.image_height = (int32_t)set.image_height;
  plan.image_width = (int32_t)set.image_width;
  plan.height = (int32_t)set.height;
  plan.width = (int32_t)set.width;
  plan.padding = set.padding;
  plan.bilinear = set.interpolation == Interpolation::bilinear;
  plan.antialias = set.antialias;
  plan.fill_step = set.fill_count > 1;
  const int64_t group = group_size(set);
  for (int64_t first = 0; first < set.channels; first += group) {
    plan.channels = first + group < set.channels ? group : set.channels - first;
    plan.maps = maps_of_group<T>(set, first, plan.channels);
    for (int64_t c = 0; c < GROUP; ++c) {
      const int64_t channel = first + (c < plan.channels ? c : plan.channels - 1);
      plan.fill[c] = (T)(set.fill ? set.fill[plan.fill_step ? channel : 0] : 0.0);
    }
    plan.images = (const In*)images.data + first * images.stride[1];
    plan.out = (Out*)out.data + first * out.stride[0];
    FASTCONTRAST_LAUNCH(stream, blocks_for(plan.tiles, 1), THREADS, 0, (resize_patches<In, Out>),
                        plan);
  }
  return true;
}

template <typename In>
bool resize_to(const BoxSource& boxes, const PatchSet& set, const Images& images,
               const PatchOutput& out, Stream stream) {
  switch (out.type) {
    case Scalar::uint8:
      return resize<In, uint8_t>(boxes, set, images, out, stream);
    case Scalar::float16:
      return resize<In, Half>(boxes, set, images, out, stream);
    case Scalar::bfloat16:
      return resize<In, BFloat16>(boxes, set, images, out, stream);
    case Scalar::float32:
      return resize<In, float>(boxes, set, images, out, stream);
    case Scalar::float64:
      return resize<In, double>(boxes, set, images, out, stream);
  }
  return false;
}

}  // namespace

bool extract_resized(const BoxSource& boxes, const PatchSet& set, const Images& images,
                     const PatchOutput& out, Stream stream) {
  switch (images.type) {
    case Scalar::uint8:
      return resize_to<uint8_t>(boxes, set, images, out, stream);
    case Scalar::float16:
      return resize_to<Half>(boxes, set, images, out, stream);
    case Scalar::bfloat16:
      return resize_to<BFloat16>(boxes, set, images, out, stream);
    case Scalar::float32:
      return resize_to<float>(boxes, set, images, out, stream);
    case Scalar::float64:
      return resize_to<double>(boxes, set, images, out, stream);
  }
  return false;
}

}  // namespace cuda
}  // namespace fastcontrast
