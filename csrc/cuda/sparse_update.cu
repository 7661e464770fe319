// sparse_update: an optimizer step on the rows that a batch touched. One group of lanes owns one
// row.
#include "stages.cuh"

namespace xk::cuda {

namespace {

constexpr DType f32 = DType::f32, bf16 = DType::bf16, f16 = DType::f16;
using SparseFormats =
    Formats<Format<f32, f32, f32>, Format<bf16, bf16, f32>, Format<bf16, bf16, bf16>,
            Format<bf16, f32, f32>, Format<bf16, f32, bf16>, Format<f16, f16, f32>,
            Format<f16, f32, f32>>;

// Coefficients by the last block, the check by all others, which take rows in turn. Reads as the
// update does, but leaves what it reads in L2: the update begins with the rows that were read last.
template <bool kVector>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(RowState state, const int64_t* rows, int64_t count, int64_t n, const void* grad,
                   DType dtype, int lanes, Head* head) {
  const int checking = int(gridDim.x) - 1;
  if (int(blockIdx.x) == checking) {
    for (int i = checking + int(threadIdx.x); i < kFlags; i += kThreads) head->bad[i] = 0;
    if (threadIdx.x == 0) head->c = coefficients(state), head->long_runs = 0;
    return;
  }
  const int per_block = kThreads / lanes;
  bool bad = false;
  for (int64_t entry = int64_t(blockIdx.x) * per_block + threadIdx.x / lanes; entry < count;
       entry += int64_t(checking) * per_block) {
    if (rows && uint64_t(rows[entry]) >= uint64_t(n)) break;  // fill is at the end
#pragma unroll 3
    for (int64_t column = int64_t(threadIdx.x % lanes) * kChunk; column < state.width;
         column += int64_t(lanes) * kChunk) {
      const int64_t left = state.width - column;
      bad |= not_finite(load_raw<kVector, false>(grad, dtype, entry * state.width + column,
                                                 left < kChunk ? int(left) : kChunk),
                        dtype);
    }
  }
  const int any = __syncthreads_or(bad);
  if (threadIdx.x == 0) head->bad[blockIdx.x] = any != 0;
}

template <bool kMomentum, bool kSecond, bool kVector, class Form>
__global__ void __launch_bounds__(kThreads, kBlocks)
    update_kernel(SparseUpdate a, const uint32_t* limit, int lanes, const Head* head) {
  __shared__ Coefficients c;
  Form::pin(a.state, a.grad_dtype);
  const bool finite = share(c, head);
  const int64_t block = int64_t(gridDim.x) - 1 - blockIdx.x;  // what the check read last comes
                                                              // first
  const int64_t entry = block * (kThreads / lanes) + threadIdx.x / lanes;
  if (!finite || entry >= (limit ? int64_t(*limit) : a.count)) return;
  const int64_t row = a.rows[entry];
  if (uint64_t(row) >= uint64_t(a.n)) return;
  update_row<kMomentum, kSecond, kVector>(
      a.state, c, row, threadIdx.x % lanes, lanes, [&](int64_t column, int count) {
        Values g =
            widen(load_raw<kVector>(a.grad, a.grad_dtype, entry * a.state.width + column, count),
                  a.grad_dtype);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) g.v[i] *= c.scale;
        return g;
      });
}

}  // namespace

void prepare(const RowState& state, const int64_t* rows, int64_t count, int64_t n, const void* grad,
             DType dtype, Head* head, cudaStream_t stream) {
  const int lanes = lanes_for(state.width);
  const bool vector = state.width % kChunk == 0 && reinterpret_cast<uintptr_t>(grad) % 16 == 0;
  const auto check = vector ? prepare_kernel<true> : prepare_kernel<false>;
  const uint32_t blocks = blocks_for(count, lanes), checking = blocks < kFlags ? blocks : kFlags;
  XK_LAUNCH(check, checking + 1, kThreads, stream)
  (state, rows, count, n, grad, dtype, lanes, head);
  check_launch("prepare");
}

void update_rows(const SparseUpdate& a, const uint32_t* limit, const Head* head,
                 cudaStream_t stream) {
  if (a.count == 0) return;
  const int lanes = lanes_for(a.state.width);
  for_rule(a.state, a.grad_dtype, in_vectors(a.state, a.grad), SparseFormats{},
           [&](auto momentum, auto second, auto vector, auto format) {
             const auto update = update_kernel<momentum, second, vector, decltype(format)>;
             XK_LAUNCH(update, blocks_for(a.count, lanes), kThreads, stream)(a, limit, lanes, head);
           });
  check_launch("update_rows");
}

int64_t sparse_update_workspace(const SparseUpdate&) { return aligned(sizeof(Head)); }

void sparse_update(const SparseUpdate& a, void* workspace, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  auto* const head = static_cast<Head*>(workspace);
  if (a.count == 0) return;
  prepare(a.state, a.rows, a.count, a.n, a.grad, a.grad_dtype, head, s);
  update_rows(a, nullptr, head, s);
}

}  // namespace xk::cuda
