// Kernels with known results or known mistakes: what tests/test_cuda_emulation.py runs to see that
// the emulation computes the one and finds the other.
#pragma once

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.h"

namespace cuda_emulation {

constexpr int PROBE_THREADS = 64;

template <bool waits>
__global__ void reverse(const int* in, int* out) {
  FASTCONTRAST_SHARED(int, staged);
  const int i = (int)threadIdx.x;
  staged[i] = in[blockIdx.x * PROBE_THREADS + i];
  if (waits) __syncthreads();
  out[blockIdx.x * PROBE_THREADS + i] = staged[PROBE_THREADS - 1 - i];
}

// Per thread: sum over the warp, ballot of odd inputs, and the value of lane 5.
__global__ void warp_exchanges(const int* in, int* out) {
  const int i = (int)threadIdx.x, value = in[i];
  out[i] = fastcontrast::cuda::warp_sum(value);
  out[PROBE_THREADS + i] = (int)__ballot_sync(fastcontrast::cuda::ALL_LANES, value % 2);
  out[2 * PROBE_THREADS + i] = __shfl_sync(fastcontrast::cuda::ALL_LANES, value, 5);
}

__global__ void one_thread_leaves(const int*, int* out) {
  if (threadIdx.x == 3) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void half_a_warp_shuffles(const int*, int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, 1, 1);
  __syncthreads();
}

__global__ void writes_beyond_shared(const int*, int* out) {
  FASTCONTRAST_SHARED(int, staged);
  staged[threadIdx.x + 1] = 1;
  out[threadIdx.x] = 1;
}

__global__ void loads_unaligned(const int* in, int* out) {
  out[threadIdx.x] = fastcontrast::cuda::load_pack<int, 4>(in + 1).item[0];
}

inline std::vector<int> probe(const std::string& name, const std::vector<int>& in) {
  std::vector<int> out(3 * in.size(), -1);
  const fastcontrast::cuda::Stream stream{0, nullptr};
  const size_t shared = PROBE_THREADS * sizeof(int);
  const unsigned blocks = (unsigned)(in.size() / PROBE_THREADS);
#define PROBE(kernel)                                                                          \
  if (name == #kernel) {                                                                       \
    FASTCONTRAST_LAUNCH(stream, blocks, PROBE_THREADS, shared, kernel, in.data(), out.data()); \
    return out;                                                                                \
  }
  PROBE(reverse<true>)
  PROBE(reverse<false>)
  PROBE(warp_exchanges)
  PROBE(one_thread_leaves)
  PROBE(half_a_warp_shuffles)
  PROBE(writes_beyond_shared)
  PROBE(loads_unaligned)
#undef PROBE
  throw std::invalid_argument("no probe " + name);
}

}  // namespace cuda_emulation
