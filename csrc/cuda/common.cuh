// What the CUDA kernels share: the generator, 16-bit floats and their rounding, and chunks of 8
// columns in 16-byte pieces.
//
// Everything that computes is host code too: the arithmetic is tested against the reference without
// a card.
#pragma once

#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../kernels.h"

#define XK_FN __host__ __device__ __forceinline__

namespace xk::cuda {

constexpr int kChunk = 8;  // columns of one lane, served by one draw of 128 bits

// --- the generator ---
// Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC
// 2011). key = low words of (seed, step); counter = (row low, row high, column group, stream) with
// the global row and column group = column / 8; column c takes word (c % 8) / 2, low half where c
// is even.

enum Stream : uint32_t { kStreamWeight = 0, kStreamMomentum = 1, kStreamSecond = 2 };

struct Words {
  uint32_t w[4];
};

XK_FN Words philox(uint32_t k0, uint32_t k1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
#pragma unroll
  for (int r = 0; r < 10; ++r) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

XK_FN uint32_t random16(const Words& draw, int i) {
  return i % 2 ? draw.w[i / 2] >> 16 : draw.w[i / 2] & 0xffffu;
}

// --- 16-bit floats ---

constexpr float kMaxF32 = 3.40282347e38f, kMaxBf16 = 3.38953139e38f, kMaxF16 = 65504.0f;

XK_FN uint32_t bits_of(float v) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(v);
#else
  uint32_t u;
  std::memcpy(&u, &v, sizeof u);
  return u;
#endif
}
XK_FN float float_of(uint32_t u) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(u);
#else
  float v;
  std::memcpy(&v, &u, sizeof v);
  return v;
#endif
}

// NaN becomes the limit, as in the reference's rounding; fp32 stores keep it (see saturate).
XK_FN float clamp(float v, float limit) { return fmaxf(fminf(v, limit), -limit); }
XK_FN float saturate(float v) { return v > kMaxF32 ? kMaxF32 : v < -kMaxF32 ? -kMaxF32 : v; }

XK_FN float widen16(uint32_t half, DType dtype) {
  if (dtype == DType::bf16) return float_of(half << 16);
  __half_raw raw;
  raw.x = uint16_t(half);
  return __half2float(__half(raw));
}

// Round to nearest even; v lies within the format's range.
XK_FN uint32_t nearest16(float v, DType dtype) {
  const uint32_t u = bits_of(v);
  if (dtype == DType::bf16) return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return __half_raw(__float2half_rn(v)).x;
}

// Stochastic rounding to bf16: the discarded 16 bits are the chance to round away from zero. Exact
// in the subnormal range too, where fp32 and bf16 patterns are linear in the value. Saturates.
XK_FN uint32_t stochastic_bf16(float v, uint32_t random) {
  return (bits_of(clamp(v, kMaxBf16)) + random) >> 16;
}

// Stochastic rounding to fp16. Normal results drop 13 bits; below 2^-14 the spacing stays at 2^-24,
// so the mantissa moves right with the exponent. Beyond 31 dropped bits the mantissa is shifted
// first, which keeps the chance proportional to the value down to 2^-16 of a spacing, and 0 below.
// Saturates.
XK_FN uint32_t stochastic_f16(float v, uint32_t random) {
  v = clamp(v, kMaxF16);
  const uint32_t u = bits_of(v) & 0x7fffffffu, e = u >> 23;
  const uint32_t wanted = e >= 113u ? 13u : 126u - e, drop = wanted < 31u ? wanted : 31u;
  const uint32_t excess = wanted - drop, shift = excess < 24u ? excess : 24u;
  const uint32_t mantissa = ((u & 0x7fffffu) | 0x800000u) >> shift;
  const uint32_t sum = (mantissa + ((random << 16) >> (32u - drop))) >> drop;
  // A carry out of the 11 bits moves into the exponent, which is what rounding up to the next power
  // of two means.
  const uint32_t half = e >= 113u ? ((e - 113u) << 10) + sum : sum;
  return (half < 0x7bffu ? half : 0x7bffu) | ((bits_of(v) >> 16) & 0x8000u);
}

