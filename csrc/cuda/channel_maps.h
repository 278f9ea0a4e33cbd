// The affine map of every channel, by value, sizes and 32-bit division by a number known at launch:
// what the patch kernels need to allocate nothing and to find their pixel. Included by .cu files
// only.
#pragma once

#include <stdint.h>

#include <stdexcept>
#include <string>

#include "common/macros.h"
#include "common/patches.h"

namespace fastcontrast {
namespace cuda {

// Channels with numbers of their own, in one launch: more are cut in groups.
constexpr int GROUP = 64;

template <typename T>
struct ChannelMaps {
  T scale[GROUP], offset[GROUP];
  int scale_step, offset_step;  // 0: one number for all channels
};

// An absent offset is -0, so that x·1 + b is x for both zeros.
template <typename T>
ChannelMaps<T> maps_of_group(const PatchSet& set, int64_t first, int64_t channels) {
  ChannelMaps<T> maps;
  maps.scale_step = set.scale_count > 1;
  maps.offset_step = set.offset_count > 1;
  for (int64_t c = 0; c < GROUP; ++c) {
    const int64_t channel = first + (c < channels ? c : channels - 1);
    maps.scale[c] = (T)(set.scale ? set.scale[maps.scale_step ? channel : 0] : 1.0);
    maps.offset[c] = (T)(set.offset ? set.offset[maps.offset_step ? channel : 0] : -0.0);
  }
  return maps;
}

inline int64_t group_size(const PatchSet& set) {
  const bool own = set.scale_count > 1 || set.offset_count > 1 || set.fill_count > 1;
  return own && set.channels > GROUP ? GROUP : set.channels;
}

// Indices within a patch or a plane are 32-bit numbers below 2^31.
inline uint32_t checked_size(const char* what, int64_t a, int64_t b, int64_t c) {
  constexpr int64_t limit = 0x7FFFFFFF;
  if (a * b > limit || a * b * c > limit) {
    throw std::invalid_argument(std::string(what) + " of " + std::to_string(a) + "x" +
                                std::to_string(b) + "x" + std::to_string(c) +
                                " elements is larger than the CUDA kernels' limit of 2^31");
  }
  return (uint32_t)(a * b * c);
}

// Quotients of n < 2^31 by multiplication, after Granlund and Montgomery, "Division by invariant
// integers using multiplication" (PLDI 1994).
struct Divisor {
  uint32_t divisor, multiplier, shift;
};

inline Divisor divisor(uint32_t d) {
  Divisor out{d, 0, 0};
  while (((uint64_t)1 << out.shift) < d) ++out.shift;
  const uint64_t power = (uint64_t)1 << out.shift;
  out.multiplier = (uint32_t)(((power - d) << 32) / d + 1);
  return out;
}

FC_INLINE uint32_t quotient(uint32_t n, Divisor d) {
  return ((uint32_t)(((uint64_t)n * d.multiplier) >> 32) + n) >> d.shift;
}

}  // namespace cuda
}  // namespace fastcontrast
