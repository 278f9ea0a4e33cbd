// Maths: as distance_softmax.cu, with ‖x-y‖² = ‖x‖² + ‖y‖² - 2 x·y of rounded points, and
//   gradients as (C Q) - o Σ c, both by the matrix units.
// Tiling: a block owns 64 points of one side, a warp 16 of them, and streams tiles of 64 points (32
//   of two bfloat16 terms) of the other: mma.sync of 16 × 8 scores, which stay in registers,
//   softmax and all. Weights go from there into the second product without a detour, and the
//   gradient of 128 coordinates is in registers; more are further blocks, which compute the scores
//   anew.
// Memory: points are rounded once, into rows of whole stages; a stage is copied (cp.async) while
//   the one before is multiplied. Others come from the L2 cache.
// Numerics: points are centred, sums in float. Near pairs (common/scores.h) and positives leave the
//   tile: a warp takes one at a time, by direct difference of the points as given, and adds its
//   gradient to the owner's row in memory, which this warp alone writes. Σ c (q - o) is formed with
//   the rounded weights c~ on both sides and scaled by Σ c / Σ c~; weights of both signs take a
//   second product for what rounding left over.
#include "cuda/column_sums.h"
#include "cuda/pair_scores.h"
#include "cuda/tensor_walk.h"

