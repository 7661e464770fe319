// What the three BCE kernels share: sizes, packed batch, and one tile of labels from logits to
// gradient.
#pragma once

#include <cmath>

#include "finite.h"
#include "gemm.h"

namespace xk::XK_NS {

// Bytes of a tile's arrays (rows, packed rows, logits, gradient): with the packed batch they should
// stay in L2.
constexpr int64_t kTileBytes = 320 << 10;
constexpr int64_t kPartialBytes = 32 << 20;  // all partial sums of dX together, for B and D up to
                                             // 1024
constexpr int64_t kMaxSegments = 64, kMinSegments = 8, kMinSegmentRows = 256;

// With the instruction for it; both formats are exact in bf16.
inline bool products_in_bf16(DType table) { return table == DType::bf16 || table == DType::f8; }

// A table that a step updates, as the tiles read it.
inline Table table_of(const RowState& s, int64_t rows, const float* bias) {
  return {s.weight, s.dtype, rows, bias, s.row_scale};
}

// Sizes of one call, a function of the shapes alone: which rows share a partial sum of dX decides
// its last bits.
struct Plan {
  int64_t batch, width, rows;
  int64_t batch_pad, width_pad;  // whole vectors
  int64_t z_row;  // row stride of logits and gradient; never a power of two, so that a column of
                  // them does not fall into one cache set
  int64_t tile, segments, segment_rows;

  // group: above 0, a tile is one such group of rows.
  Plan(const Batch& x, const Table& t, int64_t elem, int64_t group = 0)
      : batch(x.size), width(x.width), rows(t.rows), batch_pad(round_up(batch, kLanes)),
        width_pad(round_up(width, kLanes)), z_row(batch_pad + kLanes) {
    const int64_t partial = max64(1, batch * width_pad * 4);
    segments = max64(kMinSegments, min64(kMaxSegments, kPartialBytes / partial));
    segment_rows = round_up(max64(kMinSegmentRows, ceil_div(rows, segments)), max64(2, group));
    segments = ceil_div(rows, segment_rows);
    // As large as the cache allows, and then all of one size: a short last tile costs a pass over
    // dX all the same.
    const int64_t row_bytes = 2 * width * elem + batch * (elem == 4 ? 4 : 8), step = 2 * kRows;
    tile = max64(8, min64(16, kTileBytes / row_bytes / step)) * step;
    tile = group ? group : round_up(ceil_div(segment_rows, ceil_div(segment_rows, tile)), step);
  }
};

inline bool all_finite(const Batch& x) { return all_finite(x.x, x.dtype, 0, x.size * x.width); }

// The batch as the two products over labels need it: `by_width` runs over d (logits), `by_batch`
// over b (dW).
template <class T>
struct PackedBatch {
  using elem = typename T::elem;
  int64_t width_panel, batch_panel;  // elements from one panel to the next
  Buffer<elem> by_width, by_batch;

  PackedBatch(const Batch& x, bool need_by_batch, const Host& host)
      : width_panel(panel_elems<T>(x.width)), batch_panel(panel_elems<T>(x.size)),
        by_width(ceil_div(x.size, kPanel) * width_panel),
        by_batch(need_by_batch ? ceil_div(x.width, kPanel) * batch_panel : 0) {
    Buffer<elem> plain(x.size * x.width);
    convert<T>(x, plain.data);
    const elem* p = plain.data;
    const int64_t width = x.width, size = x.size, first = ceil_div(size, kPanel);
    for_each_item(host, first + (need_by_batch ? ceil_div(width, kPanel) : 0),
                  [&](int64_t item, int64_t) {
                    if (item < first) {
                      const int64_t b = item * kPanel;
                      pack_panel<T>(
                          width, min64(kPanel, size - b),
                          [=](int64_t k, int64_t j) { return p[(b + j) * width + k]; },
                          by_width.data + item * width_panel);
                    } else {
                      const int64_t d = (item - first) * kPanel;
                      pack_panel<T>(
                          size, min64(kPanel, width - d),
                          [=](int64_t k, int64_t j) { return p[k * width + d + j]; },
                          by_batch.data + (item - first) * batch_panel);
                    }
                  });
  }
};

// One worker's arrays for a tile.
template <class T>
struct TileSpace {
  using elem = typename T::elem;
  Buffer<elem> wide;     // the rows in the product's format [tile, D], where the table has another
  Buffer<elem> packed;   // the rows as right operand of dX
  Buffer<float> logits;  // [tile, z_row]; the fp32 gradient takes their place
  Buffer<uint16_t> half, half_pairs;  // the bf16 gradient [tile, z_row] and [tile / 2, z_row, 2]
  Buffer<float> target;               // [z_row] zeros between rows
  Buffer<float> dw;                   // [kRows, kChunk]

