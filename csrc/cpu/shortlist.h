// What the two forms of a shortlist share: the batch in fp32, and the products over scattered rows.
//
// A row is read where it lies and widened in registers. Each result is one chain of fp32 additions in ascending order
// of entry (or column), whatever rows are handled beside it: neither blocks nor threads reach the bits.
#pragma once

#include "simd.h"

namespace xk::XK_NS {

constexpr int kGroup = 4;    // rows handled at once: as many chains of additions hide each other's latency
constexpr int kAhead = 16;   // rows asked for before their turn: memory answers more slowly than a group takes
constexpr int64_t kEntries = 256;  // entries of a list in one work item

// x [B, width_pad] in fp32, zeros beyond the width.
struct PaddedBatch {
  int64_t width_pad;
  Buffer<float> data;

  explicit PaddedBatch(const Batch& x) : width_pad(round_up(x.width, kLanes)), data(x.size * width_pad) {
    for (int64_t b = 0; b < x.size; ++b) {
      float* row = data.data + b * width_pad;
      widen(x.x, x.dtype, b * x.width, x.width, row);
      for (int64_t d = x.width; d < width_pad; ++d) row[d] = 0;
    }
  }
  const float* row(int64_t b) const { return data.data + b * width_pad; }
};

// The lanes' sum in a fixed order.
XK_INLINE float fold(vf v) {
#if XK_ISA >= 2
  return _mm512_reduce_add_ps((__m512)v);
#else
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
#endif
}

// Columns d.. of a row; zeros from `width` on, where the memory belongs to the next row.
template <DType kRow>
XK_INLINE vf row_vector(const char* row, int64_t d, int64_t width) {
  if (d + kLanes <= width) return load_as_f32(row, kRow, d);
  alignas(64) char rest[kLanes * 4] = {};
  const int64_t size = dtype_size(kRow);
  std::memcpy(rest, row + d * size, size_t((width - d) * size));
  return load_as_f32(rest, kRow, 0);
}

// out[n] = x · row n. `next` are the rows to fetch meanwhile.
template <DType kRow, int N>
XK_INLINE void dot_rows(const float* x, const char* const* rows, const char* const* next, int64_t width, float* out) {
  vf sum[N] = {};
  for (int64_t d = 0; d < width; d += kLanes) {
    const vf e = load<vf>(x + d);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      __builtin_prefetch(next[n] + d * dtype_size(kRow), 0, 2);
      sum[n] = e * row_vector<kRow>(rows[n], d, width) + sum[n];
    }
  }
  for (int n = 0; n < N; ++n) out[n] = fold(sum[n]);
}

// out [width] (+)= sum over n of g[n] * row n, in ascending order of n.
template <DType kRow, int N>
XK_INLINE void add_rows(const float* g, const char* const* rows, const char* const* next, int64_t width, bool fresh,
                        float* out) {
  for (int64_t d = 0; d < width; d += kLanes) {
    const int64_t columns = min64(kLanes, width - d);
    vf sum{};
    if (!fresh) std::memcpy(&sum, out + d, columns == kLanes ? sizeof sum : size_t(columns) * 4);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      if (next) __builtin_prefetch(next[n] + d * dtype_size(kRow), 0, 2);
      sum = g[n] * row_vector<kRow>(rows[n], d, width) + sum;
    }
    std::memcpy(out + d, &sum, columns == kLanes ? sizeof sum : size_t(columns) * 4);
  }
}

// Calls f.template operator()<DType>() for the table's format.
template <class F>
void for_dtype(DType dtype, F f) {
  if (dtype == DType::f32) return f.template operator()<DType::f32>();
  if (dtype == DType::bf16) return f.template operator()<DType::bf16>();
  f.template operator()<DType::f16>();
}

void shared_matmul(const ShortlistMatmul& a, const Host& host);
void shared_backward(const ShortlistBackward& a, const Host& host);

}  // namespace xk::XK_NS