namespace fastcontrast {
namespace cuda {
namespace {

constexpr int FLUSH = 16;  // tiles whose softmax is summed in float

template <Operand kind, bool with_columns>
struct StatisticsTile : TensorTile<kind, false> {
  static constexpr int WIDTH = with_columns ? Unit<kind>::OTHERS : 1;
  ColumnSums<float, TENSOR_THREADS / WARP, WIDTH> columns[2];  // of this tile and of the one before
};

// The sums of a lane's columns over its two rows, and over those of the warp, to shared memory.
template <Operand kind>
__device__ __forceinline__ void sum_columns(
    const float (&t)[Shape<kind>::TILES][4],
    ColumnSums<float, TENSOR_THREADS / WARP, Unit<kind>::OTHERS>& to) {
  constexpr int COLUMNS = 2 * Shape<kind>::TILES;
  const int lane = threadIdx.x % WARP;
  TopSum<float, float> sums[COLUMNS];
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    const float column[2] = {t[c / 2][c % 2], t[c / 2][2 + c % 2]};
    sums[c] = top_sum(column);
  }
  const int kept = merge_lanes<4, WARP / 2>(sums);
#pragma unroll
  for (int c = 0; c < COLUMNS / 8; ++c) {
    const int place = kept + c;
    to.put(other_of(lane, place / 2 * 4 + place % 2), sums[c]);
  }
}

template <Operand kind, bool with_columns>
__global__ void __launch_bounds__(TENSOR_THREADS, 2)
    tensor_row_statistics(const Pairs pairs, const RowStatistics out,
                          const ColumnStatistics columns, const Splits splits,
                          TensorWalk<kind> walk) {
  using S = Shape<kind>;
  using Tile = StatisticsTile<kind, with_columns>;
  FASTCONTRAST_SHARED(Tile, tile);
  const int lane = threadIdx.x % WARP, warp_row = threadIdx.x / WARP * WARP_ROWS;
  const int64_t split = blockIdx.x % splits.count, part = blockIdx.x / splits.count;
  const int64_t m = pairs.rows.count, n = pairs.columns.count;
  walk.begin = split * splits.size;
  walk.end = walk.begin + splits.size;
  walk.end = walk.end < n ? walk.end : n;
  const float scale2 = scale_of<float>(pairs) * float(LOG2_E);
  const bool is_dot = pairs.metric == Metric::dot, counts_all = out.column_count || out.rank;
  const int64_t groups = with_columns ? columns.groups : 1;
  for (int64_t group = 0; group < groups; ++group) {
    walk.first_own = (part * groups + group) * TENSOR_OWNERS;
    if (walk.first_own >= m) break;
    SoftmaxState state[2] = {empty_state(), empty_state()};
    RunningSoftmax<float> running[2];
    float limit[2], total[2] = {0, 0};
    int number[2] = {0, 0}, above[2] = {0, 0};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = walk.first_own + warp_row + lane / 4 + 8 * half;
      running[half].clear();
      limit[half] = row < m ? value_at<float>(out.threshold, row) * float(LOG2_E) : 0.0f;
    }
    load_marks(pairs, true, walk.first_own, &tile->own);
    load_norms<kind>(walk.own, m, walk.first_own, TENSOR_OWNERS, tile->own_norm);
    walk.start(tile->stages);
    int tiles = 0;
    for (int64_t first = walk.begin; first < walk.end; first += S::OTHERS) {
      Marks<S::OTHERS>& other = tile->other[tiles % 2];
      load_marks(pairs, false, first, &other);
      load_norms<kind>(walk.other, n, first, S::OTHERS, tile->other_norm[tiles % 2]);
      __syncthreads();
      if constexpr (with_columns) {  // those of the tile before are complete now
        if (tiles > 0) {
          tile->columns[(tiles - 1) % 2].add_to(columns, part, group, n, first - S::OTHERS, first);
        }
      }
      float t[S::TILES][4];
      walk.products(tile->stages, first, !is_dot, t);
      uint32_t near = 0, counting = 0;
      if (!is_dot) near = square_distances<kind>(tile->own_norm, tile->other_norm[tiles % 2], t);
#pragma unroll
      for (int i = 0; i < 4 * S::TILES; ++i) {
        const int own = warp_row + owner_of(lane, i), place = other_of(lane, i);
        const int64_t column = first + place;
        const bool counts = column < walk.end && walk.first_own + own < m &&
                            column != tile->own.first[own] && column != tile->own.second[own] &&
                            id_counts(pairs.keep, tile->own.id[own], other.id[place]);
        if (counts) counting |= 1u << i;
      }
      near &= counting;
      for (unsigned lanes; (lanes = __ballot_sync(ALL_LANES, near != 0)) != 0;) {
        const int source = __ffs(lanes) - 1;
        const int i = __shfl_sync(ALL_LANES, __ffs(near) - 1, source);
        const float direct =
            direct_value(pairs, pairs.rows, walk.first_own + warp_row + owner_of(source, i),
                         pairs.columns, first + other_of(source, i));
        if (lane != source) continue;
        near &= near - 1;
#pragma unroll
        for (int j = 0; j < 4 * S::TILES; ++j) t[j / 4][j % 4] = j == i ? direct : t[j / 4][j % 4];
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float scores[2 * S::TILES];
#pragma unroll
        for (int j = 0; j < 2 * S::TILES; ++j) {
          const int i = j / 2 * 4 + 2 * half + j % 2;
          const bool counts = counting >> i & 1u;
          const float score = counts ? score_of(pairs.metric, t[i / 4][i % 4], scale2) : -INFINITY;
          if (counts_all) {
            total[half] += counts ? score : 0.0f;
            number[half] += counts;
            above[half] += score > limit[half];
          }
          scores[j] = t[i / 4][i % 4] = score;
        }
        running[half].add(scores);
      }
      if constexpr (with_columns) sum_columns<kind>(t, tile->columns[tiles % 2]);
      if (++tiles % FLUSH == 0) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          state[half] = merge(state[half], running[half].state());
          running[half].clear();
        }
      }
    }
    if constexpr (with_columns) {
      __syncthreads();  // and nobody reads what the next group of rows replaces
      const int64_t last = walk.begin + (int64_t)(tiles - 1) * S::OTHERS;
      tile->columns[(tiles - 1) % 2].add_to(columns, part, group, n, last, walk.end);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      finish_row<float, 4>(out, splits, split, m, walk.first_own + warp_row + lane / 4 + 8 * half,
                           merge(state[half], running[half].state()), (double)total[half],
                           number[half], above[half]);
    }
  }
}

