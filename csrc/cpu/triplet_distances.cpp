// Maths: per row, d = ‖x-y‖ or ‖x-y‖² of the pairs (a,p), (a,n) and on request (p,n), and on
// request
//   the difference d_ap - d_an or d_ap - min(d_an, d_pn); backward, with the weights w of
//   common/distance.h, the gradient of a point x with the other two y and z is w_xy (x-y) + w_xz
//   (x-z).
// Tiling: a thread owns whole rows, so results do not depend on the thread count.
// Memory: every point is read once in each direction, and every gradient written once. A row whose
//   weights are 0 (an inactive hinge) is not read in the backward pass.
// Numerics: direct differences; sums of up to 256 squares in T, beyond in double. A gradient is
//   rounded to a half type once. At distance 0 the subgradient is 0; NaN and inf propagate.
#include "cpu/triplet_distances.h"

#include <string.h>

#include "common/distance.h"

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_ISA {
namespace {

// As in distance_softmax.cpp: plain float32 over many columns would be less exact than eager
// PyTorch's pairwise sums.
constexpr int64_t SUM_CHUNK = 256;

template <typename Element>
FC_INLINE const Element* row_of(const Triplets& triplets, int point, int64_t row) {
  return (const Element*)triplets.points[point] + row * triplets.stride[point];
}

template <Metric metric, bool between, typename Element>
void forward(const Triplets& triplets, const TripletDistances& out) {
  using T = typename Arithmetic<Element, Element>::type;
#pragma omp parallel for num_threads(triplets.threads) if (triplets.threads > 1) schedule(static)
  for (int64_t row = 0; row < triplets.rows; ++row) {
    const Element* a = row_of<Element>(triplets, 0, row);
    const Element* p = row_of<Element>(triplets, 1, row);
    const Element* n = row_of<Element>(triplets, 2, row);
    double sum[3] = {0, 0, 0};
    for (int64_t begin = 0; begin < triplets.dim; begin += SUM_CHUNK) {
      const int64_t end = begin + SUM_CHUNK < triplets.dim ? begin + SUM_CHUNK : triplets.dim;
      T part_ap = 0, part_an = 0, part_pn = 0;
#pragma omp simd reduction(+ : part_ap, part_an, part_pn)
      for (int64_t k = begin; k < end; ++k) {
        const T x = widen(a[k]), y = widen(p[k]), z = widen(n[k]);
        part_ap += (x - y) * (x - y);
        part_an += (x - z) * (x - z);
        if (between) part_pn += (y - z) * (y - z);
      }
      sum[0] += (double)part_ap;
      sum[1] += (double)part_an;
      sum[2] += (double)part_pn;
    }
    T d[3];
    for (int pair = 0; pair < (between ? 3 : 2); ++pair) {
      d[pair] = (T)distance_from_squares<metric>(sum[pair]);
      ((T*)out.pairs[pair])[row] = d[pair];
    }
    if (out.difference) {
      ((T*)out.difference)[row] = triplet_difference(d, between);
    }
  }
}

// The two pairs of each point, and the other point of each.
constexpr int PAIRS[3][2] = {{0, 1}, {0, 2}, {1, 2}};
constexpr int OTHERS[3][2] = {{1, 2}, {0, 2}, {0, 1}};

template <Metric metric, typename Element>
void backward(const Triplets& triplets, const TripletDistances& distances,
              const TripletGradients& gradients, void* const* out) {
  using T = typename Arithmetic<Element, Element>::type;
  const int64_t dim = triplets.dim;
#pragma omp parallel for num_threads(triplets.threads) if (triplets.threads > 1) schedule(static)
  for (int64_t row = 0; row < triplets.rows; ++row) {
    T d[3], gradient[3], weight[3];
    bool counts[3];
    for (int pair = 0; pair < 3; ++pair) {
      d[pair] = distances.pairs[pair] ? ((const T*)distances.pairs[pair])[row] : T(0);
    }
    gradients_of_row(gradients, d, distances.pairs[2], row, gradient, counts);
    for (int pair = 0; pair < 3; ++pair) {
      weight[pair] = difference_weight<metric>(gradient[pair], d[pair]);
      // 0 times a finite difference is left out; where d is finite all differences are.
      counts[pair] = counts[pair] && (weight[pair] != T(0) || d[pair] - d[pair] != T(0));
    }
    for (int point = 0; point < 3; ++point) {
      if (!out[point]) continue;
      Element* to = (Element*)out[point] + row * dim;
      const Element* x = row_of<Element>(triplets, point, row);
      const Element* y = row_of<Element>(triplets, OTHERS[point][0], row);
      const Element* z = row_of<Element>(triplets, OTHERS[point][1], row);
      const T v = weight[PAIRS[point][0]], w = weight[PAIRS[point][1]];
      const bool first = counts[PAIRS[point][0]], second = counts[PAIRS[point][1]];
      if (first && second) {
#pragma omp simd
        for (int64_t k = 0; k < dim; ++k) {
          const T from = widen(x[k]);
          narrow(v * (from - widen(y[k])) + w * (from - widen(z[k])), to + k);
        }
      } else if (first || second) {
        const Element* other = first ? y : z;
        const T only = first ? v : w;
#pragma omp simd
        for (int64_t k = 0; k < dim; ++k) narrow(only * (widen(x[k]) - widen(other[k])), to + k);
      } else {
        memset(to, 0, (size_t)dim * sizeof(Element));
      }
    }
  }
}

template <Metric metric, typename Element>
void forward_of_pairs(const Triplets& triplets, const TripletDistances& out) {
  if (out.pairs[2]) {
    forward<metric, true, Element>(triplets, out);
  } else {
    forward<metric, false, Element>(triplets, out);
  }
}

// Calls f<metric, Element>(arguments...) with the two run-time choices as constants, and returns
// whether there is a kernel.
#define FASTCONTRAST_FOR_ELEMENT(function, metric, ...)               \
  switch (triplets.type) {                                            \
    case Scalar::float16:                                             \
      return function<metric, Half>(triplets, __VA_ARGS__), true;     \
    case Scalar::bfloat16:                                            \
      return function<metric, BFloat16>(triplets, __VA_ARGS__), true; \
    case Scalar::float32:                                             \
      return function<metric, float>(triplets, __VA_ARGS__), true;    \
    case Scalar::float64:                                             \
      return function<metric, double>(triplets, __VA_ARGS__), true;   \
    default:                                                          \
      return false;                                                   \
  }
#define FASTCONTRAST_FOR_DISTANCE(function, ...)                         \
  if (triplets.metric == Metric::l2) {                                   \
    FASTCONTRAST_FOR_ELEMENT(function, Metric::l2, __VA_ARGS__)          \
  }                                                                      \
  if (triplets.metric == Metric::sqeuclidean) {                          \
    FASTCONTRAST_FOR_ELEMENT(function, Metric::sqeuclidean, __VA_ARGS__) \
  }                                                                      \
  return false

}  // namespace

bool triplet_distances_forward(const Triplets& triplets, const TripletDistances& out) {
  FASTCONTRAST_FOR_DISTANCE(forward_of_pairs, out);
}
bool triplet_distances_backward(const Triplets& triplets, const TripletDistances& distances,
                                const TripletGradients& gradients, void* const* out) {
  FASTCONTRAST_FOR_DISTANCE(backward, distances, gradients, out);
}

}  // namespace FASTCONTRAST_ISA
}  // namespace cpu
}  // namespace fastcontrast
