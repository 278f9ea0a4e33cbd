// Arguments of the CUDA half of `nearest`: the points as given, which columns count, and the memory
// that fastcontrast/backends/native/nearest.py allocates for lists and results.
#pragma once

#include <stdint.h>

#include "common/ranking.h"
#include "common/scalar.h"
#include "common/scores.h"
#include "cuda/stream.h"

namespace fastcontrast {
namespace cuda {

// Points [count, dim], contiguous within a row.
struct Points {
  const void* data;
  int64_t stride;  // from row to row, in elements
  int64_t count;
};

struct NearestSearch {
  Points x, y;
  Scalar type;  // of all points
  int64_t dim;
  Metric metric;
  bool farthest;
  bool cosine;                // with Metric::dot: the key of a pair is its cosine
  const double* x_norm;       // [x.count], with Metric::dot
  const double* y_norm;       // [y.count], with Metric::dot
  const int64_t* exclude;     // [x.count, exclude_count] columns left out; outside 0..N-1: none
  int exclude_count;          // up to 2
  const int64_t* row_ids;     // [x.count], unless Keep::all
  const int64_t* column_ids;  // [y.count], unless Keep::all
  Keep keep;
  int k;                  // 1..256
  const Neighbor* after;  // [x.count], or null: only columns that come after this one count
};

// The columns of a row are shared out among `splits` blocks, and each keeps a list of candidates.
struct NearestLists {
  int64_t splits;
  int capacity;      // of a list, 2k + 64 or more, up to 576
  void* bounds;      // [splits, x.count, capacity, 2] of the type of arithmetic
  int64_t* column;   // [splits, x.count, capacity]
  Neighbor* ranked;  // [splits, x.count, k], or null with one split
};

struct NearestResults {
  void* values;  // [x.count, k] of the type of arithmetic: distance, squared distance or product
  int64_t* indices;  // [x.count, k]; -1 where fewer than k columns count
  int64_t stride;    // from row to row of both, in elements
  Neighbor* last;    // [x.count], or null: the k-th, for the search for those after it
};

// Norms of the rows in double, where squares of floats do not overflow. Both return false for what
// has no kernel.
bool row_norms(const Points& points, Scalar type, int64_t dim, double* norms, Stream stream);
bool nearest(const NearestSearch& search, const NearestLists& lists, const NearestResults& out,
             Stream stream);

}  // namespace cuda
}  // namespace fastcontrast
