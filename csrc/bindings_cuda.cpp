// Torch's view of the CUDA kernels, on the stable ABI; compiled with -DUSE_CUDA -DXK_CUDA into a library of its own. No
// check here reads a tensor's values: that would wait for the device.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "bindings.h"
#include "cuda/launch.h"

namespace {

// Runs a kernel on the table's device and current stream, with a workspace that torch's allocator takes back in the
// stream's order.
template <class Args>
void launch(const Tensor& table, const Args& args, int64_t (*workspace_bytes)(const Args&),
            void (*kernel)(const Args&, void*, void*)) {
  const torch::stable::accelerator::DeviceGuard guard(table.get_device_index());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(table.get_device_index(), &stream));
  Tensor workspace = torch::stable::empty({workspace_bytes(args)}, ScalarType::Byte, std::nullopt, table.device());
  kernel(args, workspace.mutable_data_ptr(), stream);
}

// The three sparse updates are one kernel: the rule follows from the states.
void sparse_update(xk::RowState state, const Tensor& param, const Tensor& rows, const Tensor& grad) {
  check(rows, "rows", ScalarType::Long);
  xk::SparseUpdate a{};
  a.state = state;
  a.n = param.size(0);
  a.rows = static_cast<const int64_t*>(rows.const_data_ptr());
  a.count = rows.numel();
  a.grad = grad.const_data_ptr();
  a.grad_dtype = dtype_of(grad, "grad");
  check_size(grad, "grad", a.count * state.width);
  launch(param, a, &xk::cuda::sparse_update_workspace, &xk::cuda::sparse_update);
}

void sparse_sgd_(Tensor param, Maybe momentum, Tensor rows, Tensor grad, Tensor hyper, Tensor counter, Maybe kahan,
                 Maybe row_decay, Maybe decay_sum, int64_t row_offset, bool decoupled) {
  sparse_update(row_state_of(param, momentum, {}, kahan, {}, row_decay, decay_sum, {}, hyper, counter, row_offset,
                             decoupled),
                param, rows, grad);
}

void sparse_adagrad_(Tensor param, Tensor second, Tensor rows, Tensor grad, Tensor hyper, Tensor counter, Maybe kahan,
                     Maybe row_decay, Maybe decay_sum, int64_t row_offset, bool decoupled) {
  sparse_update(row_state_of(param, {}, second, kahan, {}, row_decay, decay_sum, {}, hyper, counter, row_offset,
                             decoupled),
                param, rows, grad);
}

void sparse_adam_(Tensor param, Tensor momentum, Tensor second, Tensor rows, Tensor grad, Tensor hyper, Tensor counter,
                  Maybe kahan, Maybe row_step, Maybe row_decay, Maybe decay_sum, int64_t row_offset, bool decoupled) {
  sparse_update(row_state_of(param, momentum, second, kahan, row_step, row_decay, decay_sum, {}, hyper, counter,
                             row_offset, decoupled),
                param, rows, grad);
}

void bag_step_(Tensor weight, Tensor grad, Tensor token, Tensor offset, Tensor hyper, Tensor counter,
               Maybe token_weight, Maybe momentum, Maybe second, Maybe kahan, Maybe row_step, Maybe row_decay,
               Maybe decay_sum, int64_t row_offset, bool decoupled) {
  check(token, "token", ScalarType::Long);
  check(offset, "offset", ScalarType::Long);
  xk::BagStep a{};
  a.state = row_state_of(weight, momentum, second, kahan, row_step, row_decay, decay_sum, {}, hyper, counter,
                         row_offset, decoupled);
  a.n = weight.size(0);
  a.grad = grad.const_data_ptr();
  a.grad_dtype = dtype_of(grad, "grad");
  a.bags = offset.numel() - 1;
  check_size(grad, "grad", a.bags * a.state.width);
  a.token = static_cast<const int64_t*>(token.const_data_ptr());
  a.count = token.numel();
  a.offset = static_cast<const int64_t*>(offset.const_data_ptr());
  STD_TORCH_CHECK(a.bags >= 0, "argument offset: expected [B + 1], got no element");
  STD_TORCH_CHECK(a.count <= xk::cuda::kMaxOccurrences && a.n <= xk::cuda::kMaxBagRows, "arguments token and weight: ",
                  "expected at most ", xk::cuda::kMaxOccurrences, " occurrences and ", xk::cuda::kMaxBagRows,
                  " rows on a CUDA device, got ", a.count, " and ", a.n);
  if (token_weight) {
    check(*token_weight, "token_weight", ScalarType::Float);
    check_size(*token_weight, "token_weight", a.count);
    a.token_weight = static_cast<const float*>(token_weight->const_data_ptr());
  }
  launch(weight, a, &xk::cuda::bag_step_workspace, &xk::cuda::bag_step);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(xmlkernels, CUDA, m) {
  m.impl("sparse_sgd_", TORCH_BOX(&sparse_sgd_));
  m.impl("sparse_adagrad_", TORCH_BOX(&sparse_adagrad_));
  m.impl("sparse_adam_", TORCH_BOX(&sparse_adam_));
  m.impl("bag_step_", TORCH_BOX(&bag_step_));
}
