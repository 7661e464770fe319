// What the kernels share that update scattered rows: one worker's gradient row, and the fetching
// ahead of what comes next.
#pragma once

#include "finite.h"
#include "row_update.h"

namespace xk::XK_NS {

// Rows of a table that lie anywhere in memory: no hardware sees the next one coming, so it is asked
// for while a row before it is computed, chunk by chunk: all at once would fill the few places for
// lines on their way and stall the rest.
class RowPrefetch {
 public:
  explicit RowPrefetch(const RowState& s) {
    const auto add = [&](const void* data, int64_t elem, int64_t width) {
      if (data)
        arrays_[count_++] = {static_cast<const char*>(data), elem * width,
                             elem * min64(width, kChunk)};
    };
    add(s.weight, dtype_size(s.dtype), s.width);
    add(s.momentum.data, dtype_size(s.momentum.dtype), s.width);
    add(s.second.data, dtype_size(s.second.dtype), s.row_wise ? 1 : s.width);
    add(s.kahan.data, dtype_size(s.kahan.dtype), s.width);
    add(s.row_step, sizeof(int64_t), 1);
    add(s.row_decay, sizeof(float), 1);
  }

  // Chunk `c` of the columns of a row.
  void operator()(int64_t row, int64_t c) const {
    for (int i = 0; i < count_; ++i) {
      const Array& a = arrays_[i];
      const int64_t end = min64(a.row, (c + 1) * a.chunk);
      for (int64_t b = c * a.chunk; b < end; b += kCacheLine)
        __builtin_prefetch(a.data + row * a.row + b, 1);
      // A row need not begin on a line.
      if (end == a.row && c * a.chunk < end) __builtin_prefetch(a.data + row * a.row + end - 1, 1);
    }
  }

 private:
  struct Array {
    const char* data;
    int64_t row, chunk;  // bytes
  };
  Array arrays_[6];
  int count_ = 0;
};

// One gradient row for each worker, as RowUpdate reads it: whole chunks.
class GradientRows {
 public:
  GradientRows(int64_t width, int64_t workers)
      : stride_(round_up(width, kChunk)), rows_(stride_ * workers) {
    std::memset(rows_.data, 0, size_t(stride_ * workers) * 4);
  }
  float* operator[](int64_t worker) { return rows_.data + worker * stride_; }

 private:
  int64_t stride_;
  Buffer<float> rows_;
};

}  // namespace xk::XK_NS
