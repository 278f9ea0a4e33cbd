// Maths: grad_images[b,c,Y,X] = a_c·Σ grad[b,k,c,y,x] over the patches that hold (Y, X): the
//   transpose of extract_patches.cpp, resizing and padding included.
// Tiling: a thread owns whole planes (b,c) of the images, to which it adds patches in the order of
//   k. One writer per element, fixed order, no atomics: results do not depend on the thread count.
// Memory: a plane is summed in cache and written once, past the caches if the gradient is larger
//   than them; rows that no patch reaches are written as zeros.
// Numerics: sums in float, or double where an element type is double; one rounding at the end.
#include "cpu/extract_patches.h"

#include "cpu/patch_planes.h"

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_ISA {
namespace {

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
FC_INLINE void add_box(const PatchSet& set, const PatchGradient& grad, int64_t patch,
                       const G* values, T* sums) {
  const Box box = set.coords[patch];
  const int flips = flips_of(set, patch);
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

template <typename G, typename T>
void add_resampled(Resampler<T>& r, const PatchSet& set, const PatchGradient& grad, int64_t patch,
                   const G* values, T* sums) {
  prepare(r, set, patch);
  memset(r.crop, 0, (int64_t)r.box.height * r.box.width * sizeof(T));
  for (int64_t y = 0; y < set.height; ++y) {
    const G* row = values + y * grad.stride[3];
    for (int64_t x = 0; x < set.width; ++x) r.line[x] = (T)widen(row[x * grad.stride[4]]);
    add_resampled_row(r, y);
  }
  add_crop(r, set, sums);
}

// The rows of `coords` that belong to one image.
struct Sources {
  const int64_t* order;  // null: the image's own number
  int64_t begin, end;
};

FC_INLINE Sources sources_of(const ImageGradient& images, int64_t image) {
  if (!images.order) return Sources{nullptr, image, image + 1};
  return Sources{images.order, images.starts[image], images.starts[image + 1]};
}

FC_INLINE int64_t source_row(const Sources& sources, int64_t i) {
  return sources.order ? sources.order[i] : i;
}

// Rows of the image that its patches reach, half-open.
struct Rows {
  int64_t begin, end;
};

FC_INLINE Rows covered_rows(const PatchSet& set, const Sources& sources) {
  if (set.padding == Padding::reflect) return Rows{0, set.image_height};
  Rows rows{set.image_height, 0};
  for (int64_t i = sources.begin; i < sources.end; ++i) {
    const Box* boxes = set.coords + source_row(sources, i) * set.num_patches;
    for (int64_t k = 0; k < set.num_patches; ++k) {
      const int64_t y0 = boxes[k].y0, y1 = y0 + boxes[k].height;
      const int64_t last = set.image_height - 1;
      const int64_t begin = y0 < 0 ? 0 : y0 > last ? last : y0;
      const int64_t end = y1 < 1 ? 1 : y1 > last + 1 ? last + 1 : y1;
      if (begin < rows.begin) rows.begin = begin;
      if (end > rows.end) rows.end = end;
    }
  }
  return rows.begin < rows.end ? rows : Rows{0, 0};
}

// A plane is summed in memory that stays in cache, and written once.
template <bool stream, typename G, typename I>
bool gather_planes(const PatchSet& set, const PatchGradient& grad, const ImageGradient& images) {
  using T = typename Arithmetic<G, I>::type;
  const G* source = static_cast<const G*>(grad.data);
  const int64_t width = set.image_width;
  const int64_t plane_size = set.image_height * width;
  bool complete = true;
#pragma omp parallel num_threads(set.threads) if (set.threads > 1) reduction(&& : complete)
  {
    T* sums = static_cast<T*>(malloc(plane_size * sizeof(T) + 1));
    Resampler<T> r;
    complete = open_resampler(r, set) && sums;
#pragma omp for schedule(static)
    for (int64_t p = 0; p < images.count * set.channels; ++p) {
      if (!complete) continue;
      const int64_t image = p / set.channels;
      const int64_t channel = p - image * set.channels;
      const Sources sources = sources_of(images, image);
      const Rows rows = covered_rows(set, sources);
      const int64_t begin = rows.begin * width, count = (rows.end - rows.begin) * width;
      memset(sums + begin, 0, count * sizeof(T));
      for (int64_t i = sources.begin; i < sources.end; ++i) {
        const int64_t row = source_row(sources, i);
        for (int64_t k = 0; k < set.num_patches; ++k) {
          const int64_t patch = row * set.num_patches + k;
          const G* values =
              source + row * grad.stride[0] + k * grad.stride[1] + channel * grad.stride[2];
          if (plain(set, patch)) {
            add_box(set, grad, patch, values, sums);
          } else {
            add_resampled(r, set, grad, patch, values, sums);
          }
        }
      }
      const T a = (T)channel_value(set.scale, set.scale_count, channel, 1.0);
      I* target = static_cast<I*>(images.data) + p * plane_size;
      zero_row<stream>(target, begin);
      map_row<Stride::forward, stream>(sums + begin, 1, target + begin, count, a, (T)-0.0);
      zero_row<stream>(target + begin + count, plane_size - begin - count);
    }
    if (stream) end_streams();
    free(r.memory);
    free(sums);
  }
  return complete;
}

template <typename G, typename I>
bool gather(const PatchSet& set, const PatchGradient& grad, const ImageGradient& images) {
  const int64_t elements = images.count * set.channels * set.image_height * set.image_width;
  const bool stream = StoresLanes<I>::value &&
                      streams(static_cast<const I*>(images.data), elements, set.image_width);
  return stream ? gather_planes<true, G, I>(set, grad, images)
                : gather_planes<false, G, I>(set, grad, images);
}

template <typename G>
bool gather_to(const PatchSet& set, const PatchGradient& grad, const ImageGradient& images) {
  switch (images.type) {
    case Scalar::float16:
      return gather<G, Half>(set, grad, images);
    case Scalar::bfloat16:
      return gather<G, BFloat16>(set, grad, images);
    case Scalar::float32:
      return gather<G, float>(set, grad, images);
    case Scalar::float64:
      return gather<G, double>(set, grad, images);
    default:
      return false;
  }
}

}  // namespace

bool extract_patches_backward(const PatchSet& set, const PatchGradient& grad,
                              const ImageGradient& images) {
  switch (grad.type) {
    case Scalar::float16:
      return gather_to<Half>(set, grad, images);
    case Scalar::bfloat16:
      return gather_to<BFloat16>(set, grad, images);
    case Scalar::float32:
      return gather_to<float>(set, grad, images);
    case Scalar::float64:
      return gather_to<double>(set, grad, images);
    default:
      return false;
  }
}

}  // namespace FASTCONTRAST_ISA
}  // namespace cpu
}  // namespace fastcontrast
