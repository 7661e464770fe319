// Torch's view of the CUDA kernels, on the stable ABI; compiled with -DUSE_CUDA -DXK_CUDA into a
// library of its own; with -DXK_CUTLASS too where it has bce_pass. No check here reads a tensor's
// values: that would wait for the device.
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

#ifdef XK_CUTLASS
// Refuses a matrix that no TMA descriptor of bf16 takes.
void* described(const Arguments& args, const Tensor& t, const char* name, const Floats& floats) {
  const bool fits = floats.dtype == xk::DType::bf16 && t.size(1) % 8 == 0 &&
                    reinterpret_cast<uintptr_t>(floats.data) % 16 == 0;
  if (!fits)
    args.refuse(name, "torch.bfloat16, rows of 16 bytes on a boundary of 16", describe(t),
                "convert or copy it");
  return floats.data;
}

// No public op: xmlkernels/triton/bce_pass.py calls it.
void bce_pass_(Tensor weight, Tensor x, Tensor gradient, Tensor partial, Tensor hyper,
               Tensor counter, Tensor flag, int64_t rows, int64_t first, int64_t row_offset,
               bool decoupled) {
  Arguments args("bce_pass_", weight, "weight");
  xk::cuda::BcePass a{};
  a.rows = rows, a.first = first, a.row_offset = row_offset, a.decoupled = decoupled;
  a.weight = described(args, weight, "weight", args.table(weight, "weight", true, false));
  a.width = weight.size(1);
  a.x = described(args, x, "x", args.read_floats(x, "x", {-1, a.width}));
  a.batch = x.size(0);
  a.gradient =
      described(args, gradient, "gradient", args.read_floats(gradient, "gradient", {-1, -1}));
  a.chunk = gradient.size(0), a.pitch = gradient.size(1);
  a.partial = args.write<float>(Maybe(partial), "partial", {-1, a.batch, a.width});
  a.splits = partial.size(0);
  const float* const numbers = args.read<float>(hyper, "hyper", {xk::kHyperCount});
  a.hyper = reinterpret_cast<const xk::Hyper*>(numbers);
  a.counter = args.read<int64_t>(counter, "counter", {2});
  a.flag = args.read<int32_t>(flag, "flag", {1});
  args.offset(row_offset, weight.size(0));
  const bool batch = a.batch >= 1 && a.batch <= xk::cuda::kPassSamples && a.batch <= a.pitch;
  if (!batch)
    args.refuse("x and gradient", text("1 to ", xk::cuda::kPassSamples, " samples in both"),
                text(a.batch, " and ", a.pitch), "take another pass");
  const bool chunk = 0 <= first && first < rows && rows <= weight.size(0) &&
                     rows <= std::numeric_limits<int32_t>::max() && a.splits >= 1 &&
                     a.chunk % 64 == 0;
  if (!chunk)
    args.refuse("first and rows", text("a chunk within ", weight.size(0), " rows"),
                text(first, " and ", rows), "pass where the chunk begins");
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(weight.get_device_index(), &stream));
  xk::cuda::bce_pass(a, stream);
}
#endif

}  // namespace

#ifdef XK_CUTLASS
STABLE_TORCH_LIBRARY_FRAGMENT(xmlkernels, m) {
  m.def(
      "bce_pass_(Tensor(a!) weight, Tensor x, Tensor gradient, Tensor(b!) partial, Tensor hyper, "
      "Tensor counter, Tensor flag, int rows, int first, int row_offset, bool decoupled) -> ()");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(xmlkernels, CUDA, m) {
  m.impl("sparse_sgd_", TORCH_BOX(&sparse_sgd_<&run_sparse_update>));
  m.impl("sparse_adagrad_", TORCH_BOX(&sparse_adagrad_<&run_sparse_update>));
  m.impl("sparse_adam_", TORCH_BOX(&sparse_adam_<&run_sparse_update>));
  m.impl("bag_step_", TORCH_BOX(&bag_step_<&run_bag_step>));
#ifdef XK_CUTLASS
  m.impl("bce_pass_", TORCH_BOX(&bce_pass_));
#endif
}