// The pairs that leave a tile: one at a time, each lane the coordinates k = lane, lane + 32, ...
template <Operand kind>
__device__ __forceinline__ void take_directly(const Pairs& pairs, const ScoreGradients& from,
                                              const SideGradient& out, const TensorWalk<kind>& walk,
                                              int64_t split, int64_t first, float scale,
                                              const TensorTile<kind, true>& tile, int parity,
                                              uint32_t pending, uint32_t positives,
                                              float (&product)[2]) {
  const int lane = threadIdx.x % WARP, warp_row = threadIdx.x / WARP * WARP_ROWS;
  const float scale2 = scale * float(LOG2_E);
  const bool symmetric = from.column_grad != nullptr;
  for (unsigned lanes; (lanes = __ballot_sync(ALL_LANES, pending != 0)) != 0;) {
    const int source = __ffs(lanes) - 1;
    const int i = __shfl_sync(ALL_LANES, __ffs(pending) - 1, source);
    const bool positive = __shfl_sync(ALL_LANES, positives, source) >> i & 1u;
    const int own = warp_row + owner_of(source, i), place = other_of(source, i);
    const int64_t o = walk.first_own + own, q = first + place;
    const float t =
        score_of(pairs.metric, direct_value(pairs, walk.own_given, o, walk.other_given, q), scale2);
    const auto& other_terms = tile.other_terms[parity];
    float g = 0.0f;
    if (positive) {
      g = out.owns_rows ? -tile.own_terms.of[GRAD_POSITIVE][own]
                        : -other_terms.of[GRAD_POSITIVE][place];
    } else if (t != -INFINITY) {
      g = out.owns_rows ? score_gradient(t, tile.own_terms, own, other_terms, place, symmetric)
                        : score_gradient(t, other_terms, place, tile.own_terms, own, symmetric);
    }
    const float weight = g == 0.0f ? 0.0f : weight_of(pairs.metric, g, t, scale, scale2);
    if (out.grad && weight != 0.0f) {
      float* const row = (float*)out.grad + (split * walk.own_given.count + o) * walk.dim;
      const int64_t begin = (int64_t)walk.part * Shape<kind>::CHUNK;
      int64_t end = begin + (int64_t)walk.parts * Shape<kind>::CHUNK;
      end = end < walk.dim ? end : walk.dim;
      for (int64_t k = begin + lane; k < end; k += WARP) {
        const float y = element_at(walk.other_given, pairs.type, q, k);
        const float x =
            pairs.metric == Metric::dot ? 0.0f : element_at(walk.own_given, pairs.type, o, k);
        row[k] += weight * (y - x);
      }
    }
    if (lane != source) continue;
    pending &= pending - 1;
    const float part = g == 0.0f ? 0.0f : g * t;
    product[0] += i % 4 < 2 ? part : 0.0f;
    product[1] += i % 4 < 2 ? 0.0f : part;
  }
}

// exact / rounded, where rounding moved the sum little, as it does if all have one sign.
FC_INLINE float rounding_ratio(double exact, double rounded) {
  const bool close = fabs(exact - rounded) <= 0.0078125 * fabs(rounded) && rounded != 0.0;
  return close ? (float)(exact / rounded) : 1.0f;
}

