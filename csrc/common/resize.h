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

FC_INLINE Taps nearest_tap(int64_t i, int64_t in, int64_t out) {
  return Taps{(2 * i + 1) * in / (2 * out), 1};
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

}  // namespace fastcontrast
