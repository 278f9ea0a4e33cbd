// Tiles of points on their way from global to shared memory, and what is taken of them: sums of
// squared differences, or dot products. Shared by the kernels of `distance_softmax` that multiply
// in float or double. Included by .cu files only.
#pragma once

#include <stdint.h>

#include "cuda/async_copy.h"
#include "cuda/distance_softmax.h"
#include "cuda/launch.h"

namespace fastcontrast {
namespace cuda {

constexpr int THREADS = 128;
constexpr int OWNERS = 32;                            // points that a block owns
constexpr int LANES_OF_ROW = 16;                      // threads that share an owner's scores
constexpr int OWN = OWNERS * LANES_OF_ROW / THREADS;  // owners of a thread
constexpr int STAGE_BYTES = 128;   // of a point that is in shared memory at a time
constexpr int STRIDE_BYTES = 144;  // to the next point: eight in a row lie in different banks

template <typename T>
struct Sizes {
  static constexpr int OTHERS = sizeof(T) == 4 ? 64 : 32;  // points of the other side in a tile
  static constexpr int OTHER = OTHERS / LANES_OF_ROW;      // others of a thread
  static constexpr int CHUNK = STAGE_BYTES / sizeof(T);    // coordinates of a stage
  static constexpr int STRIDE = STRIDE_BYTES / sizeof(T);
  static constexpr int UNIT = 16 / sizeof(T);  // elements moved at once
};

template <typename T>
struct SameScalar;
template <>
struct SameScalar<float> {
  static constexpr Scalar value = Scalar::float32;
};
template <>
struct SameScalar<double> {
  static constexpr Scalar value = Scalar::float64;
};

// Whether units of 16 bytes of every point can be moved at once.
inline bool has_units(const PointSet& points, int64_t bytes) {
  return points.step == 1 && is_aligned(points.data, 16) && points.stride * bytes % 16 == 0;
}

// Starts to move coordinates [begin, begin + CHUNK) of COUNT points; 0 beyond the last point and
// the last coordinate. Half numbers are widened on the way, by the thread itself.
template <typename T, int COUNT>
static __device__ __forceinline__ void fetch_points(const PointSet& points, Scalar type, bool units,
                                                    int64_t dim, int64_t first, int64_t begin,
                                                    T* to) {
  using S = Sizes<T>;
  constexpr int UNITS = S::CHUNK / S::UNIT;
  for (int u = threadIdx.x; u < COUNT * UNITS; u += THREADS) {
    const int point = u / UNITS, unit = u % UNITS;
    const int64_t k = begin + unit * S::UNIT;
    int64_t left = first + point < points.count ? dim - k : 0;
    left = left < 0 ? 0 : left < S::UNIT ? left : S::UNIT;
    const int64_t at = left > 0 ? (first + point) * points.stride + k * points.step : 0;
    T* const target = to + point * S::STRIDE + unit * S::UNIT;
    if (type == SameScalar<T>::value) {
      const T* const from = (const T*)points.data + at;
      if (units) {
        async_copy<16>(target, from, (int)(left * sizeof(T)));
      } else {
#pragma unroll
        for (int i = 0; i < S::UNIT; ++i) {
          const bool inside = i < left;
          async_copy<sizeof(T)>(target + i, inside ? from + i * points.step : from,
                                inside ? (int)sizeof(T) : 0);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < S::UNIT; ++i) {
        const int64_t element = at + i * points.step;
        T value = T(0);
        if (i < left) {
          value = type == Scalar::bfloat16 ? widen(((const BFloat16*)points.data)[element])
                                           : widen(((const Half*)points.data)[element]);
        }
        target[i] = value;
      }
    }
  }
}

// Adds to a thread's sums what `width` coordinates of its pairs bring. Its owners are
// threadIdx.x / 16 + 8 i, its others threadIdx.x % 16 + 16 j.
template <bool is_dot, typename T>
static __device__ __forceinline__ void add_coordinates(const T* own, const T* other, int width,
                                                       T (&sum)[OWN][Sizes<T>::OTHER]) {
  using S = Sizes<T>;
  own += threadIdx.x / LANES_OF_ROW * S::STRIDE;
  other += threadIdx.x % LANES_OF_ROW * S::STRIDE;
#pragma unroll 2
  for (int k = 0; k < width; k += S::UNIT) {
    Pack<T, S::UNIT> x[OWN], y[S::OTHER];
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      x[i] = load_pack<T, S::UNIT>(own + i * (THREADS / LANES_OF_ROW) * S::STRIDE + k);
    }
#pragma unroll
    for (int j = 0; j < S::OTHER; ++j) {
      y[j] = load_pack<T, S::UNIT>(other + j * LANES_OF_ROW * S::STRIDE + k);
    }
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
#pragma unroll
      for (int j = 0; j < S::OTHER; ++j) {
#pragma unroll
        for (int l = 0; l < S::UNIT; ++l) {
          const T difference = x[i].item[l] - y[j].item[l];
          sum[i][j] += is_dot ? x[i].item[l] * y[j].item[l] : difference * difference;
        }
      }
    }
  }
}

}  // namespace cuda
}  // namespace fastcontrast
