// Which pixels of a crop a resized pixel is made of, and their weights: exact integers, so that one
// division rounds. Called by the patch kernels of every device.
//
// Pixel i of `out` lies at (i + 1/2)·in/out in a crop of `in` pixels, pixel j of the crop at
// j + 1/2. Bilinear weights fall linearly from that point to a radius of one pixel, or with
// antialiasing, where the crop shrinks, to a radius of in/out pixels. Times 2·out they are
//   n_ij = 2·R - |(2j+1)·out - (2i+1)·in|     R = out, or with antialiasing max(in, out)
// where positive, and the weight of j is n_ij / Σ_j n_ij over the pixels inside of the crop. At
// in = out the only tap is j = i: the identity is exact. Nearest takes the pixel that
// (i + 1/2)·in/out lies in.
#pragma once

#include <stdint.h>

#include "common/macros.h"

namespace fastcontrast {

// Pixels first .. first+count-1 of a crop.
struct Taps {
  int64_t first, count;
};

FC_INLINE int64_t tap_radius(int64_t in, int64_t out, bool antialias) {
  return antialias && in > out ? in : out;
}

FC_INLINE int64_t floor_division(int64_t a, int64_t b) {  // b > 0
  return a >= 0 ? a / b : -((-a + b - 1) / b);
}

FC_INLINE Taps bilinear_taps(int64_t i, int64_t in, int64_t out, int64_t radius) {
  const int64_t centre = (2 * i + 1) * in - out;
  int64_t first = floor_division(centre - 2 * radius, 2 * out) + 1;
  int64_t end = -floor_division(-(centre + 2 * radius), 2 * out);
  if (first < 0) first = 0;
  if (end > in) end = in;
  return Taps{first, end - first};
}

FC_INLINE int64_t bilinear_numerator(int64_t i, int64_t j, int64_t in, int64_t out,
                                     int64_t radius) {
  const int64_t distance = (2 * j + 1) * out - (2 * i + 1) * in;
  return 2 * radius - (distance < 0 ? -distance : distance);
}

// Σ_j n_ij over begin <= j < end, taps of i all: two arithmetic series, which meet where j + 1/2
// passes the point that pixel i lies at.
FC_INLINE int64_t bilinear_sum(int64_t i, int64_t begin, int64_t end, int64_t in, int64_t out,
                               int64_t radius) {
  const int64_t centre = (2 * i + 1) * in;
  int64_t middle = -floor_division(out - centre, 2 * out);
  if (middle < begin) middle = begin;
  if (middle > end) middle = end;
  const int64_t above = (end - middle) * ((end + middle) * out - centre);
  const int64_t below = (middle - begin) * ((middle + begin) * out - centre);
  return (end - begin) * 2 * radius - above + below;
}

FC_INLINE Taps nearest_tap(int64_t i, int64_t in, int64_t out) {
  return Taps{(2 * i + 1) * in / (2 * out), 1};
}

// How an axis of a crop, of `in` pixels, becomes that of a patch, of `out`.
struct Resize {
  int64_t in, out, radius;
  bool single;  // one tap of weight 1 for each pixel
};

FC_INLINE Resize resize_of(int64_t in, int64_t out, bool bilinear, bool antialias) {
  return Resize{in, out, tap_radius(in, out, antialias), !bilinear || in == out};
}

FC_INLINE Taps taps_of(const Resize& axis, int64_t i) {
  return axis.single ? nearest_tap(i, axis.in, axis.out)
                     : bilinear_taps(i, axis.in, axis.out, axis.radius);
}

// What the numerators of pixel i are to be divided by.
FC_INLINE int64_t numerators_of(const Resize& axis, int64_t i) {
  if (axis.single) return 1;
  const Taps taps = bilinear_taps(i, axis.in, axis.out, axis.radius);
  return bilinear_sum(i, taps.first, taps.first + taps.count, axis.in, axis.out, axis.radius);
}

FC_INLINE int64_t first_of_nearest(const Resize& axis, int64_t j) {
  return -floor_division(axis.in - 2 * axis.out * j, 2 * axis.in);
}

// The transpose: pixels of the patch that the pixels `crop` are taps of, and the sum of these
// numerators for pixel i of them. The taps of bilinear weights are symmetric in i and j.
FC_INLINE Taps patch_pixels(const Resize& axis, Taps crop) {
  const int64_t end = crop.first + crop.count;
  if (crop.count <= 0) return Taps{0, 0};
  if (axis.single) {
    const int64_t first = first_of_nearest(axis, crop.first);
    return Taps{first, first_of_nearest(axis, end) - first};
  }
  const Taps low = bilinear_taps(crop.first, axis.out, axis.in, axis.radius);
  const Taps high = bilinear_taps(end - 1, axis.out, axis.in, axis.radius);
  return Taps{low.first, high.first + high.count - low.first};
}

FC_INLINE int64_t numerators_within(const Resize& axis, int64_t i, Taps crop) {
  if (axis.single) return 1;
  if (crop.count == 1) return bilinear_numerator(i, crop.first, axis.in, axis.out, axis.radius);
  const Taps taps = bilinear_taps(i, axis.in, axis.out, axis.radius);
  const int64_t crop_end = crop.first + crop.count, taps_end = taps.first + taps.count;
  const int64_t begin = crop.first > taps.first ? crop.first : taps.first;
  const int64_t end = crop_end < taps_end ? crop_end : taps_end;
  return begin < end ? bilinear_sum(i, begin, end, axis.in, axis.out, axis.radius) : 0;
}

// Pixel of an axis of `length` pixels that stands for position `i` beyond its ends; -1 where that
// is the fill value. `reflect` leaves out the border pixel and reaches length - 1 pixels far.
enum class Padding { error = 0, constant = 1, reflect = 2, edge = 3 };

FC_INLINE int64_t padded_position(int64_t i, int64_t length, Padding mode) {
  if (i >= 0 && i < length) return i;
  if (mode == Padding::reflect) return i < 0 ? -i : 2 * (length - 1) - i;
  if (mode == Padding::edge) return i < 0 ? 0 : length - 1;
  return -1;
}

// Positions that a box may reach beyond each end of an axis.
FC_INLINE int64_t padding_reach(int64_t length, Padding mode) {
  return mode == Padding::error ? 0 : mode == Padding::reflect ? length - 1 : (int64_t)1 << 30;
}

// The transpose: the pixels of a crop of `extent` pixels from `start` that pixel `i` of an axis
// stands for, itself (part 0), those before the axis (1) and those beyond it (2).
constexpr int MOST_PARTS = 3;

FC_INLINE Taps positions_of(int64_t i, int part, int64_t start, int64_t extent, int64_t length,
                            Padding mode) {
  const bool mirrored = mode == Padding::reflect;
  int64_t begin = i, end = i + 1;
  if (part == 1) {
    begin = mirrored ? -i : start;
    end = mirrored ? (i > 0 ? 1 - i : begin) : (i == 0 ? 0 : begin);
  } else if (part == 2) {
    begin = mirrored ? 2 * (length - 1) - i : length;
    const bool last = i == length - 1;
    end = mirrored ? (last ? begin : begin + 1) : (last ? start + extent : begin);
  }
  if (begin < start) begin = start;
  if (end > start + extent) end = start + extent;
  return Taps{begin - start, end > begin ? end - begin : 0};
}

}  // namespace fastcontrast
