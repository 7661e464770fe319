// The update of whole table rows, for the ops that touch few of them: what belongs to a row as one
// (a row-wise second moment, its own count of updates, decay that it has not had yet) is settled
// first, then update.h treats its columns.
#pragma once

#include "update.h"

namespace xk::XK_NS {

// Mean over the row of g^2, g with its L2 term: lane by lane over the chunks, then across the
// lanes.
static inline float mean_square(const Update& u, int64_t row, const float* gradient) {
  vf sum{};
  for (int64_t column = 0; column < u.width; column += kChunk) {
    const int64_t count = min64(kChunk, u.width - column), index = row * u.width + column;
    alignas(64) float g[kChunk] = {};  // what lies beyond the row must not count
    std::memcpy(g, gradient + column, size_t(count) * 4);
    Chunk w{};
    if (u.l2 != 0) {
      Slot weight, kahan;
      load_chunk(w, weight.open(u.weight, index, count), u.weight.dtype);
      if (u.row_scale)
        for (int i = 0; i < kChunkVecs; ++i) w.v[i] = w.v[i] * u.row_scale[2 * row];
      if (u.kahan.data) {
        Chunk c;
        load_chunk(c, kahan.open(u.kahan, index, count), u.kahan.dtype);
        for (int i = 0; i < kChunkVecs; ++i) w.v[i] = w.v[i] + c.v[i];
      }
    }
    for (int i = 0; i < kChunkVecs; ++i) {
      const vf v = load<vf>(g + i * kLanes) + u.l2 * w.v[i];
      sum = sum + v * v;
    }
  }
  return float(lane_sum(sum) / double(u.width));
}

// One value of a row-wise state: it draws like column 0 of the row. `at`: the columns from 0.
static inline void store_row_value(const State& s, int64_t row, float value, const PhiloxKey& key,
                                   const PhiloxColumns& at, uint64_t global, Stream stream) {
  const vf v = splat(value);
  if (s.dtype == DType::f32) {
    static_cast<float*>(s.data)[row] = vclamp(v, FLT_MAX)[0];
    return;
  }
  alignas(64) uint16_t random[kChunk];
  draw(key, at, global, stream, random);
  const vu r = splat(uint32_t(random[0]));
  static_cast<uint16_t*>(s.data)[row] =
      uint16_t(s.dtype == DType::bf16 ? round_bf16(v, r)[0] >> 16 : round_f16(v, r)[0]);
}

// Updates whole rows. Built once per call, before anything is written (it takes memory); then
// shared by all workers.
struct RowUpdate {
  const RowState state;
  const Update base;
  const double log_beta1, log_beta2;
  Buffer<PhiloxColumns> columns;
  Buffer<PhiloxColumns32> columns32;  // 8-bit tables

  explicit RowUpdate(const RowState& s)
      : state(s), base(s), log_beta1(std::log(double(s.hyper->beta1))),
        log_beta2(std::log(double(s.hyper->beta2))), columns(ceil_div(s.width, kChunk)),
        columns32(s.row_scale ? ceil_div(s.width, kChunk) : 0) {
    for (int64_t c = 0; c * kChunk < s.width; ++c) {
      columns.data[c] = PhiloxColumns(c * kChunk);
      if (s.row_scale) columns32.data[c] = PhiloxColumns32(c * kChunk);
    }
  }

  // gradient: fp32, scaled, readable up to width rounded up to kChunk; what it holds beyond the
  // width does not matter.
  void row(int64_t row, const float* gradient) const {
    this->row(row, gradient, [](int64_t) {});
  }

  // before_chunk(c) is called before each chunk of columns: the place to ask for what comes next, a
  // little at a time.
  template <class F>
  void row(int64_t row, const float* gradient, F before_chunk) const {
    Update u = base;
    if (state.row_decay) {
      u.keep = float(std::exp(double(*state.decay_sum) - double(state.row_decay[row])));
      state.row_decay[row] = *state.decay_sum;
    }
    if (state.row_step) {
      int64_t& steps = state.row_step[row];
      steps = int64_t(uint64_t(steps) + 1);  // whatever stood there
      const double t = double(steps);
      if (u.rule == Rule::adam || u.rule == Rule::adam_row) {
        u.rate = float(double(u.lr) / -std::expm1(t * log_beta1));
        u.inverse2 = float(1 / -std::expm1(t * log_beta2));
      }
    }
    if (state.row_wise) row_wise(u, row, gradient);
    for (int64_t c = 0; c * kChunk < u.width; ++c) {
      before_chunk(c);
      u.at = columns.data[c];
      if (u.row_scale) u.at32 = columns32.data[c];
      u.row(row, c * kChunk, min64(kChunk, u.width - c * kChunk), gradient + c * kChunk);
    }
  }

 private:
  void row_wise(Update& u, int64_t row, const float* gradient) const {
    const float square = mean_square(u, row, gradient);
    float v;
    widen(u.second.data, u.second.dtype, row, 1, &v);
    v = u.rule == Rule::sgd ? v + square : u.beta2 * v + (1 - u.beta2) * square;
    u.rate = u.rate / (std::sqrt(v * u.inverse2) + u.eps);
    if (u.rule == Rule::sgd && u.l2 != 0) u.keep = 1 - u.rate * u.l2;
    store_row_value(u.second, row, v, u.key, columns.data[0],
                    uint64_t(row) + uint64_t(u.row_offset), kStreamSecond);
  }
};

}  // namespace xk::XK_NS