template <Operand kind>
__global__ void __launch_bounds__(TENSOR_THREADS, 2)
    tensor_point_gradients(const Pairs pairs, const ScoreGradients from, const SideGradient out,
                           const Splits splits, TensorWalk<kind> walk, const int parts) {
  using S = Shape<kind>;
  using Tile = TensorTile<kind, true>;
  FASTCONTRAST_SHARED(Tile, tile);
  const int lane = threadIdx.x % WARP, warp_row = threadIdx.x / WARP * WARP_ROWS;
  const int part = blockIdx.x % parts;
  const int64_t split = blockIdx.x / parts % splits.count;
  walk.first_own = blockIdx.x / (parts * splits.count) * TENSOR_OWNERS;
  walk.begin = split * splits.size;
  walk.end = walk.begin + splits.size;
  walk.end = walk.end < walk.other_given.count ? walk.end : walk.other_given.count;
  walk.part = part * S::PARTS;
  walk.parts = walk.chunks - walk.part < S::PARTS ? walk.chunks - walk.part : S::PARTS;
  if (!out.grad) walk.parts = 0;
  const float scale = scale_of<float>(pairs), scale2 = scale * float(LOG2_E);
  const bool is_dot = pairs.metric == Metric::dot, symmetric = from.column_grad != nullptr;
  const bool twice = kind == Operand::bf16x3 || from.grad_entropy || from.grad_sum;
  float grad[S::PARTS][S::GRAD_TILES][4];
#pragma unroll
  for (int i = 0; i < S::PARTS * S::GRAD_TILES * 4; ++i) {
    grad[i / (S::GRAD_TILES * 4)][i / 4 % S::GRAD_TILES][i % 4] = 0.0f;
  }
  double exact_sum[2] = {0, 0}, used_sum[2] = {0, 0}, product[2] = {0, 0};
  load_marks(pairs, out.owns_rows, walk.first_own, &tile->own);
  load_terms(pairs, from, out.owns_rows, walk.first_own, &tile->own_terms);
  load_norms<kind>(walk.own, walk.own_given.count, walk.first_own, TENSOR_OWNERS, tile->own_norm);
  walk.start(tile->stages);
  int parity = 0;
  for (int64_t first = walk.begin; first < walk.end; first += S::OTHERS, parity ^= 1) {
    const auto& other = tile->other[parity];
    const auto& other_terms = tile->other_terms[parity];
    load_marks(pairs, !out.owns_rows, first, &tile->other[parity]);
    load_terms(pairs, from, !out.owns_rows, first, &tile->other_terms[parity]);
    load_norms<kind>(walk.other, walk.other_given.count, first, S::OTHERS,
                     tile->other_norm[parity]);
    __syncthreads();
    float value[S::TILES][4], rest[S::TILES][4];
    walk.products(tile->stages, first, !is_dot, value);
    uint32_t near = 0, positives = 0;
    if (!is_dot) near = square_distances<kind>(tile->own_norm, tile->other_norm[parity], value);
    float exact[2] = {0, 0}, used[2] = {0, 0}, products[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 4 * S::TILES; ++i) {
      const int own = warp_row + owner_of(lane, i), place = other_of(lane, i);
      const int64_t column = out.owns_rows ? first + place : walk.first_own + own;
      const int left_out = out.owns_rows ? tile->own.first[own] : other.first[place];
      const int left_out_too = out.owns_rows ? tile->own.second[own] : other.second[place];
      const bool inside = walk.first_own + own < walk.own_given.count && first + place < walk.end;
      const bool positive = inside && from.grad_positive && column == left_out;
      const bool counts = inside && column != left_out && column != left_out_too &&
                          id_counts(pairs.keep, tile->own.id[own], other.id[place]);
      if (positive) positives |= 1u << i;
      if (!counts) near &= ~(1u << i);
      const float t = score_of(pairs.metric, value[i / 4][i % 4], scale2);
      float g = 0.0f;
      if (counts && !(near >> i & 1u) && t != -INFINITY) {
        g = out.owns_rows ? score_gradient(t, tile->own_terms, own, other_terms, place, symmetric)
                          : score_gradient(t, other_terms, place, tile->own_terms, own, symmetric);
      }
      products[i % 4 / 2] += g == 0.0f ? 0.0f : g * t;
      const float weight = g == 0.0f ? 0.0f : weight_of(pairs.metric, g, t, scale, scale2);
      const float high = rounded_weight<kind>(weight);
      const float low = twice ? rounded_weight<kind>(weight - high) : 0.0f;
      value[i / 4][i % 4] = high;
      rest[i / 4][i % 4] = low;
      exact[i % 4 / 2] += weight;
      used[i % 4 / 2] += high + low;
    }
    take_directly<kind>(pairs, from, out, walk, split, first, scale, *tile, parity,
                        near | positives, positives, products);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      exact_sum[half] += exact[half];
      used_sum[half] += used[half];
      product[half] += products[half];
    }
#pragma unroll
    for (int w = 0; w < S::PARTS; ++w) {
      if (w < walk.parts) {
        const int stage = walk.arrive(tile->stages, first, walk.chunks + w);
        const auto& points = tile->stages.other[stage];
        if constexpr (kind == Operand::bf16x3) add_weighted<kind>(value, points[1], grad[w]);
        if (twice) add_weighted<kind>(rest, points[0], grad[w]);
        add_weighted<kind>(value, points[0], grad[w]);
      }
    }
  }
  __syncwarp();  // other lanes have added to the rows in memory
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t owner = walk.first_own + warp_row + lane / 4 + 8 * half;
#pragma unroll
    for (int distance = 2; distance > 0; distance /= 2) {
      exact_sum[half] += __shfl_xor_sync(ALL_LANES, exact_sum[half], distance);
      used_sum[half] += __shfl_xor_sync(ALL_LANES, used_sum[half], distance);
      product[half] += __shfl_xor_sync(ALL_LANES, product[half], distance);
    }
    if (owner >= walk.own_given.count) continue;
    const float ratio = is_dot ? 1.0f : rounding_ratio(exact_sum[half], used_sum[half]);
    const float sum = is_dot ? 0.0f : (float)used_sum[half];
    using Element = typename S::Element;
    const Element* const values = (const Element*)walk.own.values + owner * walk.own.width;
    const Element* const lows = (const Element*)walk.own.low + owner * walk.own.width;
    float* const row = (float*)out.grad + (split * walk.own_given.count + owner) * walk.dim;
