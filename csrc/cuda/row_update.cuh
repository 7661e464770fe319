// The update of one table row by a group of lanes, 8 columns each: SGD, momentum, Adagrad, Adam;
// L2, decoupled or late decay; fp32, or bf16 and fp16 rounded stochastically or with Kahan
// compensation. One formula serves the four rules:
//
//   g += l2 w
//   m = beta1 m + gain1 g      (no momentum: m = g; SGD's momentum: gain1 = 1; Adam: 1 - beta1)
//   v = beta2 v + gain2 g^2    (Adagrad: beta2 = gain2 = 1; Adam: gain2 = 1 - beta2; row-wise: the
//                              mean of g^2 over the row)
//   new = keep w - rate m [ / (sqrt(inverse2 v) + eps) ]
//   weight = stochastic(new), or with Kahan: weight = nearest(new), kahan = nearest(new - weight)
//
// The step uses m and v as computed; only what is kept is rounded.
#pragma once

#include <cmath>

#include "common.cuh"

namespace xk::cuda {

// What hyper and counter come to, computed once per call by one thread; lies at the head of the
// workspace.
struct Coefficients {
  float keep, l2, rate, beta1, gain1, beta2, gain2, inverse2, eps, scale, decay_sum;
  uint32_t seed, step;
  double log_beta1, log_beta2;  // for rows that count their own steps
  float lr;
  int32_t not_finite;  // raised where a weight of bag_step's is not finite: then nothing is touched
};

// --- formats ---
// The kernels read the formats of a table at run time, or have them as constants: the common ones,
// vectorised, without what few tables have (Kahan compensation, a row-wise second moment). Same
// source, so same bits; constants halve the instructions.

struct AnyFormat {
  static XK_FN void pin(RowState&, DType&) {}
};

template <DType kTable, DType kState, DType kGrad>
struct Format {
  static constexpr bool kOneDtype = kTable == kState;  // others differ only where there is a state
  static XK_FN void pin(RowState& s, DType& grad) {
    s.dtype = kTable;
    s.momentum.dtype = s.second.dtype = kState;
    s.kahan.data = nullptr;
    s.row_wise = false;
    grad = kGrad;
  }
  static bool fits(const RowState& s, DType grad) {
    const bool states = (!s.momentum.data || s.momentum.dtype == kState) &&
                        (!s.second.data || s.second.dtype == kState);
    return s.dtype == kTable && states && grad == kGrad && !s.kahan.data && !s.row_wise;
  }
};

XK_FN Coefficients coefficients(const RowState& s) {
  Coefficients c{};
  const Hyper& h = *s.hyper;
  const float lr = h.lr, decay = h.decay;
  const bool adam = s.momentum.data && s.second.data;
  c.lr = lr;
  c.keep = s.decoupled ? 1 - lr * decay : 1.0f;
  c.l2 = s.decoupled ? 0.0f : decay;
  c.beta1 = h.beta1;
  c.gain1 = adam ? 1 - h.beta1 : 1.0f;
  c.beta2 = adam ? h.beta2 : 1.0f;
  c.gain2 = adam ? 1 - h.beta2 : 1.0f;
  c.eps = h.epsilon;
  c.scale = h.scale;
  c.decay_sum = s.decay_sum ? *s.decay_sum : 0.0f;
  c.seed = uint32_t(s.counter[0]);
  c.step = uint32_t(s.counter[1]);
  c.rate = lr;
  c.inverse2 = 1;
  if (adam) {
    // 1 - beta^t by expm1: exact to fp32 where beta^t is close to 1, and cheap enough to repeat for
    // each row.
    c.log_beta1 = log(double(h.beta1));
    c.log_beta2 = log(double(h.beta2));
    const double t = double(s.counter[1] + 1);
    c.rate = float(double(lr) / -expm1(t * c.log_beta1));
    c.inverse2 = float(1 / -expm1(t * c.log_beta2));
  }
  return c;
}

// What differs from row to row.
struct RowFactors {
  float keep, rate, inverse2;
};

XK_FN RowFactors row_factors(const RowState& s, const Coefficients& c, int64_t row) {
  RowFactors f{c.keep, c.rate, c.inverse2};
  if (s.row_decay) f.keep = float(exp(double(c.decay_sum) - double(s.row_decay[row])));
  if (s.row_step) {
    const double t = double(s.row_step[row] + 1);
    f.rate = float(double(c.lr) / -expm1(t * c.log_beta1));
    f.inverse2 = float(1 / -expm1(t * c.log_beta2));
  }
  return f;
}

// One row as a lane sees it at its present 8 columns.
struct Place {
  int64_t row, index;  // of the table; of the first column in [n, D]
  uint64_t global;
  uint32_t group;  // column / 8
  int count;       // columns of the row from here on, at most 8
};

XK_FN Place place_of(const RowState& s, int64_t row, int64_t column) {
  const int64_t left = s.width - column;
  return {row, row * s.width + column, uint64_t(row + s.row_offset), uint32_t(column / kChunk),
          left < kChunk ? int(left) : kChunk};
}

XK_FN Words draw(const Coefficients& c, const Place& at, Stream stream) {
  return philox(c.seed, c.step, uint32_t(at.global), uint32_t(at.global >> 32), at.group, stream);
}

template <bool kVector>
XK_FN void store_values(void* base, DType dtype, const Place& at, Values x, const Coefficients& c,
                        Stream stream) {
  Raw raw;
  if (dtype == DType::f32) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) raw.w[i] = bits_of(saturate(x.v[i]));
  } else {
    raw = round_stochastic(x, dtype, draw(c, at, stream));
  }
  store_raw<kVector>(base, dtype, at.index, at.count, raw);
}

