// bag_step: backward of an embedding bag and the update of its touched rows.
//
// Occurrences are sorted by row, so that a row's occurrences are one run. A group of lanes owns a
// short run: it adds up the gradients of the bags in order and updates the row from registers. A
// long run is added up by many groups first (block-wise, in an order that depends on its length
// alone) and then updated like any row of sparse_update.
#include "bag_runs.cuh"
#include "sort.cuh"
#include "stages.cuh"

namespace xk::cuda {

namespace {

constexpr int kLongRun = 128;     // longer ones would keep one warp busy when all others are done
constexpr int kSumThreads = 512;  // of a block that adds up a piece of a long run: 64 slots of 8
                                  // lanes
constexpr int kSumLanes = 8, kSumSlots = kSumThreads / kSumLanes, kSumColumns = kSumLanes * kChunk;
constexpr int kSumBlocks = 1024;
using BagFormats = Formats<Format<DType::f32, DType::f32, DType::f32>,
                           Format<DType::bf16, DType::bf16, DType::f32>,
                           Format<DType::bf16, DType::f32, DType::f32>>;

// Where the parts of the workspace begin, in bytes. T occurrences; no more than T / (kLongRun + 1)
// runs are long.
struct Layout {
  int64_t keys, values, sorted_keys, sorted_values, scratch, scratch_bytes, long_start, long_row,
      long_grad, bytes;
  int64_t long_runs;

  explicit Layout(const BagStep& a) : long_runs(a.count / (kLongRun + 1)) {
    bytes = aligned(sizeof(Head));
    keys = take(a.count * 4);
    values = take(a.count * 8);
    sorted_keys = take(a.count * 4);
    sorted_values = take(a.count * 8);
    scratch_bytes = a.count ? sort_scratch(a.count) : 0;
    scratch = take(scratch_bytes);
    long_start = take(long_runs * 4);
    long_row = take(long_runs * 8);
    long_grad = take(long_runs * a.state.width * 4);
  }

 private:
  int64_t take(int64_t size) {
    const int64_t begin = bytes;
    bytes += aligned(size);
    return begin;
  }
};

// Key (row, or n for fill) and value (bag, weight) of each occurrence; raises not_finite for a
// weight that is not finite.
__global__ void __launch_bounds__(kThreads)
    key_kernel(BagStep a, uint32_t* keys, uint2* values, Coefficients* c) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= a.count) return;
  const Occurrence o = occurrence(a, j);
  if (not_finite(o.value.y, 0x7f800000u)) c->not_finite = 1;  // whoever writes it writes the same
  keys[j] = o.row;
  values[j] = o.value;
}

// One group of lanes per occurrence; the one at the head of a run goes on with it.
template <bool kMomentum, bool kSecond, bool kVector, class Form>
__global__ void __launch_bounds__(kThreads, kBlocks - 1)
    bag_kernel(BagStep a, Runs runs, int lanes, uint32_t* long_start, int64_t* long_row,
               Head* head) {
  __shared__ Coefficients c;
  Form::pin(a.state, a.grad_dtype);
  const bool finite = share(c, head);
  const int lane = threadIdx.x % lanes;
  const int64_t begin = int64_t(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
  if (!finite || begin >= runs.count) return;
  const uint32_t row = runs.row[begin];
  if (row >= a.n || (begin > 0 && runs.row[begin - 1] == row)) return;
  const int in_warp = threadIdx.x % 32 - lane;
  const uint32_t all = 0xffffffffu >> (32 - lanes), group = all << in_warp;
  int64_t end = begin;
  for (uint32_t same = all; same == all && end - begin <= kLongRun;) {
    const int64_t p = end + lane;
    same = __ballot_sync(group, p < runs.count && runs.row[p < runs.count ? p : begin] == row) >>
               in_warp &
           all;
    end += __popc(same);  // equal keys are neighbours: the set bits are the lowest
  }
  if (end - begin > kLongRun) {
    if (lane == 0) {
      // The order of the list is chance, what becomes of an entry is not.
      const uint32_t entry = atomicAdd(&head->long_runs, 1u);
      long_start[entry] = uint32_t(begin);
      long_row[entry] = row;
    }
    return;
  }
  update_row<kMomentum, kSecond, kVector>(
      a.state, c, row, lane, lanes, [&](int64_t column, int count) {
        Values g = sum_run<kVector>(a, runs, begin, end, 1, column, count);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) g.v[i] *= c.scale;
        return g;
      });
}

