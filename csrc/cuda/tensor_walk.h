// One block's way through the points of the other side, for the kernels of
// distance_softmax_tensor.cu: stages of both sides, products of a tile, distances of its pairs.
// Included by .cu files only.
#pragma once

#include "cuda/pair_scores.h"
#include "cuda/tensor_tiles.h"

namespace fastcontrast {
namespace cuda {

template <Operand kind, bool with_terms>
struct TensorTile {
  static constexpr int OTHERS = Unit<kind>::OTHERS;
  TensorStages<kind> stages;
  Marks<TENSOR_OWNERS> own;
  Marks<OTHERS> other[2];  // of this tile and of the one before
  float own_norm[TENSOR_OWNERS], other_norm[2][OTHERS];
  Terms<float, with_terms ? TENSOR_OWNERS : 1> own_terms;
  Terms<float, with_terms ? OTHERS : 1> other_terms[2];
};

template <Operand kind>
struct TensorWalk {
  PointSet own_given, other_given;
  RoundedPoints own, other;
  int64_t dim;
  int64_t first_own, begin, end;
  int chunks, part, parts;
  int turn;

  FC_MEMBER int steps() const { return chunks + parts; }
  FC_MEMBER int depths_of(int chunk) const {
    using S = Shape<kind>;
    const int64_t left = dim - (int64_t)chunk * S::CHUNK;
    return (int)((left < S::CHUNK ? left : S::CHUNK) + S::DEPTH - 1) / S::DEPTH;
  }

  __device__ __forceinline__ void fetch(TensorStages<kind>& stages, int64_t first, int step,
                                        int stage) {
    const int chunk = step < chunks ? step : part + step - chunks;
#pragma unroll
    for (int term = 0; term < Unit<kind>::TERMS_OF_POINT; ++term) {
      fetch_rounded<kind, TENSOR_OWNERS>(term ? own.low : own.values, own_given.count, own.width,
                                         first_own, chunk, stages.own[stage][term]);
      fetch_rounded<kind, Unit<kind>::OTHERS>(term ? other.low : other.values, other_given.count,
                                              other.width, first, chunk, stages.other[stage][term]);
    }
    async_commit();
  }

  __device__ __forceinline__ void start(TensorStages<kind>& stages) {
    turn = 0;
    if (begin < end && steps() > 0) fetch(stages, begin, 0, 0);
  }

  __device__ __forceinline__ int arrive(TensorStages<kind>& stages, int64_t first, int step) {
    async_wait<0>();
    __syncthreads();
    const int stage = turn;
    turn ^= 1;
    if (step + 1 < steps()) {
      fetch(stages, first, step + 1, turn);
    } else if (first + Unit<kind>::OTHERS < end) {
      fetch(stages, first + Unit<kind>::OTHERS, 0, turn);
    }
    return stage;
  }

  // Products of all coordinates of a warp's pairs of one tile.
  __device__ __forceinline__ void products(TensorStages<kind>& stages, int64_t first, bool all,
                                           float (&sum)[Shape<kind>::TILES][4]) {
#pragma unroll
    for (int n = 0; n < Shape<kind>::TILES; ++n) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0;
    for (int step = 0; step < chunks; ++step) {
      const int stage = arrive(stages, first, step);
      add_products<kind>(stages.own[stage], stages.other[stage], depths_of(step), all, sum);
    }
  }
};

template <Operand kind>
TensorWalk<kind> walk_of(const RoundedPairs& of, bool owns_rows) {
  TensorWalk<kind> walk;
  walk.own_given = owns_rows ? of.pairs.rows : of.pairs.columns;
  walk.other_given = owns_rows ? of.pairs.columns : of.pairs.rows;
  walk.own = owns_rows ? of.rows : of.columns;
  walk.other = owns_rows ? of.columns : of.rows;
  walk.dim = of.pairs.dim;
  walk.first_own = walk.begin = walk.end = 0;
  walk.chunks = (int)((of.pairs.dim + Shape<kind>::CHUNK - 1) / Shape<kind>::CHUNK);
  walk.part = walk.parts = walk.turn = 0;
  return walk;
}

FC_INLINE float element_at(const PointSet& points, Scalar type, int64_t point, int64_t k) {
  const int64_t at = point * points.stride + k * points.step;
  if (type == Scalar::float32) return ((const float*)points.data)[at];
  return type == Scalar::bfloat16 ? widen(((const BFloat16*)points.data)[at])
                                  : widen(((const Half*)points.data)[at]);
}

// Σ (x-y)² or x·y of one pair, taken by a whole warp.
__device__ __forceinline__ float direct_value(const Pairs& pairs, const PointSet& own, int64_t o,
                                              const PointSet& other, int64_t q) {
  float sum = 0;
  for (int64_t k = threadIdx.x % WARP; k < pairs.dim; k += WARP) {
    const float u = element_at(own, pairs.type, o, k), v = element_at(other, pairs.type, q, k);
    sum += pairs.metric == Metric::dot ? u * v : (u - v) * (u - v);
  }
  return warp_sum(sum);
}

// Place of score `i` of a lane, 0 .. 4 TILES - 1, among the owners of a warp and the tile's others.
FC_INLINE int owner_of(int lane, int i) { return lane / 4 + i % 4 / 2 * 8; }
FC_INLINE int other_of(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

// Squared distances in place of products; bits of `near` for those to take directly.
template <Operand kind>
__device__ __forceinline__ uint32_t square_distances(const float* own_norm, const float* other_norm,
                                                     float (&value)[Shape<kind>::TILES][4]) {
  const int lane = threadIdx.x % WARP;
  const float fraction = near_fraction(0.0f, Rounding::ieee);
  uint32_t near = 0;
#pragma unroll
  for (int i = 0; i < 4 * Shape<kind>::TILES; ++i) {
    const float xs = own_norm[threadIdx.x / WARP * WARP_ROWS + owner_of(lane, i)];
    const float ys = other_norm[other_of(lane, i)];
    const float squared = squared_distance(value[i / 4][i % 4], xs, ys);
    value[i / 4][i % 4] = squared;
    if (!(squared >= fraction * (xs + ys))) near |= 1u << i;  // NaN, as from inf - inf, too
  }
  return near;
}

template <Operand kind>
__device__ __forceinline__ void load_norms(const RoundedPoints& points, int64_t count,
                                           int64_t first, int width, float* to) {
  for (int i = threadIdx.x; i < width; i += TENSOR_THREADS) {
    to[i] = first + i < count ? points.sqnorm[first + i] : 0.0f;
  }
}

}  // namespace cuda
}  // namespace fastcontrast
