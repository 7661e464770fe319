// sparse_update: SGD, momentum SGD, Adagrad or Adam on the touched rows of a table. Rows are
// unique, so each has one owner.
#include "touched_rows.h"

namespace xk::XK_NS {

namespace {

constexpr int64_t kBlock = 64;    // rows of one work item
constexpr int64_t kAhead = 1024;  // numbers between what is asked for and what is computed: longer
                                  // than memory takes

// The first place at or after which all rows are fill.
int64_t real_rows(const SparseUpdate& a) {
  int64_t low = 0, high = a.count;
  while (low < high) {
    const int64_t mid = low + (high - low) / 2;
    if (a.rows[mid] < a.n)
      low = mid + 1;
    else
      high = mid;
  }
  return low;
}

}  // namespace

void sparse_update(const SparseUpdate& a, const Host& host) {
  const int64_t count = real_rows(a), width = a.state.width, items = ceil_div(count, kBlock);
  if (!all_finite(a.grad, a.grad_dtype, count * width, host)) return;
  const float scale = a.state.hyper->scale;
  const RowUpdate update(a.state);
  const RowPrefetch prefetch(a.state);
  const int64_t ahead = max64(1, min64(8, kAhead / max64(1, width)));
  GradientRows gradients(width, worker_count(host, items));
  for_each_item(host, items, [&](int64_t item, int64_t worker) {
    float* const gradient = gradients[worker];
    const int64_t end = min64(count, (item + 1) * kBlock);
    for (int64_t i = item * kBlock; i < end; ++i) {
      const int64_t later = i + ahead;
      widen(a.grad, a.grad_dtype, i * width, width, gradient);
      for (int64_t d = 0; d < width; d += kLanes)
        store(gradient + d, load<vf>(gradient + d) * scale);
      update.row(a.rows[i], gradient, [&](int64_t c) {
        if (later < end) prefetch(a.rows[later], c);
      });
    }
  });
}

}  // namespace xk::XK_NS