// Sums of long runs into long_grad [runs, D]: a block per run and piece of 64 columns. Slot s of a
// block adds up the occurrences s, s + 64, ..., then the slots are added pairwise.
template <bool kVector>
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(BagStep a, Runs runs, const uint32_t* long_start, float* long_grad,
               const Head* head) {
  __shared__ Values part[kSumSlots][kSumLanes];
  const int lane = threadIdx.x % kSumLanes, slot = threadIdx.x / kSumLanes;
  const int64_t pieces = ceil_div(a.state.width, int64_t(kSumColumns));
  const int64_t items = int64_t(head->long_runs) * pieces;  // none where a value is not finite
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t run = item / pieces,
                  column = item % pieces * kSumColumns + int64_t(lane) * kChunk;
    const int64_t begin = long_start[run], left = a.state.width - column;
    const uint32_t row = runs.row[begin];
    int64_t end = begin + 1, beyond = runs.count;
    while (end < beyond) {
      const int64_t middle = end + (beyond - end) / 2;
      if (runs.row[middle] == row)
        end = middle + 1;
      else
        beyond = middle;
    }
    Values sum{};
    if (left > 0)
      sum = sum_run<kVector>(a, runs, begin + slot, end, kSumSlots, column,
                             left < kChunk ? int(left) : kChunk);
    part[slot][lane] = sum;
    for (int half = kSumSlots / 2; half > 0; half /= 2) {
      __syncthreads();
      if (slot >= half) continue;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) part[slot][lane].v[i] += part[slot + half][lane].v[i];
    }
    if (slot == 0)
      for (int i = 0; i < kChunk && i < left; ++i)
        long_grad[run * a.state.width + column + i] = part[0][lane].v[i];
    __syncthreads();  // before the next item overwrites the parts
  }
}

int bits_of_key(int64_t largest) {
  int bits = 1;
  while (largest >> bits) ++bits;
  return bits;
}

}  // namespace

int64_t bag_step_workspace(const BagStep& a) { return Layout(a).bytes; }

void bag_step(const BagStep& a, void* workspace, void* stream) {
  if (a.count == 0 || a.bags == 0 || a.n == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  const Layout at(a);
  char* const base = static_cast<char*>(workspace);
  auto* const head = reinterpret_cast<Head*>(base);
  auto* const keys = reinterpret_cast<uint32_t*>(base + at.keys);
  auto* const values = reinterpret_cast<uint2*>(base + at.values);
  auto* const sorted_keys = reinterpret_cast<uint32_t*>(base + at.sorted_keys);
  auto* const sorted_values = reinterpret_cast<uint2*>(base + at.sorted_values);
  auto* const long_start = reinterpret_cast<uint32_t*>(base + at.long_start);
  auto* const long_row = reinterpret_cast<int64_t*>(base + at.long_row);
  auto* const long_grad = reinterpret_cast<float*>(base + at.long_grad);
  const Runs runs{sorted_keys, sorted_values, a.count};
  const int lanes = lanes_for(a.state.width);
  const bool vector = in_vectors(a.state, a.grad);

  prepare(a.state, nullptr, a.bags, a.n, a.grad, a.grad_dtype, head, s);
  XK_LAUNCH(key_kernel, uint32_t(ceil_div(a.count, kThreads)), kThreads, s)
  (a, keys, values, &head->c);
  check_launch("bag_step keys");
  sort_pairs(keys, sorted_keys, values, sorted_values, a.count, bits_of_key(a.n), base + at.scratch,
             at.scratch_bytes, s);
  for_rule(a.state, a.grad_dtype, vector, BagFormats{},
           [&](auto momentum, auto second, auto in_chunks, auto format) {
             const auto bags = bag_kernel<momentum, second, in_chunks, decltype(format)>;
             XK_LAUNCH(bags, blocks_for(a.count, lanes), kThreads, s)
             (a, runs, lanes, long_start, long_row, head);
           });
  check_launch("bag_step rows");
  if (at.long_runs == 0) return;
  const int64_t items = at.long_runs * ceil_div(a.state.width, kSumColumns);
  const auto sum = vector ? sum_kernel<true> : sum_kernel<false>;
  XK_LAUNCH(sum, uint32_t(items < kSumBlocks ? items : kSumBlocks), kSumThreads, s)
  (a, runs, long_start, long_grad, head);
  check_launch("bag_step long rows");
  update_rows({a.state, a.n, long_row, at.long_runs, long_grad, DType::f32}, &head->long_runs, head,
              s);
}

}  // namespace xk::cuda
