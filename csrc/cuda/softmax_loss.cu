// Maths: loss_i = a softplus(lse_i - s_i) + b H_i + c softplus(lse'_t - s_i), s_i the score of row
// i
//   and its positive t = exclude[i][0], and the derivatives by lse_i, lse'_t and s_i.
// Tiling: a warp owns a row; the grid is 1-D and strides over the rows.
// Memory: a row and its positive are read once, five numbers per row written.
// Numerics: s by direct difference, a lane's squares in T; from there in double, once per row. No
// two
//   rows share a positive where c is given, so that the columns' derivatives have one writer each.
#include "common/scalar.h"
#include "cuda/distance_softmax.h"
#include "cuda/launch.h"
#include "cuda/pair_scores.h"

namespace fastcontrast {
namespace cuda {
namespace {

constexpr int BLOCK = 128;
constexpr int ROWS = BLOCK / WARP;

FC_INLINE double softplus(double x) {  // exact from end to end
  return x > 0.0 ? x + log1p(exp(-x)) : log1p(exp(x));
}
FC_INLINE double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

// Dot product or squared distance of a pair: the same in every lane of the warp.
template <typename Element, typename T>
__device__ __forceinline__ T pair_value(const Pairs& pairs, int64_t row, int64_t column, int lane) {
  const Element* x = (const Element*)pairs.rows.data + row * pairs.rows.stride;
  const Element* y = (const Element*)pairs.columns.data + column * pairs.columns.stride;
  T sum = T(0);
  for (int64_t k = lane; k < pairs.dim; k += WARP) {
    const T u = widen(x[k * pairs.rows.step]), v = widen(y[k * pairs.columns.step]);
    sum += pairs.metric == Metric::dot ? u * v : (u - v) * (u - v);
  }
  return warp_sum(sum);
}

template <typename Element>
__global__ void __launch_bounds__(BLOCK) row_losses(const Pairs pairs, const RowLosses of) {
  using T = typename Arithmetic<Element, Element>::type;
  const int lane = threadIdx.x % WARP;
  const int64_t first = (int64_t)blockIdx.x * ROWS + threadIdx.x / WARP;
  for (int64_t row = first; row < pairs.rows.count; row += (int64_t)gridDim.x * ROWS) {
    const int target = excluded_column(pairs, row, 0);
    const T value = pair_value<Element, T>(pairs, row, target < 0 ? 0 : target, lane);
    if (lane != 0) continue;
    const double t = score_of(pairs.metric, value, scale_of<T>(pairs) * T(LOG2_E));
    const double s = t * LN_2;
    const double a = target < 0 ? 0.0 : (double)value_at<T>(of.a, row);
    const double b = (double)value_at<T>(of.b, row);
    const double c = target < 0 ? 0.0 : (double)value_at<T>(of.c, row);
    double loss = 0.0, grad_lse = 0.0, column_grad = 0.0;
    if (a != 0.0) {
      const double z = ((const T*)of.lse)[row] - s + ((const T*)of.residual)[row];
      loss = a * softplus(z);
      grad_lse = a * sigmoid(z);
    }
    if (b != 0.0) loss += b * ((const T*)of.entropy)[row];
    if (c != 0.0) {
      const double z =
          ((const T*)of.column_lse)[target] - s + ((const T*)of.column_residual)[target];
      loss += c * softplus(z);
      column_grad = c * sigmoid(z);
      ((T*)of.column_grad)[target] = (T)column_grad;
    }
    ((T*)of.loss)[row] = (T)loss;
    ((T*)of.grad_lse)[row] = (T)grad_lse;
    ((T*)of.grad_positive)[row] = (T)(grad_lse + column_grad);
  }
}

template <typename Element>
bool losses(const Pairs& pairs, const RowLosses& of, Stream stream) {
  const unsigned blocks = blocks_for(pairs.rows.count, ROWS);
  FASTCONTRAST_LAUNCH(stream, blocks, BLOCK, 0, (row_losses<Element>), pairs, of);
  return true;
}

}  // namespace

bool distance_softmax_losses(const Pairs& pairs, const RowLosses& of, Stream stream) {
  switch (pairs.type) {
    case Scalar::float16:
      return losses<Half>(pairs, of, stream);
    case Scalar::bfloat16:
      return losses<BFloat16>(pairs, of, stream);
    case Scalar::float32:
      return losses<float>(pairs, of, stream);
    case Scalar::float64:
      return losses<double>(pairs, of, stream);
    default:
      return false;
  }
}

}  // namespace cuda
}  // namespace fastcontrast
