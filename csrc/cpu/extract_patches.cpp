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

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_ISA {
namespace {

// Direction of a walk along columns. The two unit strides get loops of their own: the compiler
// knows the stride and loads whole vectors, reversed for `backward`.
enum class Stride { any, forward, backward };

FC_INLINE Stride stride_kind(int64_t step) {
  return step == 1 ? Stride::forward : step == -1 ? Stride::backward : Stride::any;
}

template <Stride kind>
FC_INLINE int64_t stride_value(int64_t step) {
  return kind == Stride::forward ? 1 : kind == Stride::backward ? -1 : step;
}

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

template <Stride kind, typename In, typename Out, typename T>
FC_INLINE void map_row(const In* __restrict in, int64_t step, Out* __restrict out, int64_t width,
                       T a, T b) {
#pragma omp simd
  for (int64_t x = 0; x < width; ++x) {
    narrow(a * (T)widen(in[x * stride_value<kind>(step)]) + b, &out[x]);
  }
}

#if defined(__AVX2__)
// Bytes to floats, the case that most batches of images are, by hand: compilers choose one length
// of vector for bytes and floats alike, and leave patches of 16 to 63 pixels to scalar code.
#if defined(__AVX512F__)
constexpr int BLOCK = 16;
constexpr __mmask16 ALL = 0xFFFF;  // the unmasked forms draw a false warning from GCC 12
FC_INLINE void map_block(__m128i bytes, float* out, float a, float b) {
  const __m512 floats = _mm512_maskz_cvtepi32_ps(ALL, _mm512_maskz_cvtepu8_epi32(ALL, bytes));
  _mm512_storeu_ps(out, _mm512_fmadd_ps(floats, _mm512_set1_ps(a), _mm512_set1_ps(b)));
}
FC_INLINE __m128i load_block(const uint8_t* in) { return _mm_loadu_si128((const __m128i*)in); }
FC_INLINE __m128i reversed_bytes(__m128i bytes) {
  return _mm_shuffle_epi8(bytes,
                          _mm_setr_epi8(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
}
#else
constexpr int BLOCK = 8;
FC_INLINE void map_block(__m128i bytes, float* out, float a, float b) {
  const __m256 floats = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
  _mm256_storeu_ps(out, _mm256_fmadd_ps(floats, _mm256_set1_ps(a), _mm256_set1_ps(b)));
}
FC_INLINE __m128i load_block(const uint8_t* in) { return _mm_loadl_epi64((const __m128i*)in); }
FC_INLINE __m128i reversed_bytes(__m128i bytes) {
  return _mm_shuffle_epi8(bytes,
                          _mm_setr_epi8(7, 6, 5, 4, 3, 2, 1, 0, -1, -1, -1, -1, -1, -1, -1, -1));
}
#endif

// The last block overlaps the one before, so that no pixel is left to scalar code.
template <Stride kind>
FC_INLINE void map_row(const uint8_t* __restrict in, int64_t step, float* __restrict out,
                       int64_t width, float a, float b) {
  if (kind == Stride::any || width < BLOCK) {
    return map_row<kind, uint8_t, float, float>(in, step, out, width, a, b);
  }
  for (int64_t begin = 0; begin < width; begin += BLOCK) {
    const int64_t x = begin + BLOCK <= width ? begin : width - BLOCK;
    if (kind == Stride::forward) {
      map_block(load_block(in + x), out + x, a, b);
    } else {
      map_block(reversed_bytes(load_block(in - x - (BLOCK - 1))), out + x, a, b);
    }
  }
}
#endif

template <Stride kind, typename In, typename Out, typename T>
void map_plane(const Plane& plane, const In* images, Out* out, T a, T b) {
  for (int64_t y = 0; y < plane.height; ++y) {
    map_row<kind>(images + plane.rows.first + y * plane.rows.step + plane.columns.first,
                  plane.columns.step, out + y * plane.width, plane.width, a, b);
  }
}

// Copy of bits; T is an unsigned integer of the element's size.
template <Stride kind, typename T>
void copy_plane(const Plane& plane, const T* images, T* out) {
  const int64_t step = stride_value<kind>(plane.columns.step);
  const int64_t width = plane.width;
  for (int64_t y = 0; y < plane.height; ++y) {
    const T* __restrict in = images + plane.rows.first + y * plane.rows.step + plane.columns.first;
    T* __restrict row = out + y * width;
    if (kind == Stride::forward) {
      memcpy(row, in, width * sizeof(T));
    } else {
#pragma omp simd
      for (int64_t x = 0; x < width; ++x) row[x] = in[x * step];
    }
  }
}

template <typename In, typename Out>
FC_INLINE void map_patch(const Plane& plane, const In* images, Out* out, double scale,
                         double offset) {
  using T = typename Arithmetic<In, Out>::type;
  const T a = (T)scale, b = (T)offset;
  const Stride kind = stride_kind(plane.columns.step);
  if (kind == Stride::forward) return map_plane<Stride::forward>(plane, images, out, a, b);
  if (kind == Stride::backward) return map_plane<Stride::backward>(plane, images, out, a, b);
  map_plane<Stride::any>(plane, images, out, a, b);
}

template <typename T>
FC_INLINE void copy_patch(const Plane& plane, const T* images, T* out) {
  const Stride kind = stride_kind(plane.columns.step);
  if (kind == Stride::forward) return copy_plane<Stride::forward>(plane, images, out);
  if (kind == Stride::backward) return copy_plane<Stride::backward>(plane, images, out);
  copy_plane<Stride::any>(plane, images, out);
}

FC_INLINE double channel_value(const double* values, int64_t count, int64_t channel,
                               double absent) {
  return values ? values[count == 1 ? 0 : channel] : absent;
}

// Every plane (b, k, c) of the output; `In` and `Out` are bits of equal size where `copies`.
template <bool copies, typename In, typename Out>
bool cut(const PatchSet& set, const Images& images, void* out) {
  const In* source = static_cast<const In*>(images.data);
  Out* target = static_cast<Out*>(out);
  const int64_t planes = set.batch * set.num_patches * set.channels;
  const int64_t plane_size = set.height * set.width;
#pragma omp parallel for num_threads(set.threads) if (set.threads > 1) schedule(static)
  for (int64_t p = 0; p < planes; ++p) {
    const int64_t patch = p / set.channels;
    const int64_t channel = p - patch * set.channels;
    const int64_t image = patch / set.num_patches;
    const Plane plane = plane_of(set, patch, images.stride[2], images.stride[3]);
    const In* in = source + image * images.stride[0] + channel * images.stride[1];
    if constexpr (copies) {
      copy_patch(plane, in, target + p * plane_size);
    } else {
      map_patch(plane, in, target + p * plane_size,
                channel_value(set.scale, set.scale_count, channel, 1.0),
                channel_value(set.offset, set.offset_count, channel, -0.0));
    }
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
  const int64_t step = stride_value<kind>(plane.columns.step);
  const int64_t width = plane.width;
  for (int64_t y = 0; y < plane.height; ++y) {
    const G* __restrict in = grad + plane.rows.first + y * plane.rows.step + plane.columns.first;
    T* __restrict row = sums + y * sums_stride;
#pragma omp simd
    for (int64_t x = 0; x < width; ++x) row[x] += (T)widen(in[x * step]);
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

template <typename G, typename I>
bool gather(const PatchSet& set, const PatchGradient& grad, void* grad_images, void* scratch) {
  using T = typename Arithmetic<G, I>::type;
  const G* source = static_cast<const G*>(grad.data);
  const int64_t plane_size = set.image_height * set.image_width;
#pragma omp parallel for num_threads(set.threads) if (set.threads > 1) schedule(static)
  for (int64_t p = 0; p < set.batch * set.channels; ++p) {
    const int64_t image = p / set.channels;
    const int64_t channel = p - image * set.channels;
    I* target = static_cast<I*>(grad_images) + p * plane_size;
    T* sums = scratch ? static_cast<T*>(scratch) + thread_number() * plane_size
                      : reinterpret_cast<T*>(target);
    memset(sums, 0, plane_size * sizeof(T));
    for (int64_t k = 0; k < set.num_patches; ++k) {
      const G* values =
          source + image * grad.stride[0] + k * grad.stride[1] + channel * grad.stride[2];
      add_patch(set, grad, image * set.num_patches + k, values, sums);
    }
    if (!scratch && !set.scale) continue;
    const T a = (T)channel_value(set.scale, set.scale_count, channel, 1.0);
    // Without scratch the two are one array, which `simd` allows: element i depends on i alone.
#pragma omp simd
    for (int64_t i = 0; i < plane_size; ++i) narrow(a * sums[i], &target[i]);
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
