// Torch's view of the CUDA kernels, on the stable ABI; compiled with -DUSE_CUDA -DXK_CUDA into a
// library of its own. No check here reads a tensor's values: that would wait for the device.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "bindings_rows.h"
#include "cuda/launch.h"

namespace {

// Runs a kernel on the table's device and current stream, with a workspace that torch's allocator
// takes back in the stream's order.
template <class Args>
void launch(const Tensor& table, const Args& args, int64_t (*workspace_bytes)(const Args&),
            void (*kernel)(const Args&, void*, void*)) {
  const torch::stable::accelerator::DeviceGuard guard(table.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(table.get_device_index(), &stream));
  Tensor workspace =
      torch::stable::empty({workspace_bytes(args)}, ScalarType::Byte, std::nullopt, table.device());
  kernel(args, workspace.mutable_data_ptr(), stream);
}

void run_sparse_update(const xk::SparseUpdate& a, const Arguments&, const Tensor& param) {
  launch(param, a, &xk::cuda::sparse_update_workspace, &xk::cuda::sparse_update);
}

void run_bag_step(const xk::BagStep& a, const Arguments& args, const Tensor& weight) {
  if (a.count > xk::cuda::kMaxOccurrences || a.n > xk::cuda::kMaxBagRows)
    args.refuse("token and weight",
                text("at most ", xk::cuda::kMaxOccurrences, " occurrences and ",
                     xk::cuda::kMaxBagRows, " rows on a CUDA device"),
                text(a.count, " and ", a.n), "shard the table, or take smaller batches");
  launch(weight, a, &xk::cuda::bag_step_workspace, &xk::cuda::bag_step);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(xmlkernels, CUDA, m) {
  m.impl("sparse_sgd_", TORCH_BOX(&sparse_sgd_<&run_sparse_update>));
  m.impl("sparse_adagrad_", TORCH_BOX(&sparse_adagrad_<&run_sparse_update>));
  m.impl("sparse_adam_", TORCH_BOX(&sparse_adam_<&run_sparse_update>));
  m.impl("bag_step_", TORCH_BOX(&bag_step_<&run_bag_step>));
}
