// How every CUDA kernel is launched, and what the kernels share: sizes of a grid, 16-byte access,
// sums over a warp. Included by .cu files only. tests/cuda_emulation/ compiles the same files for
// the host, with another <cuda_runtime.h> that replaces FASTCONTRAST_LAUNCH.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

#include <stdexcept>
#include <string>

#include "common/macros.h"
#include "cuda/stream.h"

namespace fastcontrast {
namespace cuda {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xFFFFFFFFu;
constexpr int64_t MAX_BLOCKS = 0x7FFFFFFF;  // of a 1-D grid

// Blocks for `work` items; kernels stride over what is beyond the largest grid.
inline unsigned blocks_for(int64_t work, int64_t per_block) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  return (unsigned)(blocks < MAX_BLOCKS ? blocks : MAX_BLOCKS);
}

inline void check(cudaError_t error, const char* kernel, unsigned blocks, unsigned threads) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would find it again
  throw std::runtime_error(std::string(kernel) + " could not be launched in " +
                           std::to_string(blocks) + " blocks of " + std::to_string(threads) +
                           " threads: " + cudaGetErrorString(error));
}

// Makes a GPU the current one until the end of the scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    error = cudaGetDevice(&before_);
    if (error != cudaSuccess || before_ == device) return;
    error = cudaSetDevice(device);
    changed_ = error == cudaSuccess;
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  cudaError_t error;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// FASTCONTRAST_LAUNCH(stream, blocks, threads, shared bytes, (kernel<...>), arguments...):
// allocates nothing and waits for nothing, so that it can be captured into a graph.
#if !defined(FASTCONTRAST_LAUNCH)
// Beyond 48 KiB of shared memory a kernel has to be allowed them, on every GPU.
inline cudaError_t allow_shared(const void* kernel, size_t bytes) {
  if (bytes <= (48u << 10)) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
}
#define FASTCONTRAST_LAUNCH(stream, blocks, threads, shared, kernel, ...)                          \
  do {                                                                                             \
    const ::fastcontrast::cuda::DeviceScope scope((stream).device);                                \
    ::fastcontrast::cuda::check(scope.error, #kernel, blocks, threads);                            \
    ::fastcontrast::cuda::check(::fastcontrast::cuda::allow_shared((const void*)(kernel), shared), \
                                #kernel, blocks, threads);                                         \
    kernel<<<blocks, threads, shared, (cudaStream_t)(stream).handle>>>(__VA_ARGS__);               \
    ::fastcontrast::cuda::check(cudaGetLastError(), #kernel, blocks, threads);                     \
  } while (false)
#define FASTCONTRAST_CHECK_ALIGNED(address, bytes) ((void)0)
// The dynamic shared memory of a block, on 16 bytes.
#define FASTCONTRAST_SHARED(type, name)                            \
  extern __shared__ __align__(16) unsigned char dynamic_shared_[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared_)
#endif

// V elements of one row, moved at once.
template <typename T, int V>
struct Pack {
  T item[V];
};

FC_INLINE bool is_aligned(const void* address, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

template <typename T, int V>
static __device__ __forceinline__ Pack<T, V> load_pack(const T* from) {
  Pack<T, V> pack;
  if constexpr (sizeof(pack) == 16) {
    FASTCONTRAST_CHECK_ALIGNED(from, 16);
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    memcpy(&pack, &bits, 16);
  } else {
    static_assert(V == 1, "packs have 16 bytes, or one element");
    pack.item[0] = *from;
  }
  return pack;
}

template <typename T, int V>
static __device__ __forceinline__ void store_pack(T* to, const Pack<T, V>& pack) {
  if constexpr (sizeof(pack) == 16) {
    FASTCONTRAST_CHECK_ALIGNED(to, 16);
    uint4 bits;
    memcpy(&bits, &pack, 16);
    *reinterpret_cast<uint4*>(to) = bits;
  } else {
    *to = pack.item[0];
  }
}

// The sum over all lanes, the same bits in each.
template <typename T>
static __device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(ALL_LANES, x, distance);
  }
  return x;
}

}  // namespace cuda
}  // namespace fastcontrast