// --- chunks ---
// kVector: rows are whole chunks on 16-byte boundaries. Otherwise a chunk is taken value by value,
// `count` of them.

struct Values {
  float v[kChunk];
};

// A chunk as it lies in memory: 32 bytes of fp32 or 16 of a narrower format. Loading is apart from
// widening, so that a lane has the loads of all its arrays in flight before it waits for the first.
struct Raw {
  uint32_t w[8];
};

XK_FN int64_t dtype_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// For bytes that are used once per step: they should not push out what is read again.
XK_FN uint4 load_once(const uint4* p) {
#ifdef __CUDA_ARCH__
  return __ldcs(p);
#else
  return *p;
#endif
}
XK_FN void store_once(uint4* p, uint4 v) {
#ifdef __CUDA_ARCH__
  __stcs(p, v);
#else
  *p = v;
#endif
}

template <bool kVector, bool kOnce = true>
XK_FN Raw load_raw(const void* base, DType dtype, int64_t index, int count) {
  Raw raw{};
  const char* p = static_cast<const char*>(base) + index * dtype_size(dtype);
  if constexpr (kVector) {
    const uint4* const q = reinterpret_cast<const uint4*>(p);
    const uint4 a = kOnce ? load_once(q) : *q;
    raw.w[0] = a.x, raw.w[1] = a.y, raw.w[2] = a.z, raw.w[3] = a.w;
    if (dtype == DType::f32) {
      const uint4 b = kOnce ? load_once(q + 1) : q[1];
      raw.w[4] = b.x, raw.w[5] = b.y, raw.w[6] = b.z, raw.w[7] = b.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i >= count) continue;
      if (dtype == DType::f32)
        raw.w[i] = reinterpret_cast<const uint32_t*>(p)[i];
      else
        raw.w[i / 2] |= uint32_t(reinterpret_cast<const uint16_t*>(p)[i]) << (16 * (i % 2));
    }
  }
  return raw;
}

template <bool kVector>
XK_FN void store_raw(void* base, DType dtype, int64_t index, int count, const Raw& raw) {
  char* p = static_cast<char*>(base) + index * dtype_size(dtype);
  if constexpr (kVector) {
    store_once(reinterpret_cast<uint4*>(p), make_uint4(raw.w[0], raw.w[1], raw.w[2], raw.w[3]));
    if (dtype == DType::f32)
      store_once(reinterpret_cast<uint4*>(p) + 1,
                 make_uint4(raw.w[4], raw.w[5], raw.w[6], raw.w[7]));
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i >= count) continue;
      if (dtype == DType::f32)
        reinterpret_cast<uint32_t*>(p)[i] = raw.w[i];
      else
        reinterpret_cast<uint16_t*>(p)[i] = uint16_t(raw.w[i / 2] >> (16 * (i % 2)));
    }
  }
}

XK_FN Values widen(const Raw& raw, DType dtype) {
  Values out;
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    out.v[i] = dtype == DType::f32 ? float_of(raw.w[i])
                                   : widen16((raw.w[i / 2] >> (16 * (i % 2))) & 0xffffu, dtype);
  return out;
}

// Whether a pattern is infinite or NaN, by the format's exponent bits.
XK_FN bool not_finite(uint32_t bits, uint32_t exponent) { return (bits & exponent) == exponent; }
XK_FN bool not_finite(const Raw& raw, DType dtype) {
  const uint32_t exponent = dtype == DType::f32    ? 0x7f800000u
                            : dtype == DType::bf16 ? 0x7f80u
                                                   : 0x7c00u;
  bool bad = false;
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    bad |= not_finite(raw.w[i], exponent) ||
           (dtype != DType::f32 && not_finite(raw.w[i] >> 16, exponent));
  return bad;
}

// Below fp32 each value takes its 16 bits of the draw.
XK_FN Raw round_stochastic(const Values& x, DType dtype, const Words& draw) {
  Raw raw{};
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const uint32_t r = random16(draw, i);
    const uint32_t half =
        dtype == DType::bf16 ? stochastic_bf16(x.v[i], r) : stochastic_f16(x.v[i], r);
    raw.w[i / 2] |= half << (16 * (i % 2));
  }
  return raw;
}

}  // namespace xk::cuda
