// Maths: t_ij = s_ij log2(e) from Σ_k (x_ik - y_jk)², or from x_i·y_j. Statistics: per row the
//   running maximum, Σ 2^(t-max) and Σ 2^(t-max)(t-max), on request Σ t and two counts. Gradients
//   of the owners o of one side by the others q: do = Σ c (q - o), for "dot" Σ c q, with the pair
//   weights c of common/scores.h. Losses: one positive per row, by direct difference.
// Tiling: a block owns 32 points of one side and streams tiles of 64 points (32 in double) of the
//   other, a thread has 4 × 4 (4 × 2) of the scores. Their softmax stays in its registers; 16
//   threads merge theirs when the last tile is through (of columns: column_sums.h). In gradients
//   the weights of a tile meet in shared memory, and the gradient of up to 256 coordinates (128 in
//   double) stays in registers: more coordinates are further blocks, which compute the scores anew.
//   The grid is 1-D; few owners share out the other side among blocks.
// Memory: owners' and others' coordinates pass through shared memory 128 bytes of a point at a
//   time, the next ones copied (cp.async) while those are used; others come from the L2 cache, as
//   all blocks stream the same ones. Up to 1024 columns they stay there as far as 80 KiB go
//   (point_walk.h): a block then reads its rows once for scores and gradient, and the columns once
//   for several groups of rows. Every result is written once.
// Numerics: every distance is the norm of a difference, so no pair is too near, nothing is centred
//   and NaN and inf spread as they do there; that takes two operations where the Gram identity
//   takes one. Sums in T, of statistics beyond a few hundred columns in double. One writer per
//   result, in a fixed order.
#include "cuda/distance_softmax.h"

#include "cuda/column_sums.h"
#include "cuda/pair_scores.h"
#include "cuda/point_walk.h"

namespace fastcontrast {
namespace cuda {
namespace {

constexpr int FLUSH = 16;  // tiles whose softmax is summed in T
constexpr int PARTS = 8;   // chunks of coordinates whose gradient a block holds

template <typename T, bool with_columns>
struct alignas(16) StatisticsTile {
  Marks<OWNERS> own;
  Marks<Sizes<T>::OTHERS> other[2];  // of this tile and of the one before
  ColumnSums<T, THREADS / WARP, with_columns ? Sizes<T>::OTHERS : 1> columns[2];
};

// The sums of a thread's columns over its rows and the other lanes' rows, to shared memory.
template <typename T>
__device__ __forceinline__ void sum_columns(const T (&t)[OWN][Sizes<T>::OTHER],
                                            ColumnSums<T, THREADS / WARP, Sizes<T>::OTHERS>& to) {
  constexpr int OTHER = Sizes<T>::OTHER;
  TopSum<T, T> sums[OTHER];
#pragma unroll
  for (int j = 0; j < OTHER; ++j) {
    const T column[OWN] = {t[0][j], t[1][j], t[2][j], t[3][j]};
    sums[j] = top_sum(column);
  }
  const int kept = merge_lanes<LANES_OF_ROW, WARP / 2>(sums);
#pragma unroll
  for (int j = 0; j < OTHER * LANES_OF_ROW / WARP; ++j) {
    to.put(threadIdx.x % LANES_OF_ROW + (kept + j) * LANES_OF_ROW, sums[j]);
  }
}

template <bool is_dot, bool with_columns, typename T>
__global__ void __launch_bounds__(THREADS, 2)
    row_statistics(const Pairs pairs, const RowStatistics out, const ColumnStatistics columns,
                   const Splits splits, Walk<T> walk) {
  using S = Sizes<T>;
  using Tile = StatisticsTile<T, with_columns>;
  FASTCONTRAST_SHARED(Tile, tile);
  T* const slots = (T*)(tile + 1);
  const int lane = threadIdx.x % LANES_OF_ROW, line = threadIdx.x / LANES_OF_ROW;
  const int64_t split = blockIdx.x % splits.count, part = blockIdx.x / splits.count;
  const int64_t m = pairs.rows.count, n = pairs.columns.count;
  walk.begin = split * splits.size;
  walk.end = walk.begin + splits.size;
  walk.end = walk.end < n ? walk.end : n;
  const T scale2 = scale_of<T>(pairs) * T(LOG2_E);
  const bool counts_all = out.column_count || out.rank;
  for (int64_t group = 0; group < columns.groups; ++group) {
    walk.first_own = (part * columns.groups + group) * OWNERS;
    if (walk.first_own >= m) break;
    if (group > 0) __syncthreads();  // nobody reads those before any more
    SoftmaxState state[OWN];
    RunningSoftmax<T> running[OWN];
    T limit[OWN], total[OWN];
    int number[OWN], above[OWN];
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const int64_t row = walk.first_own + line + i * (THREADS / LANES_OF_ROW);
      state[i] = empty_state();
      running[i].clear();
      limit[i] = row < m ? value_at<T>(out.threshold, row) * T(LOG2_E) : T(0);
      total[i] = T(0);
      number[i] = above[i] = 0;
    }
    load_marks(pairs, true, walk.first_own, &tile->own);
    walk.start(slots, group);
    int tiles = 0;
    for (int64_t first = walk.begin; first < walk.end; first += S::OTHERS) {
      Marks<S::OTHERS>& other = tile->other[tiles % 2];
      load_marks(pairs, false, first, &other);
      __syncthreads();
      if constexpr (with_columns) {  // those of the tile before are complete now
        if (tiles > 0) {
          tile->columns[(tiles - 1) % 2].add_to(columns, part, group, n, first - S::OTHERS, first);
        }
      }
      T t[OWN][S::OTHER];
      tile_values<is_dot>(walk, slots, first, t);
#pragma unroll
      for (int i = 0; i < OWN; ++i) {
        const int own = line + i * (THREADS / LANES_OF_ROW);
#pragma unroll
        for (int j = 0; j < S::OTHER; ++j) {
          const int place = lane + j * LANES_OF_ROW;
          const int64_t column = first + place;
          const bool counts = column < walk.end && walk.first_own + own < m &&
                              column != tile->own.first[own] && column != tile->own.second[own] &&
                              id_counts(pairs.keep, tile->own.id[own], other.id[place]);
          t[i][j] = counts ? score_of(pairs.metric, t[i][j], scale2) : T(-INFINITY);
          if (counts_all) {
            total[i] += counts ? t[i][j] : T(0);
            number[i] += counts;
            above[i] += t[i][j] > limit[i];
          }
        }
        running[i].add(t[i]);
      }
      if constexpr (with_columns) sum_columns<T>(t, tile->columns[tiles % 2]);
      if (++tiles % FLUSH == 0) {
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
          state[i] = merge(state[i], running[i].state());
          running[i].clear();
        }
      }
    }
    if constexpr (with_columns) {
      __syncthreads();
      const int64_t last = walk.begin + (int64_t)(tiles - 1) * S::OTHERS;
      tile->columns[(tiles - 1) % 2].add_to(columns, part, group, n, last, walk.end);
    }
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const int64_t row = walk.first_own + line + i * (THREADS / LANES_OF_ROW);
      finish_row<T, LANES_OF_ROW>(out, splits, split, m, row, merge(state[i], running[i].state()),
                                  (double)total[i], number[i], above[i]);
    }
  }
}

