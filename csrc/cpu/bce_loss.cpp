// bce_loss and its backward: the tiles of bce_step without the update.
#include <limits>

#include "bce_pass.h"

namespace xk::XK_NS {

namespace {

struct GradientSink {
  float *dweight, *dbias;
  int64_t width;

  void bias(int64_t row, double gradient) {
    if (dbias) dbias[row] = float(gradient);
  }
  void columns(int64_t) {}
  void row(int64_t row, int64_t column, int64_t count, const float* gradient) {
    std::memcpy(dweight + row * width + column, gradient, size_t(count) * 4);
  }
};

template <class T>
void loss_pass(const BceLoss& a, const Host& host) {
  const Plan p(a.batch, a.table, sizeof(typename T::elem));
  const PackedBatch<T> x(a.batch, false, host);
  const int64_t workers = worker_count(host, p.segments);
  Buffer<double> losses(p.segments);
  std::unique_ptr<std::unique_ptr<TileSpace<T>>[]> spaces(
      new std::unique_ptr<TileSpace<T>>[size_t(workers)]);
  for (int64_t w = 0; w < workers; ++w)
    spaces[size_t(w)].reset(new TileSpace<T>(p, a.table.dtype != T::kDType));
  for_each_item(host, p.segments, [&](int64_t segment, int64_t worker) {
    TileSpace<T>& space = *spaces[size_t(worker)];
    const int64_t end = min64(p.rows, (segment + 1) * p.segment_rows);
    double loss = 0;
    for (int64_t first = segment * p.segment_rows; first < end; first += p.tile) {
      const int64_t count = min64(p.tile, end - first);
      gemm<T>(count, p.batch, p.width, tile_rows<T>(p, a.table, first, count, space), p.width,
              T::kPair, x.by_width.data, x.width_panel, space.logits.data, p.z_row, false);
      loss += tile_gradient<T>(p, a.table, a.positives, first, count, 1, true, space,
                               [](int64_t, double) {});
    }
    losses.data[segment] = loss;
  });
  double loss = 0;
  for (int64_t s = 0; s < p.segments; ++s) loss += losses.data[s];
  *a.loss = float(loss);
}

}  // namespace

void bce_loss(const BceLoss& a, const Host& host) {
  if (!all_finite(a.batch)) {  // promised even where the infinities would cancel or no row is
                               // scored
    *a.loss = std::numeric_limits<float>::quiet_NaN();
    return;
  }
#if XK_ISA == 2
  if (products_in_bf16(a.table.dtype)) return loss_pass<BF16>(a, host);
#endif
  loss_pass<F32>(a, host);
}

void bce_loss_backward(const BceLossBackward& a, const Host& host) {
  run_pass_for(Pass{a.batch, a.table, a.positives, 1, 1, a.dx, nullptr, a.dbias != nullptr,
                    a.dweight != nullptr},
               host, GradientSink{a.dweight, a.dbias, a.batch.width});
}

}  // namespace xk::XK_NS
