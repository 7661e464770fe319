// The kernels of csrc/cuda as host code, called through ctypes: their arithmetic and their launches, on an emulated card.
#include <cstring>

#include "emulated_card.h"

#include "cuda/bag_step.cu"
#include "cuda/sparse_update.cu"

#include <algorithm>
#include <numeric>

// In place of sort.cu.
namespace xk::cuda {

int64_t sort_scratch(int64_t) { return 1; }

void sort_pairs(const uint32_t* keys, uint32_t* sorted_keys, const uint2* values, uint2* sorted_values, int64_t count,
                int bits, void*, int64_t, cudaStream_t) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  const uint32_t mask = 0xffffffffu >> (32 - bits);
  std::stable_sort(order.begin(), order.end(), [=](int64_t i, int64_t j) { return (keys[i] & mask) < (keys[j] & mask); });
  for (int64_t i = 0; i < count; ++i) sorted_keys[i] = keys[order[i]], sorted_values[i] = values[order[i]];
}

}  // namespace xk::cuda

using namespace xk;
using namespace xk::cuda;

namespace {

// Runs with a workspace full of noise, threads and blocks in one order or the other.
template <class Args>
void run(const Args& args, int64_t (*bytes)(const Args&), void (*kernel)(const Args&, void*, void*), bool reverse) {
  const int64_t size = aligned(bytes(args));
  void* const workspace = std::aligned_alloc(kAlign, size_t(size));
  std::memset(workspace, 0x7f, size_t(size));
  emu::reverse = reverse;
  // Set to 1 by whoever sees a weight that is not finite; the next launch reads it.
  race::meant = {{"key_kernel", &static_cast<Head*>(workspace)->c.not_finite, 1}};
  kernel(args, workspace, nullptr);
  race::meant.clear();
  std::free(workspace);
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
  s.hyper = static_cast<const xk::Hyper*>(p[7]);
  s.counter = static_cast<const int64_t*>(p[8]);
  s.row_wise = n[5], s.row_offset = n[6], s.decoupled = n[7];
  return s;
}

// Races, and the same without: what the record must find, and what it must not.
namespace planted {

__global__ void blocks_write_one_place(int* out, bool fault) { out[fault ? threadIdx.x : threadIdx.x + 64 * blockIdx.x] = 1; }

__global__ void block_reads_what_another_writes(int* out, bool fault) {
  out[threadIdx.x + 64 * blockIdx.x] = out[threadIdx.x + 64 * (fault ? 1 - blockIdx.x : blockIdx.x)] + 1;
}

__global__ void no_barrier(int* out, bool fault) {
  __shared__ int place[64];
  place[threadIdx.x] = int(threadIdx.x);
  if (!fault) __syncthreads();
  out[threadIdx.x + 64 * blockIdx.x] = place[63 - threadIdx.x];
}

__global__ void no_barrier_before_the_next_turn(int* out, bool fault) {
  __shared__ int place[64];
  for (int turn = 0; turn < 2; ++turn) {
    place[threadIdx.x] = turn;
    __syncthreads();
    out[threadIdx.x + 64 * blockIdx.x] = place[63 - threadIdx.x];
    if (!fault) __syncthreads();
  }
}

// Lanes of one warp are ordered, those of two are not.
__global__ void barrier_of_a_warp(int* out, bool fault) {
  __shared__ int place[64];
  place[threadIdx.x] = int(threadIdx.x);
  __syncwarp(0xffffffffu);
  out[threadIdx.x + 64 * blockIdx.x] = place[fault ? 63 - threadIdx.x : threadIdx.x ^ 31];
}

// So are those that a mask names.
__global__ void barrier_of_half_a_warp(int* out, bool fault) {
  __shared__ int place[64];
  place[threadIdx.x] = int(threadIdx.x);
  __syncwarp(threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u);
  out[threadIdx.x + 64 * blockIdx.x] = place[fault ? threadIdx.x ^ 31 : threadIdx.x ^ 15];
}

__global__ void atomic_and_plain(uint32_t* out, bool fault) {
  if (fault && threadIdx.x == 5)
    out[0] += 1;
  else
    atomicAdd(out, 1u);
}

}  // namespace planted

}  // namespace

extern "C" {

void planted_races(int64_t which, int64_t fault) {
  using namespace planted;
  int out[128] = {};
  uint32_t count = 0;
  switch (which) {
    case 0: XK_LAUNCH(blocks_write_one_place, 2, 64, nullptr)(&out[0], bool(fault)); break;
    case 1: XK_LAUNCH(block_reads_what_another_writes, 2, 64, nullptr)(&out[0], bool(fault)); break;
    case 2: XK_LAUNCH(no_barrier, 2, 64, nullptr)(&out[0], bool(fault)); break;
    case 3: XK_LAUNCH(no_barrier_before_the_next_turn, 2, 64, nullptr)(&out[0], bool(fault)); break;
    case 4: XK_LAUNCH(barrier_of_a_warp, 2, 64, nullptr)(&out[0], bool(fault)); break;
    case 5: XK_LAUNCH(barrier_of_half_a_warp, 2, 64, nullptr)(&out[0], bool(fault)); break;
    default: XK_LAUNCH(atomic_and_plain, 2, 64, nullptr)(&count, bool(fault));
  }
}

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
  const SparseUpdate a{state_of(p, n), n[8], static_cast<const int64_t*>(p[9]), n[9], p[10], DType(n[3])};
  run(a, &sparse_update_workspace, &sparse_update, n[11]);
}

void bag_step_host(void* const* p, const int64_t* n) {
  BagStep a{};
  a.state = state_of(p, n), a.n = n[8], a.count = n[9], a.grad = p[10], a.grad_dtype = DType(n[3]);
  a.token = static_cast<const int64_t*>(p[9]), a.offset = static_cast<const int64_t*>(p[11]), a.bags = n[10];
  a.token_weight = static_cast<const float*>(p[12]);
  run(a, &bag_step_workspace, &bag_step, n[11]);
}
}
