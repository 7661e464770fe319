// The update of a table row from its gradient: SGD, SGD with momentum, Adagrad, Adam; L2 or
// decoupled decay; fp32, or bf16 and fp16 rounded stochastically or with Kahan compensation; e4m3
// with a scale per row, rounded stochastically, which keeps the row's largest |value| too. `Update`
// treats kChunk columns in registers, for the tiles of bce_step; row_update.h a whole row, with
// what belongs to the row as one.
//
//   w = weight (+ kahan)                          g += decay w             (not decoupled)
//   SGD:       d = g
//   momentum:  m = mu m + g, d = m
//   Adagrad:   v = v + g^2, d = g / (sqrt(v) + eps)
//   Adam:      m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2,
//              d = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
//   new = w (1 - lr decay when decoupled) - lr d
//   weight = stochastic(new), or with Kahan: weight = nearest(new), kahan = nearest(new - weight)
//
// The step uses m and v as computed; only what is kept is rounded. t = step + 1, or the row's own
// count of updates. A row-wise v takes the mean of g^2 over the row. Lazy decay replaces 1 - lr
// decay by exp(decay_sum - row_decay): both in row_update.h.
#pragma once

#include <cmath>

#include "philox.h"

namespace xk::XK_NS {

// adam_row: Adam with a row-wise v, which is known before the first column. Row-wise Adagrad is
// then plain SGD.
enum class Rule { sgd, momentum, adagrad, adam, adam_row };

constexpr int kChunkVecs = kChunk / kLanes;
struct Chunk {
  vf v[kChunkVecs];
};

inline Rule rule_of(const RowState& s) {
  if (!s.second.data) return s.momentum.data ? Rule::momentum : Rule::sgd;
  if (s.row_wise) return s.momentum.data ? Rule::adam_row : Rule::sgd;
  return s.momentum.data ? Rule::adam : Rule::adagrad;
}

struct Update {
  Rule rule;
  State weight, momentum, second, kahan;
  int64_t width, row_offset;
  float lr, l2, beta1, beta2, eps;
  // new = keep * w - rate * d: the corrections of Adam's bias and a row-wise denominator are in the
  // rate.
  float keep, rate, inverse2;  // inverse2 = 1 / (1 - b2^t)
  float* row_scale;            // of an 8-bit table
  PhiloxKey key;
  PhiloxColumns at{0};
  PhiloxColumns32 at32{0};  // kept up for 8-bit tables alone

  explicit Update(const RowState& s)
      : rule(rule_of(s)), weight{s.weight, s.dtype}, momentum(s.momentum), second(s.second),
        kahan(s.kahan), width(s.width), row_offset(s.row_offset), lr(s.hyper->lr),
        l2(s.decoupled ? 0 : s.hyper->decay), beta1(s.hyper->beta1), beta2(s.hyper->beta2),
        eps(s.hyper->epsilon),
        // Plain SGD's L2 term is linear, so it joins the factor on the weight.
        keep(s.decoupled || rule == Rule::sgd ? 1 - s.hyper->lr * s.hyper->decay : 1), rate(lr),
        inverse2(1), row_scale(s.row_scale), key(s.counter[0], s.counter[1]) {
    if (rule != Rule::adam && rule != Rule::adam_row) return;
    rate = float(lr / (1 - std::pow(double(beta1), double(s.counter[1] + 1))));
    inverse2 = float(1 / (1 - std::pow(double(beta2), double(s.counter[1] + 1))));
  }

  void columns(int64_t c) {
    at = PhiloxColumns(c);
    if (weight.dtype == DType::f8) at32 = PhiloxColumns32(c);
  }
  void row(int64_t row, int64_t column, int64_t count, const float* gradient);
};

// kChunk values of a state: in place, or through a copy where fewer columns are left, since whole
// vectors would touch the next row.
struct Slot {
  alignas(64) unsigned char copy[kChunk * 4];
  unsigned char* place;
  int64_t bytes;

