// Torch's view of the CPU kernels, on the stable ABI. Arguments arrive checked by xmlkernels/ops; what would corrupt
// memory is checked once more, since the dispatcher can be called without them.
#include "bindings.h"

namespace {

void parallel_for(int64_t n, void (*body)(int64_t, int64_t, void*), void* ctx) {
  torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { body(begin, end, ctx); });
}
int threads() { return int(torch::stable::get_num_threads()); }
constexpr xk::Host kHost{&parallel_for, &threads};

xk::Batch batch_of(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) && x.size(1) > 0,
                  "arguments x and weight: expected [B, D] and [n, D] with D >= 1");
  return {x.const_data_ptr(), dtype_of(x, "x"), x.size(0), x.size(1)};
}

xk::Table table_of(const Tensor& weight, const Maybe& bias, int64_t rows) {
  const int64_t n = weight.size(0);
  STD_TORCH_CHECK(rows >= -1 && rows <= n, "argument rows: expected -1 to ", n, ", got ", rows);
  if (bias) check(*bias, "bias", ScalarType::Float), check_size(*bias, "bias", n);
  return {weight.const_data_ptr(), dtype_of(weight, "weight"), rows < 0 ? n : rows,
          bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr};
}

// Samples index a buffer, and rows are searched by bisection.
xk::Positives positives_of(const Tensor& row, const Tensor& sample, const Maybe& value, int64_t batch, int64_t rows) {
  check(row, "pos_row", ScalarType::Long);
  check(sample, "pos_sample", ScalarType::Int);
  check_size(sample, "pos_sample", row.numel());
  if (value) check(*value, "pos_value", ScalarType::Float), check_size(*value, "pos_value", row.numel());
  const xk::Positives p{static_cast<const int64_t*>(row.const_data_ptr()),
                        static_cast<const int32_t*>(sample.const_data_ptr()),
                        value ? static_cast<const float*>(value->const_data_ptr()) : nullptr, row.numel()};
  for (int64_t i = 0; i < p.count; ++i) {
    STD_TORCH_CHECK(p.row[i] >= (i ? p.row[i - 1] : 0), "argument pos_row: expected ascending rows, got ", p.row[i],
                    " at ", i);
    STD_TORCH_CHECK(p.row[i] >= rows || (p.sample[i] >= 0 && p.sample[i] < batch),
                    "argument pos_sample: expected 0 to ", batch - 1, ", got ", p.sample[i], " at ", i);
  }
  return p;
}

std::tuple<Tensor, Tensor> bce_step_(Tensor weight, Tensor x, Tensor pos_row, Tensor pos_sample, Tensor hyper,
                                     Tensor counter, Maybe pos_value, Maybe bias, Maybe momentum, Maybe second,
                                     Maybe kahan, Maybe row_scale, int64_t row_offset, int64_t rows, bool decoupled,
                                     bool need_loss) {
  check(hyper, "hyper", ScalarType::Float);
  check(counter, "counter", ScalarType::Long);
  check_size(hyper, "hyper", 7);
  check_size(counter, "counter", 2);
  STD_TORCH_CHECK(!row_scale, "argument row_scale: expected None, 8-bit tables have no kernel here");
  STD_TORCH_CHECK(momentum || !second, "argument second: expected momentum beside it");
  xk::BceStep a{};
  a.batch = batch_of(x, weight);
  a.table = table_of(weight, bias, rows);
  a.positives = positives_of(pos_row, pos_sample, pos_value, a.batch.size, a.table.rows);
  a.hyper = static_cast<const float*>(hyper.const_data_ptr());
  a.counter = static_cast<const int64_t*>(counter.const_data_ptr());
  a.momentum = state_of(momentum, "momentum", weight);
  a.second = state_of(second, "second", weight);
  a.kahan = state_of(kahan, "kahan", weight);
  STD_TORCH_CHECK(!kahan || (a.kahan.dtype == a.table.dtype && a.table.dtype != xk::DType::f32),
                  "argument kahan: expected the table's dtype, below float32");
  a.row_offset = row_offset;
  a.decoupled = decoupled;
  Tensor dx = empty({x.size(0), x.size(1)}), loss = empty({need_loss ? 1 : 0});
  a.dx = static_cast<float*>(dx.mutable_data_ptr());
  a.loss = need_loss ? static_cast<float*>(loss.mutable_data_ptr()) : nullptr;
  xk::bce_step(a, kHost);
  return {dx, loss};
}