// Rounds to nearest, keeps what the rounding left over. From the clamped value: what saturation
// cuts off must not come back in the next step.
template <bool kVector>
XK_FN void store_compensated(const RowState& s, const Place& at, const Values& x) {
  const float limit = s.dtype == DType::bf16 ? kMaxBf16 : kMaxF16;
  Raw weight{}, rest{};
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float v = clamp(x.v[i], limit);
    const uint32_t half = nearest16(v, s.dtype);
    weight.w[i / 2] |= half << (16 * (i % 2));
    rest.w[i / 2] |= nearest16(v - widen16(half, s.dtype), s.dtype) << (16 * (i % 2));
  }
  store_raw<kVector>(s.weight, s.dtype, at.index, at.count, weight);
  store_raw<kVector>(s.kahan.data, s.dtype, at.index, at.count, rest);
}

// The weight with what Kahan compensation holds of it.
XK_FN Values widen_weight(const RowState& s, const Raw& weight, const Raw& kahan) {
  Values w = widen(weight, s.dtype);
  if (s.kahan.data) {
    const Values k = widen(kahan, s.dtype);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) w.v[i] += k.v[i];
  }
  return w;
}

// Sum of the squared gradient over this lane's columns, for a row-wise second moment.
template <bool kVector>
XK_FN float square_sum(const RowState& s, const Coefficients& c, const Place& at,
                       const Values& gradient) {
  Values w{};
  if (c.l2 != 0) {
    const Raw weight = load_raw<kVector, false>(s.weight, s.dtype, at.index, at.count);
    Raw kahan{};
    if (s.kahan.data) kahan = load_raw<kVector, false>(s.kahan.data, s.dtype, at.index, at.count);
    w = widen_weight(s, weight, kahan);
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float g = gradient.v[i] + c.l2 * w.v[i];
    if (i < at.count) sum += g * g;
  }
  return sum;
}

