// Torch's view of the CPU kernels, on the stable ABI. Arguments arrive checked by xmlkernels/ops;
// what would corrupt memory is checked once more, since the dispatcher can be called without them.
#include "bindings_arguments.h"
#include "bindings_rows.h"

namespace {

void parallel_for(int64_t n, void (*body)(int64_t, int64_t, void*), void* ctx) {
  torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { body(begin, end, ctx); });
}
int threads() { return int(torch::stable::get_num_threads()); }
constexpr xk::Host kHost{&parallel_for, &threads};
constexpr int64_t kLargestK = 65536;  // results of a sample beyond the rows of the table, which are
                                      // all padding

// A kernel takes all its memory before it writes.
template <class Args>
void run(const Arguments& args, void (*kernel)(const Args&, const xk::Host&), const Args& a) {
  try {
    kernel(a, kHost);
  } catch (const std::bad_alloc&) {
    throw std::runtime_error(
        text(args.op, ": expected memory for its work, got none; ask for less at once"));
  }
}

std::tuple<Tensor, Tensor> bce_step_(Tensor weight, Tensor x, Tensor pos_row, Tensor pos_sample,
                                     Tensor hyper, Tensor counter, Maybe pos_value, Maybe bias,
                                     Maybe momentum, Maybe second, Maybe kahan, Maybe row_scale,
                                     int64_t row_offset, int64_t rows, bool decoupled,
                                     bool need_loss, double skip_below, Maybe skipped) {
  Arguments args("bce_step_", weight, "weight");
  args.expect(momentum || !second, "second", "momentum beside it (Adam has both moments)", "None",
              "pass momentum too");
  xk::BceStep a{};
  a.state = row_state_of(args, weight, "weight", {momentum, second, kahan, {}, {}, {}, row_scale},
                         hyper, counter, row_offset, decoupled, true);
  args.expect(!a.state.row_wise, "second", "one value for each of the table's", "one for each row",
              "reshape it");
  const int64_t n = weight.size(0);
  a.batch = batch_of(args, x, weight);
  a.rows = real_rows(args, rows, n);
  a.bias = args.write<float>(bias, "bias", {n});
  a.positives = positives_of(args, pos_row, pos_sample, pos_value, a.batch.size, a.rows);
  if (!(skip_below >= 0 && skip_below < std::numeric_limits<double>::infinity()))
    args.refuse("skip_below", "a finite number from 0 (skips nothing)", text(skip_below),
                "pass the change of a weight that may be left out");
  a.skip_below = skip_below;
  a.skipped = args.write<int64_t>(skipped, "skipped", {2});
  Tensor dx = args.result({x.size(0), x.size(1)}), loss = args.result({need_loss ? 1 : 0});
  a.dx = static_cast<float*>(dx.mutable_data_ptr());
  a.loss = need_loss ? static_cast<float*>(loss.mutable_data_ptr()) : nullptr;
  run(args, &xk::bce_step, a);
  return {dx, loss};
}