template <typename T>
struct alignas(16) GradientTile {
  using S = Sizes<T>;
  static constexpr int STRIDE = OWNERS + S::UNIT;
  T weights[S::OTHERS * STRIDE];
  Marks<OWNERS> own;
  Marks<S::OTHERS> other[2];  // of this tile and of the one before
  Terms<T, OWNERS> own_terms;
  Terms<T, S::OTHERS> other_terms[2];
};

// The weights of a thread's pairs, from the sums of their coordinates, to shared memory. Returns
// Σ ∂L/∂s · t of each of its owners.
template <bool is_dot, typename T>
__device__ __forceinline__ void weigh_tile(const Pairs& pairs, const ScoreGradients& from,
                                           const Walk<T>& walk, bool owns_rows, int64_t first,
                                           int parity, T scale, GradientTile<T>* tile,
                                           T (&value)[OWN][Sizes<T>::OTHER],
                                           double (&product)[OWN]) {
  const int lane = threadIdx.x % LANES_OF_ROW, line = threadIdx.x / LANES_OF_ROW;
  const T scale2 = scale * T(LOG2_E);
  const auto& other = tile->other[parity];
  const auto& other_terms = tile->other_terms[parity];
  const bool symmetric = from.column_grad != nullptr;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int own = line + i * (THREADS / LANES_OF_ROW);
    const bool here = walk.first_own + own < walk.own.count;
    T part = T(0);
#pragma unroll
    for (int j = 0; j < Sizes<T>::OTHER; ++j) {
      const int place = lane + j * LANES_OF_ROW;
      const int64_t column = owns_rows ? first + place : walk.first_own + own;
      const int left_out = owns_rows ? tile->own.first[own] : other.first[place];
      const int left_out_too = owns_rows ? tile->own.second[own] : other.second[place];
      const T t = score_of(pairs.metric, value[i][j], scale2);
      T g = T(0);
      if (here && first + place < walk.end) {
        if (from.grad_positive && column == left_out) {
          g = owns_rows ? -tile->own_terms.of[GRAD_POSITIVE][own]
                        : -other_terms.of[GRAD_POSITIVE][place];
        } else if (column != left_out && column != left_out_too && t != T(-INFINITY) &&
                   id_counts(pairs.keep, tile->own.id[own], other.id[place])) {
          g = owns_rows ? score_gradient(t, tile->own_terms, own, other_terms, place, symmetric)
                        : score_gradient(t, other_terms, place, tile->own_terms, own, symmetric);
        }
      }
      part += g == T(0) ? T(0) : g * t;
      const T weight = g == T(0) ? T(0) : weight_of(pairs.metric, g, t, scale, scale2);
      tile->weights[place * GradientTile<T>::STRIDE + own] = weight;
    }
    product[i] += (double)part;
  }
}

