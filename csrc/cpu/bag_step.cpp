// bag_step: occurrences of rows in bags, sorted by row, summed row by row and applied at once.
#include "touched_rows.h"

namespace xk::XK_NS {

namespace {

constexpr int64_t kBlock = 1 << 14;  // occurrences of one work item while sorting
constexpr int64_t kShare = 256;      // and while updating
constexpr int kDigitBits = 11;
constexpr int64_t kDigits = 1 << kDigitBits;

struct Occurrence {
  int64_t row, bag;
  float weight;
};

// Every occurrence that lies in a bag and names a row of the table, in ascending order.
int64_t collect(const BagStep& a, Occurrence* out) {
  int64_t count = 0;
  for (int64_t b = 0; b < a.bags; ++b)
    for (int64_t j = a.offset[b]; j < a.offset[b + 1]; ++j)
      if (a.token[j] >= 0 && a.token[j] < a.n)
        out[count++] = {a.token[j], b, a.token_weight ? a.token_weight[j] : 1.0f};
  return count;
}

// Sorts by row and keeps the order of equal rows. Radix sort from the lowest digit up, in blocks of
// a fixed size: each block's share of each digit has a place of its own, so threads neither meet
// nor reach the result. Returns the array in which the result lies.
Occurrence* sort_by_row(Occurrence* from, Occurrence* to, int64_t count, int64_t n,
                        const Host& host) {
  const int64_t blocks = ceil_div(count, kBlock);
  Buffer<int64_t> places(blocks * kDigits);
  const int bits = 64 - __builtin_clzll(uint64_t(max64(n - 1, 1)));
  for (int shift = 0; shift < bits; shift += kDigitBits) {
    const auto digit = [shift](int64_t row) { return (row >> shift) & (kDigits - 1); };
    for_each_item(host, blocks, [&](int64_t block, int64_t) {
      int64_t* const sizes = places.data + block * kDigits;
      std::memset(sizes, 0, kDigits * sizeof(int64_t));
      const int64_t end = min64(count, (block + 1) * kBlock);
      for (int64_t i = block * kBlock; i < end; ++i) ++sizes[digit(from[i].row)];
    });
    int64_t place = 0;
    for (int64_t d = 0; d < kDigits; ++d)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t size = places.data[block * kDigits + d];
        places.data[block * kDigits + d] = place;
        place += size;
      }
    for_each_item(host, blocks, [&](int64_t block, int64_t) {
      int64_t* const next = places.data + block * kDigits;
      const int64_t end = min64(count, (block + 1) * kBlock);
      for (int64_t i = block * kBlock; i < end; ++i) to[next[digit(from[i].row)]++] = from[i];
    });
    Occurrence* const sorted = to;
    to = from;
    from = sorted;
  }
  return from;
}

// kChunkVecs vectors at a time stay in registers over all occurrences of the row.
template <DType kType>
void sum_columns(const BagStep& a, const Occurrence* first, const Occurrence* last, int64_t column,
                 int64_t count, float scale, float* out) {
  const int64_t size = dtype_size(kType);
  Chunk sum{};
  for (const Occurrence* o = first; o < last; ++o) {
    alignas(64) unsigned char copy[kChunk * 4];
    const void* from =
        static_cast<const unsigned char*>(a.grad) + (o->bag * a.state.width + column) * size;
    if (count < kChunk) {  // whole vectors would read past the last bag
      std::memset(copy, 0, sizeof copy);
      std::memcpy(copy, from, size_t(count * size));
      from = copy;
    }
    const vf weight = splat(o->weight);
#pragma GCC unroll 8
    for (int i = 0; i < kChunkVecs; ++i)
      sum.v[i] = sum.v[i] + weight * load_as_f32(from, kType, i * kLanes);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kChunkVecs; ++i) store(out + i * kLanes, sum.v[i] * scale);
}

void sum_row(const BagStep& a, const Occurrence* first, const Occurrence* last, float* out) {
  const float scale = a.state.hyper->scale;
  for (int64_t c = 0; c < a.state.width; c += kChunk) {
    const int64_t count = min64(kChunk, a.state.width - c);
    if (a.grad_dtype == DType::f32)
      sum_columns<DType::f32>(a, first, last, c, count, scale, out + c);
    else if (a.grad_dtype == DType::bf16)
      sum_columns<DType::bf16>(a, first, last, c, count, scale, out + c);
    else
      sum_columns<DType::f16>(a, first, last, c, count, scale, out + c);
  }
}

}  // namespace

void bag_step(const BagStep& a, const Host& host) {
  if (!all_finite(a.grad, a.grad_dtype, a.bags * a.state.width, host)) return;
  if (a.token_weight && !all_finite(a.token_weight, DType::f32, a.count, host)) return;
  Buffer<Occurrence> first(a.count), second(a.count);
  const int64_t count = collect(a, first.data), items = ceil_div(count, kShare);
  const Occurrence* const sorted = sort_by_row(first.data, second.data, count, a.n, host);
  const RowUpdate update(a.state);
  const RowPrefetch prefetch(a.state);
  GradientRows gradients(a.state.width, worker_count(host, items));
  for_each_item(host, items, [&](int64_t item, int64_t worker) {
    // A work item owns the rows that begin in its share of the occurrences, and follows the last of
    // them to its end.
    const int64_t share_end = min64(count, (item + 1) * kShare);
    int64_t at = item * kShare;
    while (at > 0 && at < share_end && sorted[at].row == sorted[at - 1].row) ++at;
    while (at < share_end) {
      const int64_t row = sorted[at].row, begin = at;
      while (at < count && sorted[at].row == row) ++at;
      sum_row(a, sorted + begin, sorted + at, gradients[worker]);
      update.row(row, gradients[worker], [&](int64_t c) {
        if (at < share_end) prefetch(sorted[at].row, c);
      });
    }
  });
}

}  // namespace xk::XK_NS
