// The occurrences of an embedding bag's rows: how they are keyed, and how a run of them is added
// up.
#pragma once

#include "common.cuh"

namespace xk::cuda {

struct Occurrence {
  uint32_t row;  // n for fill
  uint2 value;   // bag, and the bits of the weight
};

// The occurrences in order of their row.
struct Runs {
  const uint32_t* row;  // [T]
  const uint2* value;   // [T]
  int64_t count;        // T
};

XK_FN Occurrence occurrence(const BagStep& a, int64_t j) {
  const int64_t row = a.token[j];
  int64_t low = 0, high = a.bags;  // the first bag that ends behind j
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (a.offset[middle + 1] > j)
      high = middle;
    else
      low = middle + 1;
  }
  const bool real = uint64_t(row) < uint64_t(a.n) && low < a.bags && j >= a.offset[0];
  return {uint32_t(real ? row : a.n),
          make_uint2(uint32_t(low), bits_of(a.token_weight ? a.token_weight[j] : 1.0f))};
}

// Adds up `count` columns over the occurrences first, first + step, ... below end.
template <bool kVector>
XK_FN Values sum_run(const BagStep& a, const Runs& runs, int64_t first, int64_t end, int step,
                     int64_t column, int count) {
  Values sum{};
#pragma unroll 4
  for (int64_t p = first; p < end; p += step) {
    const uint2 value = runs.value[p];
    const Raw raw = load_raw<kVector, false>(a.grad, a.grad_dtype,
                                             int64_t(value.x) * a.state.width + column, count);
    const Values g = widen(raw, a.grad_dtype);
    const float weight = float_of(value.y);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum.v[i] += weight * g.v[i];
  }
  return sum;
}

}  // namespace xk::cuda
