// bce_step: logits, gradient, dX and the update of the table, tile by tile.
#include <limits>

#include "bce_pass.h"
#include "update.h"

namespace xk::XK_NS {

namespace {

RowState rows_of(const BceStep& a) {
  RowState s{};
  s.weight = const_cast<void*>(a.table.weight);
  s.dtype = a.table.dtype;
  s.width = a.batch.width;
  s.momentum = a.momentum;
  s.second = a.second;
  s.kahan = a.kahan;
  s.hyper = a.hyper;
  s.counter = a.counter;
  s.row_scale = const_cast<float*>(a.table.row_scale);
  s.row_offset = a.row_offset;
  s.decoupled = a.decoupled;
  return s;
}

struct StepSink : Update {
  float* bias_data;

  StepSink(const BceStep& a) : Update(rows_of(a)), bias_data(const_cast<float*>(a.table.bias)) {}
  void bias(int64_t row, double gradient) {
    if (!bias_data) return;
    const float b = float(bias_data[row] - double(lr) * gradient);
    bias_data[row] = b > FLT_MAX ? FLT_MAX : b < -FLT_MAX ? -FLT_MAX : b;
  }
};

// The sigmoid below which lr |scale| sigmoid max_d(sum_b |x_bd|) < skip_below; a bias is a weight of an x that is 1.
double skip_sigmoid(const BceStep& a) {
  if (!(a.skip_below > 0)) return 0;
  Buffer<float> row(a.batch.width);
  Buffer<double> sum(a.batch.width);
  for (int64_t d = 0; d < a.batch.width; ++d) sum.data[d] = 0;
  for (int64_t b = 0; b < a.batch.size; ++b) {
    widen(a.batch.x, a.batch.dtype, b * a.batch.width, a.batch.width, row.data);
    for (int64_t d = 0; d < a.batch.width; ++d) sum.data[d] += std::abs(double(row.data[d]));
  }
  double reach = a.table.bias ? double(a.batch.size) : 0;
  for (int64_t d = 0; d < a.batch.width; ++d) reach = sum.data[d] > reach ? sum.data[d] : reach;
  return a.skip_below / (std::abs(double(a.hyper[0]) * a.hyper[5]) * reach);  // infinity where nothing can change
}

}  // namespace

void bce_step(const BceStep& a, const Host& host) {
  if (!all_finite(a.batch)) {  // decided before the table is touched
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (int64_t i = 0; i < a.batch.size * a.batch.width; ++i) a.dx[i] = nan;
    if (a.loss) *a.loss = nan;
    return;
  }
  Pass pass{a.batch, a.table, a.positives, a.hyper[5], a.hyper[6], a.dx, a.loss, a.table.bias != nullptr, true};
  pass.skip_sigmoid = skip_sigmoid(a);
  // Nothing would change: plain SGD without decay.
  pass.idle_rows = a.momentum.data || a.kahan.data || a.hyper[1] != 0;
  pass.skipped = a.skipped;
  run_pass_for(pass, host, StepSink(a));
}

}  // namespace xk::XK_NS
