// Maths: out[b,k,c,y,x] = a_c·images[b,c,Y,X] + b_c, where (Y, X) walks the box of patch (b,k),
//   backwards along a flipped axis; where the box is resized, images is the crop resized, and
//   beyond the image its padding. common/crop.h has the walk, common/resize.h the weights.
// Tiling: a thread owns consecutive planes (b,k,c) of the output. One writer per element: results
//   do not depend on the thread count.
// Memory: the output is written once, past the caches if it is larger than them; the boxes' pixels
//   are read in place through their strides, the next plane's rows fetched ahead.
// Numerics: float, or double where an element type is double; one rounding at the end. Same type
//   in and out without an affine map is a copy of bits. The absent offset is -0, so that x·1 + b is
//   x for both zeros.
#include "cpu/extract_patches.h"

#include "cpu/patch_planes.h"

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_ISA {
namespace {

FC_INLINE int64_t image_of(const PatchSet& set, const Images& images, int64_t patch) {
  const int64_t row = patch / set.num_patches;
  return images.index ? images.index[row] : row;
}

// One plane (b, k, c) of the output. `next` is the plane that follows: its rows are fetched on the
// way, because a row of a patch is too short for the processor to see the walk coming.
template <bool copies, bool stream, Stride kind, typename In, typename Out, typename T>
void cut_plane(const Plane& plane, const In* in, const Plane& next, const In* next_in, Out* out,
               T a, T b) {
  const In* row = in + plane.rows.first + plane.columns.first;
  const In* next_row = next_in + next.rows.first + next.columns.first;
  for (int64_t y = 0; y < plane.height; ++y) {
    prefetch(next_row);
    if constexpr (copies) {
      copy_row<kind, stream>(row, plane.columns.step, out, plane.width);
    } else {
      map_row<kind, stream>(row, plane.columns.step, out, plane.width, a, b);
    }
    row += plane.rows.step;
    next_row += next.rows.step;
    out += plane.width;
  }
}

// Every plane (b, k, c) of the output; `In` and `Out` are bits of equal size where `copies`.
template <bool copies, bool stream, typename In, typename Out>
void cut_planes(const PatchSet& set, const Images& images, Out* out) {
  using T = typename Arithmetic<In, Out>::type;
  const In* source = static_cast<const In*>(images.data);
  const int64_t planes = set.batch * set.num_patches * set.channels;
  const int64_t plane_size = set.height * set.width;
#pragma omp parallel num_threads(set.threads) if (set.threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < planes; ++p) {
      const int64_t patch = p / set.channels;
      const int64_t channel = p - patch * set.channels;
      const Plane plane = plane_of(set, patch, images.stride[2], images.stride[3]);
      const In* in = source + image_of(set, images, patch) * images.stride[0];
      const In* next_in = in;
      Plane next = plane;
      if (channel + 1 < set.channels) {
        next_in += images.stride[1] * (channel + 1);
      } else if (p + 1 < planes) {
        next = plane_of(set, patch + 1, images.stride[2], images.stride[3]);
        next_in = source + image_of(set, images, patch + 1) * images.stride[0];
      }
      in += channel * images.stride[1];
      const T a = (T)channel_value(set.scale, set.scale_count, channel, 1.0);
      const T b = (T)channel_value(set.offset, set.offset_count, channel, -0.0);
      Out* target = out + p * plane_size;
      switch (stride_kind(plane.columns.step)) {
        case Stride::forward:
          cut_plane<copies, stream, Stride::forward>(plane, in, next, next_in, target, a, b);
          break;
        case Stride::backward:
          cut_plane<copies, stream, Stride::backward>(plane, in, next, next_in, target, a, b);
          break;
        default:
          cut_plane<copies, false, Stride::any>(plane, in, next, next_in, target, a, b);
      }
    }
    if (stream) end_streams();
  }
}

// The same for outputs whose rows are not contiguous.
template <bool copies, typename In, typename Out>
void cut_apart(const PatchSet& set, const Images& images, const PatchOutput& output) {
  using T = typename Arithmetic<In, Out>::type;
  const int64_t planes = set.batch * set.num_patches * set.channels;
  const int64_t patch_size = set.channels * set.height * set.width;
#pragma omp parallel for num_threads(set.threads) if (set.threads > 1) schedule(static)
  for (int64_t p = 0; p < planes; ++p) {
    const int64_t patch = p / set.channels;
    const int64_t channel = p - patch * set.channels;
    const Plane plane = plane_of(set, patch, images.stride[2], images.stride[3]);
    const In* in = static_cast<const In*>(images.data) +
                   image_of(set, images, patch) * images.stride[0] + channel * images.stride[1] +
                   plane.rows.first + plane.columns.first;
    Out* out = static_cast<Out*>(output.data) + patch * patch_size + channel * output.stride[0];
    const T a = (T)channel_value(set.scale, set.scale_count, channel, 1.0);
    const T b = (T)channel_value(set.offset, set.offset_count, channel, -0.0);
    for (int64_t y = 0; y < set.height; ++y) {
      if constexpr (copies) {
        for (int64_t x = 0; x < set.width; ++x) {
          out[x * output.stride[2]] = in[x * plane.columns.step];
        }
      } else {
        map_pixels(in, plane.columns.step, out, output.stride[2], set.width, a, b);
      }
      in += plane.rows.step;
      out += output.stride[1];
    }
  }
}

