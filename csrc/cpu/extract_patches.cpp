// Maths: out[b,k,c,y,x] = a_c·images[b,c,Y,X] + b_c, where (Y, X) walks the box of patch (b,k),
//   backwards along a flipped axis; its transpose: grad_images[b,c,Y,X] = a_c·Σ grad[b,k,c,y,x]
//   over the patches that hold (Y, X). common/crop.h has the draws and the walk.
// Tiling: forward, a thread owns consecutive planes (b,k,c) of the output; backward, whole planes
//   (b,c) of the images, to which it adds patches in the order of k. One writer per element, fixed
//   order: results do not depend on the thread count.
// Memory: the output is written once, the boxes' pixels are read in place through their strides;
//   backward zeroes a plane and adds to it while it is in cache.
// Numerics: float, or double where an element type is double; one rounding at the end. Same type
//   in and out without an affine map is a copy of bits. The absent offset is -0, so that x·1 + b is
//   x for both zeros.
#include "cpu/extract_patches.h"

#include <string.h>

#include "cpu/pixel_rows.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_ISA {
namespace {

// What the walk of one patch through one plane needs.
struct Plane {
  Walk rows, columns;
  int64_t height, width;
};

FC_INLINE Plane plane_of(const PatchSet& set, int64_t patch, int64_t row_stride,
                         int64_t column_stride) {
  const Box box = set.coords[patch];
  const int flips = set.flips ? set.flips[patch] : 0;
  Plane plane;
  plane.rows = walk(box.y0, set.height, row_stride, flips & FLIP_VERTICAL);
  plane.columns = walk(box.x0, set.width, column_stride, flips & FLIP_HORIZONTAL);
  plane.height = set.height;
  plane.width = set.width;
  return plane;
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

FC_INLINE double channel_value(const double* values, int64_t count, int64_t channel,
                               double absent) {
  return values ? values[count == 1 ? 0 : channel] : absent;
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
      const In* in = source + patch / set.num_patches * images.stride[0];
      const In* next_in = in;
      Plane next = plane;
      if (channel + 1 < set.channels) {
        next_in += images.stride[1] * (channel + 1);
      } else if (p + 1 < planes) {
        next = plane_of(set, patch + 1, images.stride[2], images.stride[3]);
        next_in = source + (patch + 1) / set.num_patches * images.stride[0];
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

template <bool copies, typename In, typename Out>
bool cut(const PatchSet& set, const Images& images, void* out) {
  Out* target = static_cast<Out*>(out);
  const int64_t elements = set.batch * set.num_patches * set.channels * set.height * set.width;
  if ((copies || HasLanes<Out>::value) && streams(target, elements, set.width)) {
    cut_planes<copies, true, In>(set, images, target);
  } else {
    cut_planes<copies, false, In>(set, images, target);
  }
  return true;
}

template <typename In>
bool cut_to(const PatchSet& set, const Images& images, void* out, Scalar out_type) {
  switch (out_type) {
    case Scalar::float16:
      return cut<false, In, Half>(set, images, out);
    case Scalar::bfloat16:
      return cut<false, In, BFloat16>(set, images, out);
    case Scalar::float32:
      return cut<false, In, float>(set, images, out);
    case Scalar::float64:
      return cut<false, In, double>(set, images, out);
    default:
      return false;
  }
}

bool copy_bits(const PatchSet& set, const Images& images, void* out) {
  switch (images.type) {
    case Scalar::uint8:
      return cut<true, uint8_t, uint8_t>(set, images, out);
    case Scalar::float16:
    case Scalar::bfloat16:
      return cut<true, uint16_t, uint16_t>(set, images, out);
    case Scalar::float32:
      return cut<true, uint32_t, uint32_t>(set, images, out);
    case Scalar::float64:
      return cut<true, uint64_t, uint64_t>(set, images, out);
  }
  return false;
}

template <Stride kind, typename G, typename T>
void add_plane(const Plane& plane, const G* grad, T* sums, int64_t sums_stride) {
  const G* in = grad + plane.rows.first + plane.columns.first;
  for (int64_t y = 0; y < plane.height; ++y) {
    add_row<kind>(in, plane.columns.step, sums, plane.width);
    in += plane.rows.step;
    sums += sums_stride;
  }
}

// The walk goes through the patch's gradient here, and the sums are visited in image order.
template <typename G, typename T>
FC_INLINE void add_patch(const PatchSet& set, const PatchGradient& grad, int64_t patch,
                         const G* values, T* sums) {
  const Box box = set.coords[patch];
  const int flips = set.flips ? set.flips[patch] : 0;
  Plane plane;
  plane.rows = walk(0, set.height, grad.stride[3], flips & FLIP_VERTICAL);
  plane.columns = walk(0, set.width, grad.stride[4], flips & FLIP_HORIZONTAL);
  plane.height = set.height;
  plane.width = set.width;
  T* target = sums + box.y0 * set.image_width + box.x0;
  const Stride kind = stride_kind(plane.columns.step);
  if (kind == Stride::forward) {
    return add_plane<Stride::forward>(plane, values, target, set.image_width);
  }
  if (kind == Stride::backward) {
    return add_plane<Stride::backward>(plane, values, target, set.image_width);
  }
  add_plane<Stride::any>(plane, values, target, set.image_width);
}

FC_INLINE int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Rows of the image that the patches of one image reach, half-open.
struct Rows {
  int64_t begin, end;
};

FC_INLINE Rows covered_rows(const PatchSet& set, int64_t image) {
  Rows rows{set.image_height, 0};
  for (int64_t k = 0; k < set.num_patches; ++k) {
    const int64_t y0 = set.coords[image * set.num_patches + k].y0;
    if (y0 < rows.begin) rows.begin = y0;
    if (y0 + set.height > rows.end) rows.end = y0 + set.height;
  }
  return rows.begin < rows.end ? rows : Rows{0, 0};
}

// A plane is summed in `scratch`, which stays in cache, and written once.
template <bool stream, typename G, typename I, typename T>
void gather_planes(const PatchSet& set, const PatchGradient& grad, I* grad_images, T* scratch) {
  const G* source = static_cast<const G*>(grad.data);
  const int64_t width = set.image_width;
  const int64_t plane_size = set.image_height * width;
#pragma omp parallel num_threads(set.threads) if (set.threads > 1)
  {
    T* sums = scratch + thread_number() * plane_size;
#pragma omp for schedule(static)
    for (int64_t p = 0; p < set.batch * set.channels; ++p) {
      const int64_t image = p / set.channels;
      const int64_t channel = p - image * set.channels;
      const Rows rows = covered_rows(set, image);
      const int64_t begin = rows.begin * width, count = (rows.end - rows.begin) * width;
      memset(sums + begin, 0, count * sizeof(T));
      for (int64_t k = 0; k < set.num_patches; ++k) {
        const G* values =
            source + image * grad.stride[0] + k * grad.stride[1] + channel * grad.stride[2];
        add_patch(set, grad, image * set.num_patches + k, values, sums);
      }
      const T a = (T)channel_value(set.scale, set.scale_count, channel, 1.0);
      I* target = grad_images + p * plane_size;
      zero_row<stream>(target, begin);
      map_row<Stride::forward, stream>(sums + begin, 1, target + begin, count, a, (T)-0.0);
      zero_row<stream>(target + begin + count, plane_size - begin - count);
    }
    if (stream) end_streams();
  }
}

template <typename G, typename I>
bool gather(const PatchSet& set, const PatchGradient& grad, void* grad_images, void* scratch) {
  using T = typename Arithmetic<G, I>::type;
  I* target = static_cast<I*>(grad_images);
  T* sums = static_cast<T*>(scratch);
  const int64_t elements = set.batch * set.channels * set.image_height * set.image_width;
  if (HasLanes<I>::value && streams(target, elements, set.image_width)) {
    gather_planes<true, G>(set, grad, target, sums);
  } else {
    gather_planes<false, G>(set, grad, target, sums);
  }
  return true;
}

template <typename G>
bool gather_to(const PatchSet& set, const PatchGradient& grad, void* grad_images, Scalar type,
               void* sums) {
  switch (type) {
    case Scalar::float16:
      return gather<G, Half>(set, grad, grad_images, sums);
    case Scalar::bfloat16:
      return gather<G, BFloat16>(set, grad, grad_images, sums);
    case Scalar::float32:
      return gather<G, float>(set, grad, grad_images, sums);
    case Scalar::float64:
      return gather<G, double>(set, grad, grad_images, sums);
    default:
      return false;
  }
}

}  // namespace

bool extract_patches_forward(const PatchSet& set, const Images& images, void* out,
                             Scalar out_type) {
  if (images.type == out_type && !set.scale && !set.offset) return copy_bits(set, images, out);
  switch (images.type) {
    case Scalar::uint8:
      return cut_to<uint8_t>(set, images, out, out_type);
    case Scalar::float16:
      return cut_to<Half>(set, images, out, out_type);
    case Scalar::bfloat16:
      return cut_to<BFloat16>(set, images, out, out_type);
    case Scalar::float32:
      return cut_to<float>(set, images, out, out_type);
    case Scalar::float64:
      return cut_to<double>(set, images, out, out_type);
  }
  return false;
}

bool extract_patches_backward(const PatchSet& set, const PatchGradient& grad, void* grad_images,
                              Scalar image_type, void* sums) {
  switch (grad.type) {
    case Scalar::float16:
      return gather_to<Half>(set, grad, grad_images, image_type, sums);
    case Scalar::bfloat16:
      return gather_to<BFloat16>(set, grad, grad_images, image_type, sums);
    case Scalar::float32:
      return gather_to<float>(set, grad, grad_images, image_type, sums);
    case Scalar::float64:
      return gather_to<double>(set, grad, grad_images, image_type, sums);
    default:
      return false;
  }
}

}  // namespace FASTCONTRAST_ISA
}  // namespace cpu
}  // namespace fastcontrast
