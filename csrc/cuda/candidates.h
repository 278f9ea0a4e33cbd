// The candidates of one row of `nearest`, with bounds of their keys, and what a warp does with
// them: drop those that k others are surely nearer than, and rank them by their direct keys.
// Included by nearest.cu.
//
// A list lies in global memory, which its block reads and writes through the caches; bounds or keys
// that are compared many times lie in shared memory (`scratch`, one element per candidate).
#pragma once

#include <stdint.h>

#include "common/ranking.h"
#include "cuda/launch.h"

namespace fastcontrast {
namespace cuda {

// The key of a candidate is neither below `lower` nor above `upper`.
template <typename T>
struct KeyBounds {
  T lower, upper;
};

template <typename T>
struct CandidateList {
  KeyBounds<T>* bounds;
  int64_t* column;
};

// No column: fills what is left of a result, and takes the place of candidates that do not count.
constexpr int64_t NO_COLUMN = INT64_MAX;
FC_INLINE Neighbor no_neighbor() { return Neighbor{INT64_MAX, NO_COLUMN}; }

static __device__ __forceinline__ int lane_of_thread() { return (int)threadIdx.x % WARP; }

// Smallest and largest of all lanes.
template <typename Ordered>
static __device__ __forceinline__ void warp_range(Ordered* low, Ordered* high) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
    const Ordered other_low = __shfl_xor_sync(ALL_LANES, *low, distance);
    const Ordered other_high = __shfl_xor_sync(ALL_LANES, *high, distance);
    *low = other_low < *low ? other_low : *low;
    *high = other_high > *high ? other_high : *high;
  }
}

// A bound that at least k of the values do not pass, and none of the others unless it equals the
// k-th smallest. By bisection, count >= k.
template <typename T>
static __device__ T bound_of_smallest(const T* values, int count, int k) {
  const int lane = lane_of_thread();
  auto low = to_ordered(values[0]), high = low;
  for (int i = lane; i < count; i += WARP) {
    const auto value = to_ordered(values[i]);
    low = value < low ? value : low;
    high = value > high ? value : high;
  }
  warp_range(&low, &high);
  while (low < high) {
    const auto middle = (low & high) + ((low ^ high) >> 1);
    const T pivot = from_ordered(middle);
    int below = 0;
    for (int i = lane; i < count; i += WARP) below += values[i] <= pivot;
    below = warp_sum(below);
    if (below == k) return pivot;
    if (below > k) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return from_ordered(low);
}

// Moves the candidates whose bounds pass the test to the front; returns how many.
template <typename T, typename Test>
static __device__ __forceinline__ int compact(const CandidateList<T>& list, int count,
                                              const Test& stays_with) {
  const int lane = lane_of_thread();
  int kept = 0;
  for (int begin = 0; begin < count; begin += WARP) {
    const int i = begin + lane;
    KeyBounds<T> bounds{};
    int64_t column = NO_COLUMN;
    bool stays = false;
    if (i < count) {
      bounds = list.bounds[i];
      column = list.column[i];
      stays = stays_with(bounds);
    }
    const unsigned votes = __ballot_sync(ALL_LANES, stays);
    __syncwarp();  // all of these are read: their places may be written
    if (stays) {
      const int at = kept + __popc(votes & ((1u << lane) - 1));
      list.bounds[at] = bounds;
      list.column[at] = column;
    }
    kept += __popc(votes);
  }
  __syncwarp();
  return kept;
}

// Drops candidates that k others are surely nearer than, and lowers the limit: k keys are not above
// it. Returns how many are left.
template <typename T>
static __device__ int cut_by_bounds(const CandidateList<T>& list, int count, int k, T* scratch,
                                    T* limit) {
  if (count <= k) return count;
  for (int i = lane_of_thread(); i < count; i += WARP) scratch[i] = list.bounds[i].upper;
  __syncwarp();
  const T bound = bound_of_smallest(scratch, count, k);
  *limit = bound;
  return compact(list, count, [=](const KeyBounds<T>& bounds) { return !(bounds.lower > bound); });
}

// How many candidates come before the i-th in the order of the result.
static __device__ __forceinline__ int rank_of(const int64_t* keys, const int64_t* column, int count,
                                              int i) {
  const int64_t key = keys[i], own = column[i];
  int rank = 0;
  for (int j = 0; j < count; ++j) {
    const int64_t other = keys[j];
    rank += other < key || (other == key && column[j] < own);
  }
  return rank;
}

// Leaves the k nearest of the candidates by their direct keys, with bounds around these, and lowers
// the limit if there are k. Returns how many are left.
template <typename T>
static __device__ int cut_by_keys(const CandidateList<T>& list, const int64_t* keys, int count,
                                  int k, T* limit) {
  auto low = to_ordered(T(-INFINITY)), high = low;
  // Ranks are taken of all before any moves; NaN marks what goes.
  for (int i = lane_of_thread(); i < count; i += WARP) {
    const bool stays = list.column[i] != NO_COLUMN && rank_of(keys, list.column, count, i) < k;
    const double key = from_ordered(keys[i]);
    const bool is_number = key == key;
    KeyBounds<T> bounds;
    bounds.lower = is_number ? step_down((T)key) : T(INFINITY);
    bounds.upper = is_number ? step_up((T)key) : T(INFINITY);
    if (stays && to_ordered(bounds.upper) > high) high = to_ordered(bounds.upper);
    if (!stays) bounds.upper = T(NAN);
    list.bounds[i] = bounds;
  }
  __syncwarp();
  warp_range(&low, &high);
  const int kept =
      compact(list, count, [](const KeyBounds<T>& bounds) { return bounds.upper == bounds.upper; });
  if (kept == k) *limit = from_ordered(high);
  return kept;
}

}  // namespace cuda
}  // namespace fastcontrast
