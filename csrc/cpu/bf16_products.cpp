// Maths: C = Σ over terms of left·right, with bfloat16 factors and float32 sums, by the blocks of
//   bf16_block.h. For the gradients C·Y and Xᵀ·C the pair weights C are packed as they lie, as left
//   factor and as right factor; that is why the gradient of Y is summed transposed.
// Tiling: panels of 512 depth, packed once, 32 columns of which stay in L1 while up to 128 rows
//   pass by. One writer per 32 × 32 block, depth always in the same order: results do not depend on
//   the thread count.
// Memory: factors of X and Y are packed once per call, O((M+N)·D); of C, WEIGHT_COLUMNS at a time.
// Numerics: products of bfloat16 values are exact in float32. Of two terms per factor, the small
//   products go first. Sums of rounded weights run in float32 over SUM_CHUNK values, then in
//   double. The matrix units take denormals for 0.
#include "cpu/bf16_products.h"

#include <string.h>

#include "common/macros.h"
#include "cpu/bf16_block.h"

namespace fastcontrast {
namespace cpu {
namespace FASTCONTRAST_BF16_UNIT {
namespace {

constexpr int64_t DEPTH_PANEL = 16;  // blocks of depth: 32 columns of them take 32 KiB
constexpr int64_t GROUP_PANELS = 4;  // column panels of C that a thread packs and sums at a time
constexpr int64_t SUM_CHUNK = 256;   // rows that are summed in float32
static_assert(SUM_CHUNK % DEPTH_BLOCK == 0 && WEIGHT_COLUMNS % SUM_CHUNK == 0, "whole blocks");

FC_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FC_INLINE int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

// Sixteen values at a time, whatever the instruction set has to hold them.
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

FC_INLINE Floats load(const float* from) {
  Floats x;
  memcpy(&x, from, sizeof x);
  return x;
}

// `narrow` of common/scalar.h and `widen` of that: the bits of x rounded to bfloat16, as float32.
FC_INLINE Words rounded(Floats x) {
  const Words bits = (Words)x;
  const Words nearest = (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits & 0) + 0x7FC00000u : nearest;
}

// x = high + low as far as two terms can; where high is inf or NaN it says all.
struct Terms {
  Words high, low;
};
template <bool two_terms>
FC_INLINE Terms split(Floats x) {
  Terms t = {rounded(x), {}};
  if (two_terms) {
    const Floats rest = x - (Floats)t.high;
    t.low = (t.high & 0x7F800000u) == 0x7F800000u ? t.low : rounded(rest);
  }
  return t;
}
FC_INLINE Floats sum_of(const Terms& t) { return (Floats)t.high + (Floats)t.low; }

// A panel's block of 32 depth as 16 × 16 pairs of values, 32 bits each.
struct PairBlock {
  uint32_t pair[PANEL][PANEL];
};

FC_INLINE void transpose(const PairBlock& from, PairBlock* to) {
  for (int i = 0; i < PANEL; ++i) {
    for (int j = 0; j < PANEL; ++j) to->pair[j][i] = from.pair[i][j];
  }
}

// A block of a matrix whose lines are `stride` apart, as it lies or, at the edge, as a copy with
// zeros beyond what is there.
template <int LINES, int WIDTH>
struct Window {
  float buffer[LINES][WIDTH];
  const float* first;
  int64_t stride;
};
template <int LINES, int WIDTH>
FC_INLINE void open_window(const float* from, int64_t stride, int64_t lines, int64_t width,
                           Window<LINES, WIDTH>* window) {
  if (lines >= LINES && width >= WIDTH) {
    window->first = from;
    window->stride = stride;
    return;
  }
  memset(window->buffer, 0, sizeof window->buffer);
  for (int64_t i = 0; i < smaller(lines, LINES); ++i) {
    for (int64_t j = 0; j < smaller(width, WIDTH); ++j) {
      window->buffer[i][j] = from[i * stride + j];
    }
  }
  window->first = window->buffer[0];
  window->stride = WIDTH;
}

// Two halves of a line as 32 values of 16 bits.
FC_INLINE void write_line(Words left, Words right, uint32_t* out) {
  const Halves halves[2] = {__builtin_convertvector(left >> 16, Halves),
                            __builtin_convertvector(right >> 16, Halves)};
  memcpy(out, halves, sizeof halves);
}

// Lines are the panel's 16 rows (or columns), each with its 32 depth: pair[row][pair of depth].
// Adds what was rounded to the sums of each row, in 16 lanes.
template <bool two_terms>
FC_INLINE void pack_lines(const Window<PANEL, DEPTH_BLOCK>& window, PairBlock* high, PairBlock* low,
                          Floats* sums) {
  for (int i = 0; i < PANEL; ++i) {
    const float* x = window.first + i * window.stride;
    const Terms left = split<two_terms>(load(x)), right = split<two_terms>(load(x + PANEL));
    write_line(left.high, right.high, high->pair[i]);
    if (two_terms) write_line(left.low, right.low, low->pair[i]);
    if (sums) sums[i] += sum_of(left) + sum_of(right);
  }
}

// Lines are the block's 32 depth, each with its 16 rows (or columns): pair[pair of depth][row].
// Adds what was rounded to the sum of each row.
template <bool two_terms>
FC_INLINE void pack_depths(const Window<DEPTH_BLOCK, PANEL>& window, PairBlock* high,
                           PairBlock* low, Floats* sum) {
  for (int k = 0; k < PANEL; ++k) {
    const float* x = window.first + 2 * k * window.stride;
    const Terms even = split<two_terms>(load(x)), odd = split<two_terms>(load(x + window.stride));
    const Words pairs = (even.high >> 16) | odd.high;
    memcpy(high->pair[k], &pairs, sizeof pairs);
    if (two_terms) {
      const Words low_pairs = (even.low >> 16) | odd.low;
      memcpy(low->pair[k], &low_pairs, sizeof low_pairs);
    }
    if (sum) *sum += sum_of(even) + sum_of(odd);
  }
}

template <bool two_terms>
FC_INLINE void write_blocks(const PairBlock& high, const PairBlock& low, bool transposed,
                            BFloat16* high_out, BFloat16* low_out) {
  PairBlock turned;
  if (transposed) transpose(high, &turned);
  memcpy(high_out, transposed ? &turned : &high, sizeof high);
  if (!two_terms) return;
  if (transposed) transpose(low, &turned);
  memcpy(low_out, transposed ? &turned : &low, sizeof low);
}

template <bool two_terms>
void pack_panel(const Bf16Source& source, Side side, int64_t panel, const Bf16Factor& out) {
  const int64_t first = panel * PANEL;
  PairBlock high, low;
  for (int64_t block = 0; block < parts(source.depth, DEPTH_BLOCK); ++block) {
    const int64_t depth = block * DEPTH_BLOCK;
    const int64_t offset = panel * out.panel_stride + block * PANEL_BLOCK;
    BFloat16* low_out = two_terms ? out.low + offset : nullptr;
    if (source.depth_stride == 1) {
      Window<PANEL, DEPTH_BLOCK> window;
      open_window(source.data + first * source.outer_stride + depth, source.outer_stride,
                  source.outer - first, source.depth - depth, &window);
      pack_lines<two_terms>(window, &high, &low, nullptr);
      write_blocks<two_terms>(high, low, side == Side::right, out.high + offset, low_out);
    } else {
      Window<DEPTH_BLOCK, PANEL> window;
      open_window(source.data + depth * source.depth_stride + first, source.depth_stride,
                  source.depth - depth, source.outer - first, &window);
      pack_depths<two_terms>(window, &high, &low, nullptr);
      write_blocks<two_terms>(high, low, side == Side::left, out.high + offset, low_out);
    }
  }
}

// Terms of a product in the order of their sum, from row panel `i` and column panel `j` on.
FC_INLINE BlockFactors block_factors(const Bf16Factor& left, const Bf16Factor& right, int64_t i,
                                     int64_t j, int64_t block, int64_t blocks) {
  BlockFactors f;
  const int64_t from_left = i * left.panel_stride + block * PANEL_BLOCK;
  const int64_t from_right = j * right.panel_stride + block * PANEL_BLOCK;
  f.terms = 0;
  if (left.low) {
    f.left[0] = left.low + from_left;
    f.right[0] = right.high + from_right;
    f.left[1] = left.high + from_left;
    f.right[1] = right.low + from_right;
    f.terms = 2;
  }
  f.left[f.terms] = left.high + from_left;
  f.right[f.terms++] = right.high + from_right;
  f.left_stride = left.panel_stride;
  f.right_stride = right.panel_stride;
  f.depth_blocks = blocks;
  return f;
}

// Results that the caller wants of a product, [rows, columns] of leading dimension `stride`.
struct Result {
  float* values;
  int64_t rows, columns, stride;
  bool accumulate;
};

// One block of results; what the matrix does not hold goes through a buffer.
FC_INLINE void add_block(const BlockFactors& f, const Result& c, int64_t row, int64_t column,
                         bool accumulate) {
  const int64_t rows = smaller(BLOCK, c.rows - row), columns = smaller(BLOCK, c.columns - column);
  const int row_panels = rows > PANEL ? 2 : 1, column_panels = columns > PANEL ? 2 : 1;
  float* to = c.values + row * c.stride + column;
  if (rows == row_panels * PANEL && columns == column_panels * PANEL) {
    block_product(f, row_panels, column_panels, accumulate, to, c.stride);
    return;
  }
  float buffer[BLOCK * BLOCK] = {0};
  if (accumulate) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) buffer[i * BLOCK + j] = to[i * c.stride + j];
    }
  }
  block_product(f, row_panels, column_panels, accumulate, buffer, BLOCK);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[i * c.stride + j] = buffer[i * BLOCK + j];
  }
}