template <bool is_dot, typename T>
__global__ void __launch_bounds__(THREADS, 2)
    point_gradients(const Pairs pairs, const ScoreGradients from, const SideGradient out,
                    const Splits splits, Walk<T> walk, const int parts) {
  using S = Sizes<T>;
  constexpr int STRIDE = GradientTile<T>::STRIDE;
  constexpr int ROWS = 4;                                   // owners of a thread, when weights meet
  constexpr int DIMS = OWNERS * S::CHUNK / ROWS / THREADS;  // and coordinates of a chunk
  FASTCONTRAST_SHARED(GradientTile<T>, tile);
  T* const slots = (T*)(tile + 1);
  const int part = blockIdx.x % parts;
  const unsigned own_blocks = gridDim.x / (unsigned)(parts * splits.count);
  // Blocks that read the same others are neighbours.
  const int64_t own_block = blockIdx.x / parts % own_blocks;
  const int64_t split = blockIdx.x / parts / own_blocks;
  walk.begin = split * splits.size;
  walk.end = walk.begin + splits.size;
  walk.end = walk.end < walk.other.count ? walk.end : walk.other.count;
  walk.part = part * PARTS;
  walk.parts = walk.chunks - walk.part < PARTS ? walk.chunks - walk.part : PARTS;
  if (!out.grad) walk.parts = 0;
  const T scale = scale_of<T>(pairs);
  const int rows = threadIdx.x % (OWNERS / ROWS) * ROWS;
  const int dims = threadIdx.x / (OWNERS / ROWS) * DIMS;
  for (int64_t group = 0; group < out.groups; ++group) {
    walk.first_own = (own_block * out.groups + group) * OWNERS;
    if (walk.first_own >= walk.own.count) break;
    if (group > 0) __syncthreads();  // nobody reads those before any more
    T grad[PARTS][ROWS][DIMS];
#pragma unroll
    for (int w = 0; w < PARTS; ++w) {
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
#pragma unroll
        for (int d = 0; d < DIMS; ++d) grad[w][i][d] = T(0);
      }
    }
    double product[OWN] = {0, 0, 0, 0};
    load_marks(pairs, out.owns_rows, walk.first_own, &tile->own);
    load_terms(pairs, from, out.owns_rows, walk.first_own, &tile->own_terms);
    walk.start(slots, group);
    int parity = 0;
    for (int64_t first = walk.begin; first < walk.end; first += S::OTHERS, parity ^= 1) {
      load_marks(pairs, !out.owns_rows, first, &tile->other[parity]);
      load_terms(pairs, from, !out.owns_rows, first, &tile->other_terms[parity]);
      __syncthreads();
      T value[OWN][S::OTHER];
      tile_values<is_dot>(walk, slots, first, value);
      weigh_tile<is_dot>(pairs, from, walk, out.owns_rows, first, parity, scale, tile, value,
                         product);
      const int others = walk.end - first < S::OTHERS ? (int)(walk.end - first) : S::OTHERS;
#pragma unroll
      for (int w = 0; w < PARTS; ++w) {
        if (w < walk.parts) {
          const T *own, *other;
          walk.arrive(slots, first, walk.chunks + w, &own, &other);  // weights, too
          own += rows * S::STRIDE + dims;
          other += dims;
          T mine[ROWS][DIMS];
#pragma unroll
          for (int i = 0; i < ROWS; ++i) {
#pragma unroll
            for (int d = 0; d < DIMS; ++d) mine[i][d] = is_dot ? T(0) : own[i * S::STRIDE + d];
          }
          for (int j = 0; j < others; ++j) {
            T weight[ROWS];
#pragma unroll
            for (int i = 0; i < ROWS; i += S::UNIT) {
              const auto pack = load_pack<T, S::UNIT>(tile->weights + j * STRIDE + rows + i);
#pragma unroll
              for (int l = 0; l < S::UNIT; ++l) weight[i + l] = pack.item[l];
            }
#pragma unroll
            for (int d = 0; d < DIMS; ++d) {
              const T q = other[j * S::STRIDE + d];
#pragma unroll
              for (int i = 0; i < ROWS; ++i) {
                grad[w][i][d] += weight[i] * (is_dot ? q : q - mine[i][d]);
              }
            }
          }
        }
      }
    }
#pragma unroll
    for (int w = 0; w < PARTS; ++w) {
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const int64_t owner = walk.first_own + rows + i;
#pragma unroll
        for (int d = 0; d < DIMS; ++d) {
          const int64_t k = (int64_t)(walk.part + w) * S::CHUNK + dims + d;
          if (w < walk.parts && owner < walk.own.count && k < walk.dim) {
            ((T*)out.grad)[(split * walk.own.count + owner) * walk.dim + k] = grad[w][i][d];
          }
        }
      }
    }
    if (!out.product || part != 0) continue;
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const int64_t owner =
          walk.first_own + threadIdx.x / LANES_OF_ROW + i * (THREADS / LANES_OF_ROW);
