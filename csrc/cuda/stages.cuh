// Launches that both updates are made of. Everything on one stream, in this order: prepare, update.
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

// What the first launch of a call leaves for the others, at the head of the workspace.
//
// The gradient must be read whole before anything is written, so that one value that is not finite
// touches nothing, and by then most of a large one has left L2. No log for an undo would be
// smaller: a small moment is lost in a large gradient's, so up to all its bits must be kept.
constexpr int kFlags = 1024;  // as many blocks check the gradient at most
struct Head {
  Coefficients c;
  // Of bag_step: rows that one warp would take too long for. Not among the coefficients, which some
  // blocks still copy while others count.
  uint32_t long_runs;
  alignas(8) uint8_t bad[kFlags];  // by block: whether it saw a value that is not finite
};

// Writes the head. Checks grad [count, D]; with `rows`, those of its rows that belong to a row
// below n.
void prepare(const RowState& state, const int64_t* rows, int64_t count, int64_t n, const void* grad,
             DType dtype, Head* head, cudaStream_t stream);

// One group of lanes per entry of rows; of the first *limit entries alone, where limit is given (a
// device pointer).
void update_rows(const SparseUpdate& args, const uint32_t* limit, const Head* head,
                 cudaStream_t stream);

// The coefficients in shared memory: registers are scarcer in the kernels that use them. For all
// threads of a block. Returns whether everything that was checked is finite.
__device__ __forceinline__ bool share(Coefficients& c, const Head* from) {
  constexpr int kWords = sizeof(Coefficients) / 4;
  static_assert(kWords <= kThreads && kFlags == kThreads * 8);
  const int i = threadIdx.x;
  if (i < kWords)
    reinterpret_cast<uint32_t*>(&c)[i] = reinterpret_cast<const uint32_t*>(&from->c)[i];
  const uint2 bad = i < kThreads ? reinterpret_cast<const uint2*>(from->bad)[i] : uint2{};
  return !__syncthreads_or(bad.x | bad.y) && !c.not_finite;
}

template <class... F>
struct Formats {};  // for which a kernel is compiled, beside AnyFormat

// Calls f(momentum, second, vector, format) with the first three as std::bool_constant: a kernel
// for each rule, layout and format.
template <class... Form, class F>
void for_rule(const RowState& s, DType grad, bool vector, Formats<Form...>, const F& f) {
  const auto pinned = [&](auto momentum, auto second, auto format) {
    if constexpr (format.kOneDtype || momentum || second) {
      if (format.fits(s, grad)) return f(momentum, second, std::true_type{}, format), true;
    }
    return false;
  };
  const auto with_layout = [&](auto momentum, auto second) {
    if (!vector) return f(momentum, second, std::false_type{}, AnyFormat{});
    if (!(pinned(momentum, second, Form{}) || ...))
      f(momentum, second, std::true_type{}, AnyFormat{});
  };
  const auto with_second = [&](auto momentum) {
    s.second.data ? with_layout(momentum, std::true_type{})
                  : with_layout(momentum, std::false_type{});
  };
  s.momentum.data ? with_second(std::true_type{}) : with_second(std::false_type{});
}

}  // namespace xk::cuda
