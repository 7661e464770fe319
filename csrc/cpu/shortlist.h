// What the two forms of a shortlist share: the batch in fp32, and the products over scattered rows.
//
// A row is read where it lies and widened in registers. Each result is one chain of fp32 additions
// in ascending order of entry (or column), whatever rows are handled beside it: neither blocks nor
// threads reach the bits.
#pragma once

#include "simd.h"

namespace xk::XK_NS {

constexpr int kGroup = 4;   // rows handled at once: as many chains of additions hide each other's
                            // latency
constexpr int kAhead = 16;  // rows asked for before their turn: memory answers more slowly than a
                            // group takes
constexpr int64_t kEntries = 256;  // entries of a list in one work item

// x [B, width_pad] in fp32, zeros beyond the width.
struct PaddedBatch {
  int64_t width_pad;
  Buffer<float> data;

  explicit PaddedBatch(const Batch& x)
      : width_pad(round_up(x.width, kLanes)), data(x.size * width_pad) {
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

// The last `count` columns of a row, at `row`, and zeros: the memory after them belongs to the next
// row.
template <DType kRow>
XK_INLINE vf last_columns(const char* row, int64_t count) {
  alignas(64) char rest[kLanes * 4] = {};
  std::memcpy(rest, row, size_t(count * dtype_size(kRow)));
  return load_as_f32(rest, kRow, 0);
}

// out[n] = x · row n. `next` are the rows to fetch meanwhile.
template <DType kRow, int N>
XK_INLINE void dot_rows(const float* x, const char* const* rows, const char* const* next,
                        int64_t width, float* out) {
  const int64_t kSize = dtype_size(kRow);
  vf sum[N] = {};
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    const vf e = load<vf>(x + d);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      __builtin_prefetch(next[n] + d * kSize, 0, 2);
      sum[n] = e * load_as_f32(rows[n], kRow, d) + sum[n];
    }
  }
  if (d < width) {
    const vf e = load<vf>(x + d);
    for (int n = 0; n < N; ++n)
      sum[n] = e * last_columns<kRow>(rows[n] + d * kSize, width - d) + sum[n];
  }
  for (int n = 0; n < N; ++n) out[n] = fold(sum[n]);
}

// out [width] (+)= sum over n of g[n] * row n, in ascending order of n. `next` are the rows to
// fetch meanwhile, or null.
template <DType kRow, int N>
XK_INLINE void add_rows(const float* g, const char* const* rows, const char* const* next,
                        int64_t width, bool fresh, float* out) {
  const int64_t kSize = dtype_size(kRow);
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    vf sum{};
    if (!fresh) sum = load<vf>(out + d);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      if (next) __builtin_prefetch(next[n] + d * kSize, 0, 2);
      sum = g[n] * load_as_f32(rows[n], kRow, d) + sum;
    }
    store(out + d, sum);
  }
  if (d == width) return;
  const size_t bytes = size_t(width - d) * 4;
  vf sum{};
  if (!fresh) std::memcpy(&sum, out + d, bytes);
  for (int n = 0; n < N; ++n) sum = g[n] * last_columns<kRow>(rows[n] + d * kSize, width - d) + sum;
  std::memcpy(out + d, &sum, bytes);
}

// What a stored value of a row counts for: the row's scale where the table is e4m3, a power of two.
inline float scale_of(const Table& table, int64_t row) {
  return table.row_scale ? table.row_scale[2 * row] : 1;
}

// Calls f.template operator()<DType>() for the table's format.
template <class F>
void for_dtype(DType dtype, F f) {
  if (dtype == DType::f32) return f.template operator()<DType::f32>();
  if (dtype == DType::bf16) return f.template operator()<DType::bf16>();
  if (dtype == DType::f8) return f.template operator()<DType::f8>();
  f.template operator()<DType::f16>();
}

void shared_matmul(const ShortlistMatmul& a, const Host& host);
void shared_backward(const ShortlistBackward& a, const Host& host);

}  // namespace xk::XK_NS
