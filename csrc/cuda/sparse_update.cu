// sparse_update: an optimizer step on the rows that a batch touched. One group of lanes owns one
// row.
#include "stages.cuh"

namespace xk::cuda {

namespace {

__global__ void prepare_kernel(RowState state, Coefficients* c) { *c = coefficients(state); }

// Reads as the update does, but leaves what it reads in L2: the update begins with the rows that
// were read last.
template <bool kVector>
__global__ void __launch_bounds__(kThreads)
    check_kernel(const int64_t* rows, int64_t count, int64_t n, const void* grad, DType dtype,
                 int64_t width, int lanes, Coefficients* c) {
  const int64_t entry = int64_t(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
  if (entry >= count || (rows && uint64_t(rows[entry]) >= uint64_t(n))) return;
  bool bad = false;
  for (int64_t column = int64_t(threadIdx.x % lanes) * kChunk; column < width;
       column += int64_t(lanes) * kChunk) {
    const int left = width - column < kChunk ? int(width - column) : kChunk;
    bad |= not_finite(load_raw<kVector, false>(grad, dtype, entry * width + column, left), dtype);
  }
  if (bad) c->not_finite = 1;  // whoever writes it writes the same
}

template <bool kMomentum, bool kSecond, bool kVector>
__global__ void __launch_bounds__(kThreads, kBlocks)
    update_kernel(SparseUpdate a, const uint32_t* limit, int lanes,
                  const Coefficients* coefficients) {
  __shared__ Coefficients c;
  share(c, coefficients);
  const int64_t block = int64_t(gridDim.x) - 1 - blockIdx.x;  // what the check read last comes
                                                              // first
  const int64_t entry = block * (kThreads / lanes) + threadIdx.x / lanes;
  if (entry >= (limit ? int64_t(*limit) : a.count)) return;
  const int64_t row = a.rows[entry];
  if (c.not_finite || uint64_t(row) >= uint64_t(a.n)) return;
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

void prepare(const RowState& state, Coefficients* c, cudaStream_t stream) {
  XK_LAUNCH(prepare_kernel, 1, 1, stream)(state, c);
  check_launch("prepare");
}

void check_finite(const int64_t* rows, int64_t count, int64_t n, const void* grad, DType dtype,
                  int64_t width, Coefficients* c, cudaStream_t stream) {
  if (count == 0) return;
  const int lanes = lanes_for(width);
  const bool vector = width % kChunk == 0 && reinterpret_cast<uintptr_t>(grad) % 16 == 0;
  const auto kernel = vector ? check_kernel<true> : check_kernel<false>;
  XK_LAUNCH(kernel, blocks_for(count, lanes), kThreads, stream)(rows, count, n, grad, dtype, width,
                                                                lanes, c);
  check_launch("check_finite");
}

void update_rows(const SparseUpdate& a, const uint32_t* limit, const Coefficients* c,
                 cudaStream_t stream) {
  if (a.count == 0) return;
  const int lanes = lanes_for(a.state.width);
  for_rule(a.state, in_vectors(a.state, a.grad), [&](auto momentum, auto second, auto vector) {
    const auto kernel = update_kernel<momentum, second, vector>;
    XK_LAUNCH(kernel, blocks_for(a.count, lanes), kThreads, stream)(a, limit, lanes, c);
  });
  check_launch("update_rows");
}

int64_t sparse_update_workspace(const SparseUpdate&) { return aligned(sizeof(Coefficients)); }

void sparse_update(const SparseUpdate& a, void* workspace, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  auto* const c = static_cast<Coefficients*>(workspace);
  if (a.count == 0) return;
  prepare(a.state, c, s);
  check_finite(a.rows, a.count, a.n, a.grad, a.grad_dtype, a.state.width, c, s);
  update_rows(a, nullptr, c, s);
}

}  // namespace xk::cuda
