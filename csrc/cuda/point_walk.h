// One block's way through the points of the other side, for the kernels of distance_softmax.cu:
// which coordinates are in shared memory, and when the next ones are copied. Included by .cu files
// only.
#pragma once

#include <stdint.h>

#include "cuda/point_tiles.h"

namespace fastcontrast {
namespace cuda {

// Up to STAGED_COLUMNS coordinates stay in shared memory as far as MOST_SHARED bytes of a block go:
// two such blocks, as many as registers allow, fit a multiprocessor of sm_80, sm_90 and sm_100, one
// that of sm_86 and sm_89. More columns are many tiles: what a block owns is then a small part of
// what it reads, and other blocks read the rest from the L2 cache as well.
constexpr int64_t STAGED_COLUMNS = 1024;
constexpr int64_t MOST_SHARED = 80 << 10;

// Which points a block goes through, and how their coordinates come into shared memory: a slot
// holds one chunk of those of all owners, or of all others of a tile.
template <typename T>
struct Walk {
  using S = Sizes<T>;
  static constexpr int OWN_SLOT = OWNERS * S::STRIDE, OTHER_SLOT = S::OTHERS * S::STRIDE;
  PointSet own, other;
  Scalar type;
  bool own_units, other_units;
  int64_t dim;
  int64_t first_own;           // of the block
  int64_t begin, end;          // of the other side
  int chunks;                  // of all coordinates, for the scores
  int part, parts;             // first and number of chunks that gradients are taken of
  int own_slots, other_slots;  // 2 where one is read while the other is filled
  bool keeps_own;              // a slot for every chunk: owners are read once
  bool keeps_tile;  // slots for a tile and the next chunk, or for all tiles: others are read once
  bool keeps_all;   // for all tiles: once for all owners of a block
  bool staged;      // all tiles are there, from owners before
  int turn;         // of the two slots, where there are two

  FC_MEMBER int steps() const { return chunks + parts; }
  FC_MEMBER int chunk_of(int step) const { return step < chunks ? step : part + step - chunks; }
  FC_MEMBER int width_of(int step) const {
    const int64_t left = dim - (int64_t)chunk_of(step) * S::CHUNK;
    return left < S::CHUNK ? (int)left : S::CHUNK;
  }

  FC_MEMBER T* own_slot(T* slots, int step) const {
    return slots + (keeps_own ? chunk_of(step) : turn) * OWN_SLOT;
  }
  FC_MEMBER T* other_slot(T* slots, int64_t first, int step) const {
    unsigned slot = turn;
    if (keeps_tile) {
      const unsigned tile = (unsigned)((first - begin) / S::OTHERS);
      slot = (tile * chunks + chunk_of(step)) % (unsigned)other_slots;
    }
    return slots + own_slots * OWN_SLOT + slot * OTHER_SLOT;
  }

  __device__ __forceinline__ void fetch(T* slots, int64_t first, int step) {
    const int64_t k = (int64_t)chunk_of(step) * S::CHUNK;
    const bool is_new = step < chunks;  // gradients take what scores have taken
    if (!keeps_own || (is_new && first == begin)) {
      fetch_points<T, OWNERS>(own, type, own_units, dim, first_own, k, own_slot(slots, step));
    }
    if (!keeps_tile || (is_new && !staged)) {
      fetch_points<T, S::OTHERS>(other, type, other_units, dim, first, k,
                                 other_slot(slots, first, step));
    }
    async_commit();
  }

  // To be called once for the owners of a group, before the first step of the first tile.
  __device__ __forceinline__ void start(T* slots, int64_t group) {
    turn = 0;
    staged = keeps_all && group > 0;
    if (begin < end && steps() > 0) fetch(slots, begin, 0);
  }

  // Waits for a step's coordinates, which `owners` and `others` then point to, and starts the copy
  // of the next ones: into a slot that was read last before the barrier.
  __device__ __forceinline__ void arrive(T* slots, int64_t first, int step, const T** owners,
                                         const T** others) {
    async_wait<0>();
    __syncthreads();  // all have arrived
    *owners = own_slot(slots, step);
    *others = other_slot(slots, first, step);
    turn ^= 1;
    const bool is_last = step + 1 == steps();
    const int64_t next = is_last ? first + S::OTHERS : first;
    if (next < end) fetch(slots, next, is_last ? 0 : step + 1);
  }
};

// Sums over all coordinates of a thread's pairs of one tile.
template <bool is_dot, typename T>
static __device__ __forceinline__ void tile_values(Walk<T>& walk, T* slots, int64_t first,
                                                   T (&value)[OWN][Sizes<T>::OTHER]) {
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
#pragma unroll
    for (int j = 0; j < Sizes<T>::OTHER; ++j) value[i][j] = T(0);
  }
  for (int step = 0; step < walk.chunks; ++step) {
    const T *own, *other;
    walk.arrive(slots, first, step, &own, &other);
    add_coordinates<is_dot>(own, other, walk.width_of(step), value);
  }
}

template <typename T>
Walk<T> walk_of(const Pairs& pairs, bool owns_rows) {
  Walk<T> walk;
  walk.own = owns_rows ? pairs.rows : pairs.columns;
  walk.other = owns_rows ? pairs.columns : pairs.rows;
  walk.type = pairs.type;
  walk.own_units = has_units(walk.own, sizeof(T));
  walk.other_units = has_units(walk.other, sizeof(T));
  walk.dim = pairs.dim;
  walk.first_own = walk.begin = walk.end = 0;
  walk.chunks = (int)((pairs.dim + Sizes<T>::CHUNK - 1) / Sizes<T>::CHUNK);
  walk.part = walk.parts = walk.turn = 0;
  walk.own_slots = walk.other_slots = 2;
  walk.keeps_own = walk.keeps_tile = walk.keeps_all = walk.staged = false;
  return walk;
}

template <typename T>
int64_t slot_bytes(const Walk<T>& walk) {
  return (int64_t)sizeof(T) * (walk.own_slots * (int64_t)Walk<T>::OWN_SLOT +
                               walk.other_slots * (int64_t)Walk<T>::OTHER_SLOT);
}

// Settles what stays in shared memory beside the `fixed` bytes of a block, the owners first, and
// returns the bytes of all.
template <typename T>
size_t settle_slots(Walk<T>& walk, int64_t columns, Splits splits, bool for_gradients,
                    size_t fixed) {
  const auto fits = [&](const Walk<T>& wish) {
    return slot_bytes(wish) + (int64_t)fixed <= MOST_SHARED;
  };
  Walk<T> wish = walk;
  wish.keeps_own = true;
  wish.own_slots = walk.chunks;
  if (columns <= STAGED_COLUMNS && walk.chunks > 0 && fits(wish)) {
    walk = wish;
    const int64_t others = splits.size < walk.other.count ? splits.size : walk.other.count;
    const int64_t tiles = (others + Sizes<T>::OTHERS - 1) / Sizes<T>::OTHERS;
    wish.keeps_tile = wish.keeps_all = true;
    wish.other_slots = tiles * walk.chunks <= MOST_SHARED ? (int)(tiles * walk.chunks) : 0;
    if (wish.other_slots > 0 && fits(wish)) {
      walk = wish;
    } else if (for_gradients) {  // of statistics nothing is read twice
      wish.keeps_all = false;
      wish.other_slots = walk.chunks + 1;
      if (fits(wish)) walk = wish;
    }
  }
  return fixed + (size_t)slot_bytes(walk);
}

}  // namespace cuda
}  // namespace fastcontrast
