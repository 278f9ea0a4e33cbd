// Maths: per row, d = ‖x-y‖ or ‖x-y‖² of the pairs (a,p), (a,n) and on request (p,n), and on
//   request their difference; backward, with the weights w of common/distance.h, the gradient of a
//   point x with the other two y and z is w_xy (x-y) + w_xz (x-z).
// Tiling: a warp owns a row, each lane 16 bytes of it at a time where addresses allow, else one
//   element. A block has eight warps; the grid is 1-D and strides over the rows.
// Memory: every point is read once in each direction, and every gradient written once. A row whose
//   weights are 0 (an inactive hinge) is not read in the backward pass, a point that has no weight
//   neither.
// Numerics: direct differences; a lane sums up to 256 squares in T, the lanes' sums are added
//   pairwise, and beyond 8192 columns these in order. A gradient is rounded to a half type once. At
//   distance 0 the subgradient is 0; NaN and inf propagate.
#include "cuda/triplet_distances.h"

#include "common/distance.h"
#include "cuda/launch.h"

namespace fastcontrast {
namespace cuda {
namespace {

constexpr int THREADS = 256;
constexpr int ROWS = THREADS / WARP;       // of a block at a time
constexpr int64_t SUM_CHUNK = 256 * WARP;  // columns of one sum over the warp
constexpr int PAIRS = 3;

template <typename Element>
FC_INLINE const Element* row_of(const Triplets& triplets, int point, int64_t row) {
  return (const Element*)triplets.points[point] + row * triplets.stride[point];
}

template <typename T>
FC_INLINE T distance(Metric metric, T sum) {
  return metric == Metric::l2 ? distance_from_squares<Metric::l2>(sum)
                              : distance_from_squares<Metric::sqeuclidean>(sum);
}

template <typename T>
FC_INLINE T weight_of(Metric metric, T gradient, T d) {
  return metric == Metric::l2 ? difference_weight<Metric::l2>(gradient, d)
                              : difference_weight<Metric::sqeuclidean>(gradient, d);
}

template <bool between, typename Element, int V>
__global__ void __launch_bounds__(THREADS)
    distances_of_rows(const Triplets triplets, const TripletDistances out) {
  using T = typename Arithmetic<Element, Element>::type;
  const int lane = threadIdx.x % WARP;
  const int64_t first = (int64_t)blockIdx.x * ROWS + threadIdx.x / WARP;
  for (int64_t row = first; row < triplets.rows; row += (int64_t)gridDim.x * ROWS) {
    const Element* a = row_of<Element>(triplets, 0, row);
    const Element* p = row_of<Element>(triplets, 1, row);
    const Element* n = row_of<Element>(triplets, 2, row);
    T sum[PAIRS] = {T(0), T(0), T(0)};
    for (int64_t begin = 0; begin < triplets.dim; begin += SUM_CHUNK) {
      const int64_t end = begin + SUM_CHUNK < triplets.dim ? begin + SUM_CHUNK : triplets.dim;
      T part[PAIRS] = {T(0), T(0), T(0)};
      for (int64_t k = begin + lane * V; k < end; k += WARP * V) {
        const auto x = load_pack<Element, V>(a + k);
        const auto y = load_pack<Element, V>(p + k);
        const auto z = load_pack<Element, V>(n + k);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const T u = widen(x.item[i]), v = widen(y.item[i]), w = widen(z.item[i]);
          part[0] += (u - v) * (u - v);
          part[1] += (u - w) * (u - w);
          if (between) part[2] += (v - w) * (v - w);
        }
      }
#pragma unroll
      for (int pair = 0; pair < (between ? 3 : 2); ++pair) sum[pair] += warp_sum(part[pair]);
    }
    if (lane != 0) continue;
    T d[PAIRS];
#pragma unroll
    for (int pair = 0; pair < (between ? 3 : 2); ++pair) {
      d[pair] = distance(triplets.metric, sum[pair]);
      ((T*)out.pairs[pair])[row] = d[pair];
    }
    if (out.difference) ((T*)out.difference)[row] = triplet_difference(d, between);
  }
}

struct PointGradients {
  void* points[3];
};

template <typename Element, int V>
__global__ void __launch_bounds__(THREADS)
    gradients_of_rows(const Triplets triplets, const TripletDistances distances,
                      const TripletGradients gradients, const PointGradients out) {
  using T = typename Arithmetic<Element, Element>::type;
  const int lane = threadIdx.x % WARP;
  const int64_t dim = triplets.dim;
  const int64_t first = (int64_t)blockIdx.x * ROWS + threadIdx.x / WARP;
  for (int64_t row = first; row < triplets.rows; row += (int64_t)gridDim.x * ROWS) {
    T d[PAIRS], gradient[PAIRS], weight[PAIRS];
    bool counts[PAIRS];
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair) {
      d[pair] = distances.pairs[pair] ? ((const T*)distances.pairs[pair])[row] : T(0);
    }
    gradients_of_row(gradients, d, distances.pairs[2] != nullptr, row, gradient, counts);
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair) {
      weight[pair] = weight_of(triplets.metric, gradient[pair], d[pair]);
      // 0 times a finite difference is left out; where d is finite all differences are.
      counts[pair] = counts[pair] && (weight[pair] != T(0) || d[pair] - d[pair] != T(0));
    }
    const Element* a = row_of<Element>(triplets, 0, row);
    const Element* p = row_of<Element>(triplets, 1, row);
    const Element* n = row_of<Element>(triplets, 2, row);
    for (int64_t k = lane * V; k < dim; k += WARP * V) {
      Pack<Element, V> x{}, y{}, z{};
      if (counts[0] || counts[1]) x = load_pack<Element, V>(a + k);
      if (counts[0] || counts[2]) y = load_pack<Element, V>(p + k);
      if (counts[1] || counts[2]) z = load_pack<Element, V>(n + k);
      Pack<Element, V> of_x, of_y, of_z;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const T u = widen(x.item[i]), v = widen(y.item[i]), w = widen(z.item[i]);
        const T ap = counts[0] ? weight[0] * (u - v) : T(0);
        const T an = counts[1] ? weight[1] * (u - w) : T(0);
        const T pn = counts[2] ? weight[2] * (v - w) : T(0);
        narrow(ap + an, &of_x.item[i]);
        narrow(pn - ap, &of_y.item[i]);
        narrow(-(an + pn), &of_z.item[i]);
      }
      if (out.points[0]) store_pack((Element*)out.points[0] + row * dim + k, of_x);
      if (out.points[1]) store_pack((Element*)out.points[1] + row * dim + k, of_y);
      if (out.points[2]) store_pack((Element*)out.points[2] + row * dim + k, of_z);
    }
  }
}

