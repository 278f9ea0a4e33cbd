// One row of `nearest` as a warp works on it: columns of a tile are offered to its list of
// candidates, by bounds of their keys, and candidates are taken directly where these do not tell.
// Included by nearest.cu.
#pragma once

#include <stdint.h>

#include "cuda/candidates.h"
#include "cuda/launch.h"
#include "cuda/nearest.h"

namespace fastcontrast {
namespace cuda {

constexpr int TILE = 64;          // rows and columns of a tile
constexpr int LANES_OF_PAIR = 8;  // that take one direct difference

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

template <typename Element>
FC_INLINE const Element* point(const Points& points, int64_t number) {
  return (const Element*)points.data + number * points.stride;
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

// Offers a row the columns of a tile, whose sums a warp has in shared memory.
template <bool product, typename T>
static __device__ void offer(const NearestSearch& search, const CandidateList<T>& list,
                             const T* sums, int64_t first_column, int64_t columns, Row<T>* row) {
  if (!row->is_open) return;
  const PairKey<product, T> pair{key_error(T(0), (double)search.dim),
                                 key_floor(T(0), (double)search.dim), search.farthest};
  const int lane = lane_of_thread();
  const T limit = row->limit;
  int count = row->count;
#pragma unroll
  for (int i = lane; i < TILE; i += WARP) {
    const int64_t column = first_column + i;
    KeyBounds<T> bounds{};
    bool joins = i < columns;
    if (joins) {
      T size = row->size;
      if (product && !search.cosine) size *= (T)search.y_norm[column];
      bounds = pair.bounds(sums[i], size);
      joins = !(bounds.lower > limit);
    }
    if (joins) {
      joins = row->excluded[0] != column && row->excluded[1] != column;
      if (search.keep != Keep::all) {
        joins &= (search.column_ids[column] == row->id) == (search.keep == Keep::same);
      }
      if (search.after) {
        joins &= !(bounds.upper < row->before_low);
        // Not surely after it: this one does not help to bound the others.
        if (!(bounds.lower > row->before_up)) bounds.upper = T(INFINITY);
      }
    }
    const unsigned votes = __ballot_sync(ALL_LANES, joins);
    if (joins) {
      const int at = count + __popc(votes & ((1u << lane) - 1));
      list.bounds[at] = bounds;
      list.column[at] = column;
    }
    count += __popc(votes);
  }
  __syncwarp();  // all lanes have read the row
  row->count = count;
}

// Cuts a list of more than `most` candidates, and lowers the row's limit.
template <bool product, typename Element, typename T>
static __device__ void make_room(const NearestSearch& search, int64_t number,
                                 const CandidateList<T>& list, int most, int64_t* scratch,
                                 Row<T>* row) {
  int count = row->count;
  if (count <= most) return;
  T limit = row->limit;
  count = cut_by_bounds(list, count, search.k, (T*)scratch, &limit);
  if (count > (search.k + most) / 2) {
    direct_keys<product, Element>(search, number, list, count, scratch);
    count = cut_by_keys(list, scratch, count, search.k, &limit);
  }
  __syncwarp();  // all lanes have read the row
  row->limit = limit;
  row->count = count;
}

}  // namespace cuda
}  // namespace fastcontrast
