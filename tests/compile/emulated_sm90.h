// What bce_pass.cu takes of CUTLASS, on the emulated card: barriers, TMA, products of a warpgroup, moves of matrices.
// Asynchronous work is done as late as the code allows (products and stores when they are waited for) or as early (loads
// when they are asked for), so that memory which is given back or taken too soon shows in the results. Where operands
// and accumulators lie is test_bce_pass.py's to prove, of CUTLASS itself.
#pragma once

#include <cuda.h>

#include "emulated_card.h"

namespace emu {

inline void wait_until(const std::function<bool()>& ready) {
  const uint32_t me = thread.x;
  while (!ready()) swapcontext(&fibers[me].context, &scheduler);
  ++progress;
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated sm_90: %s\n", what);
  std::abort();
}

// A barrier that hardware names; some of its threads go on at once.
struct Named {
  uint32_t arrived = 0, generation = 0;
  uint32_t arrive(uint32_t threads) {
    const uint32_t before = generation;
    ++progress;
    if (++arrived == threads) arrived = 0, ++generation;
    return before;
  }
};
inline Named named[16];

struct Box {  // of a matrix, as a descriptor has it
  char* base;
  int64_t rows, columns;
  int32_t box_rows, box_columns;
};
inline int place_in(int row, int column, int rows) {
  return column / 64 * rows * 128 + row * 128 + (((column % 64 / 8) ^ (row % 8)) << 4) + column % 8 * 2;
}
// Moves a box between the matrix and swizzled memory; what lies outside is read as 0 and not written.
inline void move(const Box& box, char* memory, int column, int row, bool store) {
  for (int r = 0; r < box.box_rows; ++r)
    for (int c = 0; c < box.box_columns; ++c) {
      char* const here = memory + place_in(r, c, box.box_rows);
      const bool inside = row + r < box.rows && column + c < box.columns;
      char* const there = box.base + ((row + r) * box.columns + column + c) * 2;
      if (store && inside) std::memcpy(there, here, 2);
      if (!store && inside) std::memcpy(here, there, 2);
      if (!store && !inside) std::memset(here, 0, 2);
    }
}

struct Work {  // of one thread, that has been asked for and not done
  std::vector<std::function<void()>> open;
  std::vector<std::vector<std::function<void()>>> groups;
  void commit() { groups.push_back(std::move(open)), open.clear(); }
  void wait(size_t left) {
    while (groups.size() > left) {
      for (const auto& each : groups.front()) each();
      groups.erase(groups.begin());
    }
  }
};
inline Work products[1024], stores[1024];
inline int64_t counted[3];  // products, boxes loaded, boxes stored

}  // namespace emu

namespace cutlass {
struct bfloat16_t {
  uint16_t bits;
};
inline int canonical_warp_group_idx() { return int(emu::thread.x / 128); }

namespace arch {
struct ClusterTransactionBarrier {
  int32_t expected, pending, bytes;
  uint32_t phase;
  void init(int count) { expected = pending = count, bytes = 0, phase = 0; }
  void settle() {
    if (pending < 0) emu::fail("more threads arrive at a barrier than it counts");
    if (pending == 0 && bytes == 0) pending = expected, phase ^= 1;
    ++emu::progress;
  }
  void arrive() { --pending, settle(); }
  void arrive_and_expect_tx(uint32_t more) { bytes += int32_t(more), arrive(); }
  void complete(uint32_t some) { bytes -= int32_t(some), settle(); }
  void wait(uint32_t parity) {
    emu::wait_until([&] { return phase != parity; });
  }
};
struct NamedBarrier {
  static void arrive(uint32_t threads, uint32_t id) { emu::named[id + 8].arrive(threads); }
  static void sync(uint32_t threads, uint32_t id) {
    const uint32_t before = emu::named[id + 8].arrive(threads);
    emu::wait_until([=] { return emu::named[id + 8].generation != before; });
  }
};
inline void fence_barrier_init() {}
template <int>
void warpgroup_reg_alloc() {}
template <int>
void warpgroup_reg_dealloc() {}
}  // namespace arch
}  // namespace cutlass

