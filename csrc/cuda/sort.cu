// sort_pairs: CUB's radix sort, which passes over as many digits as the keys have.
#include "sort.cuh"

#include <cub/device/device_radix_sort.cuh>

#include "stages.cuh"

namespace xk::cuda {

int64_t sort_scratch(int64_t count) {
  size_t bytes = 0;
  const cudaError_t error = cub::DeviceRadixSort::SortPairs(
      nullptr, bytes, static_cast<const uint32_t*>(nullptr), static_cast<uint32_t*>(nullptr),
      static_cast<const uint2*>(nullptr), static_cast<uint2*>(nullptr), int32_t(count));
  check(error, "sort_scratch");
  return int64_t(bytes);
}

void sort_pairs(const uint32_t* keys, uint32_t* sorted_keys, const uint2* values,
                uint2* sorted_values, int64_t count, int bits, void* scratch, int64_t scratch_bytes,
                cudaStream_t stream) {
  size_t bytes = size_t(scratch_bytes);
  check(cub::DeviceRadixSort::SortPairs(scratch, bytes, keys, sorted_keys, values, sorted_values,
                                        int32_t(count), 0, bits, stream),
        "sort_pairs");
}

}  // namespace xk::cuda
