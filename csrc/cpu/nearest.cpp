// Maths: per row i the k columns of smallest key d²_ij or -x_i·y_j (or of its opposite), by direct
//   difference in double, the lower column first where keys are equal, NaN last.
// Tiling: the caller hands over a tile that its GEMM has just written; a thread owns whole rows. A
//   row keeps a list of candidates between tiles, with bounds of their keys from the product
//   (common/ranking.h). A column joins unless k keys are known to be below its lower bound. A full
//   list is cut by the k-th smallest upper bound, or, where bounds cannot tell the candidates
//   apart, by direct differences. The last tile ranks what is left by direct differences.
// Memory: the tile is read once, in vectors; lists take O(k) per row.
// Numerics: the product only decides which pairs are taken directly, so results do not depend on
// its
//   rounding, on tiles or on threads. What is not finite in it is always taken directly.
#include "cpu/nearest.h"

#include <string.h>

#include "cpu/score_rows.h"

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_ISA {
namespace {

// Columns between two looks at the limit, which falls as candidates come in.
constexpr int64_t CHUNK = 256;

// What turns a dot product of one row into bounds of the key.
template <typename T>
struct Bounds {
  T size_sign, product_factor, error, floor;
};
template <bool product, typename T>
FC_INLINE Bounds<T> bounds_of(const Tile<T>& tile, bool farthest) {
  const T sign = farthest ? T(-1) : T(1);
  Bounds<T> bounds;
  bounds.size_sign = product ? T(0) : sign;
  bounds.product_factor = product ? -sign : T(-2) * sign;
  bounds.error = key_error(T(0), (double)tile.dim);
  bounds.floor = key_floor(T(0), (double)tile.dim);
  return bounds;
}

template <bool product, typename T>
FC_INLINE T pair_size(T x_size, T y_size) {
  return product ? x_size * y_size : x_size + y_size;
}

// NaN where anything is not finite, or -inf: never above a limit.
template <bool product, typename T>
FC_INLINE T lower_bound(const Bounds<T>& bounds, T size, T dot) {
  const T key =
      product ? bounds.product_factor * dot : bounds.size_sign * size + bounds.product_factor * dot;
  return key - (bounds.error * size + bounds.floor);
}

template <typename T>
FC_INLINE T upper_bound(const Bounds<T>& bounds, T size, T lower) {
  return lower + T(2) * (bounds.error * size + bounds.floor);
}

// Key of one pair from its two points.
template <bool product, typename T>
double direct_key(const Tile<T>& tile, const NearestRows<T>& rows, int64_t row, int64_t column) {
  const T* x = tile.x + row * tile.dim;
  const T* y = rows.points + column * tile.dim;
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < tile.dim; ++i) {
    const double a = (double)x[i], b = (double)y[i];
    sum += product ? a * b : (a - b) * (a - b);
  }
  if (product && rows.x_norm) {
    sum = cosine_from_product(sum, rows.x_norm[row] * rows.y_norm[column]);
  }
  return turned(sum, product, rows.farthest);
}

// A bound that at least k values do not pass, and none of the others unless it equals the k-th
// smallest. By bisection: counting runs in vectors, exchanges would mispredict half their branches.
template <typename T>
T bound_of_smallest(const T* values, int64_t count, int64_t k) {
  T least = values[0], most = values[0];
#pragma omp simd reduction(min : least) reduction(max : most)
  for (int64_t i = 1; i < count; ++i) {
    least = values[i] < least ? values[i] : least;
    most = values[i] > most ? values[i] : most;
  }
  auto low = to_ordered(least), high = to_ordered(most);
  while (low < high) {
    const auto middle = (low & high) + ((low ^ high) >> 1);
    const T pivot = from_ordered(middle);
    int32_t below = 0;
#pragma omp simd reduction(+ : below)
    for (int64_t i = 0; i < count; ++i) below += values[i] <= pivot;
    if (below == k) return pivot;
    if (below > k) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return from_ordered(low);
}

// Shell's sort: lists are short, and the order is total, so that any sort gives the same result.
FC_INLINE void sort_neighbors(Neighbor* list, int64_t count) {
  int64_t gap = 1;
  while (gap < count / 3) gap = 3 * gap + 1;
  for (; gap > 0; gap /= 3) {
    for (int64_t i = gap; i < count; ++i) {
      const Neighbor moving = list[i];
      int64_t j = i;
      for (; j >= gap && comes_before(moving, list[j - gap]); j -= gap) list[j] = list[j - gap];
      list[j] = moving;
    }
  }
}

// The candidates of one row.
template <typename T>
struct List {
  T* lower;
  T* upper;
  int64_t* column;
  int64_t count;
  T limit;
};

// Drops candidates that k others are surely nearer than.
template <typename T>
void cut_by_bounds(List<T>* list, int64_t k) {
  if (list->count <= k) return;
  const T limit = bound_of_smallest(list->upper, list->count, k);
  list->limit = limit;
  int64_t kept = 0;
  for (int64_t i = 0; i < list->count; ++i) {
    list->lower[kept] = list->lower[i];
    list->upper[kept] = list->upper[i];
    list->column[kept] = list->column[i];
    kept += !(list->lower[i] > limit);
  }
  list->count = kept;
}

// All candidates in the order of the result, in `ranked`.
template <bool product, typename T>
void rank_directly(const Tile<T>& tile, const NearestRows<T>& rows, int64_t row,
                   const List<T>& list, Neighbor* ranked) {
  for (int64_t i = 0; i < list.count; ++i) {
    const int64_t column = list.column[i];
    ranked[i] = neighbor(direct_key<product>(tile, rows, row, column), column);
  }
  sort_neighbors(ranked, list.count);
}

// Makes room in a full list.
template <bool product, typename T>
void make_room(const Tile<T>& tile, const NearestRows<T>& rows, int64_t row, List<T>* list,
               Neighbor* scratch) {
  cut_by_bounds(list, rows.k);
  if (list->count <= rows.k + (rows.capacity - rows.k) / 2) return;
  rank_directly<product>(tile, rows, row, *list, scratch);
  list->count = rows.k;
  for (int64_t i = 0; i < rows.k; ++i) {
    const double key = key_of(scratch[i]);
    list->lower[i] = key == key ? step_down((T)key) : T(INFINITY);
    list->upper[i] = key == key ? step_up((T)key) : T(INFINITY);
    list->column[i] = scratch[i].column;
  }
  list->limit = list->upper[rows.k - 1];
}

// A limit to start from, for k of the columns of a row's first tile: with the columns dealt to
// groups, the k-th smallest of the groups' smallest upper bounds. Little above the true k-th.
template <bool product, bool masked, typename T>
T first_limit(const Tile<T>& tile, const NearestRows<T>& rows, int64_t row, int64_t k) {
  constexpr int64_t MOST = 1024;
  const int64_t groups = (4 * k + 255) / 256 * 256;
  if (groups > MOST || 2 * groups > tile.columns) return T(INFINITY);
  const Bounds<T> bounds = bounds_of<product>(tile, rows.farthest);
  const T x_size = rows.x_size[row];
  const int32_t row_id = masked ? tile.row_ids[row] : 0;
  const bool same = tile.keep == Keep::same;
  T least[MOST];
  for (int64_t j = 0; j < groups; ++j) least[j] = T(INFINITY);
  for (int64_t begin = 0; begin < tile.columns; begin += groups) {
    const int64_t width = tile.columns - begin < groups ? tile.columns - begin : groups;
    const T* dot = tile.values + row * tile.columns + begin;
    const T* y_size = rows.y_size + begin;
    const int32_t* ids = masked ? tile.column_ids + begin : nullptr;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      const T size = pair_size<product>(x_size, y_size[j]);
      const T lower = lower_bound<product>(bounds, size, dot[j]);
      const T upper = upper_bound(bounds, size, lower);
      const bool counts = upper - lower < T(INFINITY) && (!masked || (ids[j] == row_id) == same);
      const T bound = counts ? upper : T(INFINITY);
      least[j] = bound < least[j] ? bound : least[j];
    }
  }
  return bound_of_smallest(least, groups, k);
}

template <bool product, bool masked, typename T>
void collect_row(const Tile<T>& tile, const NearestRows<T>& rows, int64_t row, List<T>* list,
                 Neighbor* scratch) {
  const Bounds<T> bounds = bounds_of<product>(tile, rows.farthest);
  const Gaps gaps = gaps_of_row(tile, row);
  const T* dots = tile.values + row * tile.columns;
  const T x_size = rows.x_size[row];
  const int32_t row_id = masked ? tile.row_ids[row] : 0;
  const bool same = tile.keep == Keep::same;
  if (rows.first) {
    // The excluded columns may be among those that the limit stands on.
    list->limit = first_limit<product, masked>(tile, rows, row, rows.k + gaps.count);
  }
  uint8_t passes[CHUNK];
  for (int64_t begin = 0; begin < tile.columns; begin += CHUNK) {
    const int64_t width = tile.columns - begin < CHUNK ? tile.columns - begin : CHUNK;
    const T* dot = dots + begin;
    const T* y_size = rows.y_size + begin;
    const int32_t* ids = masked ? tile.column_ids + begin : nullptr;
    const T limit = list->limit;
    if (width < CHUNK) memset(passes, 0, sizeof passes);
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      const T size = pair_size<product>(x_size, y_size[j]);
      const bool far = lower_bound<product>(bounds, size, dot[j]) > limit;
      passes[j] = !far && (!masked || (ids[j] == row_id) == same);
    }
    // Eight flags at a time: few columns pass once the limit has fallen.
    for (int64_t block = 0; block < width; block += 8) {
      uint64_t flags;
      memcpy(&flags, passes + block, sizeof flags);
      for (; flags != 0; flags &= flags - 1) {
        const int64_t j = block + __builtin_ctzll(flags) / 8;  // the first byte is the lowest
        const int64_t column = begin + j;
        if ((gaps.count > 0 && gaps.column[0] == column) ||
            (gaps.count > 1 && gaps.column[1] == column)) {
          continue;
        }
        if (list->count == rows.capacity) make_room<product>(tile, rows, row, list, scratch);
        const T size = pair_size<product>(x_size, y_size[j]);
        const T lower = lower_bound<product>(bounds, size, dot[j]);
        if (lower > list->limit) continue;
        const T upper = upper_bound(bounds, size, lower);
        const bool known = upper - lower < T(INFINITY);  // neither NaN nor infinite
        list->lower[list->count] = known ? lower : T(-INFINITY);
        list->upper[list->count] = known ? upper : T(INFINITY);
        list->column[list->count++] = tile.first_column + column;
      }
    }
  }
}

