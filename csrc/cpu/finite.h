// Is every value of an array finite? Asked before a table is touched.
#pragma once

#include "simd.h"

namespace xk::XK_NS {

// Values begin..end of an array.
inline bool all_finite(const void* data, DType dtype, int64_t begin, int64_t end) {
  uint32_t bad = 0;  // no early end: the plain loop becomes vector code
  if (dtype == DType::f32) {
    const auto* p = static_cast<const uint32_t*>(data);
    for (int64_t i = begin; i < end; ++i) bad |= uint32_t((p[i] & 0x7f800000u) == 0x7f800000u);
  } else {
    const auto* p = static_cast<const uint16_t*>(data);
    const uint16_t exponent = dtype == DType::bf16 ? 0x7f80 : 0x7c00;
    for (int64_t i = begin; i < end; ++i) bad |= uint32_t((p[i] & exponent) == exponent);
  }
  return bad == 0;
}

// The same for the first `count` values, on all threads.
inline bool all_finite(const void* data, DType dtype, int64_t count, const Host& host) {
  constexpr int64_t kBlock = 1 << 18;
  std::atomic<int64_t> bad{0};
  for_each_item(host, ceil_div(count, kBlock), [&](int64_t i, int64_t) {
    if (!all_finite(data, dtype, i * kBlock, min64(count, (i + 1) * kBlock)))
      bad.store(1, std::memory_order_relaxed);
  });
  return bad.load() == 0;
}

}  // namespace xk::XK_NS