// Updates 8 columns: weight, momentum, a full second moment, kahan. v_row is the row's new second
// moment, if row-wise. gradient() is called between the loads of the states and their use.
template <bool kMomentum, bool kSecond, bool kVector, class Gradient>
XK_FN void update_chunk(const RowState& s, const Coefficients& c, const RowFactors& f,
                        const Place& at, float v_row, const Gradient& gradient) {
  const bool full = kSecond && !s.row_wise;
  Raw raw_m{}, raw_v{}, raw_k{};
  if constexpr (kMomentum)
    raw_m = load_raw<kVector>(s.momentum.data, s.momentum.dtype, at.index, at.count);
  if (full) raw_v = load_raw<kVector>(s.second.data, s.second.dtype, at.index, at.count);
  const Raw raw_w = load_raw<kVector>(s.weight, s.dtype, at.index, at.count);
  if (s.kahan.data) raw_k = load_raw<kVector>(s.kahan.data, s.dtype, at.index, at.count);
  Values step = gradient(), w = widen_weight(s, raw_w, raw_k);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) step.v[i] += c.l2 * w.v[i];
  Values divisor;
  if constexpr (kSecond) {
    Values v;
    if (full) v = widen(raw_v, s.second.dtype);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      v.v[i] = full ? c.beta2 * v.v[i] + c.gain2 * (step.v[i] * step.v[i]) : v_row;
      divisor.v[i] = sqrtf(v.v[i] * f.inverse2) + c.eps;
    }
    if (full) store_values<kVector>(s.second.data, s.second.dtype, at, v, c, kStreamSecond);
  }
  if constexpr (kMomentum) {
    const Values m = widen(raw_m, s.momentum.dtype);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) step.v[i] = c.beta1 * m.v[i] + c.gain1 * step.v[i];
    store_values<kVector>(s.momentum.data, s.momentum.dtype, at, step, c, kStreamMomentum);
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float step_i = f.rate * step.v[i];
    w.v[i] = w.v[i] * f.keep - (kSecond ? step_i / divisor.v[i] : step_i);
  }
  if (s.kahan.data)
    store_compensated<kVector>(s, at, w);
  else
    store_values<kVector>(s.weight, s.dtype, at, w, c, kStreamWeight);
}

// The row-wise second moment: its new value, and its store, which draws like column 0 of the row.
XK_FN float row_second(const RowState& s, const Coefficients& c, int64_t row, float squares) {
  const Raw raw = load_raw<false>(s.second.data, s.second.dtype, row, 1);
  return c.beta2 * widen(raw, s.second.dtype).v[0] + c.gain2 * (squares / float(s.width));
}

// The values that a row has once. By one lane, after all lanes have read them.
XK_FN void store_row_values(const RowState& s, const Coefficients& c, int64_t row, float v_row) {
  if (s.row_wise) {
    Place at = place_of(s, row, 0);
    at.index = row;
    at.count = 1;
    Values v{};
    v.v[0] = v_row;
    store_values<false>(s.second.data, s.second.dtype, at, v, c, kStreamSecond);
  }
  if (s.row_step) s.row_step[row] += 1;
  if (s.row_decay) s.row_decay[row] = c.decay_sum;
}

// One row by a group of `lanes` lanes (a power of two, neighbours in a warp). gradient(column,
// count) is the lane's part of the row's gradient; it may be asked for twice.
template <bool kMomentum, bool kSecond, bool kVector, class Gradient>
__device__ __forceinline__ void update_row(const RowState& s, const Coefficients& c, int64_t row,
                                           int lane, int lanes, const Gradient& gradient) {
  const uint32_t group = (0xffffffffu >> (32 - lanes)) << (threadIdx.x % 32 - lane);
  const int64_t first = int64_t(lane) * kChunk, stride = int64_t(lanes) * kChunk;
  float v_row = 0;
  if (kSecond && s.row_wise) {
    float squares = 0;
    for (int64_t column = first; column < s.width; column += stride) {
      const Place at = place_of(s, row, column);
      squares += square_sum<kVector>(s, c, at, gradient(column, at.count));
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2)
      squares += __shfl_xor_sync(group, squares, distance);
    v_row = row_second(s, c, row, squares);
  }
  const RowFactors f = row_factors(s, c, row);
  for (int64_t column = first; column < s.width; column += stride) {
    const Place at = place_of(s, row, column);
    update_chunk<kMomentum, kSecond, kVector>(s, c, f, at, v_row,
                                              [&] { return gradient(column, at.count); });
  }
  __syncwarp(group);  // every lane has read the row's own values
  if (lane == 0) store_row_values(s, c, row, v_row);
}

// Whether every array of the table, and `other`, can be taken in chunks of 16 bytes.
inline bool in_vectors(const RowState& s, const void* other) {
  const void* const arrays[] = {s.weight, s.momentum.data, s.row_wise ? nullptr : s.second.data,
                                s.kahan.data, other};
  for (const void* p : arrays)
    if (reinterpret_cast<uintptr_t>(p) % 16) return false;
  return s.width % kChunk == 0;
}

// Lanes that share a row: no more than there are chunks in it, so that narrow tables use whole
// warps.
inline int lanes_for(int64_t width) {
  int lanes = 32;
  while (lanes > 1 && (lanes / 2) * kChunk >= width) lanes /= 2;
  return lanes;
}

}  // namespace xk::cuda
