// Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC
// 2011), one counter per vector lane, and the stochastic rounding fed by it.
//
// key = low words of (seed, step); counter = (row low, row high, column group, stream) with the
// global row and column group = column / 8. The 128 bits of a draw serve the 8 columns of its group
// with 16 bits each, in memory order: column c takes word (c % 8) / 2, low half where c is even. An
// e4m3 store needs 32 bits a column: there column group = column / 4, and column c takes word c
// % 4.
#pragma once

#include "simd.h"

namespace xk::XK_NS {

constexpr uint32_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u, kWeyl0 = 0x9E3779B9u,
                   kWeyl1 = 0xBB67AE85u;
enum Stream : uint32_t {
  kStreamWeight = 0,
  kStreamMomentum = 1,
  kStreamSecond = 2,
  kStreamRescale = 3
};

struct PhiloxKey {
  uint32_t k0[10], k1[10];
  PhiloxKey(int64_t seed, int64_t step) {
    for (uint32_t r = 0; r < 10; ++r) {
      k0[r] = uint32_t(seed) + r * kWeyl0;
      k1[r] = uint32_t(step) + r * kWeyl1;
    }
  }
};

XK_INLINE void mul_hi_lo(vu a, uint32_t m, vu& hi, vu& lo) {
#if XK_ISA >= 2
  const __m512i x = (__m512i)a, y = _mm512_set1_epi32(int(m));
  const __m512i even = _mm512_mul_epu32(x, y), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
  hi = (vu)_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
  lo = (vu)_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
#elif XK_ISA == 1
  const __m256i x = (__m256i)a, y = _mm256_set1_epi32(int(m));
  const __m256i even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
  hi = (vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  lo = (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t p = uint64_t(a[i]) * m;
    hi[i] = uint32_t(p >> 32);
    lo[i] = uint32_t(p);
  }
#endif
}

// Writes the four words of each lane's draw so that the 16-bit halves lie in column order: 4 x 4
// transpositions inside each 128-bit lane; PhiloxColumns deals the column groups to the lanes so
// that no wider exchange is needed.
XK_INLINE void store_draws(vu w0, vu w1, vu w2, vu w3, uint16_t* out) {
#if XK_ISA >= 2
  const __m512i a = (__m512i)w0, b = (__m512i)w1, c = (__m512i)w2, d = (__m512i)w3;
  const __m512i ab0 = _mm512_unpacklo_epi32(a, b), ab1 = _mm512_unpackhi_epi32(a, b);
  const __m512i cd0 = _mm512_unpacklo_epi32(c, d), cd1 = _mm512_unpackhi_epi32(c, d);
  _mm512_store_si512(out, _mm512_unpacklo_epi64(ab0, cd0));
  _mm512_store_si512(out + 32, _mm512_unpackhi_epi64(ab0, cd0));
  _mm512_store_si512(out + 64, _mm512_unpacklo_epi64(ab1, cd1));
  _mm512_store_si512(out + 96, _mm512_unpackhi_epi64(ab1, cd1));
#elif XK_ISA == 1
  const __m256i a = (__m256i)w0, b = (__m256i)w1, c = (__m256i)w2, d = (__m256i)w3;
  const __m256i ab0 = _mm256_unpacklo_epi32(a, b), ab1 = _mm256_unpackhi_epi32(a, b);
  const __m256i cd0 = _mm256_unpacklo_epi32(c, d), cd1 = _mm256_unpackhi_epi32(c, d);
  __m256i* o = reinterpret_cast<__m256i*>(out);
  _mm256_store_si256(o, _mm256_unpacklo_epi64(ab0, cd0));
  _mm256_store_si256(o + 1, _mm256_unpackhi_epi64(ab0, cd0));
  _mm256_store_si256(o + 2, _mm256_unpacklo_epi64(ab1, cd1));
  _mm256_store_si256(o + 3, _mm256_unpackhi_epi64(ab1, cd1));
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t words[4] = {w0[i], w1[i], w2[i], w3[i]};
    for (int j = 0; j < 8; ++j) out[8 * i + j] = uint16_t(words[j / 2] >> (16 * (j % 2)));
  }
#endif
}

// The part of the first round that depends on the columns alone, shared by all rows of a tile.
struct PhiloxColumns {
  vu hi, lo;
  explicit PhiloxColumns(int64_t column, int per_draw = 8) {
    vu group{};
    for (int i = 0; i < kLanes; ++i)
      group[i] = uint32_t(column / per_draw) + uint32_t((kLanes / 4) * (i % 4) + i / 4);
    mul_hi_lo(group, kMul1, hi, lo);
  }
};

// The same for the 32 bits that each of kChunk columns needs in e4m3: two runs of the generator.
struct PhiloxColumns32 {
  PhiloxColumns half[2];
  explicit PhiloxColumns32(int64_t column)
      : half{PhiloxColumns(column, 4), PhiloxColumns(column + kChunk / 2, 4)} {}
};

// 16 random bits for each of the kChunk columns of `columns` in one global row.
XK_INLINE void draw(const PhiloxKey& key, const PhiloxColumns& columns, uint64_t row, Stream stream,
                    uint16_t* out) {
  // Rounds 1 and 2: row and stream are the same in all lanes, so half of their products are
  // scalars.
  const uint64_t p = uint64_t(kMul0) * uint32_t(row);
  vu c0 = columns.hi ^ (uint32_t(row >> 32) ^ key.k0[0]);
  const uint64_t q = uint64_t(kMul1) * (uint32_t(p >> 32) ^ stream ^ key.k1[0]);
  vu hi0, lo0, hi1, lo1;
  mul_hi_lo(c0, kMul0, hi0, lo0);
  c0 = columns.lo ^ (uint32_t(q >> 32) ^ key.k0[1]);
  vu c1 = splat(uint32_t(q)), c2 = hi0 ^ (uint32_t(p) ^ key.k1[1]), c3 = lo0;
#pragma GCC unroll 8
  for (int r = 2; r < 10; ++r) {
    mul_hi_lo(c0, kMul0, hi0, lo0);
    mul_hi_lo(c2, kMul1, hi1, lo1);
    c0 = hi1 ^ c1 ^ key.k0[r];
    c1 = lo1;
    c2 = hi0 ^ c3 ^ key.k1[r];
    c3 = lo0;
  }
  store_draws(c0, c1, c2, c3, out);
}

// 32 random bits for each of kChunk columns.
XK_INLINE void draw32(const PhiloxKey& key, const PhiloxColumns32& columns, uint64_t row,
                      Stream stream, uint32_t* out) {
  static_assert(kLanes * 4 == kChunk / 2);
  // Two halves in memory order, low first, are one word.
  draw(key, columns.half[0], row, stream, reinterpret_cast<uint16_t*>(out));
  draw(key, columns.half[1], row, stream, reinterpret_cast<uint16_t*>(out + kChunk / 2));
}

// Stochastic rounding to bf16: the discarded 16 bits are the chance to round away from zero. Exact
// in the subnormal range too, where fp32 and bf16 patterns are linear in the value. Saturates.
// Result in the high half of each lane.
XK_INLINE vu round_bf16(vf v, vu random) { return (vu)vclamp(v, kMaxBf16) + random; }

// Stochastic rounding to fp16. Normal results drop 13 bits; below 2^-14 the spacing stays at 2^-24,
// so the mantissa moves right with the exponent. A draw has 16 bits: beyond 31 dropped bits the
// mantissa is shifted first, which keeps the chance proportional to the value down to 2^-16 of a
// spacing and 0 below. Result in the low half.
XK_INLINE vu round_f16(vf v, vu random) {
  v = vclamp(v, kMaxF16);
  const vu u = (vu)vabs(v), e = u >> 23;
  const vu wanted = e >= 113u ? splat(13u) : 126u - e;
  const vu drop = wanted > 31u ? splat(31u) : wanted;
  const vu excess = wanted - drop, shift = excess > 24u ? splat(24u) : excess;
  const vu mantissa = ((u & 0x7fffffu) | 0x800000u) >> shift;
  const vu sum = (mantissa + ((random << 16) >> (32u - drop))) >> drop;
  // A carry out of the 11 bits moves into the exponent, which is what rounding up to the next power
  // of two means.
  const vu bits = e >= 113u ? ((e - 113u) << 10) + sum : sum;
  return (bits > 0x7bffu ? splat(0x7bffu) : bits) | (((vu)v >> 16) & 0x8000u);
}

// Stochastic rounding to e4m3. What falls off the mantissa becomes a fraction of 32 bits, the
// chance that a 32-bit draw carries: exact for normal results (20 bits drop) and down to 2^-32 of
// the subnormal spacing 2^-9. Saturates.
XK_INLINE vu round_f8(vf v, vu random) {
  const vu u = (vu)vabs(v), e = u >> 23, mantissa = (u & 0x7fffffu) | 0x800000u;
  // The mantissa moves up to the point where a unit of the result is 2^32: by 12 bits, fewer below
  // 2^-6, then down.
  const vu up = e >= 121u ? splat(12u) : e >= 109u ? e - 109u : vu{};
  const vu far = 109u - e, down = e >= 109u ? vu{} : far > 31u ? splat(31u) : far;
  const vu whole = (mantissa >> 1) >> (31u - up), fraction = (mantissa << up) >> down;
  const vu sum = whole + (fraction + random < fraction ? splat(1u) : vu{});
  const vu code = e >= 121u ? ((e - 121u) << 3) + sum : sum;
  return (code > 0x7eu ? splat(0x7eu) : code) | (((vu)v >> 24) & 0x80u);
}

}  // namespace xk::XK_NS
