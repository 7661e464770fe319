// bce_step: logits, gradient, dX and the update of the table, tile by tile.
#include <limits>

#include "bce_pass.h"
#include "update.h"

namespace xk::XK_NS {

namespace {

struct StepSink : Update {
  float* bias_data;

  StepSink(const BceStep& a) : Update(a.state), bias_data(a.bias) {}
  void bias(int64_t row, double gradient) {
    if (!bias_data) return;
    const float b = float(bias_data[row] - double(lr) * gradient);
    bias_data[row] = b > FLT_MAX ? FLT_MAX : b < -FLT_MAX ? -FLT_MAX : b;
  }
};

// The sigmoid below which lr |scale| sigmoid max_d(sum_b |x_bd|) < skip_below; a bias is a weight
// of an x that is 1.
double skip_sigmoid(const BceStep& a) {
  if (!(a.skip_below > 0)) return 0;
  Buffer<float> row(a.batch.width);
  Buffer<double> sum(a.batch.width);
  for (int64_t d = 0; d < a.batch.width; ++d) sum.data[d] = 0;
  for (int64_t b = 0; b < a.batch.size; ++b) {
    widen(a.batch.x, a.batch.dtype, b * a.batch.width, a.batch.width, row.data);
    for (int64_t d = 0; d < a.batch.width; ++d) sum.data[d] += std::abs(double(row.data[d]));
  }
  double reach = a.bias ? double(a.batch.size) : 0;
  for (int64_t d = 0; d < a.batch.width; ++d) reach = sum.data[d] > reach ? sum.data[d] : reach;
  const Hyper& hyper = *a.state.hyper;
  return a.skip_below / (std::abs(double(hyper.lr) * hyper.scale) * reach);  // infinity where
                                                                             // nothing can change
}

}  // namespace

void bce_step(const BceStep& a, const Host& host) {
  if (!all_finite(a.batch)) {  // decided before the table is touched
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (int64_t i = 0; i < a.batch.size * a.batch.width; ++i) a.dx[i] = nan;
    if (a.loss) *a.loss = nan;
    return;
  }
  const Hyper& hyper = *a.state.hyper;
  const Table table = table_of(a.state, a.rows, a.bias);
  Pass pass{a.batch, table,  a.positives,       hyper.scale, hyper.dx_scale,
            a.dx,    a.loss, a.bias != nullptr, true};
  pass.skip_sigmoid = skip_sigmoid(a);
  // Nothing would change: plain SGD without decay.
  pass.idle_rows = a.state.momentum.data || a.state.kahan.data || hyper.decay != 0;
  pass.skipped = a.skipped;
  run_pass_for(pass, host, StepSink(a));
}

}  // namespace xk::XK_NS
