// One patch of one plane: the walk through a box, and the resampler, for boxes that are resized or
// that reach beyond their image. Included by the patch kernels alone, inside their namespace
// FASTCONTRAST_ISA.
//
// The resampler puts a crop with its padding, in the type of arithmetic, into memory that stays in
// cache; mixes rows of it into one row of the patch's height, then columns of that row. Its
// transpose goes the same way back. common/resize.h has the weights.
#pragma once

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

template <typename T>
void build_axis(Axis<T>& axis, const PatchSet& set, int64_t in, int64_t out, bool flipped) {
  const int64_t radius = tap_radius(in, out, set.antialias);
  const bool single = set.interpolation != Interpolation::bilinear || in == out;
  axis.out = out;
  axis.taps = single ? 1 : 2 * radius / out + 1;
  for (int64_t i = 0; i < out; ++i) {
    const int64_t pixel = flipped ? out - 1 - i : i;
    const Taps taps = single ? nearest_tap(pixel, in, out) : bilinear_taps(pixel, in, out, radius);
    int64_t total = 0;
    for (int64_t t = 0; t < taps.count; ++t) {
      total += bilinear_numerator(pixel, taps.first + t, in, out, radius);
    }
    for (int64_t t = 0; t < axis.taps; ++t) {
      const bool used = t < taps.count;
      const int64_t j = taps.first + (used ? t : 0);
      axis.source[t * out + i] = (int32_t)j;
      axis.weight[t * out + i] =
          single ? (T)1
          : used ? (T)((double)bilinear_numerator(pixel, j, in, out, radius) / (double)total)
                 : (T)0;
    }
  }
}

template <typename T>
struct Resampler {
  void* memory;
  Axis<T> rows, columns;
  T* crop;   // [box height, box width]
  T* mixed;  // [box width]
  T* line;   // [patch width]
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
  const int64_t numbers = height * width + width + set.width + row_taps + column_taps;
  r.memory = malloc(numbers * sizeof(T) + (row_taps + column_taps) * sizeof(int32_t));
  if (!r.memory) return false;
  r.crop = static_cast<T*>(r.memory);
  r.mixed = r.crop + height * width;
  r.line = r.mixed + width;
  r.rows.weight = r.line + set.width;
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
  build_axis(r.rows, set, r.box.height, set.height, flips & FLIP_VERTICAL);
  build_axis(r.columns, set, r.box.width, set.width, flips & FLIP_HORIZONTAL);
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

// Row y of the patch, from the crop.
template <typename T>
const T* resampled_row(Resampler<T>& r, int64_t y) {
  const int64_t in_width = r.box.width, out_width = r.columns.out;
  const T* mixed = r.crop + r.rows.source[y] * in_width;
  if (r.rows.taps > 1) {
    T* __restrict sums = r.mixed;
    const T first = r.rows.weight[y];
#pragma omp simd
    for (int64_t x = 0; x < in_width; ++x) sums[x] = first * mixed[x];
    for (int64_t t = 1; t < r.rows.taps; ++t) {
      const T weight = r.rows.weight[t * r.rows.out + y];
      if (weight == (T)0) break;
      const T* __restrict row = r.crop + r.rows.source[t * r.rows.out + y] * in_width;
#pragma omp simd
      for (int64_t x = 0; x < in_width; ++x) sums[x] += weight * row[x];
    }
    mixed = sums;
  }
  T* __restrict line = r.line;
  const int32_t* __restrict source = r.columns.source;
  const T* __restrict weight = r.columns.weight;
  if (r.columns.taps == 1) {
    for (int64_t x = 0; x < out_width; ++x) line[x] = mixed[source[x]];
    return line;
  }
#pragma omp simd
  for (int64_t x = 0; x < out_width; ++x) line[x] = weight[x] * mixed[source[x]];
  for (int64_t t = 1; t < r.columns.taps; ++t) {
    source += out_width;
    weight += out_width;
    // An unused tap must not turn an infinite pixel into NaN.
#pragma omp simd
    for (int64_t x = 0; x < out_width; ++x) {
      line[x] += weight[x] == (T)0 ? (T)0 : weight[x] * mixed[source[x]];
    }
  }
  return line;
}

// The transpose of resampled_row: adds row y of a patch's gradient, in r.line, to the crop's.
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
