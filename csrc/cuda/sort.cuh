// The one sort: occurrences by table row, stable. In a file of its own because CUB is most of its
// compile time.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace xk::cuda {

// Bytes of scratch for sorting `count` pairs.
int64_t sort_scratch(int64_t count);

// Sorts pairs by the low `bits` of their key into the other arrays; equal keys keep their order.
void sort_pairs(const uint32_t* keys, uint32_t* sorted_keys, const uint2* values,
                uint2* sorted_values, int64_t count, int bits, void* scratch, int64_t scratch_bytes,
                cudaStream_t stream);

}  // namespace xk::cuda
