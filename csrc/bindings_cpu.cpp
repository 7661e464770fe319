// Torch's view of the CPU kernels, on the stable ABI. Arguments arrive checked by xmlkernels/ops; what would corrupt
// memory is checked once more, since the dispatcher can be called without them.
#include "bindings_arguments.h"
#include "bindings_rows.h"

namespace {

void parallel_for(int64_t n, void (*body)(int64_t, int64_t, void*), void* ctx) {
  torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { body(begin, end, ctx); });
}
int threads() { return int(torch::stable::get_num_threads()); }
constexpr xk::Host kHost{&parallel_for, &threads};

std::tuple<Tensor, Tensor> bce_step_(Tensor weight, Tensor x, Tensor pos_row, Tensor pos_sample, Tensor hyper,
                                     Tensor counter, Maybe pos_value, Maybe bias, Maybe momentum, Maybe second,
                                     Maybe kahan, Maybe row_scale, int64_t row_offset, int64_t rows, bool decoupled,
                                     bool need_loss, double skip_below, Maybe skipped) {
  check(hyper, "hyper", ScalarType::Float);
  check(counter, "counter", ScalarType::Long);
  check_size(hyper, "hyper", 7);
  check_size(counter, "counter", 2);
  STD_TORCH_CHECK(momentum || !second, "argument second: expected momentum beside it");
  xk::BceStep a{};
  a.batch = batch_of(x, weight);
  a.table = table_of(weight, bias, rows, row_scale);
  a.positives = positives_of(pos_row, pos_sample, pos_value, a.batch.size, a.table.rows);
  a.hyper = static_cast<const float*>(hyper.const_data_ptr());
  a.counter = static_cast<const int64_t*>(counter.const_data_ptr());
  a.momentum = state_of(momentum, "momentum", weight);
  a.second = state_of(second, "second", weight);
  a.kahan = state_of(kahan, "kahan", weight);
  STD_TORCH_CHECK(!kahan || (a.kahan.dtype == a.table.dtype && a.table.dtype != xk::DType::f32),
                  "argument kahan: expected the table's dtype, bfloat16 or float16");
  a.row_offset = row_offset;
  a.decoupled = decoupled;
  a.skip_below = skip_below;
  if (skipped) {
    check(*skipped, "skipped", ScalarType::Long), check_size(*skipped, "skipped", 2);
    a.skipped = static_cast<int64_t*>(skipped->mutable_data_ptr());
  }
  Tensor dx = empty({x.size(0), x.size(1)}), loss = empty({need_loss ? 1 : 0});
  a.dx = static_cast<float*>(dx.mutable_data_ptr());
  a.loss = need_loss ? static_cast<float*>(loss.mutable_data_ptr()) : nullptr;
  xk::bce_step(a, kHost);
  return {dx, loss};
}

Tensor bce_loss(Tensor x, Tensor weight, Maybe bias, Tensor pos_row, Tensor pos_sample, Maybe pos_value,
                Maybe row_scale, int64_t rows) {
  xk::BceLoss a{};
  a.batch = batch_of(x, weight);
  a.table = table_of(weight, bias, rows, row_scale);
  a.positives = positives_of(pos_row, pos_sample, pos_value, a.batch.size, a.table.rows);
  Tensor loss = empty({1});
  a.loss = static_cast<float*>(loss.mutable_data_ptr());
  xk::bce_loss(a, kHost);
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> bce_loss_backward(Tensor x, Tensor weight, Maybe bias, Tensor pos_row,
                                                     Tensor pos_sample, Maybe pos_value, Maybe row_scale,
                                                     int64_t rows, bool need_dweight, bool need_dbias) {
  xk::BceLossBackward a{};
  a.batch = batch_of(x, weight);
  a.table = table_of(weight, bias, rows, row_scale);
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
  a.rows = table_of(weight, bias, rows, row_scale).rows;
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
                                       Maybe row_scale, int64_t row_offset, int64_t rows) {
  STD_TORCH_CHECK(k >= 1, "argument k: expected 1 or more, got ", k);
  xk::MatmulTopk a{};
  a.batch = batch_of(x, weight);
  a.table = table_of(weight, bias, rows, row_scale);
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

Tensor rescale_rows_(Tensor weight, Tensor row_scale, Tensor counter, int64_t row_offset) {
  STD_TORCH_CHECK(weight.dim() == 2, "argument weight: expected [n, D]");
  table_dtype_of(weight, row_scale);
  check(weight, "weight", ScalarType::Float8_e4m3fn);
  check(counter, "counter", ScalarType::Long), check_size(counter, "counter", 2);
  Tensor count = empty({1}, ScalarType::Long);
  xk::RescaleRows a{};
  a.weight = weight.mutable_data_ptr();
  a.rows = weight.size(0);
  a.width = weight.size(1);
  a.row_scale = static_cast<float*>(row_scale.mutable_data_ptr());
  a.counter = static_cast<const int64_t*>(counter.const_data_ptr());
  a.row_offset = row_offset;
  a.count = static_cast<int64_t*>(count.mutable_data_ptr());
  xk::rescale_rows(a, kHost);
  return count;
}

void run_sparse_update(const xk::SparseUpdate& a, const Tensor&) {
  // A row that stood twice would be two threads' at once.
  for (int64_t i = 0; i < a.count; ++i)
    STD_TORCH_CHECK(a.rows[i] >= 0 && (i == 0 || a.rows[i] > a.rows[i - 1] || a.rows[i - 1] >= a.n),
                    "argument rows: expected unique ascending rows, got ", a.rows[i], " at ", i);
  xk::sparse_update(a, kHost);
}

void run_bag_step(const xk::BagStep& a, const Tensor&) {
  for (int64_t b = 0; b <= a.bags; ++b)
    STD_TORCH_CHECK(a.offset[b] >= (b ? a.offset[b - 1] : 0) && a.offset[b] <= a.count,
                    "argument offset: expected ascending numbers from 0 to ", a.count, ", got ", a.offset[b], " at ", b);
  xk::bag_step(a, kHost);
}

Tensor shortlist_matmul(Tensor x, Tensor weight, Maybe bias, Tensor index, Maybe row_scale) {
  xk::ShortlistMatmul a{};
  a.batch = batch_of(x, weight);
  a.table = table_of(weight, bias, -1, row_scale);
  a.list = shortlist_of(index, a.batch.size, a.table.rows);
  Tensor logits = empty({a.batch.size, a.list.size});
  a.logits = static_cast<float*>(logits.mutable_data_ptr());
  xk::shortlist_matmul(a, kHost);
  return logits;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> shortlist_backward(Tensor dlogits, Tensor x, Tensor weight, Tensor index,
                                                              Maybe row_scale, bool need_dx, bool need_dweight,
                                                              bool need_dbias) {
  xk::ShortlistBackward a{};
  a.batch = batch_of(x, weight);
  a.table = table_of(weight, Maybe(), -1, row_scale);
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
  m.impl("rescale_rows_", TORCH_BOX(&rescale_rows_));
  m.impl("sparse_sgd_", TORCH_BOX(&sparse_sgd_<&run_sparse_update>));
  m.impl("sparse_adagrad_", TORCH_BOX(&sparse_adagrad_<&run_sparse_update>));
  m.impl("sparse_adam_", TORCH_BOX(&sparse_adam_<&run_sparse_update>));
  m.impl("bag_step_", TORCH_BOX(&bag_step_<&run_bag_step>));
  m.impl("shortlist_matmul", TORCH_BOX(&shortlist_matmul));
  m.impl("shortlist_backward", TORCH_BOX(&shortlist_backward));
}