Tensor bce_loss(Tensor x, Tensor weight, Maybe bias, Tensor pos_row, Tensor pos_sample, Maybe pos_value, int64_t rows) {
  xk::BceLoss a{};
  a.batch = batch_of(x, weight);
  a.table = table_of(weight, bias, rows);
  a.positives = positives_of(pos_row, pos_sample, pos_value, a.batch.size, a.table.rows);
  Tensor loss = empty({1});
  a.loss = static_cast<float*>(loss.mutable_data_ptr());
  xk::bce_loss(a, kHost);
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> bce_loss_backward(Tensor x, Tensor weight, Maybe bias, Tensor pos_row,
                                                     Tensor pos_sample, Maybe pos_value, int64_t rows,
                                                     bool need_dweight, bool need_dbias) {
  xk::BceLossBackward a{};
  a.batch = batch_of(x, weight);
  a.table = table_of(weight, bias, rows);
  a.positives = positives_of(pos_row, pos_sample, pos_value, a.batch.size, a.table.rows);
  const int64_t n = weight.size(0), d = weight.size(1);
  Tensor dx = empty({x.size(0), d}), dweight = need_dweight ? empty({n, d}) : empty({0}),
         dbias = empty({need_dbias ? n : 0});
  // Padding rows have no gradient; the kernel writes the real ones.
  if (need_dweight && a.table.rows < n) torch::stable::zero_(dweight);
  if (need_dbias && a.table.rows < n) torch::stable::zero_(dbias);
  a.dx = static_cast<float*>(dx.mutable_data_ptr());
  a.dweight = need_dweight ? static_cast<float*>(dweight.mutable_data_ptr()) : nullptr;
  a.dbias = need_dbias ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr;
  xk::bce_loss_backward(a, kHost);
  return {dx, dweight, dbias};
}

// Clusters choose rows, so both are held to the table.
xk::Clusters clusters_of(const Tensor& clusters, const Tensor& row_ptr, int64_t most, int64_t batch, int64_t n) {
  check(clusters, "clusters", ScalarType::Long);
  check(row_ptr, "row_ptr", ScalarType::Long);
  STD_TORCH_CHECK(clusters.dim() == 2 && clusters.size(0) == batch, "argument clusters: expected [B, K]");
  STD_TORCH_CHECK(row_ptr.dim() == 1 && row_ptr.size(0) >= 1, "argument row_ptr: expected [C + 1]");
  const xk::Clusters c{static_cast<const int64_t*>(clusters.const_data_ptr()), clusters.size(1),
                       static_cast<const int64_t*>(row_ptr.const_data_ptr()), row_ptr.size(0) - 1, most};
  for (int64_t i = 0; i <= c.count; ++i) {
    const int64_t before = i ? c.row_ptr[i - 1] : 0;
    STD_TORCH_CHECK(c.row_ptr[i] >= before && c.row_ptr[i] <= n && (!i || c.row_ptr[i] - before <= most),
                    "argument row_ptr: expected ascending rows up to ", n, ", at most ", most, " apart, got ",
                    c.row_ptr[i], " at ", i);
  }
  for (int64_t i = 0; i < clusters.numel(); ++i)
    STD_TORCH_CHECK(c.chosen[i] >= -1 && c.chosen[i] < c.count, "argument clusters: expected -1 to ", c.count - 1,
                    ", got ", c.chosen[i], " at ", i);
  return c;
}

std::tuple<Tensor, Tensor, Tensor> cluster_step_(Tensor weight, Tensor x, Tensor clusters, Tensor row_ptr,
                                                 int64_t cluster_rows, Tensor pos_row, Tensor pos_sample, Tensor hyper,
                                                 Tensor counter, Maybe pos_value, Maybe bias, Maybe momentum,
                                                 Maybe second, Maybe kahan, Maybe row_scale, int64_t row_offset,
                                                 int64_t rows, bool decoupled, bool need_loss) {
  STD_TORCH_CHECK(momentum || !second, "argument second: expected momentum beside it");
  xk::ClusterStep a{};
  a.batch = batch_of(x, weight);
  a.state = row_state_of(weight, momentum, second, kahan, {}, {}, {}, row_scale, hyper, counter, row_offset, decoupled);
  a.rows = table_of(weight, bias, rows).rows;
  a.bias = bias ? static_cast<float*>(bias->mutable_data_ptr()) : nullptr;
  a.positives = positives_of(pos_row, pos_sample, pos_value, a.batch.size, a.rows);
  a.clusters = clusters_of(clusters, row_ptr, cluster_rows, a.batch.size, weight.size(0));
  Tensor dx = empty({x.size(0), x.size(1)}), loss = empty({need_loss ? 1 : 0}),
         scores = empty({a.batch.size, a.clusters.per_sample, cluster_rows});
  a.dx = static_cast<float*>(dx.mutable_data_ptr());
  a.scores = static_cast<float*>(scores.mutable_data_ptr());
  a.loss = need_loss ? static_cast<float*>(loss.mutable_data_ptr()) : nullptr;
  xk::cluster_step(a, kHost);
  return {dx, scores, loss};
}

std::tuple<Tensor, Tensor> matmul_topk(Tensor x, Tensor weight, Maybe bias, int64_t k, Maybe exclude,
                                       int64_t row_offset, int64_t rows) {
  STD_TORCH_CHECK(k >= 1, "argument k: expected 1 or more, got ", k);
  xk::MatmulTopk a{};
  a.batch = batch_of(x, weight);
  a.table = table_of(weight, bias, rows);
  a.k = k;
  a.row_offset = row_offset;
  if (exclude) {
    check(*exclude, "exclude", ScalarType::Long);
    STD_TORCH_CHECK(exclude->dim() == 2 && exclude->size(0) == a.batch.size, "argument exclude: expected [B, E]");
    a.exclude = static_cast<const int64_t*>(exclude->const_data_ptr());
    a.exclude_width = exclude->size(1);
  }
  Tensor values = empty({a.batch.size, k}), best = empty({a.batch.size, k}, ScalarType::Long);
  a.values = static_cast<float*>(values.mutable_data_ptr());
  a.rows = static_cast<int64_t*>(best.mutable_data_ptr());
  xk::matmul_topk(a, kHost);
  return {values, best};
}

// Entries are addresses.
xk::Shortlist shortlist_of(const Tensor& index, int64_t batch, int64_t n) {
  check(index, "index", ScalarType::Long);
  const bool shared = index.dim() == 1;
  STD_TORCH_CHECK(shared || (index.dim() == 2 && index.size(0) == batch), "argument index: expected [B, S] or [S]");
  const xk::Shortlist list{static_cast<const int64_t*>(index.const_data_ptr()), index.size(shared ? 0 : 1), shared,
                           batch ? index.numel() : 0};
  int64_t low = -1, high = -1;
  for (int64_t i = 0; i < list.entries; ++i) {
    low = list.index[i] < low ? list.index[i] : low;
    high = list.index[i] > high ? list.index[i] : high;
  }
  STD_TORCH_CHECK(low == -1 && high < n, "argument index: expected rows from 0 to ", n - 1, " or -1, got ",
                  low < -1 ? low : high);
  return list;
}

Tensor shortlist_matmul(Tensor x, Tensor weight, Maybe bias, Tensor index) {
  xk::ShortlistMatmul a{};
  a.batch = batch_of(x, weight);
  a.table = table_of(weight, bias, -1);
  a.list = shortlist_of(index, a.batch.size, a.table.rows);
  Tensor logits = empty({a.batch.size, a.list.size});
  a.logits = static_cast<float*>(logits.mutable_data_ptr());
  xk::shortlist_matmul(a, kHost);
  return logits;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> shortlist_backward(Tensor dlogits, Tensor x, Tensor weight, Tensor index,
                                                              bool need_dx, bool need_dweight, bool need_dbias) {
  xk::ShortlistBackward a{};
  a.batch = batch_of(x, weight);
  a.table = table_of(weight, Maybe(), -1);
  a.list = shortlist_of(index, a.batch.size, a.table.rows);
  check(dlogits, "dlogits", ScalarType::Float);
  check_size(dlogits, "dlogits", a.batch.size * a.list.size);
  a.dlogits = static_cast<const float*>(dlogits.const_data_ptr());
  const int64_t d = a.batch.width;
  Tensor dx = need_dx ? empty({a.batch.size, d}) : empty({0});
  a.dx = need_dx ? static_cast<float*>(dx.mutable_data_ptr()) : nullptr;
  const bool need_rows = need_dweight || need_dbias, group = need_rows || a.list.shared;
  Tensor place = empty({group ? a.list.entries : 0}, ScalarType::Long),
         start = empty({group ? a.list.entries + 1 : 0}, ScalarType::Long);
  int64_t unique = 0;
  a.place = group ? static_cast<int64_t*>(place.mutable_data_ptr()) : nullptr;
  a.start = static_cast<int64_t*>(start.mutable_data_ptr());
  a.unique = &unique;
  xk::shortlist_group(a, kHost);
  const int64_t u = need_rows ? unique : 0;
  Tensor rows = empty({u}, ScalarType::Long), grad = empty({need_dweight ? u : 0, d}), dbias = empty({need_dbias ? u : 0});
  a.rows = need_rows ? static_cast<int64_t*>(rows.mutable_data_ptr()) : nullptr;
  a.grad = need_dweight ? static_cast<float*>(grad.mutable_data_ptr()) : nullptr;
  a.dbias = need_dbias ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr;
  xk::shortlist_rows(a, kHost);
  return {dx, rows, grad, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(xmlkernels, CPU, m) {
  m.impl("bce_step_", TORCH_BOX(&bce_step_));
  m.impl("bce_loss", TORCH_BOX(&bce_loss));
  m.impl("bce_loss_backward", TORCH_BOX(&bce_loss_backward));
  m.impl("cluster_step_", TORCH_BOX(&cluster_step_));
  m.impl("matmul_topk", TORCH_BOX(&matmul_topk));
  m.impl("shortlist_matmul", TORCH_BOX(&shortlist_matmul));
  m.impl("shortlist_backward", TORCH_BOX(&shortlist_backward));
}
