// cluster_step: bce_step on the rows of the clusters that samples select.
//
// The active rows, cluster after cluster, are cut into the segments of bce_pass.h: a segment is one
// worker's, so a row has one owner, and its share of dX is summed apart. A cluster with many rows
// and many samples goes through the packed tiles of bce_step; the others, most of a shortlist,
// through products that need no packing. Which way a cluster goes depends on its own sizes alone,
// so the other clusters of a call change no bit of its rows.
#include <limits>

#include "cluster_call.h"

namespace xk::XK_NS {

namespace {

// Where tile_dw leaves a tile's gradient for rows that can only be updated whole.
struct RowsSink {
  float* gradient;
  int64_t stride, first;
  void columns(int64_t) {}
  void row(int64_t row, int64_t column, int64_t count, const float* g) {
    std::memcpy(gradient + (row - first) * stride + column, g, size_t(count) * 4);
  }
};

// Logits [count, S] of some rows become their gradient, in space.z. Returns the BCE sum where it is
// asked for.
template <class T>
double small_gradient(const ClusterCall<T>& c, const Group& g, int64_t first, int64_t count,
                      ClusterSpace<T>& space) {
  const int64_t s = g.samples;
  float *const z = space.z.data, *const target = space.target.data;
  for (int64_t i = 0; i < count; ++i) {
    const float bias = c.table.bias ? c.table.bias[first + i] : 0;
    for (int64_t j = 0; j < s; ++j) {
      z[i * s + j] += bias;
      *score_of(c, g, j, first + i) = z[i * s + j];
    }
  }
  const Positives& pos = c.positives;
  const int64_t begin = first_positive(pos, first);
  int64_t end = begin;
  for (; end < pos.count && pos.row[end] < first + count; ++end)
    target[(pos.row[end] - first) * s + pos.sample[end]] = pos.value ? pos.value[end] : 1;
  Plan flat = c.plan;  // the whole tile as one row
  flat.batch = count * s;
  flat.batch_pad = round_up(flat.batch, kLanes);
  const float scale = c.a.state.hyper->scale;
  RowSums sums;
  if (c.sums)
    sums = gradient_row<F32, true, true>(flat, z, 0, target, scale, nullptr);
  else
    sums = gradient_row<F32, true, false>(flat, z, 0, target, scale, nullptr);
  for (int64_t k = begin; k < end; ++k) target[(pos.row[k] - first) * s + pos.sample[k]] = 0;
  if (c.a.bias)
    for (int64_t i = 0; i < count; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < s; ++j) sum += z[i * s + j];
      move_bias(c, first + i, sum);
    }
  return sums.loss;
}

// Rows first..first+count of a cluster with few rows or few samples.
template <class T>
double small_part(const ClusterCall<T>& c, const Group& g, int64_t first, int64_t count,
                  ClusterSpace<T>& space, float* partial) {
  const int64_t width = c.plan.width, pad = c.plan.width_pad, s = g.samples;
  for (int64_t j = 0; j < s; ++j) {
    const int64_t at = c.groups.sample.data[g.pair + j] * pad;
    space.sample.data[j] = c.x.data + at;
    space.sample_out.data[j] = partial + at;
  }
  double loss = 0;
  for (int64_t end = first + count; first < end; first += c.small_rows) {
    const int64_t rows = min64(c.small_rows, end - first);
    for (int64_t i = 0; i < rows; ++i) {
      if (space.widened) {
        float* const row = space.wide.data + i * pad;
        if (c.table.dtype == DType::f8)
          decode_rows<F32>(c.table, first + i, 1, width, row);
        else
          widen(c.table.weight, c.table.dtype, (first + i) * width, width, row);
        for (int64_t d = width; d < pad; ++d) row[d] = 0;
        space.row.data[i] = row;
      } else {
        space.row.data[i] = static_cast<const float*>(c.table.weight) + (first + i) * width;
      }
    }
    small_dots(space.row.data, rows, space.sample.data, s, pad, space.z.data, s);
    loss += small_gradient(c, g, first, rows, space);
    small_outer(space.z.data, 1, s, s, space.row.data, rows, pad, space.sample_out.data, true);
    for (int64_t i = 0; i < rows; i += kSmallM) {
      const int64_t block = min64(kSmallM, rows - i);
      space.ahead.some();
      small_outer(space.z.data + i * s, s, 1, block, space.sample.data, s, pad, space.row_out.data,
                  false);
      for (int64_t k = 0; k < block; ++k) c.update.row(first + i + k, space.row_out.data[k]);
    }
  }
  return loss;
}

// dW of a large tile and the update of its rows.
template <class T>
void large_update(const ClusterCall<T>& c, const Plan& p, int64_t first, int64_t count,
                  ClusterSpace<T>& space) {
  if (!c.a.state.row_wise) {
    Update sink = c.update.base;
    tile_dw<T>(p, space.packed, first, count, *space.tile, sink);
    return;
  }
  RowsSink sink{space.gradient.data, space.gradient_row, first};
  tile_dw<T>(p, space.packed, first, count, *space.tile, sink);
  for (int64_t i = 0; i < count; ++i)
    c.update.row(first + i, space.gradient.data + i * space.gradient_row);
}

// Rows first..first+count of a cluster with many rows and samples: the tiles of bce_step on its
// samples.
template <class T>
double large_part(const ClusterCall<T>& c, const Group& g, int64_t first, int64_t count,
                  ClusterSpace<T>& space, float* partial) {
  const int32_t* const sample = c.groups.sample.data + g.pair;
  Plan p = c.plan;
  p.batch = g.samples;
  p.batch_pad = round_up(p.batch, kLanes);
  space.packed.pack(g, sample, c.packable.data, p.width);
  TileSpace<T>& tile = *space.tile;
  const int64_t row_bytes = p.width * dtype_size(c.table.dtype), end = first + count;
  double loss = 0;
  for (int64_t at = first; at < end; at += p.tile) {
    const int64_t n = min64(p.tile, end - at);
    const typename T::elem* rows = tile_rows<T>(p, c.table, at, n, tile);
    gemm<T>(n, p.batch, p.width, rows, p.width, T::kPair, space.packed.by_width.data,
            space.packed.width_panel, tile.logits.data, p.z_row, false);
    for (int64_t j = 0; j < p.batch; ++j) {
      float* const out = score_of(c, g, j, at);
      for (int64_t i = 0; i < n; ++i)
        out[i] = tile.logits.data[i * p.z_row + j] + (c.table.bias ? c.table.bias[at + i] : 0);
    }
    loss += tile_gradient<T>(p, c.table, c.positives, at, n, c.a.state.hyper->scale, c.sums, tile,
                             [&](int64_t row, double gradient) { move_bias(c, row, gradient); });
    const int64_t next = at + n;
    Prefetch prefetch(static_cast<const char*>(c.table.weight) + next * row_bytes,
                      min64(p.tile, end - next) * row_bytes);
    tile_dx<T>(p, rows, n, tile, space.dx.data, at != first, &prefetch);
    large_update(c, p, at, n, space);
  }
  for (int64_t j = 0; j < p.batch; ++j)
    for (int64_t d = 0; d < p.width_pad; d += kLanes) {
      float* const out = partial + sample[j] * p.width_pad + d;
      store(out, load<vf>(out) + load<vf>(space.dx.data + j * p.width_pad + d));
    }
  return loss;
}

// The first group that reaches beyond a number of active rows.
inline int64_t group_at(const Groups& groups, int64_t row) {
  int64_t low = 0, high = groups.count;
  while (low < high) {
    const int64_t mid = low + (high - low) / 2;
    if (groups.group.data[mid].place + groups.group.data[mid].rows <= row)
      low = mid + 1;
    else
      high = mid;
  }
  return low;
}

// Active rows begin..end. Returns their BCE sum.
template <class T>
double segment(const ClusterCall<T>& c, int64_t begin, int64_t end, ClusterSpace<T>& space,
               float* partial) {
  const Group* const group = c.groups.group.data;
  double loss = 0;
  for (int64_t i = group_at(c.groups, begin); i < c.groups.count && group[i].place < end; ++i) {
    const Group& g = group[i];
    const int64_t skip = max64(0, begin - g.place), count = min64(g.rows, end - g.place) - skip;
    if (is_large(g)) {
      loss += large_part(c, g, g.first + skip, count, space, partial);
      continue;
    }
    space.ahead = ClusterAhead();
    if (i + 1 < c.groups.count && g.place + g.rows < end && !is_large(group[i + 1])) {
      const Group& next = group[i + 1];
      space.ahead = ClusterAhead(c.a.state, next.first, min64(c.small_rows, next.rows),
                                 ceil_div(count, kSmallM));
    }
    loss += small_part(c, g, g.first + skip, count, space, partial);
  }
  return loss;
}

template <class T>
void run(const ClusterStep& a, const Host& host) {
  const ClusterCall<T> call(a);
  const Plan& p = call.plan;
  const int64_t workers = worker_count(host, p.segments), partial = p.batch * p.width_pad;
  Buffer<float> partials(p.segments * partial);
  Buffer<double> losses(p.segments);
  // All memory is taken before the first write, so that a failure leaves the table as it was.
  std::unique_ptr<std::unique_ptr<ClusterSpace<T>>[]> spaces(
      new std::unique_ptr<ClusterSpace<T>>[size_t(workers)]);
  for (int64_t w = 0; w < workers; ++w) spaces[size_t(w)].reset(new ClusterSpace<T>(call));
  for_each_item(host, p.segments, [&](int64_t s, int64_t worker) {
    float* const mine = partials.data + s * partial;
    std::memset(mine, 0, size_t(partial) * 4);
    const int64_t begin = s * p.segment_rows;
    losses.data[s] =
        segment(call, begin, min64(p.rows, begin + p.segment_rows), *spaces[size_t(worker)], mine);
  });
  sum_partials(p, partials.data, a.state.hyper->dx_scale, a.dx, host);
  if (!a.loss) return;
  double loss = 0;
  for (int64_t s = 0; s < p.segments; ++s) loss += losses.data[s];
  *a.loss = float(a.state.hyper->scale * loss);
}

void fill(float* out, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) out[i] = value;
}

}  // namespace

void cluster_step(const ClusterStep& a, const Host& host) {
  const int64_t scores = a.batch.size * a.clusters.per_sample * a.clusters.most;
  if (!all_finite(a.batch)) {  // decided before the table is touched
    const float nan = std::numeric_limits<float>::quiet_NaN();
    fill(a.dx, a.batch.size * a.batch.width, nan);
    fill(a.scores, scores, nan);
    if (a.loss) *a.loss = nan;
    return;
  }
  fill(a.scores, scores, -std::numeric_limits<float>::infinity());
#if XK_ISA == 2
  if (products_in_bf16(a.state.dtype)) return run<BF16>(a, host);
#endif
  run<F32>(a, host);
}

}  // namespace xk::XK_NS
