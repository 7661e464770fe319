// The second pass of bce_step_ over a chunk of labels on sm_90a: dX += Gᵀ W and the rows' gradient
// G x on the tensor cores, SGD of a bf16 table on the gradient while it is in registers.
//
// A block owns kColumns columns and every n-th tile of kLabels labels. One warp brings the tiles by
// TMA. Two warpgroups take them in turns, so that one multiplies while the other rounds; each keeps
// its own dX of all samples in registers over the whole loop. Their random words go through the
// memory that the tile leaves by: drawn a group of 8 columns at a time, read back as the tensor
// cores deal out columns.
//
// CUTLASS (BSD-3) gives the instructions their names and the operands their descriptors; no PTX of
// ours.
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cuda_host_adapter.hpp>

#include <stdexcept>
#include <string>

#include "../launch.h"
#include "pair_update.cuh"

// The tests put others in their place, to run without a card.
#ifndef XK_LAUNCH_SHARED
#define XK_LAUNCH_SHARED(kernel, grid, threads, bytes, stream) \
  kernel<<<grid, threads, bytes, stream>>>
#define XK_SHARED_MEMORY(name) extern __shared__ __align__(1024) char name[]
#endif

namespace xk::cuda {
namespace {

using namespace cute;
using Bf16 = cutlass::bfloat16_t;
using Barrier = cutlass::arch::ClusterTransactionBarrier;
using cutlass::arch::NamedBarrier;

constexpr int kSamples = 128, kLabels = 64, kColumns = 128;
constexpr int kStages = 5;    // tiles of the table and the gradient that are on their way or in use
constexpr int kHalf = 64;     // columns of one box: rows of 128 bytes, swizzled
constexpr int kGroup = 128;   // threads of a warpgroup
constexpr int kThreads = 3 * kGroup;
constexpr int kEntryRegisters = 168, kProducerRegisters = 24, kConsumerRegisters = 240;
static_assert(kEntryRegisters * 3 >= kProducerRegisters + 2 * kConsumerRegisters);
// Named barriers: whose turn it is, the writes of one warpgroup, the sum of dX.
constexpr uint32_t kTurn = 0, kWritten = 2, kSummed = 4;

// One memory, read in two ways: rows of 64 values stand behind one another, 1,024 bytes swizzled at
// a time; the columns behind the 64th stand behind all rows.
using Along = GMMA::Layout_K_SW128_Atom<Bf16>;    // the product runs along a row
using Across = GMMA::Layout_MN_SW128_Atom<Bf16>;  // it runs along the rows
using XLayout = decltype(tile_to_shape(Across{}, Shape<Int<kColumns>, Int<kSamples>>{},
                                       Step<_2, _1>{}));
using WLayout = decltype(tile_to_shape(Across{}, Shape<Int<kColumns>, Int<kLabels>, Int<kStages>>{},
                                       Step<_2, _1, _3>{}));
using GLayout = decltype(tile_to_shape(Along{},
                                       Shape<Int<kLabels>, Int<kSamples>, Int<kStages>>{}));
using GtLayout = decltype(tile_to_shape(Across{},
                                        Shape<Int<kSamples>, Int<kLabels>, Int<kStages>>{},
                                        Step<_2, _1, _3>{}));
using RowProduct = decltype(make_tiled_mma(
    SM90_64x128x16_F32BF16BF16_SS<GMMA::Major::K, GMMA::Major::MN>{}));
using DxProduct = decltype(make_tiled_mma(
    SM90_64x128x16_F32BF16BF16_SS<GMMA::Major::MN, GMMA::Major::MN>{}));

struct Shared {
  alignas(1024) Bf16 x[kSamples * kColumns];
  alignas(1024) Bf16 weight[kStages][kLabels * kColumns];
  alignas(1024) Bf16 gradient[kStages][kLabels * kSamples];
  alignas(1024) Bf16 out[2][kLabels * kColumns];
  Barrier x_full, full[kStages], empty[kStages];
};
static_assert(sizeof(Shared) <= 227 << 10);
constexpr uint32_t kTileBytes = sizeof(Shared::weight[0]) + sizeof(Shared::gradient[0]);

struct Maps {
  CUtensorMap x, weight, gradient;
};

struct Sizes {
  int64_t global_row;  // of the chunk's first
  const Hyper* hyper;
  const int64_t* counter;
  const int32_t* flag;
  float* partial;
  int32_t batch, first, labels, width, splits;
};

constexpr uint64_t kOnce = uint64_t(TMA::CacheHintSm90::EVICT_FIRST);
constexpr uint64_t kSoon = uint64_t(TMA::CacheHintSm90::EVICT_NORMAL);  // by the other slices

// A turn of tiles: stage, and the parity that its barriers have.
struct Stage {
  int index = 0;
  uint32_t parity = 0;
  __device__ void advance(int by) {
    index += by;
    if (index >= kStages) index -= kStages, parity ^= 1;
  }
};

__device__ void load_tiles(Shared& s, const Maps& maps, const Sizes& a, int split, int column,
                           int tiles) {
  s.x_full.arrive_and_expect_tx(sizeof s.x);
  for (int h = 0; h < 2; ++h)
    SM90_TMA_LOAD_2D::copy(&maps.x, reinterpret_cast<uint64_t*>(&s.x_full), kSoon,
                           s.x + h * kSamples * kHalf, column + h * kHalf, 0);
  Stage stage;
  for (int i = split; i < tiles; i += a.splits) {
    s.empty[stage.index].wait(stage.parity ^ 1);
    Barrier& full = s.full[stage.index];
    full.arrive_and_expect_tx(kTileBytes);
    auto* const told = reinterpret_cast<uint64_t*>(&full);
    const int local = i * kLabels;
    for (int h = 0; h < 2; ++h) {
      SM90_TMA_LOAD_2D::copy(&maps.gradient, told, kSoon,
                             s.gradient[stage.index] + h * kLabels * kHalf, h * kHalf, local);
      SM90_TMA_LOAD_2D::copy(&maps.weight, told, kOnce,
                             s.weight[stage.index] + h * kLabels * kHalf, column + h * kHalf,
                             a.first + local);
    }
    stage.advance(1);
  }
}

// A warpgroup's share of a tile of weights. Of the 16 rows of its warp and the p-th 16 columns a
// lane addresses 8 values, 16 bytes: a row of one of the four 8 x 8 matrices that are moved at
// once.
XK_FN int row_of(int thread) { return thread / 32 * 16 + thread % 16; }
XK_FN int first_group_of(int thread) { return thread % 32 / 16; }  // of 8 columns; p-th: + 2 p
XK_FN int first_bytes_of(int thread) {
  return row_of(thread) * 128 + ((first_group_of(thread) ^ (row_of(thread) % 8)) << 4);
}
XK_FN int bytes_of(int first_bytes, int p) {
  return (first_bytes ^ (p % 4 * 32)) + p / 4 * (kLabels * 128);
}
__device__ __forceinline__ uint128_t& chunk_of(Bf16* tile, int first_bytes, int p) {
  return *reinterpret_cast<uint128_t*>(reinterpret_cast<char*>(tile) + bytes_of(first_bytes, p));
}

// Where the i-th of a thread's sums of dX belongs; the next one is its neighbour.
XK_FN int sample_of(int thread, int i) {
  return i / 64 * 64 + thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8;
}
XK_FN int column_of(int thread, int i) { return i % 64 / 4 * 8 + thread % 4 * 2 + i % 2; }

template <bool kDecoupled, class Dx>
__device__ void consume_tiles(Shared& s, const Maps& maps, const Sizes& a, int which, int split,
                              int column, int tiles, Dx& dx) {
  const int thread = threadIdx.x % kGroup;
  int first_bytes = first_bytes_of(thread);
  const SgdSteering steering = sgd_steering<kDecoupled>(*a.hyper);
  const uint32_t seed = __shfl_sync(~0u, uint32_t(a.counter[0]), 0);
  const uint32_t step = __shfl_sync(~0u, uint32_t(a.counter[1]), 0);

  RowProduct row_product;
  DxProduct dx_product;
  const auto x = make_tensor(make_smem_ptr(s.x), XLayout{});
  const auto w = make_tensor(make_smem_ptr(&s.weight[0][0]), WLayout{});
  const auto g = make_tensor(make_smem_ptr(&s.gradient[0][0]), GLayout{});
  const auto gt = make_tensor(make_smem_ptr(&s.gradient[0][0]), GtLayout{});
  const auto rows = row_product.get_slice(thread);
  const auto sums = dx_product.get_slice(thread);
  const auto g_rows = rows.make_fragment_A(rows.partition_A(g));
  const auto x_rows = rows.make_fragment_B(rows.partition_B(x));
  const auto g_sums = sums.make_fragment_A(sums.partition_A(gt));
  const auto w_sums = sums.make_fragment_B(sums.partition_B(w));
  auto grad = partition_fragment_C(row_product, Shape<Int<kLabels>, Int<kColumns>>{});
  static_assert(decltype(size(grad))::value == 64);

  s.x_full.wait(0);
  Stage stage;
  stage.advance(which);
  Bf16* const out = s.out[which];
  for (int i = split + which * a.splits; i < tiles; i += 2 * a.splits, stage.advance(2)) {
    // The store of its last tile has read `out`: its first thread waited for that.
    NamedBarrier::sync(2 * kGroup, kTurn + which);
    s.full[stage.index].wait(stage.parity);
    warpgroup_fence_operand(grad);
    warpgroup_fence_operand(dx);
    warpgroup_arrive();
    row_product.accumulate_ = GMMA::ScaleOut::Zero;
    CUTE_UNROLL
    for (int k = 0; k < size<2>(x_rows); ++k) {
      gemm(row_product, g_rows(_, _, k, stage.index), x_rows(_, _, k), grad);
      row_product.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    CUTE_UNROLL
    for (int k = 0; k < size<2>(w_sums); ++k)
      gemm(dx_product, g_sums(_, _, k, stage.index), w_sums(_, _, k, stage.index), dx);
    warpgroup_commit_batch();
    if (i + a.splits < tiles) NamedBarrier::arrive(2 * kGroup, kTurn + 1 - which);

    // While the products run: a draw for each group of 8 columns of the warp's 16 rows.
    const uint64_t global = uint64_t(a.global_row + int64_t(i) * kLabels + row_of(thread));
    uint32_t group = column / kChunk + first_group_of(thread);
    // What depends on these alone is to be computed again in each turn: registers are scarcer.
    warpgroup_fence_operand(group);
    warpgroup_fence_operand(reinterpret_cast<uint32_t&>(first_bytes));
    CUTE_UNROLL
    for (int p = 0; p < kColumns / 16; ++p) {
      const Words draw = philox(seed, step, uint32_t(global), uint32_t(global >> 32), group + 2 * p,
                                kStreamWeight);
      reinterpret_cast<uint4&>(chunk_of(out, first_bytes, p)) =
          make_uint4(draw.w[0], draw.w[1], draw.w[2], draw.w[3]);
    }
    __syncwarp();
    warpgroup_wait<1>();
    warpgroup_fence_operand(grad);
    Bf16* const weight = s.weight[stage.index];
    CUTE_UNROLL
    for (int p = 0; p < kColumns / 16; ++p) {
      uint32_t word[4], value[4];
      uint128_t& at = chunk_of(out, first_bytes, p);
      SM75_U32x4_LDSM_N::copy(at, word[0], word[1], word[2], word[3]);
      SM75_U32x4_LDSM_N::copy(chunk_of(weight, first_bytes, p), value[0], value[1], value[2],
                              value[3]);
      CUTE_UNROLL
      for (int m = 0; m < 4; ++m)
        value[m] = update_pair(steering, value[m], grad(8 * p + 2 * m), grad(8 * p + 2 * m + 1),
                               word[m]);
      __syncwarp();
      SM90_U32x4_STSM_N::copy(value[0], value[1], value[2], value[3], at);
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(dx);
    tma_store_fence();
    NamedBarrier::sync(kGroup, kWritten + which);
    if (thread == 0) {
      s.empty[stage.index].arrive();
      for (int h = 0; h < 2; ++h)
        SM90_TMA_STORE_2D::copy(&maps.weight, out + h * kLabels * kHalf, column + h * kHalf,
                                a.first + i * kLabels);
      tma_store_arrive();
      tma_store_wait<0>();
    }
  }
}

template <bool kDecoupled>
__global__ void __launch_bounds__(kThreads, 1)
    bce_pass_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Sizes a) {
  XK_SHARED_MEMORY(memory);
  Shared& s = *reinterpret_cast<Shared*>(memory);
  if (*a.flag != 0) return;
  const int column = blockIdx.x * kColumns, split = blockIdx.y;
  const int tiles = (a.labels + kLabels - 1) / kLabels;
  if (threadIdx.x == 0) {
    s.x_full.init(1);
    for (int i = 0; i < kStages; ++i) s.full[i].init(1), s.empty[i].init(1);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  const int group = cutlass::canonical_warp_group_idx();
  if (group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    if (threadIdx.x == 0) load_tiles(s, maps, a, split, column, tiles);
    return;
  }
  cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
  const int which = group - 1;
  // The first turn is the first warpgroup's.
  if (which == 1 && split < tiles) NamedBarrier::arrive(2 * kGroup, kTurn);

  auto dx = partition_fragment_C(DxProduct{}, Shape<Int<kSamples>, Int<kColumns>>{});
  const int thread = threadIdx.x % kGroup;
  float* const partial = a.partial + int64_t(split) * a.batch * a.width;
  const auto each_pair = [&](auto&& f) {
    CUTE_UNROLL
    for (int i = 0; i < size(dx); i += 2) {
      const int sample = sample_of(thread, i), c = column + column_of(thread, i);
      if (sample < a.batch && c < a.width)
        f(*reinterpret_cast<float2*>(partial + int64_t(sample) * a.width + c), dx(i), dx(i + 1));
    }
  };
  clear(dx);
  // A chunk's sums go on from those of the chunk before it.
  if (which == 0 && a.first > 0)
    each_pair([](const float2& kept, float& low, float& high) { low = kept.x, high = kept.y; });
  consume_tiles<kDecoupled>(s, maps, a, which, split, column, tiles, dx);
  if (which == 0) each_pair([](float2& kept, float low, float high) { kept = {low, high}; });
  NamedBarrier::sync(2 * kGroup, kSummed);
  if (which == 1)
    each_pair([](float2& kept, float low, float high) {
      kept = {kept.x + low, kept.y + high};
    });
}

void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("xmlkernels: ") + what + ": " + cudaGetErrorString(error));
}

// A bf16 matrix [rows, columns], contiguous, in boxes of kHalf columns; zeros beyond its edges. The
// encoder comes from the driver that runs, so that the library needs none to load.
CUtensorMap map_of(const void* matrix, int64_t rows, int64_t columns, uint32_t box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows)};
  const cuuint64_t pitch[] = {cuuint64_t(columns) * sizeof(Bf16)};
  const cuuint32_t box[] = {kHalf, box_rows}, steps[] = {1, 1};
  const CUresult result = CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(matrix), sizes, pitch, box,
      steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("xmlkernels: no TMA descriptor: error " + std::to_string(int(result)));
  return map;
}

}  // namespace

