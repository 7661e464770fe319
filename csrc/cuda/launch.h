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

// The second pass of bce_step over a chunk of labels, SGD of a bf16 table: adds Gᵀ W to partial and
// updates the rows. In libraries that are built with CUTLASS, for sm_90a alone; needs no workspace.
constexpr int64_t kPassSamples = 128;  // at most; of every matrix a multiple of 8 columns, addresses
                                       // multiples of 16
struct BcePass {
  const void* x;         // bf16 [batch, width]
  const void* gradient;  // bf16 [chunk, pitch], zeros beyond samples and rows
  void* weight;          // bf16 [rows, width]
  float* partial;        // [splits, batch, width]: sums of the chunks before, where first > 0
  const Hyper* hyper;
  const int64_t* counter;
  const int32_t* flag;  // [1]: nothing is written where it is not 0
  int64_t batch, pitch, rows, width;
  int64_t first, chunk;  // the chunk's first row, and rows of a chunk
  int64_t splits;        // blocks that share the labels of a chunk
  int64_t row_offset;    // global row of weight[0]
  bool decoupled;
};
void bce_pass(const BcePass& args, void* stream);

}  // namespace xk::cuda