Tensor bce_loss(Tensor x, Tensor weight, Maybe bias, Tensor pos_row, Tensor pos_sample,
                Maybe pos_value, Maybe row_scale, int64_t rows) {
  Arguments args("bce_loss", weight, "weight");
  xk::BceLoss a{};
  a.table = table_of(args, weight, bias, rows, row_scale);
  a.batch = batch_of(args, x, weight);
  a.positives = positives_of(args, pos_row, pos_sample, pos_value, a.batch.size, a.table.rows);
  Tensor loss = args.result({1});
  a.loss = static_cast<float*>(loss.mutable_data_ptr());
  run(args, &xk::bce_loss, a);
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> bce_loss_backward(Tensor x, Tensor weight, Maybe bias,
                                                     Tensor pos_row, Tensor pos_sample,
                                                     Maybe pos_value, Maybe row_scale, int64_t rows,
                                                     bool need_dweight, bool need_dbias) {
  Arguments args("bce_loss_backward", weight, "weight");
  xk::BceLossBackward a{};
  a.table = table_of(args, weight, bias, rows, row_scale);
  a.batch = batch_of(args, x, weight);
  a.positives = positives_of(args, pos_row, pos_sample, pos_value, a.batch.size, a.table.rows);
  const int64_t n = weight.size(0), d = weight.size(1);
  Tensor dx = args.result({x.size(0), d}),
         dweight = need_dweight ? args.result({n, d}) : args.result({0}),
         dbias = args.result({need_dbias ? n : 0});
  // Padding rows have no gradient; the kernel writes the real ones.
  if (need_dweight && a.table.rows < n) torch::stable::zero_(dweight);
  if (need_dbias && a.table.rows < n) torch::stable::zero_(dbias);
  a.dx = static_cast<float*>(dx.mutable_data_ptr());
  a.dweight = need_dweight ? static_cast<float*>(dweight.mutable_data_ptr()) : nullptr;
  a.dbias = need_dbias ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr;
  run(args, &xk::bce_loss_backward, a);
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> cluster_step_(Tensor weight, Tensor x, Tensor clusters,
                                                 Tensor row_ptr, int64_t cluster_rows,
                                                 Tensor pos_row, Tensor pos_sample, Tensor hyper,
                                                 Tensor counter, Maybe pos_value, Maybe bias,
                                                 Maybe momentum, Maybe second, Maybe kahan,
                                                 Maybe row_scale, int64_t row_offset, int64_t rows,
                                                 bool decoupled, bool need_loss) {
  Arguments args("cluster_step_", weight, "weight");
  args.expect(momentum || !second, "second", "momentum beside it (Adam has both moments)", "None",
              "pass momentum too");
  xk::ClusterStep a{};
  a.state = row_state_of(args, weight, "weight", {momentum, second, kahan, {}, {}, {}, row_scale},
                         hyper, counter, row_offset, decoupled, true);
  const int64_t n = weight.size(0);
  a.batch = batch_of(args, x, weight);
  a.rows = real_rows(args, rows, n);
  a.bias = args.write<float>(bias, "bias", {n});
  a.positives = positives_of(args, pos_row, pos_sample, pos_value, a.batch.size, a.rows);
  a.clusters = clusters_of(args, clusters, row_ptr, cluster_rows, a.batch.size, n);
  Tensor dx = args.result({x.size(0), x.size(1)}), loss = args.result({need_loss ? 1 : 0}),
         scores = args.result({a.batch.size, a.clusters.per_sample, cluster_rows});
  a.dx = static_cast<float*>(dx.mutable_data_ptr());
  a.scores = static_cast<float*>(scores.mutable_data_ptr());
  a.loss = need_loss ? static_cast<float*>(loss.mutable_data_ptr()) : nullptr;
  run(args, &xk::cluster_step, a);
  return {dx, scores, loss};
}

std::tuple<Tensor, Tensor> matmul_topk(Tensor x, Tensor weight, Maybe bias, int64_t k,
                                       Maybe exclude, Maybe row_scale, int64_t row_offset,
                                       int64_t rows) {
  Arguments args("matmul_topk", weight, "weight");
  xk::MatmulTopk a{};
  a.table = table_of(args, weight, bias, rows, row_scale);
  a.batch = batch_of(args, x, weight);
  const int64_t n = weight.size(0), most = n > kLargestK ? n : kLargestK;
  if (k < 1 || k > most)
    args.refuse("k", text("1 to ", most), text(k),
                "ask for at least one label, and no more than there are");
  args.offset(row_offset, n);
  a.k = k;
  a.row_offset = row_offset;
  a.exclude = args.read<int64_t>(exclude, "exclude", {a.batch.size, -1});
  a.exclude_width = exclude ? exclude->size(1) : 0;
  Tensor values = args.result({a.batch.size, k}),
         best = args.result({a.batch.size, k}, ScalarType::Long);
  a.values = static_cast<float*>(values.mutable_data_ptr());
  a.rows = static_cast<int64_t*>(best.mutable_data_ptr());
  run(args, &xk::matmul_topk, a);
  return {values, best};
}

Tensor rescale_rows_(Tensor weight, Tensor row_scale, Tensor counter, int64_t row_offset) {
  Arguments args("rescale_rows_", weight, "weight");
  xk::RescaleRows a{};
  const Floats table = args.table(weight, "weight", true, true);
  args.expect(table.dtype == xk::DType::f8, "weight", "a torch.float8_e4m3fn table", "another",
              "only 8-bit tables have row scales");
  a.weight = table.data;
  a.rows = weight.size(0);
  a.width = weight.size(1);
  a.row_scale = args.row_scale(row_scale, table.dtype, a.rows, true);
  a.counter = args.read<int64_t>(counter, "counter", {2});
  args.offset(row_offset, a.rows);
  a.row_offset = row_offset;
  Tensor count = args.result({1}, ScalarType::Long);
  a.count = static_cast<int64_t*>(count.mutable_data_ptr());
  run(args, &xk::rescale_rows, a);
  return count;
}

void run_sparse_update(const xk::SparseUpdate& a, const Arguments& args, const Tensor&) {
  check_rows(a, args);
  run(args, &xk::sparse_update, a);
}

void run_bag_step(const xk::BagStep& a, const Arguments& args, const Tensor&) {
  check_bags(a, args);
  run(args, &xk::bag_step, a);
}

Tensor shortlist_matmul(Tensor x, Tensor weight, Maybe bias, Tensor index, Maybe row_scale) {
  Arguments args("shortlist_matmul", weight, "weight");
  xk::ShortlistMatmul a{};
  a.table = table_of(args, weight, bias, -1, row_scale);
  a.batch = batch_of(args, x, weight);
  a.list = shortlist_of(args, index, a.batch.size, a.table.rows);
  Tensor logits = args.result({a.batch.size, a.list.size});
  a.logits = static_cast<float*>(logits.mutable_data_ptr());
  run(args, &xk::shortlist_matmul, a);
  return logits;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> shortlist_backward(Tensor dlogits, Tensor x,
                                                              Tensor weight, Tensor index,
                                                              Maybe row_scale, bool need_dx,
                                                              bool need_dweight, bool need_dbias) {
  Arguments args("shortlist_backward", weight, "weight");
  xk::ShortlistBackward a{};
  a.table = table_of(args, weight, Maybe(), -1, row_scale);
  a.batch = batch_of(args, x, weight);
  a.list = shortlist_of(args, index, a.batch.size, a.table.rows);
  a.dlogits = args.read<float>(dlogits, "dlogits", {a.batch.size, a.list.size});
  const int64_t d = a.batch.width;
  Tensor dx = need_dx ? args.result({a.batch.size, d}) : args.result({0});
  a.dx = need_dx ? static_cast<float*>(dx.mutable_data_ptr()) : nullptr;
  const bool need_rows = need_dweight || need_dbias, group = need_rows || a.list.shared;
  Tensor place = args.result({group ? a.list.entries : 0}, ScalarType::Long),
         start = args.result({group ? a.list.entries + 1 : 0}, ScalarType::Long);
  int64_t unique = 0;
  a.place = group ? static_cast<int64_t*>(place.mutable_data_ptr()) : nullptr;
  a.start = static_cast<int64_t*>(start.mutable_data_ptr());
  a.unique = &unique;
  run(args, &xk::shortlist_group, a);
  const int64_t u = need_rows ? unique : 0;
  Tensor rows = args.result({u}, ScalarType::Long), grad = args.result({need_dweight ? u : 0, d}),
         dbias = args.result({need_dbias ? u : 0});
  a.rows = need_rows ? static_cast<int64_t*>(rows.mutable_data_ptr()) : nullptr;
  a.grad = need_dweight ? static_cast<float*>(grad.mutable_data_ptr()) : nullptr;
  a.dbias = need_dbias ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr;
  run(args, &xk::shortlist_rows, a);
  return {dx, rows, grad, dbias};
}

Tensor shortlist_select(Tensor scores, Tensor clusters, Tensor row_ptr, int64_t k, int64_t width,
                        Maybe node, Maybe sample, Maybe first) {
  Arguments args("shortlist_select", scores, "scores");
  xk::ShortlistSelect a{};
  a.scores = args.read<float>(scores, "scores", {-1, -1, -1});
  a.samples = scores.size(0);
  a.clusters = selected_of(args, clusters, row_ptr, scores.size(2), a.samples, k, width);
  args.read<float>(scores, "scores", {a.samples, a.clusters.per_sample, -1});
  args.expect(node.has_value() == sample.has_value(), "sample", "one beside node",
              sample ? "a tensor without node" : "None", "pass both or none");
  if (node) {
    a.node = args.read<int64_t>(node, "node", {-1});
    a.count = node->numel();
    a.sample = args.read<int32_t>(sample, "sample", {a.count});
    check_samples(a, args);
  }
  a.first = args.read<int64_t>(first, "first", {a.samples, a.clusters.per_sample});
  a.k = k;
  a.width = width;
  Tensor keys = args.result({a.samples, width}, ScalarType::Long);
  a.keys = static_cast<int64_t*>(keys.mutable_data_ptr());
  run(args, &xk::shortlist_select, a);
  return keys;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> shortlist_merge(Tensor keys, Tensor clusters,
                                                           Tensor row_ptr, int64_t most, int64_t k,
                                                           int64_t width) {
  Arguments args("shortlist_merge", keys, "keys");
  xk::ShortlistMerge a{};
  a.keys = args.read<int64_t>(keys, "keys", {-1, -1});
  a.samples = keys.size(0);
  a.count = keys.size(1);
  a.clusters = selected_of(args, clusters, row_ptr, most, a.samples, k, width);
  check_keys(a, args);
  a.k = k;
  a.width = width;
  const auto list = [&](ScalarType dtype) { return args.result({a.samples, width}, dtype); };
  Tensor nodes = list(ScalarType::Long), places = list(ScalarType::Long),
         scores = list(ScalarType::Float), forced = args.result({1}, ScalarType::Long);
  a.nodes = static_cast<int64_t*>(nodes.mutable_data_ptr());
  a.places = static_cast<int64_t*>(places.mutable_data_ptr());
  a.scores = static_cast<float*>(scores.mutable_data_ptr());
  a.forced = static_cast<int64_t*>(forced.mutable_data_ptr());
  run(args, &xk::shortlist_merge, a);
  return {nodes, places, scores, forced};
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
  m.impl("shortlist_select", TORCH_BOX(&shortlist_select));
  m.impl("shortlist_merge", TORCH_BOX(&shortlist_merge));
}
