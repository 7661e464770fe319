// Products of a few table rows with a few samples, all plain fp32 rows behind pointers: nothing is
// packed, vectors run along the width. For the clusters of a shortlist, where packing would cost
// more than the product.
//
// Rows are padded to whole vectors and the padding is zero (or, where written, ignored). Each sum
// runs in one order whatever the block around it.
#pragma once

#include "simd.h"

namespace xk::XK_NS {

#if XK_ISA >= 2
constexpr int kSmallM = 4, kSmallN = 4;  // 16 accumulators of 32 registers
#elif XK_ISA == 1
constexpr int kSmallM = 2, kSmallN = 4;  // 8 of 16
#else
constexpr int kSmallM = 2, kSmallN = 2;
#endif

// Sum of the lanes by halves.
XK_INLINE float lane_total(vf v) {
  float s[kLanes];
  store(s, v);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  return s[0];
}

// c[i * c_row + j] = sum over d < width of a[i][d] * b[j][d].
template <int M, int N>
static void dot_block(const float* const* a, const float* const* b, int64_t width, float* c,
                      int64_t c_row) {
  vf acc[M][N] = {};
  for (int64_t d = 0; d < width; d += kLanes) {
    vf col[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) col[j] = load<vf>(b[j] + d);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      const vf row = load<vf>(a[i] + d);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[i][j] = row * col[j] + acc[i][j];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) c[i * c_row + j] = lane_total(acc[i][j]);
}

// c[i][d] (+)= sum over k < depth of a[i * a_row + k * a_step] * b[k][d], for N vectors from column
// d on.
template <int M, int N>
static void outer_block(const float* a, int64_t a_row, int64_t a_step, const float* const* b,
                        int64_t depth, float* const* c, int64_t d, bool accumulate) {
  vf acc[M][N] = {};
  if (accumulate)
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[i][j] = load<vf>(c[i] + d + j * kLanes);
  for (int64_t k = 0; k < depth; ++k, a += a_step) {
    vf col[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) col[j] = load<vf>(b[k] + d + j * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      const vf value = splat(a[i * a_row]);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[i][j] = value * col[j] + acc[i][j];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) store(c[i] + d + j * kLanes, acc[i][j]);
}

using DotBlock = void (*)(const float* const*, const float* const*, int64_t, float*, int64_t);
using OuterBlock = void (*)(const float*, int64_t, int64_t, const float* const*, int64_t,
                            float* const*, int64_t, bool);

template <int M, int N>
constexpr DotBlock dot_or_null() {
  if constexpr (M <= kSmallM && N <= kSmallN)
    return &dot_block<M, N>;
  else
    return nullptr;
}
template <int M, int N>
constexpr OuterBlock outer_or_null() {
  if constexpr (M <= kSmallM && N <= kSmallN)
    return &outer_block<M, N>;
  else
    return nullptr;
}

#define XK_SMALL(f)                                                                             \
  {                                                                                             \
    {f<1, 1>(), f<1, 2>(), f<1, 3>(), f<1, 4>()}, {f<2, 1>(), f<2, 2>(), f<2, 3>(), f<2, 4>()}, \
        {f<3, 1>(), f<3, 2>(), f<3, 3>(), f<3, 4>()}, {                                         \
      f<4, 1>(), f<4, 2>(), f<4, 3>(), f<4, 4>()                                                \
    }                                                                                           \
  }
constexpr DotBlock kDot[4][4] = XK_SMALL(dot_or_null);
constexpr OuterBlock kOuter[4][4] = XK_SMALL(outer_or_null);
#undef XK_SMALL

// C[m, n] = A[m, width] * B[n, width]^T; width in whole vectors.
inline void small_dots(const float* const* a, int64_t m, const float* const* b, int64_t n,
                       int64_t width, float* c, int64_t c_row) {
  for (int64_t i = 0; i < m; i += kSmallM)
    for (int64_t j = 0; j < n; j += kSmallN)
      kDot[min64(m - i, kSmallM) - 1][min64(n - j, kSmallN) - 1](a + i, b + j, width,
                                                                 c + i * c_row + j, c_row);
}

// C[m, width] (+)= A[m, depth] * B[depth, width]; A with free strides, width in whole vectors.
inline void small_outer(const float* a, int64_t a_row, int64_t a_step, int64_t m,
                        const float* const* b, int64_t depth, int64_t width, float* const* c,
                        bool accumulate) {
  constexpr int64_t columns = kSmallN * kLanes;
  for (int64_t d = 0; d < width; d += columns)
    for (int64_t i = 0; i < m; i += kSmallM)
      kOuter[min64(m - i, kSmallM) - 1][min64(width - d, columns) / kLanes - 1](
          a + i * a_row, a_row, a_step, b, depth, c + i, d, accumulate);
}

}  // namespace xk::XK_NS
