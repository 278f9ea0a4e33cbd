// One patch of one plane: the walk through a box, and the resampler, for boxes that are resized or
// that reach beyond their image. Included by the patch kernels alone, inside their namespace
// FASTCONTRAST_ISA.
//
// The resampler mixes rows of a box into rows of the patch, then columns of those. A box with
// padding is first put, in the type of arithmetic, into memory that stays in cache. Its transpose
// goes the same way back. common/resize.h has the weights.
#pragma once

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/extract_patches.h"
#include "cpu/pixel_rows.h"

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_ISA {
namespace {

// What the walk of one patch through one plane needs.
struct Plane {
  Walk rows, columns;
  int64_t height, width;
};

FC_INLINE int flips_of(const PatchSet& set, int64_t patch) {
  return set.flips ? set.flips[patch] : 0;
}

FC_INLINE Plane plane_of(const PatchSet& set, int64_t patch, int64_t row_stride,
                         int64_t column_stride) {
  const Box box = set.coords[patch];
  const int flips = flips_of(set, patch);
  Plane plane;
  plane.rows = walk(box.y0, set.height, row_stride, flips & FLIP_VERTICAL);
  plane.columns = walk(box.x0, set.width, column_stride, flips & FLIP_HORIZONTAL);
  plane.height = set.height;
  plane.width = set.width;
  return plane;
}

FC_INLINE double channel_value(const double* values, int64_t count, int64_t channel,
                               double absent) {
  return values ? values[count == 1 ? 0 : channel] : absent;
}

// Whether a patch is a box of the image as it is.
FC_INLINE bool plain(const PatchSet& set, int64_t patch) {
  const Box box = set.coords[patch];
  return box.height == set.height && box.width == set.width &&
         inside(box, set.image_height, set.image_width, 0, 0);
}

// Along one axis, pixel i of a patch is Σ_t weight[t·out + i] · crop[source[t·out + i]]; unused
// taps have weight 0.
template <typename T>
struct Axis {
  int64_t taps, out;
  int32_t* source;
  T* weight;
};

// Weights of bilinear taps for a whole axis. Where pixel i's taps begin follows from pixel i - 1 by
// additions, and its numerators, equally spaced up to a peak, are formed for many pixels at once.
// `distance` and `total`: room for a number per pixel.
template <typename T>
void bilinear_axis(Axis<T>& axis, const Resize& resize, bool flipped, double* distance,
                   double* total) {
  const int64_t in = resize.in, out = resize.out, reach = 2 * resize.radius;
  int64_t before = floor_division(in - out - reach, 2 * out);  // the last that is no tap
  int64_t rest = in - out - reach - before * 2 * out;
  for (int64_t i = 0; i < out; ++i) {
    const int64_t place = flipped ? out - 1 - i : i;
    const int64_t first = before < 0 ? 0 : before + 1;
    axis.source[place] = (int32_t)first;
    distance[place] = (double)((first - before) * 2 * out - rest - reach);
    total[place] = 0;
    before += in / out;
    rest += in % out * 2;
    if (rest >= 2 * out) {
      rest -= 2 * out;
      ++before;
    }
  }
  const double peak = (double)reach, spacing = (double)(2 * out);
  // Integers below 2^53 both times, so that the sum is exact and so are the terms.
  const auto numerator = [&](int64_t t, int64_t i) {
    const double n = peak - fabs(distance[i] + (double)t * spacing);
    return axis.source[i] + t < in && n > 0 ? n : 0.0;
  };
  for (int64_t t = 0; t < axis.taps; ++t) {
#pragma omp simd
    for (int64_t i = 0; i < out; ++i) total[i] += numerator(t, i);
  }
#pragma omp simd
  for (int64_t i = 0; i < out; ++i) total[i] = 1.0 / total[i];
  for (int64_t t = axis.taps - 1; t >= 0; --t) {  // the first taps last: the others need them
#pragma omp simd
    for (int64_t i = 0; i < out; ++i) {
      const double n = numerator(t, i);
      axis.weight[t * out + i] = (T)(n * total[i]);
      axis.source[t * out + i] = axis.source[i] + (n > 0 ? (int32_t)t : 0);
    }
  }
}

template <typename T>
void build_axis(Axis<T>& axis, const PatchSet& set, int64_t in, int64_t out, bool flipped,
                double* scratch) {
  const Resize resize =
      resize_of(in, out, set.interpolation == Interpolation::bilinear, set.antialias);
  axis.out = out;
  axis.taps = resize.single ? 1 : 2 * resize.radius / out + 1;
  if (!resize.single) return bilinear_axis(axis, resize, flipped, scratch, scratch + out);
  for (int64_t i = 0; i < out; ++i) {
    axis.source[i] = (int32_t)taps_of(resize, flipped ? out - 1 - i : i).first;
    axis.weight[i] = (T)1;
  }
}

template <typename T>
struct Resampler {
  void* memory;
  Axis<T> rows, columns;
  T* crop;    // [box height, box width]
  T* mixed;   // [box width]
  T* line;    // [patch width]
  T* sums;    // [patch height, box width], then [patch width, patch height]
  T* turned;  // [box width, patch height]
  T* plane;   // [patch height, patch width]
  double* scratch;
  int64_t patch;
  Box box;
};

// Room for the largest box of the set; false where memory has run out.
template <typename T>
bool open_resampler(Resampler<T>& r, const PatchSet& set) {
  int64_t height = 1, width = 1;
  for (int64_t i = 0; i < set.batch * set.num_patches; ++i) {
    if (set.coords[i].height > height) height = set.coords[i].height;
    if (set.coords[i].width > width) width = set.coords[i].width;
  }
  const int64_t row_taps = 2 * height + 3 * set.height;  // out·(2·max(in, out)/out + 1) at most
  const int64_t column_taps = 2 * width + 3 * set.width;
  const int64_t longer = width > set.width ? width : set.width;
  const int64_t between = set.height * longer, plane = set.height * set.width;
  const int64_t numbers =
      height * width + width + set.width + row_taps + column_taps + 2 * between + plane;
  const int64_t doubles = 2 * (set.height > set.width ? set.height : set.width);
  r.memory = malloc(doubles * sizeof(double) + numbers * sizeof(T) +
                    (row_taps + column_taps) * sizeof(int32_t));
  if (!r.memory) return false;
  r.scratch = static_cast<double*>(r.memory);
  r.crop = reinterpret_cast<T*>(r.scratch + doubles);
  r.mixed = r.crop + height * width;
  r.line = r.mixed + width;
  r.sums = r.line + set.width;
  r.turned = r.sums + between;
  r.plane = r.turned + between;
  r.rows.weight = r.plane + plane;
  r.columns.weight = r.rows.weight + row_taps;
  r.rows.source = reinterpret_cast<int32_t*>(r.columns.weight + column_taps);
  r.columns.source = r.rows.source + row_taps;
  r.patch = -1;
  return true;
}

template <typename T>
void prepare(Resampler<T>& r, const PatchSet& set, int64_t patch) {
  if (r.patch == patch) return;  // the channels of a patch share its weights
  const int flips = flips_of(set, patch);
  r.patch = patch;
  r.box = set.coords[patch];
  build_axis(r.rows, set, r.box.height, set.height, flips & FLIP_VERTICAL, r.scratch);
  build_axis(r.columns, set, r.box.width, set.width, flips & FLIP_HORIZONTAL, r.scratch);
}

// Columns of the box that lie in the image, counted from the box's first, half-open.
struct Columns {
  int64_t begin, end;
};

FC_INLINE Columns columns_inside(const PatchSet& set, Box box) {
  Columns columns{box.x0 < 0 ? -(int64_t)box.x0 : 0, set.image_width - box.x0};
  if (columns.begin > box.width) columns.begin = box.width;
  if (columns.end > box.width) columns.end = box.width;
  if (columns.end < columns.begin) columns.end = columns.begin;
  return columns;
}

// The crop and its padding, from a plane of the images.
template <typename In, typename T>
void load_crop(Resampler<T>& r, const PatchSet& set, const In* in, int64_t row_stride,
               int64_t column_stride, T fill) {
  const Columns inner = columns_inside(set, r.box);
  for (int64_t y = 0; y < r.box.height; ++y) {
    T* out = r.crop + y * r.box.width;
    const int64_t row = padded_position(r.box.y0 + y, set.image_height, set.padding);
    const In* source = in + row * row_stride;
    for (int64_t x = 0; x < r.box.width; ++x) {
      if (row >= 0 && x == inner.begin) x = inner.end;
      if (x == r.box.width) break;
      const int64_t column = padded_position(r.box.x0 + x, set.image_width, set.padding);
      out[x] = row < 0 || column < 0 ? fill : (T)widen(source[column * column_stride]);
    }
    if (row < 0) continue;
    const In* first = source + (r.box.x0 + inner.begin) * column_stride;
    const int64_t width = inner.end - inner.begin;
    if (column_stride == 1) {
      map_row<Stride::forward, false>(first, 1, out + inner.begin, width, (T)1, (T)-0.0);
    } else {
      map_row<Stride::any, false>(first, column_stride, out + inner.begin, width, (T)1, (T)-0.0);
    }
  }
}

// out[0..width) = Σ_t weight[t] · row source[t] of `in`, whose rows are `step` apart, for pixel i
// of an axis. A tap of weight 0 ends the sum: it must not turn an infinite pixel into NaN.
template <typename In, typename T>
FC_INLINE void mix_rows(const Axis<T>& axis, int64_t i, const In* in, int64_t step, int64_t width,
                        T* __restrict out) {
  const T* weight = axis.weight + i;
  const int32_t* source = axis.source + i;
  int64_t end = axis.out;  // of the taps, in steps of axis.out
  while (end < axis.taps * axis.out && weight[end] != (T)0) end += axis.out;
#if defined(__AVX2__)
  if constexpr (HasLanes<In>::value && HasLanes<T>::value) {
    if (width >= LANES) {
      int64_t x = 0;
      for (; x + 2 * LANES <= width; x += 2 * LANES) {
        Floats low = every(-0.0f), high = low;
        for (int64_t t = 0; t < end; t += axis.out) {
          const In* row = in + source[t] * step + x;
          const Floats w = every(weight[t]);
          low = fused(w, load(row), low);
          high = fused(w, load(row + LANES), high);
        }
        store<false>(out + x, low);
        store<false>(out + x + LANES, high);
      }
      for (; x < width; x += LANES) {
        const int64_t at = x + LANES <= width ? x : width - LANES;
        Floats sums = every(-0.0f);
        for (int64_t t = 0; t < end; t += axis.out) {
          sums = fused(every(weight[t]), load(in + source[t] * step + at), sums);
        }
        store<false>(out + at, sums);
      }
      return;
    }
  }
#endif
  for (int64_t x = 0; x < width; ++x) out[x] = weight[0] * (T)widen(in[source[0] * step + x]);
  for (int64_t t = axis.out; t < end; t += axis.out) {
    const In* row = in + source[t] * step;
#pragma omp simd
    for (int64_t x = 0; x < width; ++x) out[x] += weight[t] * (T)widen(row[x]);
  }
}

#if defined(__AVX2__)
// out[c][r] = in[r][c] for a square of 8.
FC_INLINE void turn_square(const float* in, int64_t in_step, float* out, int64_t out_step) {
  __m256 row[8], pair[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(in + i * in_step);
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    row[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    row[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xEE);
    row[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    row[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * out_step, _mm256_permute2f128_ps(row[i], row[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * out_step, _mm256_permute2f128_ps(row[i], row[i + 4], 0x31));
  }
}
#endif

// out[c][r] = in[r][c].
template <typename T>
FC_INLINE void turn(const T* __restrict in, int64_t rows, int64_t columns, T* __restrict out) {
  int64_t squares = 0, whole = 0;  // rows and columns that lie in squares of 8
#if defined(__AVX2__)
  if constexpr (sizeof(T) == sizeof(float)) {
    squares = rows / 8 * 8, whole = columns / 8 * 8;
    for (int64_t r = 0; r < squares; r += 8) {
      for (int64_t c = 0; c < whole; c += 8) {
        turn_square(in + r * columns + c, columns, out + c * rows + r, rows);
      }
    }
  }
#endif
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < squares ? whole : 0; c < columns; ++c) {
      out[c * rows + r] = in[r * columns + c];
    }
  }
}

// The patch [patch height, patch width], from the box's pixels in rows that are `step` apart.
// Columns are mixed as rows of the plane turned on its side: contiguous sums are several times
// faster than gathers.
template <typename In, typename T>
const T* resampled_plane(Resampler<T>& r, const In* in, int64_t step) {
  const int64_t in_width = r.box.width, height = r.rows.out, width = r.columns.out;
  const bool columns = r.columns.taps > 1;
  for (int64_t y = 0; y < height; ++y) {
    T* out = r.sums + y * in_width;
    mix_rows(r.rows, y, in, step, in_width, out);
    if (columns) continue;
    T* line = r.plane + y * width;
    for (int64_t x = 0; x < width; ++x) line[x] = out[r.columns.source[x]];
  }
  if (!columns) return r.plane;
  turn(r.sums, height, in_width, r.turned);
  for (int64_t x = 0; x < width; ++x) {
    mix_rows(r.columns, x, r.turned, height, height, r.sums + x * height);
  }
  turn(r.sums, width, height, r.plane);
  return r.plane;
}

// The patch of the plane `in`; the image itself is read where the box lies in it and its rows are
// contiguous, else a copy with the padding.
template <typename In, typename T>
const T* resampled(Resampler<T>& r, const PatchSet& set, const In* in, int64_t row_stride,
                   int64_t column_stride, T fill) {
  if (column_stride == 1 && inside(r.box, set.image_height, set.image_width, 0, 0)) {
    return resampled_plane(r, in + r.box.y0 * row_stride + r.box.x0, row_stride);
  }
  load_crop(r, set, in, row_stride, column_stride, fill);
  return resampled_plane(r, r.crop, r.box.width);
}

// The transpose of resampled_plane, row by row: adds row y of a patch's gradient, in r.line, to the
// crop's.
template <typename T>
void add_resampled_row(Resampler<T>& r, int64_t y) {
  const int64_t in_width = r.box.width, out_width = r.columns.out;
  memset(r.mixed, 0, in_width * sizeof(T));
  for (int64_t t = 0; t < r.columns.taps; ++t) {
    const int32_t* source = r.columns.source + t * out_width;
    const T* weight = r.columns.weight + t * out_width;
    for (int64_t x = 0; x < out_width; ++x) {
      if (weight[x] != (T)0) r.mixed[source[x]] += weight[x] * r.line[x];
    }
  }
  for (int64_t t = 0; t < r.rows.taps; ++t) {
    const T weight = r.rows.weight[t * r.rows.out + y];
    if (weight == (T)0) break;
    T* __restrict row = r.crop + r.rows.source[t * r.rows.out + y] * in_width;
    const T* __restrict mixed = r.mixed;
#pragma omp simd
    for (int64_t x = 0; x < in_width; ++x) row[x] += weight * mixed[x];
  }
}

// The transpose of load_crop: adds the crop to a plane [image height, image width].
template <typename T>
void add_crop(const Resampler<T>& r, const PatchSet& set, T* plane) {
  const Columns inner = columns_inside(set, r.box);
  for (int64_t y = 0; y < r.box.height; ++y) {
    const T* in = r.crop + y * r.box.width;
    const int64_t row = padded_position(r.box.y0 + y, set.image_height, set.padding);
    if (row < 0) continue;
    T* sums = plane + row * set.image_width;
    for (int64_t x = 0; x < r.box.width; ++x) {
      if (x == inner.begin) x = inner.end;
      if (x == r.box.width) break;
      const int64_t column = padded_position(r.box.x0 + x, set.image_width, set.padding);
      if (column >= 0) sums[column] += in[x];
    }
    add_row<Stride::forward>(in + inner.begin, 1, sums + r.box.x0 + inner.begin,
                             inner.end - inner.begin);
  }
}

}  // namespace
}  // namespace FASTCONTRAST_ISA
}  // namespace cpu
}  // namespace fastcontrast
