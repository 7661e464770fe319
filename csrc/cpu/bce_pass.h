// The walk over all tiles that bce_step and bce_loss_backward share.
//
// Labels are cut into segments; a segment is one worker's until it is done, so a row has one owner.
// Each segment sums its share of dX in an array of its own, and these arrays are added in ascending
// order at the end: neither the number of threads nor their timing reaches the result.
#pragma once

#include <memory>

#include "bce_tile.h"

namespace xk::XK_NS {

struct Pass {
  const Batch& batch;
  const Table& table;
  const Positives& positives;
  float scale, dx_scale;
  float* dx;       // [B, D]
  float* loss;     // [1] or null
  bool row_sums;   // the sink wants bias(row, gradient)
  bool gradients;  // the sink wants columns() and row()
  // Tiles of kSkipGroup rows without a positive whose sigmoids all lie below it give no gradient;
  // 0: there are none.
  double skip_sigmoid = 0;
  bool idle_rows = true;       // the sink still wants the rows of such a tile, with a gradient of 0
  int64_t* skipped = nullptr;  // [2] their number and that of all tiles are added to it
};

// A tile's rows to the sink, with a gradient of 0.
template <class Sink>
static void idle_tile(const Plan& p, int64_t first, int64_t count, float* zeros, Sink& sink) {
  for (int64_t j = 0; j < kChunk; ++j) zeros[j] = 0;
  for (int64_t c = 0; c < p.width; c += kChunk) {
    sink.columns(c);
    for (int64_t i = 0; i < count; ++i) sink.row(first + i, c, min64(kChunk, p.width - c), zeros);
  }
}

// dx = dx_scale * sum of the partials [segments, B, width_pad].
inline void sum_partials(const Plan& p, const float* partials, float dx_scale, float* dx,
                         const Host& host) {
  const int64_t stride = p.batch * p.width_pad;
  for_each_item(host, p.batch, [&](int64_t b, int64_t) {
    for (int64_t d = 0; d < p.width; d += kLanes) {
      vf sum{};
      const float* at = partials + b * p.width_pad + d;
      for (int64_t s = 0; s < p.segments; ++s, at += stride) sum = sum + load<vf>(at);
      sum = sum * dx_scale;
      std::memcpy(dx + b * p.width + d, &sum, size_t(min64(kLanes, p.width - d)) * 4);
    }
  });
}

inline bool idle(const Plan& p, const Pass& pass, int64_t first, int64_t count,
                 const float* logits) {
  const int64_t at = first_positive(pass.positives, first);
  if (at < pass.positives.count && pass.positives.row[at] < first + count) return false;
  return largest_sigmoid(p, pass.table, first, count, logits) < pass.skip_sigmoid;
}

template <class T, class Sink>
static void run_pass(const Pass& pass, const Host& host, const Sink& make) {
  const bool skips = pass.skip_sigmoid > 0;
  const Plan p(pass.batch, pass.table, sizeof(typename T::elem), skips ? kSkipGroup : 0);
  const PackedBatch<T> x(pass.batch, pass.gradients, host);
  const int64_t workers = worker_count(host, p.segments), partial = p.batch * p.width_pad;
  Buffer<float> partials(p.segments * partial);
  Buffer<double> losses(p.segments);
  // All memory is taken before the first write, so that a failure leaves the table as it was.
  std::unique_ptr<std::unique_ptr<TileSpace<T>>[]> spaces(
      new std::unique_ptr<TileSpace<T>>[size_t(workers)]);
  for (int64_t w = 0; w < workers; ++w)
    spaces[size_t(w)].reset(new TileSpace<T>(p, pass.table.dtype != T::kDType));
  const int64_t row_bytes = p.width * dtype_size(pass.table.dtype);
  const bool sums = pass.loss || pass.row_sums;
  std::atomic<int64_t> skipped{0};

  for_each_item(host, p.segments, [&](int64_t segment, int64_t worker) {
    TileSpace<T>& space = *spaces[size_t(worker)];
    Sink sink = make;
    const int64_t end = min64(p.rows, (segment + 1) * p.segment_rows);
    double loss = 0;
    bool accumulate = false;
    for (int64_t first = segment * p.segment_rows; first < end; first += p.tile) {
      const int64_t count = min64(p.tile, end - first);
      const typename T::elem* rows = tile_rows<T>(p, pass.table, first, count, space);
      gemm<T>(count, p.batch, p.width, rows, p.width, T::kPair, x.by_width.data, x.width_panel,
              space.logits.data, p.z_row, false);
      if (skips && idle(p, pass, first, count, space.logits.data)) {
        skipped.fetch_add(1, std::memory_order_relaxed);
        if (pass.loss)
          loss += tile_gradient<T>(p, pass.table, pass.positives, first, count, pass.scale, true,
                                   space, [](int64_t, double) {});
        if (pass.idle_rows) idle_tile(p, first, count, space.dw.data, sink);
        continue;
      }
      loss += tile_gradient<T>(p, pass.table, pass.positives, first, count, pass.scale, sums, space,
                               [&](int64_t row, double g) { sink.bias(row, g); });
      const int64_t next = first + count;
      Prefetch prefetch(static_cast<const char*>(pass.table.weight) + next * row_bytes,
                        min64(p.tile, p.rows - next) * row_bytes);
      tile_dx<T>(p, rows, count, space, partials.data + segment * partial, accumulate, &prefetch);
      accumulate = true;
      if (pass.gradients) tile_dw<T>(p, x, first, count, space, sink);
    }
    losses.data[segment] = loss;
    for (int64_t i = 0; !accumulate && i < partial; ++i) partials.data[segment * partial + i] = 0;
  });
  if (pass.skipped)
    pass.skipped[0] += skipped.load(), pass.skipped[1] += ceil_div(p.rows, kSkipGroup);
  sum_partials(p, partials.data, pass.dx_scale, pass.dx, host);
  if (pass.loss) {
    double loss = 0;
    for (int64_t s = 0; s < p.segments; ++s) loss += losses.data[s];
    *pass.loss = float(pass.scale * loss);
  }
}

template <class Sink>
static void run_pass_for(const Pass& pass, const Host& host, const Sink& sink) {
#if XK_ISA == 2
  if (products_in_bf16(pass.table.dtype)) return run_pass<BF16>(pass, host, sink);
#endif
  run_pass<F32>(pass, host, sink);
}

}  // namespace xk::XK_NS