#pragma unroll
      for (int distance = LANES_OF_ROW / 2; distance > 0; distance /= 2) {
        product[i] += __shfl_xor_sync(ALL_LANES, product[i], distance);
      }
      if (threadIdx.x % LANES_OF_ROW == 0 && owner < walk.own.count) {
        out.product[split * walk.own.count + owner] = product[i];
      }
    }
  }
}

template <bool is_dot, bool with_columns, typename T>
void statistics(const Pairs& pairs, const RowStatistics& out, const ColumnStatistics& columns,
                Splits splits, Stream stream) {
  const int64_t m = pairs.rows.count, n = pairs.columns.count;
  const unsigned parts = blocks_for(m, OWNERS * columns.groups);
  using Tile = StatisticsTile<T, with_columns>;
  Walk<T> walk = walk_of<T>(pairs, true);
  const size_t bytes = settle_slots(walk, n, splits, false, sizeof(Tile));
  FASTCONTRAST_LAUNCH(stream, parts * (unsigned)splits.count, THREADS, bytes,
                      (row_statistics<is_dot, with_columns, T>), pairs, out, columns, splits, walk);
  merge_row_statistics(out, pairs.type, m, splits, stream);
  if (with_columns) merge_column_statistics(columns, pairs.type, n, parts, stream);
}

template <typename T>
bool statistics(const Pairs& pairs, const RowStatistics& out, const ColumnStatistics& columns,
                Splits splits, Stream stream) {
  if (pairs.metric == Metric::dot) {
    columns.lse ? statistics<true, true, T>(pairs, out, columns, splits, stream)
                : statistics<true, false, T>(pairs, out, columns, splits, stream);
  } else {
    columns.lse ? statistics<false, true, T>(pairs, out, columns, splits, stream)
                : statistics<false, false, T>(pairs, out, columns, splits, stream);
  }
  return true;
}

template <typename T>
bool gradients(const Pairs& pairs, const ScoreGradients& from, const SideGradient& out,
               Splits splits, Stream stream) {
  Walk<T> walk = walk_of<T>(pairs, out.owns_rows);
  const size_t bytes =
      settle_slots(walk, pairs.columns.count, splits, out.grad != nullptr, sizeof(GradientTile<T>));
  const int parts = out.grad && walk.chunks > 0 ? (walk.chunks + PARTS - 1) / PARTS : 1;
  const unsigned blocks =
      blocks_for(walk.own.count, OWNERS * out.groups) * (unsigned)(splits.count * parts);
  if (pairs.metric == Metric::dot) {
    FASTCONTRAST_LAUNCH(stream, blocks, THREADS, bytes, (point_gradients<true, T>), pairs, from,
                        out, splits, walk, parts);
  } else {
    FASTCONTRAST_LAUNCH(stream, blocks, THREADS, bytes, (point_gradients<false, T>), pairs, from,
                        out, splits, walk, parts);
  }
  return true;
}

}  // namespace

bool distance_softmax_statistics(const Pairs& pairs, const RowStatistics& out,
                                 const ColumnStatistics& columns, Splits splits, Stream stream) {
  if (pairs.type == Scalar::uint8) return false;
  return pairs.type == Scalar::float64 ? statistics<double>(pairs, out, columns, splits, stream)
                                       : statistics<float>(pairs, out, columns, splits, stream);
}

bool distance_softmax_gradients(const Pairs& pairs, const ScoreGradients& from,
                                const SideGradient& out, Splits splits, Stream stream) {
  if (pairs.type == Scalar::uint8) return false;
  return pairs.type == Scalar::float64 ? gradients<double>(pairs, from, out, splits, stream)
                                       : gradients<float>(pairs, from, out, splits, stream);
}

}  // namespace cuda
}  // namespace fastcontrast