// Whether every row of every point and gradient starts on 16 bytes and has a multiple of them.
bool fits_vectors(const Triplets& triplets, void* const* out, int64_t element_size) {
  bool fits = triplets.dim * element_size % 16 == 0;
  for (int point = 0; point < 3; ++point) {
    fits = fits && is_aligned(triplets.points[point], 16) &&
           triplets.stride[point] * element_size % 16 == 0;
    if (out) fits = fits && is_aligned(out[point], 16);
  }
  return fits;
}

template <typename Element, int V>
void launch_forward(const Triplets& triplets, const TripletDistances& out, Stream stream) {
  const unsigned blocks = blocks_for(triplets.rows, ROWS);
  if (out.pairs[2]) {
    FASTCONTRAST_LAUNCH(stream, blocks, THREADS, 0, (distances_of_rows<true, Element, V>), triplets,
                        out);
  } else {
    FASTCONTRAST_LAUNCH(stream, blocks, THREADS, 0, (distances_of_rows<false, Element, V>),
                        triplets, out);
  }
}

template <typename Element>
bool forward(const Triplets& triplets, const TripletDistances& out, Stream stream) {
  if (fits_vectors(triplets, nullptr, sizeof(Element))) {
    launch_forward<Element, 16 / sizeof(Element)>(triplets, out, stream);
  } else {
    launch_forward<Element, 1>(triplets, out, stream);
  }
  return true;
}

template <typename Element>
bool backward(const Triplets& triplets, const TripletDistances& distances,
              const TripletGradients& gradients, void* const* out, Stream stream) {
  const PointGradients to{{out[0], out[1], out[2]}};
  const unsigned blocks = blocks_for(triplets.rows, ROWS);
  if (fits_vectors(triplets, out, sizeof(Element))) {
    FASTCONTRAST_LAUNCH(stream, blocks, THREADS, 0,
                        (gradients_of_rows<Element, 16 / sizeof(Element)>), triplets, distances,
                        gradients, to);
  } else {
    FASTCONTRAST_LAUNCH(stream, blocks, THREADS, 0, (gradients_of_rows<Element, 1>), triplets,
                        distances, gradients, to);
  }
  return true;
}

bool has_kernel(const Triplets& triplets) {
  return triplets.metric == Metric::l2 || triplets.metric == Metric::sqeuclidean;
}

}  // namespace

bool triplet_distances_forward(const Triplets& triplets, const TripletDistances& out,
                               Stream stream) {
  if (!has_kernel(triplets)) return false;
  if (triplets.rows == 0) return true;
  switch (triplets.type) {
    case Scalar::float16:
      return forward<Half>(triplets, out, stream);
    case Scalar::bfloat16:
      return forward<BFloat16>(triplets, out, stream);
    case Scalar::float32:
      return forward<float>(triplets, out, stream);
    case Scalar::float64:
      return forward<double>(triplets, out, stream);
    default:
      return false;
  }
}

bool triplet_distances_backward(const Triplets& triplets, const TripletDistances& distances,
                                const TripletGradients& gradients, void* const* out,
                                Stream stream) {
  if (!has_kernel(triplets)) return false;
  if (triplets.rows == 0 || triplets.dim == 0) return true;
  switch (triplets.type) {
    case Scalar::float16:
      return backward<Half>(triplets, distances, gradients, out, stream);
    case Scalar::bfloat16:
      return backward<BFloat16>(triplets, distances, gradients, out, stream);
    case Scalar::float32:
      return backward<float>(triplets, distances, gradients, out, stream);
    case Scalar::float64:
      return backward<double>(triplets, distances, gradients, out, stream);
    default:
      return false;
  }
}

}  // namespace cuda
}  // namespace fastcontrast
