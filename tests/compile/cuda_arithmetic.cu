// The arithmetic of csrc/cuda as host code, called through ctypes: what a lane computes, lane after lane. Nothing here
// needs a card; the launches, the sort and the exchange between lanes are not part of it.
#include <algorithm>
#include <numeric>
#include <vector>

#include "cuda/bag_runs.cuh"
#include "cuda/stages.cuh"

using namespace xk;
using namespace xk::cuda;

namespace {

// One row as a group of lanes updates it. gradient(column, count).
template <bool kMomentum, bool kSecond, bool kVector, class Gradient>
void row_on_host(const RowState& s, const Coefficients& c, int64_t row, const Gradient& gradient) {
  const int lanes = lanes_for(s.width);
  const int64_t stride = int64_t(lanes) * kChunk;
  float v_row = 0;
  if (kSecond && s.row_wise) {
    std::vector<float> squares(lanes);
    for (int lane = 0; lane < lanes; ++lane)
      for (int64_t column = int64_t(lane) * kChunk; column < s.width; column += stride) {
        const Place at = place_of(s, row, column);
        squares[lane] += square_sum<kVector>(s, c, at, gradient(column, at.count));
      }
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      const std::vector<float> before = squares;
      for (int lane = 0; lane < lanes; ++lane) squares[lane] += before[lane ^ distance];
    }
    v_row = row_second(s, c, row, squares[0]);
  }
  const RowFactors f = row_factors(s, c, row);
  for (int64_t column = 0; column < s.width; column += kChunk) {
    const Place at = place_of(s, row, column);
    update_chunk<kMomentum, kSecond, kVector>(s, c, f, at, v_row, [&] { return gradient(column, at.count); });
  }
  store_row_values(s, c, row, v_row);
}

template <bool kVector>
bool grad_not_finite(const void* grad, DType dtype, int64_t entry, int64_t width) {
  bool bad = false;
  for (int64_t column = 0; column < width; column += kChunk)
    bad |= not_finite(load_raw<kVector, false>(grad, dtype, entry * width + column, int(std::min<int64_t>(kChunk, width - column))),
                      dtype);
  return bad;
}

Values scaled(Values g, float scale) {
  for (float& v : g.v) v *= scale;
  return g;
}

void sparse_on_host(const SparseUpdate& a) {
  const Coefficients c = coefficients(a.state);
  for_rule(a.state, in_vectors(a.state, a.grad), [&](auto momentum, auto second, auto vector) {
    for (int64_t e = 0; e < a.count; ++e)
      if (uint64_t(a.rows[e]) < uint64_t(a.n) && grad_not_finite<vector>(a.grad, a.grad_dtype, e, a.state.width)) return;
    for (int64_t e = 0; e < a.count; ++e)
      if (uint64_t(a.rows[e]) < uint64_t(a.n))
        row_on_host<momentum, second, vector>(a.state, c, a.rows[e], [&](int64_t column, int count) {
          return scaled(widen(load_raw<vector>(a.grad, a.grad_dtype, e * a.state.width + column, count), a.grad_dtype), c.scale);
        });
  });
}

void bag_on_host(const BagStep& a) {
  const Coefficients c = coefficients(a.state);
  std::vector<Occurrence> all(a.count);
  for (int64_t j = 0; j < a.count; ++j) all[j] = occurrence(a, j);
  std::stable_sort(all.begin(), all.end(), [](const Occurrence& x, const Occurrence& y) { return x.row < y.row; });
  std::vector<uint32_t> row(a.count);
  std::vector<uint2> value(a.count);
  for (int64_t j = 0; j < a.count; ++j) row[j] = all[j].row, value[j] = all[j].value;
  const Runs runs{row.data(), value.data(), a.count};
  for_rule(a.state, in_vectors(a.state, a.grad), [&](auto momentum, auto second, auto vector) {
    for (int64_t b = 0; b < a.bags; ++b)
      if (grad_not_finite<vector>(a.grad, a.grad_dtype, b, a.state.width)) return;
    for (const Occurrence& o : all)
      if (not_finite(o.value.y, 0x7f800000u)) return;
    for (int64_t begin = 0, end; begin < a.count && row[begin] < a.n; begin = end) {
      for (end = begin + 1; end < a.count && row[end] == row[begin];) ++end;
      row_on_host<momentum, second, vector>(a.state, c, row[begin], [&](int64_t column, int count) {
        return scaled(sum_run<vector>(a, runs, begin, end, 1, column, count), c.scale);
      });
    }
  });
}

// The arguments as Python packs them: pointers and numbers in the order of cuda_arithmetic.py.
RowState state_of(void* const* p, const int64_t* n) {
  RowState s{};
  s.weight = p[0], s.dtype = DType(n[0]), s.width = n[4];
  s.momentum = {p[1], DType(n[1])};
  s.second = {p[2], DType(n[2])};
  s.kahan = {p[3], DType(n[0])};
  s.row_step = static_cast<int64_t*>(p[4]);
  s.row_decay = static_cast<float*>(p[5]);
  s.decay_sum = static_cast<const float*>(p[6]);
  s.hyper = static_cast<const float*>(p[7]);
  s.counter = static_cast<const int64_t*>(p[8]);
  s.row_wise = n[5], s.row_offset = n[6], s.decoupled = n[7];
  return s;
}

}  // namespace

extern "C" {

void philox_words(const uint32_t* in, int64_t count, uint32_t* out) {
  for (int64_t i = 0; i < count; ++i, in += 6) {
    const Words w = philox(in[0], in[1], in[2], in[3], in[4], in[5]);
    std::copy(w.w, w.w + 4, out + 4 * i);
  }
}

// The 16 bits of each column of one row, as a chunk takes them.
void row_bits(int64_t seed, int64_t step, int64_t row, int64_t columns, int64_t stream, uint16_t* out) {
  for (int64_t c = 0; c < columns; ++c)
    out[c] = uint16_t(random16(philox(uint32_t(seed), uint32_t(step), uint32_t(row), uint32_t(uint64_t(row) >> 32),
                                      uint32_t(c / kChunk), uint32_t(stream)),
                               int(c % kChunk)));
}

void round16(const float* v, const uint32_t* random, int64_t count, int64_t dtype, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = uint16_t(DType(dtype) == DType::bf16 ? stochastic_bf16(v[i], random[i]) : stochastic_f16(v[i], random[i]));
}

void nearest(const float* v, int64_t count, int64_t dtype, uint16_t* out, float* back) {
  const float limit = DType(dtype) == DType::bf16 ? kMaxBf16 : kMaxF16;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = uint16_t(nearest16(clamp(v[i], limit), DType(dtype)));
    back[i] = widen16(out[i], DType(dtype));
  }
}

void sparse_update_host(void* const* p, const int64_t* n) {
  sparse_on_host({state_of(p, n), n[8], static_cast<const int64_t*>(p[9]), n[9], p[10], DType(n[3])});
}

void bag_step_host(void* const* p, const int64_t* n) {
  BagStep a{};
  a.state = state_of(p, n), a.n = n[8], a.count = n[9], a.grad = p[10], a.grad_dtype = DType(n[3]);
  a.token = static_cast<const int64_t*>(p[9]), a.offset = static_cast<const int64_t*>(p[11]), a.bags = n[10];
  a.token_weight = static_cast<const float*>(p[12]);
  bag_on_host(a);
}
}