  void* open(const State& s, int64_t index, int64_t count) {
    place = static_cast<unsigned char*>(s.data) + index * dtype_size(s.dtype);
    bytes = count * dtype_size(s.dtype);
    if (count == kChunk) return place;
    std::memset(copy, 0, sizeof copy);
    std::memcpy(copy, place, size_t(bytes));
    return copy;
  }
  void close(int64_t count) {
    if (count != kChunk) std::memcpy(place, copy, size_t(bytes));
  }
};

template <DType kType>
XK_INLINE void load_chunk(Chunk& c, const void* p) {
#pragma GCC unroll 8
  for (int i = 0; i < kChunkVecs; ++i) c.v[i] = load_as_f32(p, kType, i * kLanes);
}

XK_INLINE void load_chunk(Chunk& c, const void* p, DType dtype) {
  if (dtype == DType::f32)
    load_chunk<DType::f32>(c, p);
  else if (dtype == DType::bf16)
    load_chunk<DType::bf16>(c, p);
  else if (dtype == DType::f16)
    load_chunk<DType::f16>(c, p);
  else
    load_chunk<DType::f8>(c, p);
}

template <DType kType>
XK_INLINE void store_chunk(const Update& u, const Chunk& c, void* p, uint64_t row, Stream stream) {
  if constexpr (kType == DType::f32) {
#pragma GCC unroll 8
    for (int i = 0; i < kChunkVecs; ++i)
      store(static_cast<float*>(p) + i * kLanes, vclamp(c.v[i], FLT_MAX));
  } else {
    alignas(64) uint16_t random[kChunk];
    draw(u.key, u.at, row, stream, random);
#pragma GCC unroll 8
    for (int i = 0; i < kChunkVecs; i += 2) {
      uint16_t* const out = static_cast<uint16_t*>(p) + i * kLanes;
      const vu r0 = load_u16(random + i * kLanes), r1 = load_u16(random + (i + 1) * kLanes);
      if constexpr (kType == DType::bf16) {
        store_high_halves(out, round_bf16(c.v[i], r0), round_bf16(c.v[i + 1], r1));
      } else {
        store_u16(out, round_f16(c.v[i], r0));
        store_u16(out + kLanes, round_f16(c.v[i + 1], r1));
      }
    }
  }
}

static inline void store_state(const Update& u, const Chunk& c, void* p, DType dtype, uint64_t row,
                               Stream stream) {
  if (dtype == DType::f32)
    store_chunk<DType::f32>(u, c, p, row, stream);
  else if (dtype == DType::bf16)
    store_chunk<DType::bf16>(u, c, p, row, stream);
  else
    store_chunk<DType::f16>(u, c, p, row, stream);
}

// Rounds to e4m3 in units of the row's scale and returns the largest code stored; the first `count`
// columns are real.
static inline uint32_t store_f8(const Update& u, const Chunk& c, float inverse_scale, void* p,
                                int64_t count, uint64_t row, Stream stream) {
  alignas(64) uint32_t random[kChunk];
  draw32(u.key, u.at32, row, stream, random);
  auto* const out = static_cast<uint8_t*>(p);
#pragma GCC unroll 8
  for (int i = 0; i < kChunkVecs; ++i)
    store_u8(out + i * kLanes, round_f8(c.v[i] * inverse_scale, load<vu>(random + i * kLanes)));
  uint8_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t code = out[i] & 0x7f;
    largest = code > largest ? code : largest;
  }
  return largest;
}

// Rounds to nearest, keeps what the rounding left over.
template <DType kType>
XK_INLINE void store_compensated(const Chunk& c, void* weight, void* kahan) {
  constexpr float limit = kType == DType::bf16 ? kMaxBf16 : kMaxF16;
#pragma GCC unroll 8
  for (int i = 0; i < kChunkVecs; ++i) {
    const vf v = vclamp(c.v[i], limit);
    const vu w = kType == DType::bf16 ? f32_to_bf16(v) : f32_to_f16(v);
    // From the clamped value: what saturation cut off must not come back in the next step.
    const vf rest = v - (kType == DType::bf16 ? bf16_to_f32(w) : f16_to_f32(w));
    store_u16(static_cast<uint16_t*>(weight) + i * kLanes, w);
    store_u16(static_cast<uint16_t*>(kahan) + i * kLanes,
              kType == DType::bf16 ? f32_to_bf16(rest) : f32_to_f16(rest));
  }
}

