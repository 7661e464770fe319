// The CUDA kernels as plain functions: enqueued on a stream, without a wait, a read of a device
// value on the host, or an allocation, so that a CUDA graph can capture them. The caller brings the
// workspace, aligned to 256 bytes; what it holds before does not matter. Throw std::runtime_error
// where a launch fails.
#pragma once

#include "../kernels.h"

namespace xk::cuda {

int64_t sparse_update_workspace(const SparseUpdate& args);  // bytes
void sparse_update(const SparseUpdate& args, void* workspace, void* stream);

constexpr int64_t kMaxOccurrences = (int64_t(1) << 31) - 1;  // T of bag_step
constexpr int64_t kMaxBagRows = (int64_t(1) << 32) - 2;  // n of bag_step: the sort's keys have 32
                                                         // bits
int64_t bag_step_workspace(const BagStep& args);
void bag_step(const BagStep& args, void* workspace, void* stream);

}  // namespace xk::cuda