  TileSpace(const Plan& p, bool widened)
      : wide(widened ? p.tile * p.width : 0),
        packed(ceil_div(p.width, kPanel) * panel_elems<T>(p.tile)), logits(p.tile * p.z_row),
        half(T::kPair == 2 ? p.tile * p.z_row : 0),
        half_pairs(T::kPair == 2 ? p.tile * p.z_row : 0), target(p.z_row), dw(kRows * kChunk) {
    for (int64_t i = 0; i < p.z_row; ++i) target.data[i] = 0;
  }
  elem* gradient() {
    if constexpr (T::kPair == 1)
      return logits.data;
    else
      return half.data;
  }
};

// Rows of an 8-bit table times their scale: exact in fp32, and in bf16 too, which has the bits for
// three of mantissa.
template <class T>
static void decode_rows(const Table& table, int64_t first, int64_t count, int64_t width,
                        typename T::elem* out) {
  for (int64_t i = 0; i < count; ++i, out += width) {
    const uint8_t* row = static_cast<const uint8_t*>(table.weight) + (first + i) * width;
    const float scale = table.row_scale[2 * (first + i)];
    for (int64_t j = 0; j < width; j += kLanes) {
      typename T::elem part[kLanes];
      uint8_t edge[kLanes] = {};  // whole vectors would pass the end of the table
      const bool whole = j + kLanes <= width;
      if (!whole) std::memcpy(edge, row + j, size_t(width - j));
      const vf v = f8_to_f32(load_u8(whole ? row + j : edge)) * scale;
      typename T::elem* const to = whole ? out + j : part;
      if constexpr (T::kPair == 1)
        store(to, v);
      else
        store_u16(to, (vu)v >> 16);
      if (!whole) std::memcpy(out + j, part, size_t(width - j) * sizeof *part);
    }
  }
}

// Rows first..first+count of the table in the product's format, row stride D: in place where the
// formats agree.
template <class T>
static const typename T::elem* tile_rows(const Plan& p, const Table& table, int64_t first,
                                         int64_t count, TileSpace<T>& space) {
  if (table.dtype == T::kDType)
    return static_cast<const typename T::elem*>(table.weight) + first * p.width;
  if (table.dtype == DType::f8) {
    decode_rows<T>(table, first, count, p.width, space.wide.data);
  } else if constexpr (T::kPair == 1) {
    widen(table.weight, table.dtype, first * p.width, count * p.width, space.wide.data);
  }
  return space.wide.data;
}

// First positive at or after a row.
inline int64_t first_positive(const Positives& pos, int64_t row) {
  int64_t low = 0, high = pos.count;
  while (low < high) {
    const int64_t mid = low + (high - low) / 2;
    if (pos.row[mid] < row)
      low = mid + 1;
    else
      high = mid;
  }
  return low;
}

struct RowSums {
  double loss = 0, gradient = 0;
};

// One row of logits -> scale * (sigmoid(z) - y), subtracted in fp32 before any narrower format, and
// the BCE sum.
template <class T, bool kTargets, bool kLoss>
XK_INLINE RowSums gradient_row(const Plan& p, float* z, float bias, const float* target,
                               float scale, uint16_t* half) {
  vf loss{}, total{};
  for (int64_t j = 0; j < p.batch_pad; j += kLanes) {
    const vf v = load<vf>(z + j) + bias, e = exp_negative(-vabs(v)), r = 1.0f / (1.0f + e);
    vf g = v >= 0.0f ? r : e * r;
    if (kTargets) g = g - load<vf>(target + j);
    g = g * scale;
    if (kLoss) {
      vf l = vmax(v, vf{}) + log1p_unit(e);
      if (kTargets) l = vmax(v, vf{}) - v * load<vf>(target + j) + log1p_unit(e);
      if (j + kLanes > p.batch)
        for (int i = 0; i < kLanes; ++i)
          if (j + i >= p.batch) l[i] = 0, g[i] = 0;
      loss = loss + l;
      total = total + g;
    }
    if constexpr (T::kPair == 1)
      store(z + j, g);
    else
      store_u16(half + j, f32_to_bf16(g));
  }
  return kLoss ? RowSums{lane_sum(loss), lane_sum(total)} : RowSums{};
}

// Logits of a tile become its gradient. `sums` asks for the loss and, through `row_sum`, the
// gradient of the bias.
template <class T, class F>
static double tile_gradient(const Plan& p, const Table& table, const Positives& pos, int64_t first,
                            int64_t count, float scale, bool sums, TileSpace<T>& space, F row_sum) {
  double loss = 0;
  int64_t at = first_positive(pos, first);
  for (int64_t i = 0; i < count; ++i) {
    float *z = space.logits.data + i * p.z_row, *target = space.target.data;
    uint16_t* half = T::kPair == 2 ? space.half.data + i * p.z_row : nullptr;
    const float bias = table.bias ? table.bias[first + i] : 0;
    const int64_t begin = at;
    for (; at < pos.count && pos.row[at] == first + i; ++at)
      target[pos.sample[at]] = pos.value ? pos.value[at] : 1;
    RowSums s;
    if (begin == at)
      s = sums ? gradient_row<T, false, true>(p, z, bias, target, scale, half)
               : gradient_row<T, false, false>(p, z, bias, target, scale, half);
    else
      s = sums ? gradient_row<T, true, true>(p, z, bias, target, scale, half)
               : gradient_row<T, true, false>(p, z, bias, target, scale, half);
    for (int64_t k = begin; k < at; ++k) target[pos.sample[k]] = 0;
    if (sums) {
      loss += s.loss;
      row_sum(first + i, s.gradient);
    }
  }
  return loss;
}

// The largest sigmoid of a tile, from its logits; NaN where one of them is, which a comparison of
// vectors would lose.
inline double largest_sigmoid(const Plan& p, const Table& table, int64_t first, int64_t count,
                              const float* logits) {
  vf most = vf{} - INFINITY;
  auto unordered = most != most;
  for (int64_t i = 0; i < count; ++i, logits += p.z_row) {
    const float bias = table.bias ? table.bias[first + i] : 0;
    for (int64_t j = 0; j < p.batch_pad; j += kLanes) {
      vf v = load<vf>(logits + j) + bias;
      for (int l = 0; j + kLanes > p.batch && l < kLanes; ++l)
        if (j + l >= p.batch) v[l] = -INFINITY;
      unordered |= v != v;
      most = vmax(v, most);
    }
  }
  for (int l = 0; l < kLanes; ++l)
    if (unordered[l]) return NAN;
  float z = most[0];
  for (int l = 1; l < kLanes; ++l) z = z < most[l] ? most[l] : z;
  return 1 / (1 + std::exp(-double(z)));
}

// dX [B, width_pad] (+)= G^T W for one tile.
template <class T>
static void tile_dx(const Plan& p, const typename T::elem* rows, int64_t count, TileSpace<T>& space,
                    float* dx, bool accumulate, Prefetch* prefetch) {
  pack_rows<T>(rows, count, p.width, space.packed.data);
  const int64_t panel = panel_elems<T>(count);
  if constexpr (T::kPair == 1) {
    gemm<T>(p.batch, p.width, count, space.logits.data, 1, p.z_row, space.packed.data, panel, dx,
            p.width_pad, accumulate, prefetch);
  } else {
    const int64_t step = 2 * p.z_row;
    for (int64_t i = 0; i < count; i += 2) {
      const uint16_t *g0 = space.half.data + i * p.z_row, *g1 = g0 + p.z_row;
      uint16_t* pairs = space.half_pairs.data + i / 2 * step;
      for (int64_t j = 0; j < p.batch_pad; j += kLanes) {
        const vu second = i + 1 < count ? load_u16(g1 + j) : vu{};
        store(pairs + 2 * j, load_u16(g0 + j) | (second << 16));
      }
    }
    gemm<T>(p.batch, p.width, round_up(count, 2), space.half_pairs.data, 2, step, space.packed.data,
            panel, dx, p.width_pad, accumulate, prefetch);
  }
}

// dW of a tile, kChunk columns of kRows rows at a time: sink.columns(c) before each run of columns,
// then sink.row(row, c, count, gradient), where gradient has kChunk fp32 values. x: PackedBatch, or
// what has its by_batch.
template <class T, class Packed, class Sink>
static void tile_dw(const Plan& p, const Packed& x, int64_t first, int64_t count,
                    TileSpace<T>& space, Sink& sink) {
  Product<T> product{ceil_div(p.batch, T::kPair),
                     false,
                     nullptr,
                     p.z_row,
                     T::kPair,
                     nullptr,
                     nullptr,
                     kChunk,
                     false};
  for (int64_t c = 0; c < p.width; c += kChunk) {
    const int64_t columns = min64(kChunk, p.width - c);
    sink.columns(c);
    for (int64_t i = 0; i < count; i += kRows) {
      const int64_t rows = min64(kRows, count - i);
      product.a = space.gradient() + i * p.z_row;
      for (int64_t j = 0; j < columns; j += kPanel) {
        product.b = x.by_batch.data + (c + j) / kPanel * x.batch_panel;
        product.c = space.dw.data + j;
        run_micro(product, rows, min64(columns - j, kPanel));
      }
      for (int64_t r = 0; r < rows; ++r)
        sink.row(first + i + r, c, columns, space.dw.data + r * kChunk);
    }
  }
}

}  // namespace xk::XK_NS
