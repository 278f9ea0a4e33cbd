// Kernels with known results or known mistakes: what tests/test_cuda_emulation.py runs to see that
// the emulation computes the one and finds the other.
#pragma once

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/async_copy.h"
#include "cuda/launch.h"
#include "cuda/mma.h"

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
  staged[threadIdx.x + PROBE_THREADS + 1] = 1;
  out[threadIdx.x] = 1;
}

__global__ void loads_unaligned(const int* in, int* out) {
  out[threadIdx.x] = fastcontrast::cuda::load_pack<int, 4>(in + 1).item[0];
}

// Each thread its own number, the second half of the threads in a group of copies of its own.
template <int pending>
__global__ void copies_asynchronously(const int* in, int* out) {
  FASTCONTRAST_SHARED(int, staged);
  const int i = (int)threadIdx.x;
  fastcontrast::cuda::async_copy<4>(staged + i, in + i, i == 5 ? 0 : 4);
  fastcontrast::cuda::async_commit();
  if (i < PROBE_THREADS / 2) fastcontrast::cuda::async_commit();
  fastcontrast::cuda::async_wait<pending>();
  out[blockIdx.x * PROBE_THREADS + i] = staged[i];
}

// Per warp: words of A in place of numbers, B with ones in row k and column n of `in[0]`, `in[1]`:
// column n of the result is column k of A, one word in `out` for each thread's four sums.
template <bool tf32>
__global__ void multiplies(const int* in, int* out) {
  const int lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4, k = in[0], n = in[1];
  const int rows[4] = {g, g + 8, g, g + 8}, words[4] = {t, t, t + 4, t + 4};
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) {  // a number for each place, exact in bfloat16: 16 row + k
    const int first = 16 * rows[i] + (tf32 ? words[i] : 2 * words[i]);
    const auto bits = [](int value) { return fastcontrast::bits_of_float((float)value); };
    a[i] = tf32 ? bits(first) : (bits(first + 1) & 0xFFFF0000u) | bits(first) >> 16;
  }
  for (int i = 0; i < 2; ++i) {
    const int word = words[2 * i], here = g == n;
    const uint32_t one = fastcontrast::bits_of_float(1.0f);
    if (tf32) {
      b[i] = here && word == k ? one : 0;
    } else {
      b[i] = here && word == k / 2 ? (k % 2 ? one : one >> 16) : 0;
    }
  }
  float c[4] = {0.5f, 0.5f, 0.5f, 0.5f};
  if constexpr (tf32) {
    fastcontrast::cuda::multiply_tf32(c, a, b);
  } else {
    fastcontrast::cuda::multiply_bf16(c, a, b);
  }
  for (int i = 0; i < 4; ++i) out[4 * (threadIdx.x % 32) + i] = (int)(2 * c[i]);
}

// Four 8 × 8 matrices of 16-bit numbers that count up.
__global__ void loads_transposed(const int*, int* out) {
  FASTCONTRAST_SHARED(uint16_t, matrix);
  for (int i = (int)threadIdx.x; i < 256; i += PROBE_THREADS) matrix[i] = (uint16_t)i;
  __syncthreads();
  uint32_t words[4];
  fastcontrast::cuda::load_transposed(words, matrix + 8 * (threadIdx.x % 32));
  for (int i = 0; i < 4; ++i) out[4 * (threadIdx.x % 32) + i] = (int)words[i];
}

__global__ void copy_each(const int* in, int* out) { out[threadIdx.x] = in[threadIdx.x]; }

// 64 words between two addresses.
inline void copy_words(uintptr_t from, uintptr_t to) {
  const fastcontrast::cuda::Stream stream{0, nullptr};
  FASTCONTRAST_LAUNCH(stream, 1, PROBE_THREADS, 0, copy_each, (const int*)from, (int*)to);
}

// What FASTCONTRAST_LAUNCH does after a launch on a GPU, which fails if `fails`. Returns the error
// that is left for the next.
inline int check_launch(bool fails) {
  cuda_last_error() = fails ? cudaErrorInvalidConfiguration : cudaSuccess;
  try {
    fastcontrast::cuda::check(cuda_last_error(), "cut_patches<float>", 7, 256);
  } catch (...) {
    if (cuda_last_error() == cudaSuccess) throw;
  }
  return cuda_last_error();
}

inline std::vector<int> probe(const std::string& name, const std::vector<int>& in) {
  std::vector<int> out(3 * in.size(), -1);
  const fastcontrast::cuda::Stream stream{0, nullptr};
  const size_t shared = 2 * PROBE_THREADS * sizeof(int);
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
  PROBE(copies_asynchronously<0>)
  PROBE(copies_asynchronously<1>)
  PROBE(copies_asynchronously<2>)
  PROBE(multiplies<true>)
  PROBE(multiplies<false>)
  PROBE(loads_transposed)
#undef PROBE
  throw std::invalid_argument("no probe " + name);
}

}  // namespace cuda_emulation