// Inside a parallel region that all threads reach.
void multiply(const Bf16Factor& left, const Bf16Factor& right, int64_t depth, const Result& c,
              int threads) {
  const int64_t blocks = parts(depth, DEPTH_BLOCK);
  int64_t rows = 4 * BLOCK,
          columns = 8 * BLOCK;  // of a task; blocks are the same whatever they are
  while (parts(c.rows, rows) * parts(c.columns, columns) < 2 * threads && columns > BLOCK) {
    if (rows > BLOCK) rows /= 2;
    columns /= 2;
  }
  const int64_t task_columns = parts(c.columns, columns);
  const int64_t tasks = parts(c.rows, rows) * task_columns;
  begin_blocks();
#pragma omp for schedule(static)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t first_row = task / task_columns * rows;
    const int64_t first_column = task % task_columns * columns;
    const int64_t end_row = smaller(first_row + rows, c.rows);
    const int64_t end_column = smaller(first_column + columns, c.columns);
    int64_t block = 0;
    do {  // once, for zeros, where there is no depth
      const int64_t now = smaller(DEPTH_PANEL, blocks - block);
      for (int64_t column = first_column; column < end_column; column += BLOCK) {
        for (int64_t row = first_row; row < end_row; row += BLOCK) {
          const BlockFactors f =
              block_factors(left, right, row / PANEL, column / PANEL, block, now);
          add_block(f, c, row, column, c.accumulate || block > 0);
        }
      }
      block += now;
    } while (block < blocks);
  }
  end_blocks();
}

