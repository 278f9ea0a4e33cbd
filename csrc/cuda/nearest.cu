// Maths: per row i the k columns of smallest key d²_ij or -x_i·y_j (or of its opposite), by direct
//   difference in double, the lower column first where keys are equal, NaN last.
// Tiling: a block owns 64 rows and streams tiles of 64 columns, each thread 4 × 4 pairs, through
// two
//   buffers of shared memory that hold 16 float32 (or as many bytes of another type) of each point.
//   From the sums in T come bounds of the keys (common/ranking.h), and a column joins its row's
//   list of candidates unless k keys are surely below its lower bound. A warp cuts the lists of its
//   8 rows when they hold more than 2k, and ranks what is left at the end by direct differences.
//   Few rows share out their columns among blocks; a second kernel merges what these have ranked.
// Memory: points are read in place, the columns once per 64 rows; lists take O(k) per row in global
//   memory, and are written about k·log(N/k) times.
// Numerics: differences, not the Gram identity: the bounds have the width of d²·eps·D wherever the
//   points lie. Sums only decide which pairs are taken directly, so that results depend neither on
//   tiles nor on the order of threads. What is not finite in them is always taken directly.
#include "cuda/nearest.h"

#include "cuda/candidates.h"
#include "cuda/launch.h"
#include "cuda/ranked_columns.h"

namespace fastcontrast {
namespace cuda {
namespace {

constexpr int THREADS = 256;
constexpr int TILE = 64;   // rows and columns of a tile
constexpr int EDGE = 4;    // pairs of a thread: EDGE × EDGE
constexpr int PACKS = 4;   // of 16 bytes, of a point in a buffer: one for each thread
constexpr int PITCH = 68;  // from one dimension to the next in a buffer; a multiple of 4, for packs
constexpr int WARPS = THREADS / WARP;
constexpr int ROWS_OF_WARP = TILE / WARPS;
constexpr int LANES_OF_PAIR = 8;  // that take one direct difference
constexpr int MAX_K = 256;

// What a block knows of one of its rows, in shared memory.
template <typename T>
struct Row {
  int64_t id;
  int64_t excluded[2];      // -1: none
  T size;                   // norm, for products
  T before_low, before_up;  // bounds of the key of `after`
  T limit;                  // k keys are not above this
  int count;                // candidates
  bool is_open;             // there is such a row, and columns may count for it
};

template <typename T>
FC_INLINE T inverse_norm(double norm) {
  const double inverse = norm == 0.0 ? 0.0 : 1.0 / norm;
  // A denormal would not have T's precision: NaN, and every pair is taken directly.
  const bool is_exact =
      inverse == 0.0 || ((T)inverse >= smallest_normal(T(0)) && (T)inverse < T(INFINITY));
  return is_exact ? (T)inverse : T(NAN);
}

template <typename Element>
FC_INLINE const Element* point(const Points& points, int64_t number) {
  return (const Element*)points.data + number * points.stride;
}

// 16 bytes of a point, zeros beyond its end.
template <typename Element, int V>
static __device__ __forceinline__ Pack<Element, V> load_part(const Element* from, int64_t begin,
                                                             int64_t dim, bool has_packs) {
  Pack<Element, V> pack{};
  if (has_packs) {
    if (begin < dim) pack = load_pack<Element, V>(from + begin);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (begin + i < dim) pack.item[i] = from[begin + i];
    }
  }
  return pack;
}

template <typename T>
static __device__ __forceinline__ void load_edge(const T* from, T* to) {
  constexpr int V = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < EDGE; i += V) {
    const auto pack = load_pack<T, V>(from + i);
#pragma unroll
    for (int j = 0; j < V; ++j) to[i + j] = pack.item[j];
  }
}

template <bool product, typename T>
struct PairKey {
  T error, floor;
  bool farthest;