template <DType kType, Rule kRule, bool kKahan>
static void update_chunk(const Update& u, int64_t row, int64_t column, int64_t count,
                         const float* gradient) {
  const int64_t index = row * u.width + column;
  const uint64_t global = uint64_t(row) + uint64_t(u.row_offset);
  Slot weight, momentum, second, kahan;
  void* const w_at = weight.open(u.weight, index, count);
  Chunk w, m;
  load_chunk<kType>(w, w_at);
  if constexpr (kType == DType::f8)
    for (int i = 0; i < kChunkVecs; ++i) w.v[i] = w.v[i] * u.row_scale[2 * row];
  if constexpr (kKahan) {
    Chunk c;
    load_chunk<kType>(c, kahan.open(u.kahan, index, count));
    for (int i = 0; i < kChunkVecs; ++i) w.v[i] = w.v[i] + c.v[i];
  }
  if constexpr (kRule == Rule::sgd) {
#pragma GCC unroll 8
    for (int i = 0; i < kChunkVecs; ++i)
      w.v[i] = w.v[i] * u.keep - u.rate * load<vf>(gradient + i * kLanes);
  } else if constexpr (kRule == Rule::adagrad) {
    Chunk v;
    void* const v_at = second.open(u.second, index, count);
    load_chunk(v, v_at, u.second.dtype);
    for (int i = 0; i < kChunkVecs; ++i) {
      const vf g = load<vf>(gradient + i * kLanes) + u.l2 * w.v[i];
      v.v[i] = v.v[i] + g * g;
      w.v[i] = w.v[i] * u.keep - u.rate * g / (vsqrt(v.v[i]) + u.eps);
    }
    store_state(u, v, v_at, u.second.dtype, global, kStreamSecond);
    second.close(count);
  } else {
    void* const m_at = momentum.open(u.momentum, index, count);
    load_chunk(m, m_at, u.momentum.dtype);
    if constexpr (kRule == Rule::momentum) {
      for (int i = 0; i < kChunkVecs; ++i) {
        m.v[i] = u.beta1 * m.v[i] + (load<vf>(gradient + i * kLanes) + u.l2 * w.v[i]);
        w.v[i] = w.v[i] * u.keep - u.rate * m.v[i];
      }
    } else if constexpr (kRule == Rule::adam_row) {
      for (int i = 0; i < kChunkVecs; ++i) {
        m.v[i] =
            u.beta1 * m.v[i] + (1 - u.beta1) * (load<vf>(gradient + i * kLanes) + u.l2 * w.v[i]);
        w.v[i] = w.v[i] * u.keep - u.rate * m.v[i];
      }
    } else {
      Chunk v;
      void* const v_at = second.open(u.second, index, count);
      load_chunk(v, v_at, u.second.dtype);
      for (int i = 0; i < kChunkVecs; ++i) {
        const vf g = load<vf>(gradient + i * kLanes) + u.l2 * w.v[i];
        m.v[i] = u.beta1 * m.v[i] + (1 - u.beta1) * g;
        v.v[i] = u.beta2 * v.v[i] + (1 - u.beta2) * g * g;
        w.v[i] = w.v[i] * u.keep - u.rate * m.v[i] / (vsqrt(v.v[i] * u.inverse2) + u.eps);
      }
      store_state(u, v, v_at, u.second.dtype, global, kStreamSecond);
      second.close(count);
    }
    store_state(u, m, m_at, u.momentum.dtype, global, kStreamMomentum);
    momentum.close(count);
  }
  if constexpr (kKahan) {
    store_compensated<kType>(w, w_at, count == kChunk ? kahan.place : kahan.copy);
    kahan.close(count);
  } else if constexpr (kType == DType::f8) {
    float* const scale = u.row_scale + 2 * row;  // powers of two: products and quotients by it are
                                                 // exact
    const uint32_t code = store_f8(u, w, 1 / scale[0], w_at, count, global, kStreamWeight);
    const float largest = f8_to_f32(splat(code))[0] * scale[0];
    if (largest > scale[1]) scale[1] = largest;
  } else {
    store_chunk<kType>(u, w, w_at, global, kStreamWeight);
  }
  weight.close(count);
}

template <DType kType, bool kKahan>
XK_INLINE void update_chunk(const Update& u, int64_t row, int64_t column, int64_t count,
                            const float* gradient) {
  switch (u.rule) {
    case Rule::sgd: return update_chunk<kType, Rule::sgd, kKahan>(u, row, column, count, gradient);
    case Rule::momentum:
      return update_chunk<kType, Rule::momentum, kKahan>(u, row, column, count, gradient);
    case Rule::adagrad:
      return update_chunk<kType, Rule::adagrad, kKahan>(u, row, column, count, gradient);
    case Rule::adam:
      return update_chunk<kType, Rule::adam, kKahan>(u, row, column, count, gradient);
    case Rule::adam_row:
      return update_chunk<kType, Rule::adam_row, kKahan>(u, row, column, count, gradient);
  }
}

template <DType kType>
XK_INLINE void update_chunk(const Update& u, int64_t row, int64_t column, int64_t count,
                            const float* gradient) {
  if constexpr (kType == DType::bf16 || kType == DType::f16) {
    if (u.kahan.data) return update_chunk<kType, true>(u, row, column, count, gradient);
  }
  update_chunk<kType, false>(u, row, column, count, gradient);
}

inline void Update::row(int64_t row, int64_t column, int64_t count, const float* gradient) {
  if (weight.dtype == DType::f32)
    return update_chunk<DType::f32>(*this, row, column, count, gradient);
  if (weight.dtype == DType::bf16)
    return update_chunk<DType::bf16>(*this, row, column, count, gradient);
  if (weight.dtype == DType::f16)
    return update_chunk<DType::f16>(*this, row, column, count, gradient);
  return update_chunk<DType::f8>(*this, row, column, count, gradient);
}

}  // namespace xk::XK_NS