namespace cute {

struct alignas(16) uint128_t {
  uint32_t w[4];
};
template <int N>
struct Int {
  static constexpr int value = N;
};
using _1 = Int<1>;
using _2 = Int<2>;
using _3 = Int<3>;
template <class...>
struct Shape {};
template <class...>
struct Step {};
struct Whole {};
inline constexpr Whole _;

namespace GMMA {
enum class Major { K, MN };
enum class ScaleOut { Zero, One };
template <class T>
struct Layout_K_SW128_Atom {};
template <class T>
struct Layout_MN_SW128_Atom {};
}  // namespace GMMA

// An operand [m or n, k, stage]; kAcross: its rows in memory run along k.
template <bool kAcross, int kSide, int kDepth>
struct Placed {
  static constexpr int side = kSide, depth = kDepth;
  static int at(int side, int k, int stage) {
    return stage * kSide * kDepth * 2 +
           (kAcross ? emu::place_in(k, side, kDepth) : emu::place_in(side, k, kSide));
  }
};
template <class T, int M, int K, class... S, class... Steps>
Placed<true, M, K> tile_to_shape(GMMA::Layout_MN_SW128_Atom<T>, Shape<Int<M>, Int<K>, S...>, Steps...) { return {}; }
template <class T, int M, int K, class... S, class... Steps>
Placed<false, M, K> tile_to_shape(GMMA::Layout_K_SW128_Atom<T>, Shape<Int<M>, Int<K>, S...>, Steps...) { return {}; }

template <class L>
struct Operand {
  const char* memory;
  int k = 0, stage = 0;
  Operand operator()(Whole, Whole, int k_, int stage_ = 0) const { return {memory, k_, stage_}; }
  float at(int side, int step) const {
    uint16_t half;
    std::memcpy(&half, memory + L::at(side, 16 * k + step, stage), 2);
    const uint32_t wide = uint32_t(half) << 16;
    float out;
    std::memcpy(&out, &wide, 4);
    return out;
  }
};
template <class T>
const char* make_smem_ptr(T* p) { return reinterpret_cast<const char*>(p); }
template <class L>
Operand<L> make_tensor(const char* memory, L) { return {memory}; }

template <int N>
struct Accumulators {
  float v[N];
  float& operator()(int i) { return v[i]; }
};
template <int N>
constexpr Int<N> size(const Accumulators<N>&) { return {}; }
template <int N>
constexpr bool operator<(int i, Int<N>) { return i < N; }
template <int kMode, class L>
constexpr int size(const Operand<L>&) { return L::depth / 16; }

template <GMMA::Major, GMMA::Major>
struct SM90_64x128x16_F32BF16BF16_SS {};
struct Product {
  GMMA::ScaleOut accumulate_ = GMMA::ScaleOut::One;
  Product get_slice(int) const { return *this; }
  template <class T>
  T partition_A(const T& t) const { return t; }
  template <class T>
  T partition_B(const T& t) const { return t; }
  template <class T>
  T make_fragment_A(const T& t) const { return t; }
  template <class T>
  T make_fragment_B(const T& t) const { return t; }
};
template <class T>
Product make_tiled_mma(T) { return {}; }
template <int M, int N>
Accumulators<M * N / 128> partition_fragment_C(Product, Shape<Int<M>, Int<N>>) { return {}; }

template <class A, class B, int N>
void gemm(const Product& product, Operand<A> a, Operand<B> b, Accumulators<N>& sums) {
  const bool fresh = product.accumulate_ == GMMA::ScaleOut::Zero;
  const int thread = int(emu::thread.x % 128);
  emu::counted[0] += N / 64;
  emu::products[emu::thread.x].open.push_back([=, &sums] {
    for (int i = 0; i < N; ++i) {
      const int m = i / 64 * 64 + thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8;
      const int n = i % 64 / 4 * 8 + thread % 4 * 2 + i % 2;
      float sum = fresh ? 0 : sums.v[i];
      for (int k = 0; k < 16; ++k) sum += a.at(m, k) * b.at(n, k);
      sums.v[i] = sum;
    }
  });
}
template <int N>
void clear(Accumulators<N>& a) { for (float& each : a.v) each = 0; }
template <class T>
void warpgroup_fence_operand(T&) {}
inline void warpgroup_arrive() {}
inline void warpgroup_commit_batch() { emu::products[emu::thread.x].commit(); }
template <int N>
void warpgroup_wait() { emu::products[emu::thread.x].wait(N); }

namespace TMA {
enum class CacheHintSm90 : uint64_t { EVICT_NORMAL, EVICT_FIRST, EVICT_LAST };
}
struct SM90_TMA_LOAD_2D {
  static void copy(const void* map, uint64_t* barrier, uint64_t, void* memory, int column, int row) {
    const emu::Box& box = *static_cast<const emu::Box*>(map);
    emu::move(box, static_cast<char*>(memory), column, row, false);
    ++emu::counted[1];
    reinterpret_cast<cutlass::arch::ClusterTransactionBarrier*>(barrier)->complete(
        uint32_t(box.box_rows * box.box_columns * 2));
  }
};
struct SM90_TMA_STORE_2D {
  static void copy(const void* map, const void* memory, int column, int row) {
    ++emu::counted[2];
    emu::stores[emu::thread.x].open.push_back([=] {
      emu::move(*static_cast<const emu::Box*>(map), static_cast<char*>(const_cast<void*>(memory)), column, row, true);
    });
  }
};
inline void tma_store_fence() {}
inline void tma_store_arrive() { emu::stores[emu::thread.x].commit(); }
template <int N>
void tma_store_wait() { emu::stores[emu::thread.x].wait(N); }

}  // namespace cute