  // Bounds of the key from the sum over the coordinates; all keys where that is not finite.
  FC_MEMBER KeyBounds<T> bounds(T sum, T size) const {
    const T key = product == farthest ? sum : -sum;
    const T width = error * (product ? size : sum) + floor;
    const KeyBounds<T> found{key - width, key + width};
    if (found.upper - found.lower < T(INFINITY)) return found;
    return KeyBounds<T>{T(-INFINITY), T(INFINITY)};
  }
};

// Direct keys of all candidates, in shared memory; four at a time, so that loads overlap. Returns
// how many columns come after `search.after`; the others are struck out.
template <bool product, typename Element, typename T>
static __device__ int direct_keys(const NearestSearch& search, int64_t row,
                                  const CandidateList<T>& list, int count, int64_t* keys) {
  constexpr int PAIRS = WARP / LANES_OF_PAIR;
  const int lane = lane_of_thread(), part = lane % LANES_OF_PAIR;
  const Element* x = point<Element>(search.x, row);
  int counting = 0;
  for (int begin = 0; begin < count; begin += PAIRS) {
    const int i = begin + lane / LANES_OF_PAIR;
    int64_t column = NO_COLUMN;
    double sum = 0.0;
    if (i < count) {
      column = list.column[i];
      const Element* y = point<Element>(search.y, column);
#pragma unroll 4
      for (int64_t d = part; d < search.dim; d += LANES_OF_PAIR) {
        const double a = (double)widen(x[d]), b = (double)widen(y[d]);
        sum += product ? a * b : (a - b) * (a - b);
      }
    }
#pragma unroll
    for (int distance = LANES_OF_PAIR / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(ALL_LANES, sum, distance);
    }
    if (product && search.cosine && i < count) {
      sum = cosine_from_product(sum, search.x_norm[row] * search.y_norm[column]);
    }
    Neighbor found = neighbor(turned(sum, product, search.farthest), column);
    if (search.after && !comes_before(search.after[row], found)) found = no_neighbor();
    const bool writes = part == 0 && i < count;
    if (writes) {
      keys[i] = found.key;
      list.column[i] = found.column;
    }
    counting += __popc(__ballot_sync(ALL_LANES, writes && found.column != NO_COLUMN));
  }
  __syncwarp();
  return counting;
}

template <bool product, typename Element>
__global__ void __launch_bounds__(THREADS, 2)
    search_rows(const NearestSearch search, const NearestLists lists, const NearestResults out,
                const bool has_packs) {
  using T = typename Arithmetic<Element, Element>::type;
  constexpr int V = 16 / sizeof(Element);
  constexpr int DEPTH = PACKS * V;       // dimensions of a buffer
  constexpr int SIDE = DEPTH * PITCH;    // of the rows or the columns of a buffer
  FASTCONTRAST_SHARED(int64_t, shared);  // two buffers; lists are cut between two tiles
  __shared__ Row<T> rows[TILE];
  T* const buffers = (T*)shared;
  const int thread = threadIdx.x, warp = thread / WARP;
  int64_t* const keys = shared + (int64_t)warp * lists.capacity;

  const int64_t groups = (search.x.count + TILE - 1) / TILE;
  const int64_t first_row = blockIdx.x % groups * TILE, split = blockIdx.x / groups;
  const int64_t tiles = (search.y.count + TILE - 1) / TILE;
  const int64_t share = (tiles + lists.splits - 1) / lists.splits * TILE;
  const int64_t first_column = split * share;
  const int64_t rest = search.y.count - first_column;
  const int64_t columns = rest < share ? rest : share;  // none, or less, for a split too many
  const PairKey<product, T> pair{key_error(T(0), (double)search.dim),
                                 key_floor(T(0), (double)search.dim), search.farthest};

  const auto list_of = [&](int number) {
    const int64_t start = (split * search.x.count + first_row + number) * lists.capacity;
    return CandidateList<T>{(KeyBounds<T>*)lists.bounds + start, lists.column + start};
  };

  if (thread < TILE) {
    Row<T>& row = rows[thread];
    const int64_t number = first_row + thread;
    row.count = 0;
    row.limit = T(INFINITY);
    row.excluded[0] = row.excluded[1] = -1;
    row.is_open = number < search.x.count;
    if (row.is_open) {
      for (int i = 0; i < search.exclude_count; ++i) {
        row.excluded[i] = search.exclude[number * search.exclude_count + i];
      }
      row.id = search.keep != Keep::all ? search.row_ids[number] : 0;
      row.size = product && !search.cosine ? (T)search.x_norm[number] : T(1);
      if (search.after) {
        const Neighbor after = search.after[number];
        const double key = key_of(after);
        row.is_open = after.column != NO_COLUMN;
        row.before_low = key == key ? step_down((T)key) : T(INFINITY);  // all numbers come before
        row.before_up = key == key ? step_up((T)key) : T(INFINITY);
      }
    }
  }

  // For the buffers, a thread moves one pack of one row and one of one column.
  const int line = thread / PACKS, part = thread % PACKS;
  const bool has_row = first_row + line < search.x.count;
  const Element* const x = has_row ? point<Element>(search.x, first_row + line) : nullptr;
  T x_factor = T(1), y_factor = T(1);
  if (product && search.cosine && has_row) {
    x_factor = inverse_norm<T>(search.x_norm[first_row + line]);
  }
  Pack<Element, V> x_pack{}, y_pack{};
  const auto load = [&](int64_t tile_begin, int64_t depth_begin) {
    const int64_t begin = depth_begin + part * V, column = tile_begin + line;
    if (x) x_pack = load_part<Element, V>(x, begin, search.dim, has_packs);
    y_pack = Pack<Element, V>{};
    if (column >= columns) return;
    const Element* y = point<Element>(search.y, first_column + column);
    y_pack = load_part<Element, V>(y, begin, search.dim, has_packs);
    if (product && search.cosine) {
      y_factor = inverse_norm<T>(search.y_norm[first_column + column]);
    }
  };
  const auto store = [&](int buffer) {
    T* const to = buffers + buffer * 2 * SIDE + part * V * PITCH + line;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const T a = widen(x_pack.item[i]), b = widen(y_pack.item[i]);
      to[i * PITCH] = product ? a * x_factor : a;
      to[SIDE + i * PITCH] = product ? b * y_factor : b;
    }
  };

