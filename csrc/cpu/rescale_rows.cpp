// rescale_rows: rows of an 8-bit table that fill more than half their range get a larger scale, and
// are coded anew.
#include <atomic>

#include "update.h"

namespace xk::XK_NS {

namespace {

constexpr int64_t kBlock = 256;  // rows of one work item
constexpr float kLargestScale = 0x1p100f;

// One row coded in units of `scale`; returns its largest |value|.
float encode_again(const RescaleRows& a, const Update& base, int64_t row, float scale) {
  Update u = base;
  const float old = a.row_scale[2 * row];
  uint32_t largest = 0;
  for (int64_t column = 0; column < a.width; column += kChunk) {
    const int64_t count = min64(kChunk, a.width - column);
    u.columns(column);
    Slot slot;
    Chunk c;
    void* const p = slot.open(u.weight, row * a.width + column, count);
    load_chunk<DType::f8>(c, p);
    for (int i = 0; i < kChunkVecs; ++i) c.v[i] = c.v[i] * old;
    const uint32_t code =
        store_f8(u, c, 1 / scale, p, count, uint64_t(row) + uint64_t(a.row_offset), kStreamRescale);
    slot.close(count);
    largest = code > largest ? code : largest;
  }
  return f8_to_f32(splat(largest))[0] * scale;
}

}  // namespace

void rescale_rows(const RescaleRows& a, const Host& host) {
  const Hyper hyper{};
  RowState state{};
  state.weight = a.weight;
  state.dtype = DType::f8;
  state.width = a.width;
  state.hyper = &hyper;
  state.counter = a.counter;
  const Update base(state);
  std::atomic<int64_t> count{0};
  for_each_item(host, ceil_div(a.rows, kBlock), [&](int64_t item, int64_t) {
    int64_t changed = 0;
    for (int64_t row = item * kBlock; row < min64(a.rows, (item + 1) * kBlock); ++row) {
      float *at = a.row_scale + 2 * row, scale = at[0];
      while (scale > 0 && scale < kLargestScale && at[1] > kMaxF8 / 2 * scale) scale *= 2;
      if (scale == at[0]) continue;
      at[1] = encode_again(a, base, row, scale);
      at[0] = scale;
      ++changed;
    }
    count.fetch_add(changed, std::memory_order_relaxed);
  });
  *a.count = count.load();
}

}  // namespace xk::XK_NS