alignas(1024) inline char emulated_memory[227 << 10];  // shared

namespace emu {

// Where lane 8 m + r says that row r of matrix m begins.
template <class F>
void each_matrix(const void* mine, const F& f) {
  const uint32_t offset = uint32_t(static_cast<const char*>(mine) - emulated_memory);
  if (offset >= sizeof emulated_memory || offset % 16) fail("a row of a matrix begins nowhere");
  const uint32_t lane = thread.x % 32;
  uint32_t rows[4];
  for (uint32_t m = 0; m < 4; ++m)
    rows[m] = exchange(~0u, offset, [=](const uint32_t* warp) { return warp[8 * m + lane / 4]; });
  for (int m = 0; m < 4; ++m) f(m, emulated_memory + rows[m] + lane % 4 * 4);
  exchange(~0u, 0, [](const uint32_t*) { return 0; });
}

}  // namespace emu

namespace cute {
struct SM75_U32x4_LDSM_N {
  static void copy(const uint128_t& from, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
    uint32_t* const out[] = {&a, &b, &c, &d};
    emu::each_matrix(&from, [&](int m, char* at) { std::memcpy(out[m], at, 4); });
  }
};
struct SM90_U32x4_STSM_N {
  static void copy(uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint128_t& to) {
    const uint32_t in[] = {a, b, c, d};
    emu::each_matrix(&to, [&](int m, char* at) { std::memcpy(at, &in[m], 4); });
  }
};
}  // namespace cute

inline void __syncwarp() { __syncwarp(~0u); }
inline uint32_t __shfl_sync(uint32_t mask, uint32_t value, int lane) {
  return emu::exchange(mask, value, [=](const uint32_t* warp) { return warp[lane]; });
}

// The host's part.
static_assert(sizeof(emu::Box) <= sizeof(CUtensorMap));
inline CUresult emulated_cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, uint32_t, void* base,
                                                const cuuint64_t* sizes, const cuuint64_t* pitch, const cuuint32_t* box,
                                                const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool fits = swizzle == CU_TENSOR_MAP_SWIZZLE_128B && pitch[0] == 2 * sizes[0] && pitch[0] % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(base) % 16 == 0 && box[0] * 2 <= 128 && box[1] <= 256;
  if (!fits) return CUDA_ERROR_INVALID_VALUE;
  *reinterpret_cast<emu::Box*>(map) = {static_cast<char*>(base), int64_t(sizes[1]), int64_t(sizes[0]), int32_t(box[1]),
                                       int32_t(box[0])};
  return CUDA_SUCCESS;
}
#define CUTLASS_CUDA_DRIVER_WRAPPER_CALL(name) emulated_##name
template <class K>
cudaError_t emulated_attribute(K*, int, int bytes) {
  return bytes <= int(sizeof emulated_memory) ? cudaSuccess : cudaErrorInvalidValue;
}
#define cudaFuncSetAttribute emulated_attribute
#define CUTE_UNROLL
#undef __grid_constant__
#define __grid_constant__
#define XK_SHARED_MEMORY(name) char* const name = emulated_memory
#define XK_LAUNCH_SHARED(kernel, grid, threads, bytes, stream) \
  emu::launch_grid(kernel, (grid).x, (grid).y, threads)

namespace emu {

template <class K>
auto launch_grid(K* kernel, uint32_t x, uint32_t y, int threads) {
  return [=](const auto&... args) {
    body = [&] { kernel(args...); };
    for (uint32_t i = 0; i < x * y; ++i) {
      const uint32_t at = reverse ? x * y - 1 - i : i;
      block = {at % x, at / x};
      std::memset(emulated_memory, 0xff, sizeof emulated_memory);  // NaN
      for (int t = 0; t < threads; ++t) products[t] = {}, stores[t] = {};
      for (Named& each : named) each = {};
      run_block(threads);
      for (const Named& each : named)
        if (each.arrived) fail("a block ends while threads have arrived at a barrier");
      for (int t = 0; t < threads; ++t)
        if (products[t].groups.size() || stores[t].groups.size()) fail("a block ends before its work has");
    }
  };
}

}  // namespace emu