  // For the sums, a thread has rows 4·(thread/16).. and columns 4·(thread%16)..
  const int own_row = thread / (TILE / EDGE) * EDGE, own_column = thread % (TILE / EDGE) * EDGE;
  const bool warp_has_rows = first_row + warp * ROWS_OF_WARP < search.x.count;
  T sum[EDGE][EDGE] = {};

  int buffer = 0;
  if (columns > 0) {
    load(0, 0);
    store(0);
  }
  for (int64_t tile_begin = 0, depth_begin = 0; tile_begin < columns; buffer = 1 - buffer) {
    const int64_t left = search.dim - depth_begin;
    const bool completes = left <= DEPTH;
    const int64_t next_tile = tile_begin + (completes ? TILE : 0);
    const int64_t next_depth = completes ? 0 : depth_begin + DEPTH;
    if (next_tile < columns) load(next_tile, next_depth);
    __syncthreads();
    if (warp_has_rows) {
      const T* const from = buffers + buffer * 2 * SIDE;
      const int depth = completes ? (int)left : DEPTH;
#pragma unroll 4
      for (int d = 0; d < depth; ++d) {
        T a[EDGE], b[EDGE];
        load_edge(from + d * PITCH + own_row, a);
        load_edge(from + SIDE + d * PITCH + own_column, b);
#pragma unroll
        for (int i = 0; i < EDGE; ++i) {
#pragma unroll
          for (int j = 0; j < EDGE; ++j) {
            const T difference = a[i] - b[j];
            sum[i][j] += product ? a[i] * b[j] : difference * difference;
          }
        }
      }
    }
    if (completes) {
#pragma unroll
      for (int i = 0; i < EDGE; ++i) {
        Row<T>& row = rows[own_row + i];
#pragma unroll
        for (int j = 0; j < EDGE; ++j) {
          const int64_t column = first_column + tile_begin + own_column + j;
          const T value = sum[i][j];
          sum[i][j] = T(0);
          if (!row.is_open || column >= first_column + columns) continue;
          const T size = product && !search.cosine ? row.size * (T)search.y_norm[column] : row.size;
          KeyBounds<T> bounds = pair.bounds(value, size);
          if (bounds.lower > row.limit) continue;
          if (row.excluded[0] == column || row.excluded[1] == column) continue;
          if (search.keep != Keep::all &&
              (search.column_ids[column] == row.id) != (search.keep == Keep::same)) {
            continue;
          }
          if (search.after) {
            if (bounds.upper < row.before_low) continue;
            // Not surely after it: this one does not help to bound the others.
            if (!(bounds.lower > row.before_up)) bounds.upper = T(INFINITY);
          }
          const CandidateList<T> list = list_of(own_row + i);
          const int at = atomicAdd(&row.count, 1);  // TILE places are free before every tile
          list.bounds[at] = bounds;
          list.column[at] = column;
        }
      }
      __syncthreads();  // the buffers are free until the next store
      for (int i = 0; i < ROWS_OF_WARP; ++i) {
        const int number = warp * ROWS_OF_WARP + i;
        Row<T>& row = rows[number];
        const int room = lists.capacity - TILE - search.k;
        if (row.count <= search.k + room) continue;
        const CandidateList<T> list = list_of(number);
        T limit = row.limit;
        int count = cut_by_bounds(list, row.count, search.k, (T*)keys, &limit);
        if (count > search.k + room / 2) {
          direct_keys<product, Element>(search, first_row + number, list, count, keys);
          count = cut_by_keys(list, keys, count, search.k, &limit);
        }
        __syncwarp();  // all lanes have read the row
        row.limit = limit;
        row.count = count;
        __syncwarp();
      }
      __syncthreads();
    }
    if (next_tile < columns) store(1 - buffer);
    tile_begin = next_tile;
    depth_begin = next_depth;
  }

