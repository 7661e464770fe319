// bce_pass.cu on the emulated card, called through ctypes.
#include "emulated_sm90.h"

#include "cuda/sm90/bce_pass.cu"

using namespace xk::cuda;

extern "C" {

// p: x, gradient, weight, partial, hyper, counter, flag. n: batch, pitch, rows, width, first, chunk, splits,
// row_offset, decoupled, reverse. told: products, boxes loaded and stored.
void bce_pass_host(void* const* p, const int64_t* n, int64_t* told) {
  BcePass a{};
  a.x = p[0], a.gradient = p[1], a.weight = p[2], a.partial = static_cast<float*>(p[3]);
  a.hyper = static_cast<const xk::Hyper*>(p[4]), a.counter = static_cast<const int64_t*>(p[5]);
  a.flag = static_cast<const int32_t*>(p[6]);
  a.batch = n[0], a.pitch = n[1], a.rows = n[2], a.width = n[3], a.first = n[4], a.chunk = n[5], a.splits = n[6];
  a.row_offset = n[7], a.decoupled = n[8], emu::reverse = n[9];
  std::memset(emu::counted, 0, sizeof emu::counted);
  bce_pass(a, nullptr);
  std::memcpy(told, emu::counted, sizeof emu::counted);
}
}
