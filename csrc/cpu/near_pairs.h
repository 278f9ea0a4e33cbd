// Pairs nearer than the Gram identity can tell (near_fraction in common/scores.h): their gradient
// is added directly, because w(x-y) taken as the difference of two large products would lose it.
// Included by kernel files only, like score_rows.h.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include "cpu/distance_softmax.h"

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_ISA {
namespace {

// A pair that is not in the GEMM, with its weight c of common/scores.h.
template <typename T>
struct NearPair {
  int64_t row, column;
  T weight;
};

// Growable list; a plain one, because std::vector must not be instantiated here (cpu/isa.h).
template <typename T>
struct NearPairs {
  NearPair<T>* items;
  int64_t size, capacity;
};
template <typename T>
bool append(NearPairs<T>* list, NearPair<T> pair) {
  if (list->size == list->capacity) {
    const int64_t capacity = list->capacity ? 2 * list->capacity : 64;
    void* grown = realloc(list->items, (size_t)capacity * sizeof(NearPair<T>));
    if (!grown) return false;
    list->items = (NearPair<T>*)grown;
    list->capacity = capacity;
  }
  list->items[list->size++] = pair;
  return true;
}

// target += weight·(to - from), or weight·to for Metric::dot.
template <Metric metric, typename T>
FC_INLINE void add_pair(T* target, T weight, const T* from, const T* to, int64_t dim) {
#pragma omp simd
  for (int64_t k = 0; k < dim; ++k) {
    target[k] += weight * (metric == Metric::dot ? to[k] : to[k] - from[k]);
  }
}

// Row gradients: list l owns its rows, which come before those of list l+1. Column gradients: a
// thread owns columns and reads all lists, which are in the order of rows. One writer per gradient
// row, always in the same order.
template <Metric metric, typename T>
void add_near_pairs(const Tile<T>& tile, const TileGradient<T>& grad, const NearPairs<T>* lists,
                    int runs) {
  int64_t total = 0;
  for (int run = 0; run < runs; ++run) total += lists[run].size;
  if (total == 0) return;
#pragma omp parallel for num_threads(runs) if (runs > 1) schedule(static)
  for (int run = 0; run < runs; ++run) {
    if (grad.grad_x) {
      for (int64_t k = 0; k < lists[run].size; ++k) {
        const NearPair<T> pair = lists[run].items[k];
        add_pair<metric>(grad.grad_x + pair.row * tile.dim, pair.weight,
                         tile.x + pair.row * tile.dim, tile.y + pair.column * tile.dim, tile.dim);
      }
    }
  }
#pragma omp parallel for num_threads(runs) if (runs > 1) schedule(static)
  for (int run = 0; run < runs; ++run) {
    if (grad.grad_y) {
      const int64_t begin = tile.columns * run / runs;
      const int64_t end = tile.columns * (run + 1) / runs;
      for (int l = 0; l < runs; ++l) {
        for (int64_t k = 0; k < lists[l].size; ++k) {
          const NearPair<T> pair = lists[l].items[k];
          if (pair.column < begin || pair.column >= end) continue;
          add_pair<metric>(grad.grad_y + pair.column * tile.dim, pair.weight,
                           tile.y + pair.column * tile.dim, tile.x + pair.row * tile.dim, tile.dim);
        }
      }
    }
  }
}

}  // namespace
}  // namespace FASTCONTRAST_ISA
}  // namespace cpu
}  // namespace fastcontrast
