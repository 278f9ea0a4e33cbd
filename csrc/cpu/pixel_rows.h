// Rows of pixels: converted by a·x + b, or copied, from one element type to another; and sums of
// rows. Included by the patch kernels alone, inside their namespace FASTCONTRAST_ISA.
//
// Vectors are written by hand: compilers choose one length of vector for both element types, and
// leave rows of 16 to 63 pixels to scalar code. The last vector of a row overlaps the one before,
// so that no pixel is left over. Streaming rows go past the caches: for outputs that do not fit
// into them, where an ordinary store would first read what it overwrites.
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/scalar.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_ISA {
namespace {

// Direction of a walk along columns. The two unit strides get loops of their own.
enum class Stride { any, forward, backward };

FC_INLINE Stride stride_kind(int64_t step) {
  return step == 1 ? Stride::forward : step == -1 ? Stride::backward : Stride::any;
}

template <Stride kind>
FC_INLINE int64_t stride_value(int64_t step) {
  return kind == Stride::forward ? 1 : kind == Stride::backward ? -1 : step;
}

#if defined(__AVX512F__)
constexpr int LANES = 16;
using Floats = __m512;
constexpr __mmask16 ALL = 0xFFFF;  // the unmasked forms draw a false warning from GCC 12
FC_INLINE Floats every(float x) { return _mm512_set1_ps(x); }
FC_INLINE Floats fused(Floats a, Floats x, Floats b) { return _mm512_fmadd_ps(a, x, b); }
FC_INLINE Floats sum(Floats x, Floats y) { return _mm512_add_ps(x, y); }
FC_INLINE Floats reversed(Floats x) {
  const __m512i order = _mm512_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_maskz_permutexvar_ps(ALL, order, x);
}
FC_INLINE Floats load(const float* in) { return _mm512_loadu_ps(in); }
FC_INLINE Floats from_bytes(__m128i bytes) {
  return _mm512_maskz_cvtepi32_ps(ALL, _mm512_maskz_cvtepu8_epi32(ALL, bytes));
}
FC_INLINE Floats load(const uint8_t* in) { return from_bytes(_mm_loadu_si128((const __m128i*)in)); }
FC_INLINE Floats load(const Half* in) {
  return _mm512_maskz_cvtph_ps(ALL, _mm256_loadu_si256((const __m256i*)in));
}
FC_INLINE Floats load(const BFloat16* in) {
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(ALL, _mm256_loadu_si256((const __m256i*)in));
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(ALL, wide, 16));
}
template <bool stream>
FC_INLINE void store(float* out, Floats x) {
  stream ? _mm512_stream_ps(out, x) : _mm512_storeu_ps(out, x);
}
template <bool stream>
FC_INLINE void store_16_bits(void* out, __m256i x) {
  stream ? _mm256_stream_si256((__m256i*)out, x) : _mm256_storeu_si256((__m256i*)out, x);
}
template <bool stream>
FC_INLINE void store(Half* out, Floats x) {
  store_16_bits<stream>(out, _mm512_maskz_cvtps_ph(ALL, x, _MM_FROUND_TO_NEAREST_INT));
}
template <bool stream>
FC_INLINE void store(BFloat16* out, Floats x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd =
      _mm512_and_si512(_mm512_maskz_srli_epi32(ALL, bits, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_mov_epi32(even, nan, _mm512_set1_epi32(0x7FC00000));
  store_16_bits<stream>(
      out, _mm512_maskz_cvtepi32_epi16(ALL, _mm512_maskz_srli_epi32(ALL, rounded, 16)));
}
#elif defined(__AVX2__)
constexpr int LANES = 8;
using Floats = __m256;
FC_INLINE Floats every(float x) { return _mm256_set1_ps(x); }
FC_INLINE Floats fused(Floats a, Floats x, Floats b) { return _mm256_fmadd_ps(a, x, b); }
FC_INLINE Floats sum(Floats x, Floats y) { return _mm256_add_ps(x, y); }
FC_INLINE Floats reversed(Floats x) {
  return _mm256_permutevar8x32_ps(x, _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}
FC_INLINE Floats load(const float* in) { return _mm256_loadu_ps(in); }
FC_INLINE Floats from_bytes(__m128i bytes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}
FC_INLINE Floats load(const uint8_t* in) { return from_bytes(_mm_loadl_epi64((const __m128i*)in)); }
FC_INLINE Floats load(const Half* in) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)in));
}
FC_INLINE Floats load(const BFloat16* in) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)in));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
template <bool stream>
FC_INLINE void store(float* out, Floats x) {
  stream ? _mm256_stream_ps(out, x) : _mm256_storeu_ps(out, x);
}
template <bool stream>
FC_INLINE void store_16_bits(void* out, __m128i x) {
  stream ? _mm_stream_si128((__m128i*)out, x) : _mm_storeu_si128((__m128i*)out, x);
}
template <bool stream>
FC_INLINE void store(Half* out, Floats x) {
  store_16_bits<stream>(out, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
template <bool stream>
FC_INLINE void store(BFloat16* out, Floats x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i even = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_blendv_epi8(even, _mm256_set1_epi32(0x7FC00000), nan), 16);
  store_16_bits<stream>(
      out, _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
}
#else
constexpr int LANES = 0;  // no vectors by hand
#endif

// Types that vectors of float are loaded from and stored to.
template <typename T>
struct HasLanes {
  static constexpr bool value = LANES > 0;
};
template <>
struct HasLanes<double> {
  static constexpr bool value = false;
};
template <typename T>
struct StoresLanes {
  static constexpr bool value = HasLanes<T>::value;
};
template <>
struct StoresLanes<uint8_t> {
  static constexpr bool value = false;
};

#if defined(__AVX2__)
template <Stride kind, typename In>
FC_INLINE Floats load_at(const In* in, int64_t x) {
  return kind == Stride::forward ? load(in + x) : reversed(load(in - x - (LANES - 1)));
}
#endif

// out[x] = a·in[x·step] + b. Where it streams, `out` is aligned to 64 bytes and the row is a
// multiple of 64 bytes long.
template <Stride kind, bool stream, typename In, typename Out, typename T>
FC_INLINE void map_row(const In* __restrict in, int64_t step, Out* __restrict out, int64_t width,
                       T a, T b) {
#if defined(__AVX2__)
  if constexpr (kind != Stride::any && HasLanes<In>::value && StoresLanes<Out>::value) {
    if (stream || width >= LANES) {
      const Floats as = every(a), bs = every(b);
      int64_t x = 0;
      for (; x + 2 * LANES <= width; x += 2 * LANES) {
        store<stream>(out + x, fused(as, load_at<kind>(in, x), bs));
        store<stream>(out + x + LANES, fused(as, load_at<kind>(in, x + LANES), bs));
      }
      for (; x + LANES <= width; x += LANES) {
        store<stream>(out + x, fused(as, load_at<kind>(in, x), bs));
      }
      if (!stream && x < width) {
        x = width - LANES;
        store<false>(out + x, fused(as, load_at<kind>(in, x), bs));
      }
      return;
    }
  }
#endif
#pragma omp simd
  for (int64_t x = 0; x < width; ++x) {
    narrow(a * (T)widen(in[x * stride_value<kind>(step)]) + b, &out[x]);
  }
}

// Copy of bits; T is an unsigned integer of the element's size. Where it streams, `out` is aligned
// to 64 bytes and the row is a multiple of 64 bytes long.
template <Stride kind, bool stream, typename T>
FC_INLINE void copy_row(const T* __restrict in, int64_t step, T* __restrict out, int64_t width) {
  if constexpr (kind == Stride::forward) {
#if defined(__AVX2__)
    if constexpr (stream) {
      const __m256i* from = (const __m256i*)in;
      __m256i* to = (__m256i*)out;
      const int64_t count = width * (int64_t)sizeof(T) / 32;
      for (int64_t i = 0; i < count; ++i) _mm256_stream_si256(to + i, _mm256_loadu_si256(from + i));
      return;
    }
#endif
    memcpy(out, in, width * sizeof(T));
  } else {
#pragma omp simd
    for (int64_t x = 0; x < width; ++x) out[x] = in[x * stride_value<kind>(step)];
  }
}

// The same into pixels that lie apart, as in channels_last outputs.
template <typename In, typename Out, typename T>
FC_INLINE void map_pixels(const In* __restrict in, int64_t step, Out* __restrict out,
                          int64_t out_step, int64_t width, T a, T b) {
  for (int64_t x = 0; x < width; ++x) narrow(a * (T)widen(in[x * step]) + b, &out[x * out_step]);
}

// A row of zeros; where it streams, `out` is aligned and `width` rounded as for map_row.
template <bool stream, typename Out>
FC_INLINE void zero_row(Out* out, int64_t width) {
#if defined(__AVX2__)
  if constexpr (stream && StoresLanes<Out>::value) {
    for (int64_t x = 0; x < width; x += LANES) store<true>(out + x, every(0.0f));
    return;
  }
#endif
  memset(out, 0, width * sizeof(Out));
}

// Output beyond which it is streamed: larger than a level 2 cache and a core's share of the last.
constexpr int64_t STREAMED_BYTES = 12 << 20;

// Whether rows of `width` elements may be streamed, and are worth it.
template <typename Out>
FC_INLINE bool streams(const Out* out, int64_t elements, int64_t width) {
  return LANES > 0 && elements * (int64_t)sizeof(Out) >= STREAMED_BYTES &&
         width * sizeof(Out) % 64 == 0 && (uintptr_t)out % 64 == 0;
}

// Makes streamed rows visible to other threads.
FC_INLINE void end_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

FC_INLINE void prefetch(const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#else
  (void)address;
#endif
}

// sums[x] += in[x·step].
template <Stride kind, typename G, typename T>
FC_INLINE void add_row(const G* __restrict in, int64_t step, T* __restrict sums, int64_t width) {
  int64_t x = 0;
#if defined(__AVX2__)
  if constexpr (kind != Stride::any && HasLanes<G>::value && StoresLanes<T>::value) {
    for (; x + LANES <= width; x += LANES) {
      store<false>(sums + x, sum(load(sums + x), load_at<kind>(in, x)));
    }
  }
#endif
  // Also what is left of a row: half of the lanes at a time, where that suffices.
#pragma omp simd
  for (int64_t i = x; i < width; ++i) sums[i] += (T)widen(in[i * stride_value<kind>(step)]);
}

}  // namespace
}  // namespace FASTCONTRAST_ISA
}  // namespace cpu
}  // namespace fastcontrast
