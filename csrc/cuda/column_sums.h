// What the rows of a block bring to the log-sum-exp of every column, for a symmetric loss: from
// the scores of a tile in registers, by way of shared memory, to the state of a part of the rows.
// Included by .cu files only.
#pragma once

#include <stdint.h>

#include "common/online_softmax.h"
#include "cuda/distance_softmax.h"
#include "cuda/launch.h"
#include "cuda/pair_scores.h"

namespace fastcontrast {
namespace cuda {

// Σ 2^(t - max) of some scores t. Nothing yet: -inf and 0.
template <typename T, typename Sum>
struct TopSum {
  T max;
  Sum sum;
};

template <typename T, typename Sum>
FC_INLINE TopSum<T, Sum> merge(TopSum<T, Sum> a, TopSum<T, Sum> b) {
  const T top = a.max < b.max ? b.max : a.max;
  const T fa = a.max == top ? T(1) : exp2_flushed(a.max - top);  // also where both are infinite
  const T fb = b.max == top ? T(1) : exp2_flushed(b.max - top);
  return {top, fa * a.sum + fb * b.sum};
}

template <typename T, int COUNT>
FC_INLINE TopSum<T, T> top_sum(const T (&t)[COUNT]) {
  RunningSoftmax<T> softmax;
  softmax.clear();
  softmax.add(t);
  return {softmax.max, softmax.sum};
}

// Merges what lanes that differ in the bits from LEAST to DISTANCE, 16 at first, have of the same
// COUNT columns. Each of them keeps COUNT · LEAST / 32 columns, from the place returned on, moved
// to the front. By recursion, so that every index is known and the sums stay in registers.
template <int LEAST, int DISTANCE, typename T, int COUNT>
static __device__ __forceinline__ int merge_lanes(TopSum<T, T> (&of)[COUNT]) {
  if constexpr (DISTANCE < LEAST) {
    return 0;
  } else {
    constexpr int LEFT = COUNT * DISTANCE / WARP;
    const bool upper = (threadIdx.x & DISTANCE) != 0;
#pragma unroll
    for (int c = 0; c < LEFT; ++c) {
      const T max = upper ? of[c].max : of[c + LEFT].max;
      const T sum = upper ? of[c].sum : of[c + LEFT].sum;
      const TopSum<T, T> mine = {upper ? of[c + LEFT].max : of[c].max,
                                 upper ? of[c + LEFT].sum : of[c].sum};
      of[c] = merge(mine, TopSum<T, T>{__shfl_xor_sync(ALL_LANES, max, DISTANCE),
                                       __shfl_xor_sync(ALL_LANES, sum, DISTANCE)});
    }
    return (upper ? LEFT : 0) + merge_lanes<LEAST, DISTANCE / 2>(of);
  }
}

// Of the columns of a tile, over the rows of each warp.
template <typename T, int WARPS, int WIDTH>
struct ColumnSums {
  T max[WARPS][WIDTH], sum[WARPS][WIDTH];

  __device__ __forceinline__ void put(int place, TopSum<T, T> of) {
    max[threadIdx.x / WARP][place] = of.max;
    sum[threadIdx.x / WARP][place] = of.sum;
  }

  // Adds them to the state of a part of the rows, a thread to each column. All tiles of a column
  // meet in the same thread. The first group of rows finds no state.
  __device__ __forceinline__ void add_to(const ColumnStatistics& out, int64_t part, int64_t group,
                                         int64_t columns, int64_t first, int64_t end) const {
    const int place = threadIdx.x;
    if (place >= WIDTH || first + place >= end) return;
    TopSum<T, double> total = {max[0][place], (double)sum[0][place]};
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) {
      total = merge(total, TopSum<T, double>{max[warp][place], (double)sum[warp][place]});
    }
    double* const state = out.state + part * 2 * columns + first + place;
    if (group > 0) total = merge(TopSum<T, double>{(T)state[0], state[columns]}, total);
    state[0] = (double)total.max;
    state[columns] = total.sum;
  }
};

}  // namespace cuda
}  // namespace fastcontrast
