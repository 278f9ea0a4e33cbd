// Arguments of the CPU half of `nearest`: one tile of dot products at a time, as distance_softmax.h
// has it, and what is known so far of each row's nearest columns.
//
// fastcontrast/backends/native/nearest.py cuts the tiles, fills them by a GEMM and allocates.
#pragma once

#include <stdint.h>

#include "common/ranking.h"
#include "cpu/distance_softmax.h"

namespace fastcontrast {
namespace cpu {

template <typename T>
struct NearestRows {
  int64_t k;
  bool farthest;         // the k farthest instead
  bool first, last;      // tile of these rows: start the lists, write the results
  const T* x_size;       // [rows]: ‖x‖² of the centred points for distances, ‖x‖ for products
  const T* y_size;       // [columns]
  const T* points;       // [N, dim]: all columns as given; tile.x has the rows as given
  const double* x_norm;  // [rows], or null: the key of a pair is its cosine, 0 where a norm is 0
  const double* y_norm;  // [N], with x_norm
  int64_t capacity;      // of the lists, above k
  T* lower;              // [rows, capacity]: the key of a candidate is not below this
  T* upper;              // [rows, capacity]: and not above this
  int64_t* column;       // [rows, capacity]
  int64_t* count;        // [rows]: candidates
  T* limit;              // [rows]: k keys are not above this
  Neighbor* scratch;     // [threads, capacity]
  T* values;             // [rows, k]: distance, squared distance or product
  int64_t* indices;      // [rows, k]; -1 where fewer than k columns count
};

FASTCONTRAST_DECLARE(void nearest(const Tile<float>&, const NearestRows<float>&))
FASTCONTRAST_DECLARE(void nearest(const Tile<double>&, const NearestRows<double>&))

}  // namespace cpu
}  // namespace fastcontrast