// C as left factor, columns from `first` on, and the sums of its rounded rows. Inside a parallel
// region.
template <bool two_terms>
void pack_weights_left(const GradientProducts& p, int64_t first, int64_t width) {
  const Bf16Factor& out = p.workspace[0];
#pragma omp for schedule(static)
  for (int64_t panel = 0; panel < parts(p.rows, PANEL); ++panel) {
    const int64_t row = panel * PANEL;
    double total[PANEL] = {0};
    for (int64_t chunk = 0; chunk < width; chunk += SUM_CHUNK) {
      Floats lanes[PANEL] = {};
      for (int64_t depth = chunk; depth < smaller(chunk + SUM_CHUNK, width); depth += DEPTH_BLOCK) {
        Window<PANEL, DEPTH_BLOCK> window;
        PairBlock high, low;
        open_window(p.weights + row * p.columns + first + depth, p.columns, p.rows - row,
                    width - depth, &window);
        pack_lines<two_terms>(window, &high, &low, lanes);
        const int64_t offset = panel * out.panel_stride + depth / DEPTH_BLOCK * PANEL_BLOCK;
        write_blocks<two_terms>(high, low, false, out.high + offset,
                                two_terms ? out.low + offset : nullptr);
      }
      for (int i = 0; i < PANEL; ++i) {
        float sum = 0;
        for (int j = 0; j < PANEL; ++j) sum += lanes[i][j];
        total[i] += (double)sum;
      }
    }
    for (int64_t i = 0; i < smaller(PANEL, p.rows - row); ++i) p.row_sum[row + i] += total[i];
  }
}

