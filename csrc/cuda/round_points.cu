// Maths: z = round(x - mean) and ‖z‖², the operands of the matrix units.
// Tiling: a warp owns a point and goes through its coordinates; the grid is 1-D and strides over
// the
//   points.
// Memory: points are read once, by their strides, and written once, in rows of whole stages.
// Numerics: norms of what was rounded, in float, by lanes and then pairwise. A mean that is not
//   finite counts as 0, so that a bad column stays alone. To bfloat16 to nearest, ties to even.
#include "cuda/distance_softmax.h"
#include "cuda/pair_scores.h"
#include "cuda/tensor_tiles.h"

namespace fastcontrast {
namespace cuda {
namespace {

constexpr int ROWS = TENSOR_THREADS / WARP;  // points of a block at a time

template <Operand kind, typename Given>
__global__ void __launch_bounds__(TENSOR_THREADS, 8)
    round_rows(const PointSet points, const int64_t dim, const float* mean,
               const RoundedPoints to) {
  using Element = typename Unit<kind>::Element;
  const int lane = threadIdx.x % WARP;
  const int64_t first = (int64_t)blockIdx.x * ROWS + threadIdx.x / WARP;
  for (int64_t row = first; row < points.count; row += (int64_t)gridDim.x * ROWS) {
    const Given* const from = (const Given*)points.data + row * points.stride;
    Element* const values = (Element*)to.values + row * to.width;
    float sum = 0.0f;
    for (int64_t k = lane; k < to.width; k += WARP) {
      float x = k < dim ? widen(from[k * points.step]) : 0.0f;
      if (mean && k < dim && fabsf(mean[k]) < INFINITY) x -= mean[k];
      if constexpr (kind == Operand::tf32) {
        x = round_to_tf32(x);
        values[k] = x;
      } else {
        narrow(x, &values[k]);
        const float high = widen(values[k]);
        if constexpr (kind == Operand::bf16x3) {
          const float left = fabsf(x) < INFINITY ? round_to_bf16(x - high) : 0.0f;
          narrow(left, &((BFloat16*)to.low)[row * to.width + k]);
          x = high + left;
        } else {
          x = high;
        }
      }
      sum += x * x;
    }
    sum = warp_sum(sum);
    if (lane == 0) to.sqnorm[row] = sum;
  }
}

template <Operand kind>
bool round_to(const PointSet& points, Scalar type, int64_t dim, const float* mean,
              const RoundedPoints& to, Stream stream) {
  const unsigned blocks = blocks_for(points.count, ROWS);
  switch (type) {
    case Scalar::float32:
      FASTCONTRAST_LAUNCH(stream, blocks, TENSOR_THREADS, 0, (round_rows<kind, float>), points, dim,
                          mean, to);
      return true;
    case Scalar::bfloat16:
      FASTCONTRAST_LAUNCH(stream, blocks, TENSOR_THREADS, 0, (round_rows<kind, BFloat16>), points,
                          dim, mean, to);
      return true;
    case Scalar::float16:
      FASTCONTRAST_LAUNCH(stream, blocks, TENSOR_THREADS, 0, (round_rows<kind, Half>), points, dim,
                          mean, to);
      return true;
    default:
      return false;
  }
}

}  // namespace

bool round_points(const PointSet& points, Scalar type, int64_t dim, const void* mean,
                  Operand operand, const RoundedPoints& to, Stream stream) {
  const float* const centre = (const float*)mean;
  switch (operand) {
    case Operand::bf16:
      return round_to<Operand::bf16>(points, type, dim, centre, to, stream);
    case Operand::tf32:
      return round_to<Operand::tf32>(points, type, dim, centre, to, stream);
    case Operand::bf16x3:
      return round_to<Operand::bf16x3>(points, type, dim, centre, to, stream);
  }
  return false;
}

}  // namespace cuda
}  // namespace fastcontrast
