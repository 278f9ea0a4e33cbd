// Copies from global to shared memory that run while the thread goes on (cp.async, sm_80 and
// later). A thread waits for its own copies alone: before other threads read them, a barrier is
// due. Included by .cu files only; tests/cuda_emulation/cuda/async_copy.h stands in for it on the
// host.
#pragma once

#include <stdint.h>

namespace fastcontrast {
namespace cuda {

// Copies `bytes` of the `size` bytes at `to` (4, 8 or 16, aligned alike on both sides) and sets the
// rest to 0.
template <int size>
static __device__ __forceinline__ void async_copy(void* to, const void* from, int bytes) {
  const uint32_t target = (uint32_t)__cvta_generic_to_shared(to);
  if constexpr (size == 16) {  // past the L1 cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from),
                 "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(from),
                 "n"(size), "r"(bytes)
                 : "memory");
  }
}

// Closes the group of the copies since the last one.
static __device__ __forceinline__ void async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most the latest `pending` groups of this thread are under way.
template <int pending>
static __device__ __forceinline__ void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace cuda
}  // namespace fastcontrast
