// One vector type per instruction set, with the few operations the kernels need. GCC vector
// extensions carry the arithmetic, so that one source serves all levels; intrinsics stand only
// where the extensions have no good word.
#pragma once

#include <cfloat>
#include <cstring>

#include "common.h"

#if XK_ISA > 0
#ifdef __GNUC__
// GCC's own header trips these inside its undefined-value helpers.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace xk::XK_NS {

#if XK_ISA >= 2
constexpr int kLanes = 16, kRows = 6, kVecs = 4;  // 24 accumulators of 32 registers
#elif XK_ISA == 1
constexpr int kLanes = 8, kRows = 6, kVecs = 2;  // 12 of 16
#else
constexpr int kLanes = 4, kRows = 4, kVecs = 2;  // 8 of 16: without FMA the product needs a
                                                 // register too
#endif
constexpr int kPanel = kLanes * kVecs;  // columns of one packed panel
constexpr int kChunk = kLanes * 8;  // columns served by one vector run of the generator: 8 per draw

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));
typedef uint8_t vb __attribute__((vector_size(kLanes)));

#define XK_INLINE static inline __attribute__((always_inline))

template <class V, class T>
XK_INLINE V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
XK_INLINE void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
XK_INLINE vf splat(float x) { return x - vf{}; }
XK_INLINE vu splat(uint32_t x) { return x + vu{}; }

// 16-bit values, zero-extended; and back (the low half of each lane). GCC splits the plain
// conversions in pieces.
XK_INLINE vu load_u16(const uint16_t* p) {
#if XK_ISA >= 2
  return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif XK_ISA == 1
  return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(load<vh>(p), vu);
#endif
}
XK_INLINE vh low_halves(vu v) {
#if XK_ISA >= 2
  return (vh)_mm512_cvtepi32_epi16((__m512i)v);
#else
  return __builtin_convertvector(v, vh);
#endif
}
XK_INLINE void store_u16(uint16_t* p, vu v) { store(p, low_halves(v)); }

XK_INLINE vu load_u8(const uint8_t* p) {
#if XK_ISA >= 2
  return (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif XK_ISA == 1
  return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(load<vb>(p), vu);
#endif
}
XK_INLINE void store_u8(uint8_t* p, vu v) {
#if XK_ISA >= 2
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)v));
#else
  store(p, __builtin_convertvector(v, vb));
#endif
}

// The high halves of two vectors, one after the other.
XK_INLINE void store_high_halves(uint16_t* p, vu a, vu b) {
#if XK_ISA >= 2
  alignas(64) static const uint16_t odd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                               23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                               45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16((__m512i)a, _mm512_load_si512(odd), (__m512i)b));
#else
  store_u16(p, a >> 16);
  store_u16(p + kLanes, b >> 16);
#endif
}