template <bool product, typename T>
void write_row(const Tile<T>& tile, const NearestRows<T>& rows, int64_t row, List<T>* list,
               Neighbor* scratch) {
  cut_by_bounds(list, rows.k);
  rank_directly<product>(tile, rows, row, *list, scratch);
  T* values = rows.values + row * rows.k;
  int64_t* indices = rows.indices + row * rows.k;
  for (int64_t i = 0; i < rows.k; ++i) {
    const bool found = i < list->count;
    const double key = found ? key_of(scratch[i]) : (double)INFINITY;
    const double value = turned(key, product, rows.farthest);
    values[i] = (T)(tile.metric == Metric::l2 && found ? square_root(value) : value);
    indices[i] = found ? scratch[i].column : -1;
  }
}

template <bool product, bool masked, typename T>
void search(const Tile<T>& tile, const NearestRows<T>& rows) {
  const int runs = tile.threads > 1 ? tile.threads : 1;
#pragma omp parallel for num_threads(runs) if (runs > 1) schedule(static)
  for (int run = 0; run < runs; ++run) {
    Neighbor* scratch = rows.scratch + run * rows.capacity;
    const int64_t end = tile.rows * (run + 1) / runs;
    for (int64_t row = tile.rows * run / runs; row < end; ++row) {
      const int64_t start = row * rows.capacity;
      List<T> list{rows.lower + start, rows.upper + start, rows.column + start, 0, T(INFINITY)};
      if (!rows.first) {
        list.count = rows.count[row];
        list.limit = rows.limit[row];
      }
      collect_row<product, masked>(tile, rows, row, &list, scratch);
      if (rows.last) {
        write_row<product>(tile, rows, row, &list, scratch);
      } else {
        rows.count[row] = list.count;
        rows.limit[row] = list.limit;
      }
    }
  }
}

template <typename T>
void search_any(const Tile<T>& tile, const NearestRows<T>& rows) {
  const bool masked = tile.keep != Keep::all;
  if (tile.metric == Metric::dot) {
    masked ? search<true, true>(tile, rows) : search<true, false>(tile, rows);
  } else {
    masked ? search<false, true>(tile, rows) : search<false, false>(tile, rows);
  }
}

}  // namespace

void nearest(const Tile<float>& tile, const NearestRows<float>& rows) { search_any(tile, rows); }
void nearest(const Tile<double>& tile, const NearestRows<double>& rows) { search_any(tile, rows); }

}  // namespace FASTCONTRAST_ISA
}  // namespace cpu
}  // namespace fastcontrast
