// Qualifiers for maths that the CPU and CUDA share. Everything in csrc/common is `static inline`:
// a kernel file is compiled once per instruction set, and a function with external linkage would
// be merged by the linker across those copies, so that portable code could end up calling AVX-512.
#pragma once

#if defined(__CUDACC__)
#define FC_INLINE static __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define FC_INLINE static __forceinline
#else
#define FC_INLINE static inline __attribute__((always_inline))
#endif
// The same for member functions.
#if defined(__CUDACC__)
#define FC_MEMBER __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define FC_MEMBER __forceinline
#else
#define FC_MEMBER inline __attribute__((always_inline))
#endif