#pragma unroll
    for (int w = 0; w < S::PARTS; ++w) {
#pragma unroll
      for (int d = 0; d < 2 * S::GRAD_TILES; ++d) {
        const int64_t k = (int64_t)(walk.part + w) * S::CHUNK + d / 2 * 8 + lane % 4 * 2 + d % 2;
        if (w >= walk.parts || k >= walk.dim) continue;
        float x = widen(values[k]);
        if constexpr (kind == Operand::bf16x3) x += widen(lows[k]);
        if (is_dot) x = 0.0f;
        row[k] += (grad[w][d / 2][2 * half + d % 2] - sum * x) * ratio;
      }
    }
    if (out.product && part == 0 && lane % 4 == 0) {
      out.product[split * walk.own_given.count + owner] = product[half];
    }
  }
}

constexpr size_t MOST_SHARED = 48 << 10;  // without asking for more

template <Operand kind, bool with_columns>
void statistics(const RoundedPairs& of, const RowStatistics& out, const ColumnStatistics& columns,
                Splits splits, Stream stream) {
  using Tile = StatisticsTile<kind, with_columns>;
  static_assert(sizeof(Tile) <= MOST_SHARED);
  const int64_t m = of.pairs.rows.count, n = of.pairs.columns.count;
  const unsigned parts = blocks_for(m, TENSOR_OWNERS * columns.groups);
  FASTCONTRAST_LAUNCH(stream, parts * (unsigned)splits.count, TENSOR_THREADS, sizeof(Tile),
                      (tensor_row_statistics<kind, with_columns>), of.pairs, out, columns, splits,
                      walk_of<kind>(of, true));
  merge_row_statistics(out, of.pairs.type, m, splits, stream);
  if (with_columns) merge_column_statistics(columns, of.pairs.type, n, parts, stream);
}

template <Operand kind>
void statistics(const RoundedPairs& of, const RowStatistics& out, const ColumnStatistics& columns,
                Splits splits, Stream stream) {
  columns.lse ? statistics<kind, true>(of, out, columns, splits, stream)
              : statistics<kind, false>(of, out, columns, splits, stream);
}

template <Operand kind>
void gradients(const RoundedPairs& of, const ScoreGradients& from, const SideGradient& out,
               Splits splits, Stream stream) {
  static_assert(sizeof(TensorTile<kind, true>) <= MOST_SHARED);
  const TensorWalk<kind> walk = walk_of<kind>(of, out.owns_rows);
  constexpr int PARTS = Shape<kind>::PARTS;
  const int parts = out.grad && walk.chunks > 0 ? (walk.chunks + PARTS - 1) / PARTS : 1;
  const unsigned blocks =
      blocks_for(walk.own_given.count, TENSOR_OWNERS) * (unsigned)(splits.count * parts);
  FASTCONTRAST_LAUNCH(stream, blocks, TENSOR_THREADS, sizeof(TensorTile<kind, true>),
                      (tensor_point_gradients<kind>), of.pairs, from, out, splits, walk, parts);
}

bool has_kernel(const RoundedPairs& of) {
  return of.pairs.type != Scalar::uint8 && of.pairs.type != Scalar::float64;
}

}  // namespace

bool tensor_statistics(const RoundedPairs& of, const RowStatistics& out,
                       const ColumnStatistics& columns, Splits splits, Stream stream) {
  if (!has_kernel(of)) return false;
  switch (of.operand) {
    case Operand::bf16:
      statistics<Operand::bf16>(of, out, columns, splits, stream);
      return true;
    case Operand::tf32:
      statistics<Operand::tf32>(of, out, columns, splits, stream);
      return true;
    case Operand::bf16x3:
      statistics<Operand::bf16x3>(of, out, columns, splits, stream);
      return true;
  }
  return false;
}

bool tensor_gradients(const RoundedPairs& of, const ScoreGradients& from, const SideGradient& out,
                      Splits splits, Stream stream) {
  if (!has_kernel(of)) return false;
  switch (of.operand) {
    case Operand::bf16:
      gradients<Operand::bf16>(of, from, out, splits, stream);
      return true;
    case Operand::tf32:
      gradients<Operand::tf32>(of, from, out, splits, stream);
      return true;
    case Operand::bf16x3:
      gradients<Operand::bf16x3>(of, from, out, splits, stream);
      return true;
  }
  return false;
}

}  // namespace cuda
}  // namespace fastcontrast
