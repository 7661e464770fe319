// The one matrix product under all kernels: C[m, n] (+)= A[m, k] * B[k, n], fp32 accumulators in
// registers.
//
// A is read in place, one value (a pair for bf16) broadcast at a time, with free strides for rows
// and steps. B is packed in panels of kPanel columns, kPair consecutive k side by side: panel [k /
// kPair][kPanel][kPair]. So a weight tile serves as A where it is, and only the small operands are
// packed. Each element of C is summed over k in ascending order whatever the tile around it:
// results do not depend on tile edges.
#pragma once

#include "simd.h"

namespace xk::XK_NS {

struct F32 {
  using elem = float;
  static constexpr int kPair = 1;
  static constexpr DType kDType = DType::f32;
  static constexpr int64_t kBlock = 96;  // steps of k per pass: kBlock * kPanel values of B stay in
                                         // the L1 cache
  using vec = vf;
  XK_INLINE vec broadcast(const elem* a) { return splat(*a); }
  XK_INLINE vec broadcast_last(const elem* a) { return splat(*a); }
  XK_INLINE vec load_b(const elem* b) { return load<vf>(b); }
  XK_INLINE vf fma(vec a, vec b, vf c) { return a * b + c; }
};

#if XK_ISA == 2
struct BF16 {
  using elem = uint16_t;
  static constexpr int kPair = 2;
  static constexpr DType kDType = DType::bf16;
  static constexpr int64_t kBlock = 96;
  using vec = vu;
  XK_INLINE vec broadcast(const elem* a) {
    uint32_t pair;
    std::memcpy(&pair, a, 4);
    return splat(pair);
  }
  // The last k of an odd depth: its neighbour in memory belongs to somebody else.
  XK_INLINE vec broadcast_last(const elem* a) { return splat(uint32_t(*a)); }
  XK_INLINE vec load_b(const elem* b) { return load<vu>(b); }
  XK_INLINE vf fma(vec a, vec b, vf c) {
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// Strides are in elements. `steps` full steps of kPair, then one of a single k where `odd`.
template <class T>
struct Product {
  int64_t steps;
  bool odd;
  const typename T::elem* a;
  int64_t a_row, a_step;
  const typename T::elem* b;
  float* c;
  int64_t c_row;
  bool accumulate;
};

template <class T, int M, int N>
__attribute__((noinline)) static void micro_kernel(const Product<T>& p) {
  vf acc[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      if (p.accumulate)
        acc[i][j] = load<vf>(p.c + i * p.c_row + j * kLanes);
      else
        acc[i][j] = vf{};
    }
  const typename T::elem* a = p.a;
  const typename T::elem* b = p.b;
  const int64_t a_row = p.a_row, a_step = p.a_step;
  for (int64_t k = 0; k < p.steps; ++k) {
    typename T::vec col[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) col[j] = T::load_b(b + j * kLanes * T::kPair);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const typename T::vec row = T::broadcast(a + i * a_row);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[i][j] = T::fma(row, col[j], acc[i][j]);
    }
    a += a_step;
    b += kPanel * T::kPair;
  }
  if (p.odd)
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const typename T::vec row = T::broadcast_last(a + i * a_row);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j)
        acc[i][j] = T::fma(row, T::load_b(b + j * kLanes * T::kPair), acc[i][j]);
    }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) store(p.c + i * p.c_row + j * kLanes, acc[i][j]);
}

template <class T>
using MicroKernel = void (*)(const Product<T>&);

template <class T, int M, int N>
constexpr MicroKernel<T> micro_or_null() {
  if constexpr (M <= kRows && N <= kVecs)
    return &micro_kernel<T, M, N>;
  else
    return nullptr;
}

#define XK_MICRO_ROW(M)                                                          \
  {micro_or_null<T, M, 1>(), micro_or_null<T, M, 2>(), micro_or_null<T, M, 3>(), \
   micro_or_null<T, M, 4>()}
template <class T>
constexpr MicroKernel<T> kMicro[6][4] = {XK_MICRO_ROW(1), XK_MICRO_ROW(2), XK_MICRO_ROW(3),
                                         XK_MICRO_ROW(4), XK_MICRO_ROW(5), XK_MICRO_ROW(6)};
#undef XK_MICRO_ROW

// Runs the micro kernel of the right size; rows <= kRows, columns <= kPanel (rounded up to whole
// vectors).
template <class T>
XK_INLINE void run_micro(const Product<T>& p, int64_t rows, int64_t columns) {
  kMicro<T>[rows - 1][ceil_div(columns, kLanes) - 1](p);
}

// What to fetch into the cache while a product computes: the next tile of the table comes from
// memory.
struct Prefetch {
  const char *next, *end;

