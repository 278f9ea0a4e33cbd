// exp2 and the running softmax state of a row, in units of log2.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "common/macros.h"
#include "common/scores.h"

namespace fastcontrast {

// 2^x for x <= 127. Degree-6 minimax polynomial on [-1/2, 1/2]: relative error below 8e-8, which is
// 0.7 ulp. Results that would be denormal are 0 exactly: a denormal in a matrix product costs more
// than a hundred cycles on x86. NaN gives NaN. Written so that compilers vectorise it.
FC_INLINE float exp2_flushed(float x) {
  const float shifter = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer
  const float clamped = x < -126.0f ? -126.0f : x;
  const float shifted = clamped + shifter;
  const float r = clamped - (shifted - shifter);
  float p = 1.53458118e-4f;
  p = p * r + 1.33999309e-3f;
  p = p * r + 9.61848907e-3f;
  p = p * r + 5.55032864e-2f;
  p = p * r + 2.40226462e-1f;
  p = p * r + 6.93147182e-1f;
  p = p * r + 1.0f;
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4B400000u + 127u) << 23;  // the integer, as an exponent
  float power;
  memcpy(&power, &bits, sizeof power);
  return x < -126.0f ? 0.0f : p * power;
}
FC_INLINE double exp2_flushed(double x) { return x < -1022.0 ? 0.0 : exp2(x); }

// Below this the exponential is 0; used to keep 0·(-inf) out of weighted sums.
FC_INLINE float smallest_exponent(float) { return -127.0f; }
FC_INLINE double smallest_exponent(double) { return -1023.0; }

// A number below the normal range becomes 0; NaN stays NaN.
FC_INLINE float flush_denormal(float x) {
  return (x < 1.17549435e-38f && x > -1.17549435e-38f) ? 0.0f : x;
}
FC_INLINE double flush_denormal(double x) {
  return (x < 2.2250738585072014e-308 && x > -2.2250738585072014e-308) ? 0.0 : x;
}

// Running softmax of one row: after columns t_j, sum = Σ 2^(t_j - max) and
// weighted = Σ 2^(t_j - max)·(t_j - max). A row in which nothing counted has max = -inf, sum = 0.
struct SoftmaxState {
  double max;
  double sum;
  double weighted;
};

FC_INLINE SoftmaxState empty_state() { return SoftmaxState{-INFINITY, 0.0, 0.0}; }

FC_INLINE SoftmaxState merge(SoftmaxState a, SoftmaxState b) {
  if (a.max == -INFINITY && a.sum == 0.0) return b;
  if (b.max == -INFINITY && b.sum == 0.0) return a;
  const double max = a.max < b.max ? b.max : a.max;
  const double da = a.max == max ? 0.0 : a.max - max;  // also where both are infinite
  const double db = b.max == max ? 0.0 : b.max - max;
  // A state of -inf columns alone (all infinitely far) carries no mass beside a finite one.
  const double fa = da == -INFINITY ? 0.0 : exp2(da), fb = db == -INFINITY ? 0.0 : exp2(db);
  SoftmaxState out;
  out.max = max;
  out.sum = fa * a.sum + fb * b.sum;
  out.weighted = (fa == 0.0 ? 0.0 : fa * (a.weighted + da * a.sum)) +
                 (fb == 0.0 ? 0.0 : fb * (b.weighted + db * b.sum));
  return out;
}

// Natural logarithm of the sum of exponentials; -inf where nothing counted.
FC_INLINE double log_sum_exp(SoftmaxState s) {
  if (s.sum == 0.0) return -INFINITY;
  return (s.max + log2(s.sum)) * LN_2;
}

// -Σ_j p_j log p_j in nats; 0 where nothing counted. Taken from the state, not as the difference of
// two large numbers (log-sum-exp minus mean score).
FC_INLINE double entropy(SoftmaxState s) {
  if (s.sum == 0.0) return 0.0;
  return (log2(s.sum) - s.weighted / s.sum) * LN_2;
}

}  // namespace fastcontrast
