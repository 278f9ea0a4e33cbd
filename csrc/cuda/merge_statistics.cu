// Maths: of rows, statistics from the state that splits of the columns left; of columns,
//   log-sum-exp from what parts of the rows left.
// Tiling: a thread owns a row; a block owns 32 columns, and each of its warps takes every eighth
//   part.
// Memory: a state is read once.
// Numerics: in double, in a fixed order.
#include "cuda/column_sums.h"
#include "cuda/distance_softmax.h"
#include "cuda/launch.h"
#include "cuda/pair_scores.h"

namespace fastcontrast {
namespace cuda {
namespace {

constexpr int BLOCK = 256;
constexpr int WARPS = BLOCK / WARP;

template <typename T>
__global__ void __launch_bounds__(BLOCK)
    merge_splits(const RowStatistics out, const int64_t m, const int64_t splits) {
  const bool counts_all = out.column_count || out.rank;
  const int64_t stride = (int64_t)gridDim.x * BLOCK;
  for (int64_t row = (int64_t)blockIdx.x * BLOCK + threadIdx.x; row < m; row += stride) {
    SoftmaxState state = empty_state();
    double total = 0;
    int64_t number = 0, above = 0;
    for (int64_t split = 0; split < splits; ++split) {
      const double* const part = out.state + split * 4 * m + row;
      state = merge(state, SoftmaxState{part[0], part[m], part[2 * m]});
      if (!counts_all) continue;
      total += part[3 * m];
      number += out.counts[split * 2 * m + row];
      above += out.counts[(split * 2 + 1) * m + row];
    }
    write_statistics<T>(out, row, state, total, number, above);
  }
}

template <typename T>
__global__ void __launch_bounds__(BLOCK)
    merge_parts(const ColumnStatistics out, const int64_t columns, const int64_t parts) {
  using State = TopSum<T, double>;
  __shared__ T max[WARPS][WARP];
  __shared__ double sum[WARPS][WARP];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64_t column = (int64_t)blockIdx.x * WARP + lane;
  State state = {T(-INFINITY), 0.0};
  if (column < columns) {
    for (int64_t part = warp; part < parts; part += WARPS) {
      const double* const of = out.state + part * 2 * columns + column;
      state = merge(state, State{(T)of[0], of[columns]});
    }
  }
  max[warp][lane] = state.max;
  sum[warp][lane] = state.sum;
  __syncthreads();
  if (warp != 0 || column >= columns) return;
  for (int other = 1; other < WARPS; ++other) {
    state = merge(state, State{max[other][lane], sum[other][lane]});
  }
  write_log_sum<T>(out.lse, out.residual, column, SoftmaxState{(double)state.max, state.sum, 0.0});
}

}  // namespace

void merge_row_statistics(const RowStatistics& out, Scalar type, int64_t rows, Splits splits,
                          Stream stream) {
  if (splits.count == 1) return;
  const unsigned blocks = blocks_for(rows, BLOCK);
  if (type == Scalar::float64) {
    FASTCONTRAST_LAUNCH(stream, blocks, BLOCK, 0, (merge_splits<double>), out, rows, splits.count);
  } else {
    FASTCONTRAST_LAUNCH(stream, blocks, BLOCK, 0, (merge_splits<float>), out, rows, splits.count);
  }
}

void merge_column_statistics(const ColumnStatistics& out, Scalar type, int64_t columns,
                             int64_t parts, Stream stream) {
  const unsigned blocks = blocks_for(columns, WARP);
  if (type == Scalar::float64) {
    FASTCONTRAST_LAUNCH(stream, blocks, BLOCK, 0, (merge_parts<double>), out, columns, parts);
  } else {
    FASTCONTRAST_LAUNCH(stream, blocks, BLOCK, 0, (merge_parts<float>), out, columns, parts);
  }
}

}  // namespace cuda
}  // namespace fastcontrast