template <bool copies, typename In, typename Out>
bool cut(const PatchSet& set, const Images& images, const PatchOutput& output) {
  Out* target = static_cast<Out*>(output.data);
  const int64_t elements = set.batch * set.num_patches * set.channels * set.height * set.width;
  if (output.stride[2] != 1) {
    cut_apart<copies, In, Out>(set, images, output);
  } else if ((copies || StoresLanes<Out>::value) && streams(target, elements, set.width)) {
    cut_planes<copies, true, In>(set, images, target);
  } else {
    cut_planes<copies, false, In>(set, images, target);
  }
  return true;
}

// Boxes of any size, which may reach beyond the image.
template <typename In, typename Out>
bool resample(const PatchSet& set, const Images& images, const PatchOutput& output) {
  using T = typename Arithmetic<In, Out>::type;
  const int64_t planes = set.batch * set.num_patches * set.channels;
  const int64_t patch_size = set.channels * set.height * set.width;
  bool complete = true;
#pragma omp parallel num_threads(set.threads) if (set.threads > 1) reduction(&& : complete)
  {
    Resampler<T> r;
    complete = open_resampler(r, set);
#pragma omp for schedule(static)
    for (int64_t p = 0; p < planes; ++p) {
      if (!complete) continue;
      const int64_t patch = p / set.channels;
      const int64_t channel = p - patch * set.channels;
      const In* in = static_cast<const In*>(images.data) +
                     image_of(set, images, patch) * images.stride[0] + channel * images.stride[1];
      Out* out = static_cast<Out*>(output.data) + patch * patch_size + channel * output.stride[0];
      const T a = (T)channel_value(set.scale, set.scale_count, channel, 1.0);
      const T b = (T)channel_value(set.offset, set.offset_count, channel, -0.0);
      prepare(r, set, patch);
      const T* line = resampled(r, set, in, images.stride[2], images.stride[3],
                                (T)channel_value(set.fill, set.fill_count, channel, 0.0));
      for (int64_t y = 0; y < set.height; ++y, out += output.stride[1], line += set.width) {
        if (output.stride[2] == 1) {
          map_row<Stride::forward, false>(line, 1, out, set.width, a, b);
        } else {
          map_pixels(line, 1, out, output.stride[2], set.width, a, b);
        }
      }
    }
    free(r.memory);
  }
  return complete;
}

template <typename In, typename Out>
bool write(const PatchSet& set, const Images& images, const PatchOutput& output) {
  return is_plain(set) ? cut<false, In, Out>(set, images, output)
                       : resample<In, Out>(set, images, output);
}

template <typename In>
bool write_to(const PatchSet& set, const Images& images, const PatchOutput& output) {
  switch (output.type) {
    case Scalar::uint8:
      return write<In, uint8_t>(set, images, output);
    case Scalar::float16:
      return write<In, Half>(set, images, output);
    case Scalar::bfloat16:
      return write<In, BFloat16>(set, images, output);
    case Scalar::float32:
      return write<In, float>(set, images, output);
    case Scalar::float64:
      return write<In, double>(set, images, output);
  }
  return false;
}

bool copy_bits(const PatchSet& set, const Images& images, const PatchOutput& output) {
  switch (images.type) {
    case Scalar::uint8:
      return cut<true, uint8_t, uint8_t>(set, images, output);
    case Scalar::float16:
    case Scalar::bfloat16:
      return cut<true, uint16_t, uint16_t>(set, images, output);
    case Scalar::float32:
      return cut<true, uint32_t, uint32_t>(set, images, output);
    case Scalar::float64:
      return cut<true, uint64_t, uint64_t>(set, images, output);
  }
  return false;
}

}  // namespace

bool extract_patches_forward(const PatchSet& set, const Images& images, const PatchOutput& output) {
  if (is_plain(set) && images.type == output.type && !set.scale && !set.offset) {
    return copy_bits(set, images, output);
  }
  switch (images.type) {
    case Scalar::uint8:
      return write_to<uint8_t>(set, images, output);
    case Scalar::float16:
      return write_to<Half>(set, images, output);
    case Scalar::bfloat16:
      return write_to<BFloat16>(set, images, output);
    case Scalar::float32:
      return write_to<float>(set, images, output);
    case Scalar::float64:
      return write_to<double>(set, images, output);
  }
  return false;
}

}  // namespace FASTCONTRAST_ISA
}  // namespace cpu
}  // namespace fastcontrast
