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

}  // namespace

void bce_step(const BceStep& a, const Host& host) {
  if (!all_finite(a.batch)) {  // decided before the table is touched
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (int64_t i = 0; i < a.batch.size * a.batch.width; ++i) a.dx[i] = nan;
    if (a.loss) *a.loss = nan;
    return;
  }
  run_pass_for(Pass{a.batch, a.table, a.positives, a.hyper[5], a.hyper[6], a.dx, a.loss, a.table.bias != nullptr, true},
               host, StepSink(a));
}

}  // namespace xk::XK_NS