  __syncthreads();
  for (int i = 0; i < ROWS_OF_WARP; ++i) {
    const int number = warp * ROWS_OF_WARP + i;
    const int64_t row = first_row + number;
    if (row >= search.x.count) break;
    const CandidateList<T> list = list_of(number);
    T limit = rows[number].limit;
    const int count = cut_by_bounds(list, rows[number].count, search.k, (T*)keys, &limit);
    const int found = direct_keys<product, Element>(search, row, list, count, keys);
    const auto write = [&](int rank, Neighbor at_rank) {
      if (lists.splits == 1) return write_result<T>(search, out, row, rank, at_rank);
      lists.ranked[(split * search.x.count + row) * search.k + rank] = at_rank;
    };
    for (int j = lane_of_thread(); j < count; j += WARP) {
      if (list.column[j] == NO_COLUMN) continue;
      const int rank = rank_of(keys, list.column, count, j);
      if (rank < search.k) write(rank, Neighbor{keys[j], list.column[j]});
    }
    for (int rank = found + lane_of_thread(); rank < search.k; rank += WARP) {
      write(rank, no_neighbor());
    }
    __syncwarp();  // the keys are free
  }
}

template <typename Element>
__global__ void __launch_bounds__(THREADS)
    norms_of_rows(const Points points, const int64_t dim, double* const norms) {
  const int lane = lane_of_thread();
  const int64_t first = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
  for (int64_t row = first; row < points.count; row += (int64_t)gridDim.x * WARPS) {
    const Element* x = point<Element>(points, row);
    double sum = 0.0;
    for (int64_t d = lane; d < dim; d += WARP) {
      const double a = (double)widen(x[d]);
      sum += a * a;
    }
    sum = warp_sum(sum);
    if (lane == 0) norms[row] = square_root(sum);
  }
}