XK_INLINE vf vmin(vf a, vf b) {
#if XK_ISA >= 2
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif XK_ISA == 1
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
XK_INLINE vf vmax(vf a, vf b) {
#if XK_ISA >= 2
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif XK_ISA == 1
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
// Keeps NaN: the instructions return their second operand where either is NaN.
XK_INLINE vf vclamp(vf v, float limit) { return vmax(splat(-limit), vmin(splat(limit), v)); }
XK_INLINE vf vabs(vf v) { return (vf)((vu)v & splat(0x7fffffffu)); }
XK_INLINE vf vsqrt(vf v) {
#if XK_ISA >= 2
  return (vf)_mm512_sqrt_ps((__m512)v);
#elif XK_ISA == 1
  return (vf)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// One bit per lane: a > b. False where either is NaN.
XK_INLINE uint32_t greater_mask(vf a, vf b) {
#if XK_ISA >= 2
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif XK_ISA == 1
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= uint32_t(a[i] > b[i]) << i;
  return mask;
#endif
}

// Sum of the lanes in ascending order of lane.
XK_INLINE double lane_sum(vf v) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// --- 16-bit floats ---

constexpr float kMaxBf16 = 0x1.fep127f, kMaxF16 = 65504.0f;

XK_INLINE vf bf16_to_f32(vu bits) { return (vf)(bits << 16); }

// Round to nearest even; the result lies in the low half of each lane.
XK_INLINE vu f32_to_bf16(vf v) {
#if XK_ISA == 2
  return (vu)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  const vu u = (vu)v;
  return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
#endif
}

XK_INLINE vf f16_to_f32(vu h) {
#if XK_ISA >= 2
  return (vf)_mm512_cvtph_ps((__m256i)low_halves(h));
#elif XK_ISA == 1
  return (vf)_mm256_cvtph_ps((__m128i)low_halves(h));
#else
  // Moving the exponent by a product is exact for subnormals too; infinity and NaN need the top
  // exponent.
  const vu em = (h & 0x7fffu) << 13;
  const vu v = (vu)((vf)em * 0x1p112f);
  return (vf)(v | (em >= 0x0f800000u ? splat(0x7f800000u) : vu{}) | ((h & 0x8000u) << 16));
#endif
}

XK_INLINE vu f32_to_f16(vf v) {
  v = vclamp(v, kMaxF16);
  const vu sign = ((vu)v >> 16) & 0x8000u, u = (vu)vabs(v);
  const vu normal = (u + 0xfffu + ((u >> 13) & 1u) - (112u << 23)) >> 13;
  // Adding 1/2 puts the last place of the sum at 2^-24, the spacing of fp16 subnormals: the
  // addition rounds.
  const vu subnormal = (vu)(vabs(v) + 0.5f) - 0x3f000000u;
  return sign | (u >= (113u << 23) ? normal : subnormal);
}

// --- e4m3: 1 sign bit, 4 of exponent (bias 7), 3 of mantissa; 0x7f is NaN, no infinity ---

constexpr float kMaxF8 = 448.0f;

// Subnormals (below 2^-6, spacing 2^-9) go through an integer: a processor told to flush fp32
// subnormals keeps them.
XK_INLINE vf f8_to_f32(vu bits) {
  const vu code = bits & 0x7fu;
  const vu small = (vu)(__builtin_convertvector((vi)code, vf) * 0x1p-9f),
           normal = (code << 20) + (120u << 23);
  const vu magnitude = code < 8u ? small : code == 0x7fu ? splat(0x7fc00000u) : normal;
  return (vf)(magnitude | ((bits & 0x80u) << 24));
}

XK_INLINE int64_t dtype_size(DType d) { return d == DType::f32 ? 4 : d == DType::f8 ? 1 : 2; }

// kLanes consecutive values of any dtype as fp32; those of e4m3 as they are coded, without their
// row's scale.
XK_INLINE vf load_as_f32(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::f32) return load<vf>(static_cast<const float*>(p) + i);
  if (dtype == DType::f8) return f8_to_f32(load_u8(static_cast<const uint8_t*>(p) + i));
  const vu bits = load_u16(static_cast<const uint16_t*>(p) + i);
  return dtype == DType::bf16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}

// count values of any dtype as fp32.
static inline void widen(const void* src, DType dtype, int64_t offset, int64_t count, float* dst) {
  if (count == 0) return;  // src may be null, and memcpy takes none
  if (dtype == DType::f32) {
    std::memcpy(dst, static_cast<const float*>(src) + offset, size_t(count) * 4);
    return;
  }
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(dst + i, load_as_f32(src, dtype, offset + i));
  if (i == count) return;
  uint16_t rest[kLanes] = {};
  float wide[kLanes];
  const int64_t size = dtype_size(dtype);
  std::memcpy(rest, static_cast<const uint8_t*>(src) + (offset + i) * size,
              size_t((count - i) * size));
  store(wide, load_as_f32(rest, dtype, 0));
  std::memcpy(dst + i, wide, size_t(count - i) * 4);
}

// --- exp and log1p ---

// exp(x) for x <= 0, within 2 units in the last place; exactly 0 where it lies below half the
// smallest fp32; keeps NaN.
XK_INLINE vf exp_negative(vf x) {
  x = vmax(splat(-110.0f), x);
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
  const vf magic = splat(12582912.0f), shifted = x * 1.44269504088896341f + magic;
  const vf n = shifted - magic;
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if XK_ISA >= 2
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // Two factors, because 2^n itself is no normal number at the lower end.
  const vi e = (vi)shifted - (vi)magic, half = e >> 1;
  return p * (vf)((half + 127) << 23) * (vf)((e - half + 127) << 23);
#endif
}

// log(1 + e) for 0 <= e <= 1 as 2 atanh(e / (2 + e)): no cancellation at small e.
XK_INLINE vf log1p_unit(vf e) {
  const vf s = e / (2.0f + e), q = s * s;
  vf p = splat(2.0f / 17);
  p = p * q + 2.0f / 15;
  p = p * q + 2.0f / 13;
  p = p * q + 2.0f / 11;
  p = p * q + 2.0f / 9;
  p = p * q + 2.0f / 7;
  p = p * q + 2.0f / 5;
  p = p * q + 2.0f / 3;
  return (p * q) * s + 2.0f * s;
}

}  // namespace xk::XK_NS
