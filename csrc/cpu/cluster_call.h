// What a call of cluster_step holds: the operands in fp32, the groups, and each worker's arrays.
#pragma once

#include "bce_pass.h"
#include "cluster_groups.h"
#include "row_update.h"
#include "small_products.h"

namespace xk::XK_NS {

constexpr int64_t kLargeRows = 32, kLargeSamples = 16;  // from here on packing pays
constexpr int64_t kSmallBytes = 64 << 10;               // rows of one small tile as fp32

inline bool is_large(const Group& g) { return g.rows >= kLargeRows && g.samples >= kLargeSamples; }

// The samples of a large cluster, packed as PackedBatch packs all.
template <class T>
struct PackedSamples {
  using elem = typename T::elem;
  int64_t width_panel, batch_panel = 0;
  Buffer<elem> by_width, by_batch;
  const Group* group = nullptr;  // whose samples they are

  PackedSamples(int64_t most, int64_t width)
      : width_panel(panel_elems<T>(width)), by_width(ceil_div(most, kPanel) * width_panel),
        by_batch(ceil_div(width, kPanel) * panel_elems<T>(most)) {}

  void pack(const Group& g, const int32_t* sample, const elem* x, int64_t width) {
    if (group == &g) return;
    group = &g;
    batch_panel = panel_elems<T>(g.samples);
    for (int64_t b = 0; b < g.samples; b += kPanel)
      pack_panel<T>(
          width, min64(kPanel, g.samples - b),
          [=](int64_t k, int64_t j) { return x[sample[b + j] * width + k]; },
          by_width.data + b / kPanel * width_panel);
    for (int64_t d = 0; d < width; d += kPanel)
      pack_panel<T>(
          g.samples, min64(kPanel, width - d),
          [=](int64_t k, int64_t j) { return x[sample[k] * width + d + j]; },
          by_batch.data + d / kPanel * batch_panel);
  }
};

// Brings the rows of the next cluster, and their states, into the cache while the present one
// computes.
struct ClusterAhead {
  Prefetch array[4] = {{nullptr, 0}, {nullptr, 0}, {nullptr, 0}, {nullptr, 0}};
  int64_t lines = 0;  // of each, at every call of some()

  ClusterAhead() = default;
  ClusterAhead(const RowState& s, int64_t first, int64_t rows, int64_t calls) {
    const State all[4] = {
        {s.weight, s.dtype}, s.momentum, s.row_wise ? State{nullptr, s.dtype} : s.second, s.kahan};
    for (int i = 0; i < 4; ++i) {
      if (!all[i].data) continue;
      const int64_t row = s.width * dtype_size(all[i].dtype);
      array[i] = Prefetch(static_cast<const char*>(all[i].data) + first * row, rows * row);
      lines = max64(lines, ceil_div(array[i].lines(), calls));
    }
  }
  void some() {
    for (Prefetch& a : array) a.some(lines);
  }
};

// Candidates that a sample has in a segment on the mean, at least: a segment's share of dX is an
// array of the whole batch, which is filled and summed however few rows add to it.
constexpr int64_t kSegmentShare = 64;

// The plan of the active rows for the whole batch.
inline Plan plan_of(const ClusterStep& a, const Groups& groups, int64_t elem) {
  Plan p(a.batch, Table{a.state.weight, a.state.dtype, groups.rows, nullptr, nullptr}, elem);
  int64_t scored = 0;
  for (int64_t i = 0; i < groups.count; ++i)
    scored += groups.group.data[i].rows * groups.group.data[i].samples;
  const int64_t most = max64(kMinSegments, scored / max64(1, p.batch * kSegmentShare));
  if (p.segments > most) {
    p.segment_rows = round_up(ceil_div(p.rows, most), 2);
    p.segments = ceil_div(p.rows, p.segment_rows);
  }
  return p;
}

// What all workers read.
template <class T>
struct ClusterCall {
  const ClusterStep& a;
  const Groups groups;
  const Plan plan;
  const Table table;
  const Positives positives;
  const RowUpdate update;
  const bool sums;
  int64_t small_rows;                      // rows of a small tile
  int64_t most_small = 0, most_large = 0;  // samples of a cluster, at most
  Buffer<float> x;                         // [B, width_pad]
  Buffer<typename T::elem> packable;       // [B, D], for large clusters

  explicit ClusterCall(const ClusterStep& args)
      : a(args), groups(a.clusters, a.batch.size, a.rows, a.positives),
        plan(plan_of(a, groups, sizeof(typename T::elem))),
        table(table_of(a.state, a.rows, a.bias)), positives(groups.positives()), update(a.state),
        sums(a.loss || a.bias),
        small_rows(max64(8, min64(kLargeRows, kSmallBytes / (plan.width_pad * 4)))),
        x(plan.batch * plan.width_pad), packable(plan.batch * plan.width) {
    for (int64_t i = 0; i < groups.count; ++i) {
      int64_t& most = is_large(groups.group.data[i]) ? most_large : most_small;
      most = max64(most, groups.group.data[i].samples);
    }
    for (int64_t b = 0; b < plan.batch; ++b) {
      float* const row = x.data + b * plan.width_pad;
      widen(a.batch.x, a.batch.dtype, b * plan.width, plan.width, row);
      for (int64_t d = plan.width; d < plan.width_pad; ++d) row[d] = 0;
    }
    if (most_large) convert<T>(a.batch, packable.data);
  }
};

// One worker's arrays, taken before anything is written.
template <class T>
struct ClusterSpace {
  const bool widened;  // rows need a copy: another dtype, or no whole vectors
  const int64_t gradient_row;
  Buffer<float> wide, z, target, gradient, dx;
  Buffer<const float*> row, sample;
  Buffer<float*> row_out, sample_out;
  PackedSamples<T> packed;
  std::unique_ptr<TileSpace<T>> tile;
  ClusterAhead ahead;

  explicit ClusterSpace(const ClusterCall<T>& c)
      : widened(c.table.dtype != DType::f32 || c.plan.width_pad != c.plan.width),
        gradient_row(round_up(c.plan.width, kChunk)),
        wide(widened ? c.small_rows * c.plan.width_pad : 0),
        z(c.small_rows * c.most_small + kLanes), target(c.small_rows * c.most_small + kLanes),
        gradient((c.a.state.row_wise && c.most_large ? max64(c.plan.tile, kSmallM) : kSmallM) *
                 gradient_row),
        dx(c.most_large * c.plan.width_pad), row(c.small_rows), sample(c.most_small),
        row_out(kSmallM), sample_out(c.most_small), packed(c.most_large, c.plan.width),
        tile(c.most_large ? new TileSpace<T>(c.plan, c.table.dtype != T::kDType) : nullptr) {
    for (int64_t i = 0; i < c.small_rows * c.most_small + kLanes; ++i) target.data[i] = 0;
    for (int i = 0; i < kSmallM; ++i) row_out.data[i] = gradient.data + i * gradient_row;
  }
};

// scores[pair, place of the row in its cluster]
template <class T>
static float* score_of(const ClusterCall<T>& c, const Group& g, int64_t s, int64_t row) {
  return c.a.scores + c.groups.slot.data[g.pair + s] * c.a.clusters.most + row - g.first;
}

template <class T>
static void move_bias(const ClusterCall<T>& c, int64_t row, double gradient) {
  if (!c.a.bias) return;
  const float b = float(c.a.bias[row] - double(c.a.state.hyper->lr) * gradient);
  c.a.bias[row] = b > FLT_MAX ? FLT_MAX : b < -FLT_MAX ? -FLT_MAX : b;
}

}  // namespace xk::XK_NS
