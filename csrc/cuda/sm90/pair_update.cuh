// The update of two neighbouring weights of a bf16 table by SGD, as the warps of bce_pass hold
// them. Host code too: tested against the CPU kernels bit for bit without a card.
#pragma once

#include "../common.cuh"

namespace xk::cuda {

// What hyper comes to in a step of SGD. kDecoupled: decay shrinks the weight, else it is in the
// gradient.
template <bool kDecoupled>
struct SgdSteering {
  float rate, keep, l2, scale;
};

template <bool kDecoupled>
XK_FN SgdSteering<kDecoupled> sgd_steering(const Hyper& h) {
  return {h.lr, 1.0f - h.lr * h.decay, h.decay, h.scale};
}

// v plus the low or the high 16 bits of a word, in one instruction.
XK_FN uint32_t add_low(uint32_t v, uint32_t word) {
#ifdef __CUDA_ARCH__
  return __dp2a_lo(word, 1u, v);
#else
  return v + (word & 0xffffu);
#endif
}
XK_FN uint32_t add_high(uint32_t v, uint32_t word) { return v + (word >> 16); }

// Two bf16 whose sums with random bits have run beyond the largest number, or were NaN: the limit.
// As integers bf16 of one sign are in their order.
XK_FN uint32_t saturate_pair(uint32_t pair) {
#ifdef __CUDA_ARCH__
  return __vmins2(__vminu2(pair, 0xff7fff7fu), 0x7f7f7f7fu);
#else
  uint32_t out = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    uint32_t half = (pair >> shift) & 0xffffu;
    if (half > 0xff7fu) half = 0xff7fu;
    if (half < 0x8000u && half > 0x7f7fu) half = 0x7f7fu;
    out |= half << shift;
  }
  return out;
#endif
}

template <bool kDecoupled>
XK_FN float step_sgd(const SgdSteering<kDecoupled>& s, float w, float grad) {
  grad *= s.scale;
  return kDecoupled ? fmaf(-s.rate, grad, s.keep * w) : fmaf(-s.rate, fmaf(s.l2, w, grad), w);
}

// weights: two bf16, the lower column in the low half. grad0, grad1: their gradients, not yet
// scaled. word: of the draw of their group of 8 columns the one that serves these two.
template <bool kDecoupled>
XK_FN uint32_t update_pair(const SgdSteering<kDecoupled>& s, uint32_t weights, float grad0,
                           float grad1, uint32_t word) {
  const float low = step_sgd(s, float_of(weights << 16), grad0);
  const float high = step_sgd(s, float_of(weights & 0xffff0000u), grad1);
  const uint32_t a = add_low(bits_of(low), word), b = add_high(bits_of(high), word);
#ifdef __CUDA_ARCH__
  return saturate_pair(__byte_perm(a, b, 0x7632));
#else
  return saturate_pair((a >> 16) | (b & 0xffff0000u));
#endif
}

}  // namespace xk::cuda
