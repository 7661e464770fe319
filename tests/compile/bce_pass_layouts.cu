// bce_pass.cu as it is, and what it says of layouts and of arithmetic as host code: no card is needed to see where
// memory, registers and draws meet.
#include "cuda/sm90/bce_pass.cu"

using namespace xk;
using namespace xk::cuda;

namespace {

// Bytes of every element, for each stage where there are some.
template <class L>
void places(const L& layout, int32_t* out) {
  const auto plain = cute::as_position_independent_swizzle_layout(layout);
  for (int i = 0; i < cute::size(plain); ++i) *out++ = int32_t(plain(i) * sizeof(Bf16));
}

template <class Product, class Shape>
void accumulators(const Product& product, const Shape& shape, int32_t* out) {
  for (int thread = 0; thread < kGroup; ++thread) {
    const auto mine = product.get_slice(thread).partition_C(cute::make_identity_tensor(shape));
    for (int i = 0; i < cute::size(mine); ++i) {
      *out++ = int32_t(cute::get<0>(mine(i)));
      *out++ = int32_t(cute::get<1>(mine(i)));
    }
  }
}

template <bool kDecoupled>
void update_table(uint16_t* weight, const float* grad, const float* hyper, const int64_t* counter, int64_t row_offset,
                  int64_t rows, int64_t width) {
  const auto steering = sgd_steering<kDecoupled>(*reinterpret_cast<const xk::Hyper*>(hyper));
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < width; c += 2) {
      const uint64_t global = uint64_t(row_offset + row);
      const Words draw = philox(uint32_t(counter[0]), uint32_t(counter[1]), uint32_t(global), uint32_t(global >> 32),
                                uint32_t(c / kChunk), kStreamWeight);
      uint16_t* const pair = weight + row * width + c;
      const float* const g = grad + row * width + c;
      const uint32_t out =
          update_pair(steering, pair[0] | uint32_t(pair[1]) << 16, g[0], g[1], draw.w[c % kChunk / 2]);
      pair[0] = uint16_t(out), pair[1] = uint16_t(out >> 16);
    }
}

}  // namespace

#define XK_TOLD extern "C" __attribute__((visibility("default")))

// Of the operands [m or n, k, stage], the first index fastest.
XK_TOLD void operand_places(int64_t which, int32_t* out) {
  switch (which) {
    case 0: return places(XLayout{}, out);
    case 1: return places(WLayout{}, out);
    case 2: return places(GLayout{}, out);
    default: return places(GtLayout{}, out);
  }
}

// Row and column of every accumulator [thread, i, 2] of the rows' gradient, or of dX.
XK_TOLD void accumulator_places(int64_t dx, int32_t* out) {
  using namespace cute;
  if (dx)
    accumulators(DxProduct{}, Shape<Int<kSamples>, Int<kColumns>>{}, out);
  else
    accumulators(RowProduct{}, Shape<Int<kLabels>, Int<kColumns>>{}, out);
}

// The kernel's own account of the same: for dX [thread, i, 2].
XK_TOLD void dx_places(int32_t* out) {
  for (int thread = 0; thread < kGroup; ++thread)
    for (int i = 0; i < kSamples * kColumns / kGroup; ++i)
      *out++ = sample_of(thread, i), *out++ = column_of(thread, i);
}

// For [thread, p]: the bytes that a lane addresses, and row and first column of the draw that it puts there.
XK_TOLD void chunk_places(int32_t* out) {
  for (int thread = 0; thread < kGroup; ++thread)
    for (int p = 0; p < kColumns / 16; ++p) {
      *out++ = bytes_of(first_bytes_of(thread), p);
      *out++ = row_of(thread);
      *out++ = kChunk * (first_group_of(thread) + 2 * p);
    }
}

// Stages, and bytes of shared memory.
XK_TOLD void sizes(int32_t* out) { out[0] = kStages, out[1] = int32_t(sizeof(Shared)); }

// SGD of a table [rows, width] from its gradient, a pair at a time.
XK_TOLD void update_pairs(uint16_t* weight, const float* grad, const float* hyper, const int64_t* counter,
                          int64_t row_offset, int64_t rows, int64_t width, int64_t decoupled) {
  (decoupled ? update_table<true> : update_table<false>)(weight, grad, hyper, counter, row_offset, rows, width);
}
