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

#include "cuda/candidate_rows.h"
#include "cuda/launch.h"
#include "cuda/ranked_columns.h"

namespace fastcontrast {
namespace cuda {
namespace {

constexpr int THREADS = 256;
constexpr int EDGE = 4;    // pairs of a thread: EDGE × EDGE
constexpr int PACKS = 4;   // of 16 bytes, of a point in a buffer: one for each thread
constexpr int PITCH = 68;  // from one dimension to the next in a buffer; a multiple of 4, for packs
constexpr int WARPS = THREADS / WARP;
constexpr int ROWS_OF_WARP = TILE / WARPS;
constexpr int MAX_K = 256;

// In elements of 8 bytes: the keys of a list, or the sums of a warp's rows with a tile.
template <typename T>
FC_INLINE int64_t scratch_of_warp(int capacity) {
  const int64_t sums = ROWS_OF_WARP * TILE * sizeof(T) / 8;
  return capacity > sums ? (capacity + 1) / 2 * 2 : sums;
}

template <typename T>
FC_INLINE T inverse_norm(double norm) {
  const double inverse = norm == 0.0 ? 0.0 : 1.0 / norm;
  // A denormal would not have T's precision: NaN, and every pair is taken directly.
  const bool is_exact =
      inverse == 0.0 || ((T)inverse >= smallest_normal(T(0)) && (T)inverse < T(INFINITY));
  return is_exact ? (T)inverse : T(NAN);
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

template <typename T>
static __device__ __forceinline__ void store_edge(const T* from, T* to) {
  constexpr int V = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < EDGE; i += V) {
    Pack<T, V> pack;
#pragma unroll
    for (int j = 0; j < V; ++j) pack.item[j] = from[i + j];
    store_pack(to + i, pack);
  }
}

template <bool product, typename Element>
__global__ void __launch_bounds__(THREADS, sizeof(Element) == 8 ? 1 : 2)
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
  // Between two tiles a warp has its part of this memory for sums, then for keys.
  int64_t* const keys = shared + warp * scratch_of_warp<T>(lists.capacity);
  T* const tile_sums = (T*)keys;

  const int64_t groups = (search.x.count + TILE - 1) / TILE;
  const int64_t first_row = blockIdx.x % groups * TILE, split = blockIdx.x / groups;
  const int64_t tiles = (search.y.count + TILE - 1) / TILE;
  const int64_t share = (tiles + lists.splits - 1) / lists.splits * TILE;
  const int64_t first_column = split * share;
  const int64_t rest = search.y.count - first_column;
  const int64_t columns = rest < share ? rest : share;  // none, or less, for a split too many
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
      __syncthreads();  // the buffers are free until the next store
#pragma unroll
      for (int i = 0; i < EDGE; ++i) {
        store_edge(sum[i], tile_sums + (own_row + i) % ROWS_OF_WARP * TILE + own_column);
#pragma unroll
        for (int j = 0; j < EDGE; ++j) sum[i][j] = T(0);
      }
      __syncwarp();
      for (int i = 0; i < ROWS_OF_WARP; ++i) {
        const int number = warp * ROWS_OF_WARP + i;
        offer<product>(search, list_of(number), tile_sums + i * TILE, first_column + tile_begin,
                       columns - tile_begin, &rows[number]);
      }
      __syncwarp();  // the sums have been read: keys may take their place
      for (int i = 0; i < ROWS_OF_WARP; ++i) {
        const int number = warp * ROWS_OF_WARP + i;
        make_room<product, Element>(search, first_row + number, list_of(number),
                                    lists.capacity - TILE, keys, &rows[number]);
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
  constexpr size_t buffers = 2 * 2 * PACKS * (16 / sizeof(Element)) * PITCH * sizeof(T);
  constexpr size_t largest_scratch = WARPS * (2 * MAX_K + TILE) * sizeof(int64_t);
  constexpr size_t largest = buffers > largest_scratch ? buffers : largest_scratch;
  static_assert(largest + TILE * sizeof(Row<T>) <= 48 << 10, "more takes a kernel's attribute");
  const size_t scratch = WARPS * scratch_of_warp<T>(lists.capacity) * sizeof(int64_t);
  const size_t shared = buffers > scratch ? buffers : scratch;
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
