// Boxes of patches as kernels get them, read from memory or drawn on the spot, and runs of
// neighbouring pixels. Included by .cu files only.
#pragma once

#include "common/patches.h"
#include "cuda/launch.h"

namespace fastcontrast {
namespace cuda {

struct BoxSource {
  CropDraws draws;  // where `drawn`
  bool drawn;
  const Box* coords;
  const uint8_t* flips;
};

inline BoxSource read_boxes(const PatchSet& set) { return {{}, false, set.coords, set.flips}; }

inline BoxSource drawn_boxes(const CropDraws& draws) { return {draws, true, nullptr, nullptr}; }

// Boxes that are resized or padded: extract_patches_resized.cu.
bool extract_resized(const BoxSource&, const PatchSet&, const Images&, const PatchOutput&, Stream);

struct PatchBox {
  Box box;
  int flips;
};

// The box of a patch, for all threads of a block. Where it is drawn, one thread does so, and writes
// it to memory if the block is the one that does. No two calls without a barrier in between.
template <bool sized>
static __device__ __forceinline__ PatchBox box_of(const BoxSource& source, int64_t patch,
                                                  bool writes, PatchBox* shared) {
  if (!source.drawn) {
    return PatchBox{source.coords[patch], source.flips ? source.flips[patch] : 0};
  }
  if (threadIdx.x == 0) {
    const CropDraws& draws = source.draws;
    const int64_t image = patch / draws.num_patches;
    uint8_t flips;
    const Box box =
        draw_patch<sized>(draws, key_of(draws), image, patch - image * draws.num_patches, &flips);
    *shared = PatchBox{box, flips};
    if (writes) {
      draws.coords[patch] = box;
      draws.flips[patch] = flips;
    }
  }
  __syncthreads();
  return *shared;
}

// V neighbouring elements from any address: as 16 bytes where it allows, small ones as whole words,
// of which none is read that holds no element.
template <typename In, int V>
static __device__ __forceinline__ Pack<In, V> load_run(const In* from) {
  Pack<In, V> run;
  constexpr int bytes = V * sizeof(In);
  if constexpr (sizeof(In) >= 4 && bytes == 16) {
    if (is_aligned(from, 16)) return load_pack<In, V>(from);
  }
  if constexpr (sizeof(In) < 4 && bytes % 4 == 0) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(from);
    const uint32_t* words = reinterpret_cast<const uint32_t*>(address & ~(uintptr_t)3);
    const unsigned shift = (unsigned)(address & 3) * 8;
    uint32_t joined[bytes / 4];
    uint32_t low = words[0];
#pragma unroll
    for (int i = 0; i < bytes / 4; ++i) {
      const uint32_t high = i + 1 < bytes / 4 || shift ? words[i + 1] : 0;
      joined[i] = (uint32_t)(((uint64_t)high << 32 | low) >> shift);
      low = high;
    }
    memcpy(&run, joined, bytes);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) run.item[i] = from[i];
  }
  return run;
}

}  // namespace cuda
}  // namespace fastcontrast