  Prefetch(const void* p, int64_t bytes) : next(static_cast<const char*>(p)), end(next + bytes) {}
  int64_t lines() const { return ceil_div(end - next, kCacheLine); }
  void some(int64_t lines) {
    for (; lines > 0 && next < end; --lines, next += kCacheLine) __builtin_prefetch(next, 0, 2);
  }
};

// C[m, n rounded up to kLanes] (+)= A[m, k] * B; b points at the first panel, panels lie panel_size
// elements apart.
template <class T>
static void gemm(int64_t m, int64_t n, int64_t k, const typename T::elem* a, int64_t a_row,
                 int64_t a_step, const typename T::elem* b, int64_t panel_size, float* c,
                 int64_t c_row, bool accumulate, Prefetch* prefetch = nullptr) {
  const int64_t steps = k / T::kPair;
  const int64_t calls =
      max64(1, ceil_div(n, kPanel) * ceil_div(m, kRows) * max64(1, ceil_div(steps, T::kBlock)));
  const int64_t lines = prefetch ? ceil_div(prefetch->lines(), calls) : 0;
  for (int64_t j = 0; j < n; j += kPanel, b += panel_size) {
    for (int64_t s = 0; s == 0 || s < steps; s += T::kBlock) {
      const int64_t todo = min64(steps - s, T::kBlock);
      Product<T> p{todo,
                   k % T::kPair != 0 && s + todo == steps,
                   nullptr,
                   a_row,
                   a_step,
                   b + s * kPanel * T::kPair,
                   nullptr,
                   c_row,
                   accumulate || s > 0};
      for (int64_t i = 0; i < m; i += kRows) {
        p.a = a + i * a_row + s * a_step;
        p.c = c + i * c_row + j;
        if (prefetch) prefetch->some(lines);
        run_micro(p, min64(m - i, kRows), min64(n - j, kPanel));
      }
    }
  }
}

// --- packing ---

// x [B, D] in the product's own format. Finite values saturate, infinity and NaN stay.
template <class T>
static void convert(const Batch& x, typename T::elem* out) {
  const int64_t count = x.size * x.width;
  if constexpr (T::kPair == 1) {
    widen(x.x, x.dtype, 0, count, out);
  } else {
    if (x.dtype == DType::bf16) {
      if (count) std::memcpy(out, x.x, size_t(count) * 2);  // an empty batch may be null
      return;
    }
    for (int64_t i = 0; i < count; i += kPanel) {
      float wide[kPanel] = {};
      uint16_t half[kPanel];
      widen(x.x, x.dtype, i, min64(kPanel, count - i), wide);
      for (int j = 0; j < kPanel; j += kLanes) {
        const vf v = load<vf>(wide + j);
        store_u16(half + j, f32_to_bf16(vabs(v) <= FLT_MAX ? vclamp(v, kMaxBf16) : v));
      }
      std::memcpy(out + i, half, size_t(min64(kPanel, count - i)) * 2);
    }
  }
}

// Elements of one panel of depth k.
template <class T>
constexpr int64_t panel_elems(int64_t k) {
  return round_up(k, T::kPair) * kPanel;
}

// One panel of B from value(k, column); columns and k beyond the given sizes become 0.
template <class T, class F>
static void pack_panel(int64_t k, int64_t columns, F value, typename T::elem* out) {
  for (int64_t s = 0; s < ceil_div(k, T::kPair); ++s)
    for (int64_t j = 0; j < kPanel; ++j)
      for (int64_t h = 0; h < T::kPair; ++h, ++out) {
        const int64_t i = s * T::kPair + h;
        *out = i < k && j < columns ? value(i, j) : typename T::elem(0);
      }
}

// Table rows as B: rows [t, width] at `rows` (row stride width) -> panels over the width, k running
// over the rows.
template <class T>
static void pack_rows(const typename T::elem* rows, int64_t t, int64_t width,
                      typename T::elem* out) {
  using elem = typename T::elem;
  alignas(64) static const elem zeros[kPanel] = {};
  for (int64_t j = 0; j < width; j += kPanel) {
    const int64_t columns = min64(kPanel, width - j);
    elem edge[2][kPanel] = {};
    for (int64_t i = 0; i < t; i += T::kPair, out += kPanel * T::kPair) {
      const elem* first = rows + i * width + j;
      const elem* second = i + 1 < t ? first + width : zeros;
      if (columns < kPanel) {  // whole vectors would read beyond the table
        std::memcpy(edge[0], first, size_t(columns) * sizeof(elem));
        if (T::kPair == 2) std::memcpy(edge[1], second, size_t(columns) * sizeof(elem));
        first = edge[0], second = edge[1];
      }
      for (int v = 0; v < kVecs; ++v) {
        if constexpr (T::kPair == 1)
          store(out + v * kLanes, load<vf>(first + v * kLanes));
        else
          store(out + v * kLanes * 2,
                load_u16(first + v * kLanes) | (load_u16(second + v * kLanes) << 16));
      }
    }
  }
}

}  // namespace xk::XK_NS