void bce_pass(const BcePass& args, void* stream) {
  Maps maps;
  maps.x = map_of(args.x, args.batch, args.width, kSamples);
  maps.weight = map_of(args.weight, args.rows, args.width, kLabels);
  maps.gradient = map_of(args.gradient, args.chunk, args.pitch, kLabels);
  Sizes sizes{};
  sizes.global_row = args.row_offset + args.first;
  sizes.hyper = args.hyper, sizes.counter = args.counter, sizes.flag = args.flag;
  sizes.partial = args.partial;
  sizes.batch = int32_t(args.batch), sizes.first = int32_t(args.first);
  sizes.labels = int32_t(std::min(args.chunk, args.rows - args.first));
  sizes.width = int32_t(args.width), sizes.splits = int32_t(args.splits);
  const auto kernel = args.decoupled ? bce_pass_kernel<true> : bce_pass_kernel<false>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  int(sizeof(Shared))),
             "shared memory of bce_pass");
  const dim3 grid(uint32_t((args.width + kColumns - 1) / kColumns), uint32_t(args.splits));
  XK_LAUNCH_SHARED(kernel, grid, kThreads, sizeof(Shared), static_cast<cudaStream_t>(stream))
  (maps, sizes);
  check_cuda(cudaGetLastError(), "bce_pass");
}

}  // namespace xk::cuda