// C as right factor, and the sums of its rounded columns. Inside a parallel region.
template <bool two_terms>
void pack_weights_right(const GradientProducts& p, int64_t first, int64_t width) {
  const Bf16Factor& out = p.workspace[1];
  const int64_t panels = parts(width, PANEL);
#pragma omp for schedule(static)
  for (int64_t group = 0; group < parts(panels, GROUP_PANELS); ++group) {
    double total[GROUP_PANELS][PANEL] = {{0}};
    const int64_t first_panel = group * GROUP_PANELS;
    const int64_t count = smaller(GROUP_PANELS, panels - first_panel);
    for (int64_t chunk = 0; chunk < p.rows; chunk += SUM_CHUNK) {
      Floats sum[GROUP_PANELS] = {};
      for (int64_t depth = chunk; depth < smaller(chunk + SUM_CHUNK, p.rows);
           depth += DEPTH_BLOCK) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t column = (first_panel + i) * PANEL;
          Window<DEPTH_BLOCK, PANEL> window;
          PairBlock high, low;
          open_window(p.weights + depth * p.columns + first + column, p.columns, p.rows - depth,
                      width - column, &window);
          pack_depths<two_terms>(window, &high, &low, sum + i);
          const int64_t offset =
              (first_panel + i) * out.panel_stride + depth / DEPTH_BLOCK * PANEL_BLOCK;
          write_blocks<two_terms>(high, low, false, out.high + offset,
                                  two_terms ? out.low + offset : nullptr);
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        for (int j = 0; j < PANEL; ++j) total[i][j] += (double)sum[i][j];
      }
    }
    for (int64_t i = 0; i < count * PANEL; ++i) {
      const int64_t column = first_panel * PANEL + i;
      if (column < width) p.column_sum[first + column] += total[i / PANEL][i % PANEL];
    }
  }
}

FC_INLINE Bf16Factor at_depth(const Bf16Factor& factor, int64_t depth) {
  const int64_t offset = depth / DEPTH_BLOCK * PANEL_BLOCK;
  return {factor.high + offset, factor.low ? factor.low + offset : nullptr, factor.panel_stride};
}

template <bool two_terms>
void gradients(const GradientProducts& p) {
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  for (int64_t first = 0; first < p.columns; first += WEIGHT_COLUMNS) {
    const int64_t width = smaller(WEIGHT_COLUMNS, p.columns - first);
    if (p.grad_x) pack_weights_left<two_terms>(p, first, width);
    if (p.grad_y_transposed) pack_weights_right<two_terms>(p, first, width);
    if (p.grad_x) {
      const Result dx = {p.grad_x, p.rows, p.dim, p.dim, true};
      multiply(p.workspace[0], at_depth(p.y_right, first), width, dx, p.threads);
    }
    if (p.grad_y_transposed) {
      const Result dy = {p.grad_y_transposed + first, p.dim, width, p.grad_y_stride, true};
      multiply(p.x_left, p.workspace[1], p.rows, dy, p.threads);
    }
  }
}

}  // namespace

void pack_factor(const Bf16Source& source, Side side, int threads, const Bf16Factor& out) {
  const int64_t panels = parts(source.outer, PANEL);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t panel = 0; panel < panels; ++panel) {
    if (out.low) {
      pack_panel<true>(source, side, panel, out);
    } else {
      pack_panel<false>(source, side, panel, out);
    }
  }
}

void score_product(const ScoreProduct& p) {
  const Result scores = {p.scores, p.rows, p.columns, p.columns, false};
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  multiply(p.left, p.right, p.dim, scores, p.threads);
}

void gradient_products(const GradientProducts& p) {
  if (p.x_left.low || p.y_right.low) {
    gradients<true>(p);
  } else {
    gradients<false>(p);
  }
}

void round_to_terms(float* points, int64_t rows, int64_t dim, int terms, int threads,
                    float* sqnorm) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    float* x = points + row * dim;
    Floats squares = {};
    for (int64_t k = 0; k < dim; k += PANEL) {
      const size_t bytes = (size_t)smaller(PANEL, dim - k) * sizeof(float);
      Floats value = {};
      memcpy(&value, x + k, bytes);
      value = sum_of(terms == 2 ? split<true>(value) : split<false>(value));
      memcpy(x + k, &value, bytes);
      squares += value * value;
    }
    float sum = 0;
    for (int i = 0; i < PANEL; ++i) sum += squares[i];
    if (sqnorm) sqnorm[row] = sum;
  }
}

}  // namespace FASTCONTRAST_BF16_UNIT
}  // namespace cpu
}  // namespace fastcontrast