// Whether every point starts on 16 bytes and has a multiple of them.
bool fits_packs(const Points& points, int64_t dim, int64_t element_size) {
  return dim * element_size % 16 == 0 && is_aligned(points.data, 16) &&
         points.stride * element_size % 16 == 0;
}

template <typename Element>
bool launch(const NearestSearch& search, const NearestLists& lists, const NearestResults& out,
            Stream stream) {
  using T = typename Arithmetic<Element, Element>::type;
  const int64_t element_size = sizeof(Element);
  const bool has_packs = fits_packs(search.x, search.dim, element_size) &&
                         fits_packs(search.y, search.dim, element_size);
  const int64_t groups = (search.x.count + TILE - 1) / TILE;
  if (groups * lists.splits > MAX_BLOCKS) return false;
  const unsigned blocks = (unsigned)(groups * lists.splits);
  const size_t buffers = 2 * 2 * PACKS * (16 / sizeof(Element)) * PITCH * sizeof(T);
  const size_t keys = (size_t)WARPS * lists.capacity * sizeof(int64_t);
  const size_t shared = buffers > keys ? buffers : keys;  // below 48 KiB: no permission needed
  if (search.metric == Metric::dot) {
    FASTCONTRAST_LAUNCH(stream, blocks, THREADS, shared, (search_rows<true, Element>), search,
                        lists, out, has_packs);
  } else {
    FASTCONTRAST_LAUNCH(stream, blocks, THREADS, shared, (search_rows<false, Element>), search,
                        lists, out, has_packs);
  }
  if (lists.splits == 1) return true;
  const int64_t entries = lists.splits * search.k;
  const unsigned threads = entries > MERGE_THREADS ? MERGE_THREADS : WARP;
  FASTCONTRAST_LAUNCH(stream, blocks_for(search.x.count, 1), threads, 0, (merge_splits<T>), search,
                      lists, out);
  return true;
}

template <typename Element>
bool launch_norms(const Points& points, int64_t dim, double* norms, Stream stream) {
  FASTCONTRAST_LAUNCH(stream, blocks_for(points.count, WARPS), THREADS, 0, (norms_of_rows<Element>),
                      points, dim, norms);
  return true;
}

}  // namespace

bool row_norms(const Points& points, Scalar type, int64_t dim, double* norms, Stream stream) {
  if (points.count == 0) return true;
  switch (type) {
    case Scalar::float16:
      return launch_norms<Half>(points, dim, norms, stream);
    case Scalar::bfloat16:
      return launch_norms<BFloat16>(points, dim, norms, stream);
    case Scalar::float32:
      return launch_norms<float>(points, dim, norms, stream);
    case Scalar::float64:
      return launch_norms<double>(points, dim, norms, stream);
    default:
      return false;
  }
}

bool nearest(const NearestSearch& search, const NearestLists& lists, const NearestResults& out,
             Stream stream) {
  const bool fits = search.k >= 1 && search.k <= MAX_K && search.exclude_count <= 2 &&
                    lists.splits >= 1 && lists.capacity >= 2 * search.k + TILE &&
                    lists.capacity <= 2 * MAX_K + TILE;
  if (!fits) return false;
  if (search.x.count == 0) return true;
  switch (search.type) {
    case Scalar::float16:
      return launch<Half>(search, lists, out, stream);
    case Scalar::bfloat16:
      return launch<BFloat16>(search, lists, out, stream);
    case Scalar::float32:
      return launch<float>(search, lists, out, stream);
    case Scalar::float64:
      return launch<double>(search, lists, out, stream);
    default:
      return false;
  }
}

}  // namespace cuda
}  // namespace fastcontrast
