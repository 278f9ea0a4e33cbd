// From ranked columns of `nearest` to its results: values and indices, also where the columns of a
// row were shared out among blocks. Included by nearest.cu.
#pragma once

#include <stdint.h>

#include "cuda/candidates.h"
#include "cuda/launch.h"
#include "cuda/nearest.h"

namespace fastcontrast {
namespace cuda {

constexpr int MERGE_THREADS = 256;

template <typename T>
static __device__ __forceinline__ void write_result(const NearestSearch& search,
                                                    const NearestResults& out, int64_t row,
                                                    int rank, Neighbor found) {
  const bool product = search.metric == Metric::dot, exists = found.column != NO_COLUMN;
  const double key = exists ? key_of(found) : (double)INFINITY;
  double value = turned(key, product, search.farthest);
  if (search.metric == Metric::l2 && exists) value = square_root(value);
  const int64_t at = row * out.stride + rank;
  ((T*)out.values)[at] = (T)value;
  out.indices[at] = exists ? found.column : -1;
  if (out.last && rank == search.k - 1) out.last[row] = found;
}

// How many of a sorted list come before one that is not in it.
static __device__ __forceinline__ int count_before(const Neighbor* sorted, int count,
                                                   Neighbor limit) {
  int low = 0;
  while (low < count) {
    const int middle = (low + count) / 2;
    if (comes_before(sorted[middle], limit)) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

// A block merges the ranked lists of one row: the rank of each is the sum of its ranks in all
// lists.
template <typename T>
__global__ void __launch_bounds__(MERGE_THREADS, 4)
    merge_splits(const NearestSearch search, const NearestLists lists, const NearestResults out) {
  const int k = search.k;
  for (int64_t row = blockIdx.x; row < search.x.count; row += gridDim.x) {
    const auto list = [&](int64_t split) {
      return lists.ranked + (split * search.x.count + row) * k;
    };
    for (int64_t i = threadIdx.x; i < lists.splits * k; i += blockDim.x) {
      const int64_t own = i / k;
      int rank = (int)(i % k);
      const Neighbor candidate = list(own)[rank];
      if (candidate.column == NO_COLUMN) continue;
      for (int64_t split = 0; split < lists.splits && rank < k; ++split) {
        if (split != own) rank += count_before(list(split), k, candidate);
      }
      if (rank < k) write_result<T>(search, out, row, rank, candidate);
    }
    int64_t found = 0;
    for (int64_t split = 0; split < lists.splits && found < k; ++split) {
      found += count_before(list(split), k, no_neighbor());
    }
    for (int64_t rank = found + threadIdx.x; rank < k; rank += blockDim.x) {
      write_result<T>(search, out, row, (int)rank, no_neighbor());
    }
  }
}

}  // namespace cuda
}  // namespace fastcontrast
