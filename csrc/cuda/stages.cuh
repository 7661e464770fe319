// Launches that both updates are made of. Everything on one stream, in this order: prepare,
// check_finite, update.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "launch.h"
#include "row_update.cuh"

// XK_LAUNCH(kernel, blocks, threads, stream)(arguments): the tests put another one in its place, to
// run without a card.
#ifndef XK_LAUNCH
#define XK_LAUNCH(kernel, blocks, threads, stream) kernel<<<blocks, threads, 0, stream>>>
#endif

namespace xk::cuda {

// At least 5 blocks of 4 warps on a multiprocessor, that is at most 96 registers a thread: enough
// loads in flight.
constexpr int kThreads = 128, kBlocks = 5;
constexpr int64_t kAlign = 256;

XK_FN int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlign) * kAlign; }

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("xmlkernels: ") + what + ": " + cudaGetErrorString(error));
}
inline void check_launch(const char* what) { check(cudaGetLastError(), what); }

// Blocks for `groups` groups of `lanes` lanes.
inline uint32_t blocks_for(int64_t groups, int lanes) {
  return uint32_t(ceil_div(groups, kThreads / lanes));
}

// Writes the call's coefficients, the flags among them cleared.
void prepare(const RowState& state, Coefficients* c, cudaStream_t stream);

// Raises c->not_finite where a row of grad [count, D] has a value that is not finite; with `rows`,
// where it is a row below n.
void check_finite(const int64_t* rows, int64_t count, int64_t n, const void* grad, DType dtype,
                  int64_t width, Coefficients* c, cudaStream_t stream);

// One group of lanes per entry of rows; of the first *limit entries alone, where limit is given (a
// device pointer).
void update_rows(const SparseUpdate& args, const uint32_t* limit, const Coefficients* c,
                 cudaStream_t stream);

// The coefficients in shared memory: registers are scarcer in the kernels that use them. For all
// threads of a block.
__device__ __forceinline__ void share(Coefficients& c, const Coefficients* from) {
  constexpr int kWords = sizeof(Coefficients) / 4;
  static_assert(kWords <= kThreads);
  if (threadIdx.x < kWords)
    reinterpret_cast<uint32_t*>(&c)[threadIdx.x] =
        reinterpret_cast<const uint32_t*>(from)[threadIdx.x];
  __syncthreads();
}

// Calls f(momentum, second, vector) with the three as std::bool_constant: a kernel for each rule
// and layout.
template <class F>
void for_rule(const RowState& s, bool vector, const F& f) {
  const auto with_layout = [&](auto momentum, auto second) {
    vector ? f(momentum, second, std::true_type{}) : f(momentum, second, std::false_type{});
  };
  const auto with_second = [&](auto momentum) {
    s.second.data ? with_layout(momentum, std::true_type{})
                  : with_layout(momentum, std::false_type{});
  };
  s.momentum.data ? with_second(std::true_type{}) : with_second(std::false_type{});
}

}  // namespace xk::cuda
