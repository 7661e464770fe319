// What the kernels share that update scattered rows: one worker's gradient row, and the fetching ahead of what comes next.
#pragma once

#include "finite.h"
#include "row_update.h"

namespace xk::XK_NS {

// Rows of a table that lie anywhere in memory: no hardware sees the next one coming, so it is asked for while the row
// before it is computed.
class RowPrefetch {
 public:
  explicit RowPrefetch(const RowState& s) {
    const auto add = [&](const void* data, int64_t bytes) {
      if (data) base_[count_] = static_cast<const char*>(data), bytes_[count_++] = bytes;
    };
    add(s.weight, s.width * dtype_size(s.dtype));
    add(s.momentum.data, s.width * dtype_size(s.momentum.dtype));
    add(s.second.data, (s.row_wise ? 1 : s.width) * dtype_size(s.second.dtype));
    add(s.kahan.data, s.width * dtype_size(s.kahan.dtype));
  }
  void operator()(int64_t row) const {
    for (int i = 0; i < count_; ++i) {
      const char* const at = base_[i] + row * bytes_[i];
      for (int64_t b = 0; b < bytes_[i]; b += kCacheLine) __builtin_prefetch(at + b, 1);
      __builtin_prefetch(at + bytes_[i] - 1, 1);  // a row need not begin on a line
    }
  }

 private:
  const char* base_[4];
  int64_t bytes_[4];
  int count_ = 0;
};

// One gradient row for each worker, as RowUpdate reads it: whole chunks.
class GradientRows {
 public:
  GradientRows(int64_t width, int64_t workers) : stride_(round_up(width, kChunk)), rows_(stride_ * workers) {
    std::memset(rows_.data, 0, size_t(stride_ * workers) * 4);
  }
  float* operator[](int64_t worker) { return rows_.data + worker * stride_; }

 private:
  int64_t stride_;
  Buffer<float> rows_;
};

}  // namespace xk::XK_NS
