// shortlist_matmul and its backward where one shortlist serves the whole batch: dense products on
// gathered rows, in the tiles of bce_step. The backward merges duplicates before the products, so
// each table row is read once.
#include <limits>
#include <memory>

#include "bce_pass.h"
#include "shortlist.h"

namespace xk::XK_NS {

namespace {

// Sizes for a table of the gathered rows alone.
template <class T>
Plan plan_of(const Batch& x, int64_t rows) {
  Table gathered{};
  gathered.rows = rows;
  return Plan(x, gathered, sizeof(typename T::elem));
}

// Table rows index[first..first+count] in the product's format, in the tile's room. row(i) < 0: a
// row of zeros.
template <class T, class F>
const typename T::elem* gather(const Plan& p, const Table& table, int64_t count,
                               TileSpace<T>& space, F row) {
  using elem = typename T::elem;
  elem* out = reinterpret_cast<elem*>(space.wide.data);
  const int64_t row_bytes = p.width * dtype_size(table.dtype);
  for (int64_t i = 0; i < count; ++i, out += p.width) {
    if (i + kAhead < count && row(i + kAhead) >= 0) {
      const char* next = static_cast<const char*>(table.weight) + row(i + kAhead) * row_bytes;
      for (int64_t at = 0; at < row_bytes; at += kCacheLine) __builtin_prefetch(next + at, 0, 2);
    }
    if (row(i) < 0)
      std::memset(static_cast<void*>(out), 0, size_t(p.width) * sizeof(elem));
    else if (table.dtype == DType::f8)
      decode_rows<T>(table, row(i), 1, p.width, out);
    else if constexpr (T::kPair == 1)
      widen(table.weight, table.dtype, row(i) * p.width, p.width, out);
    else
      std::memcpy(out, static_cast<const elem*>(table.weight) + row(i) * p.width,
                  size_t(p.width) * sizeof(elem));
  }
  return reinterpret_cast<const elem*>(space.wide.data);
}

template <class T>
std::unique_ptr<std::unique_ptr<TileSpace<T>>[]> tile_spaces(const Plan& p, int64_t workers) {
  std::unique_ptr<std::unique_ptr<TileSpace<T>>[]> spaces(
      new std::unique_ptr<TileSpace<T>>[size_t(workers)]);
  for (int64_t w = 0; w < workers; ++w) spaces[size_t(w)].reset(new TileSpace<T>(p, true));
  return spaces;
}

template <class T>
void forward(const ShortlistMatmul& a, const Host& host) {
  const Plan p = plan_of<T>(a.batch, a.list.size);
  const PackedBatch<T> x(a.batch, false, host);
  const int64_t tiles = ceil_div(p.rows, p.tile);
  const auto spaces = tile_spaces<T>(p, worker_count(host, tiles));
  for_each_item(host, tiles, [&](int64_t tile, int64_t worker) {
    TileSpace<T>& space = *spaces[size_t(worker)];
    const int64_t first = tile * p.tile, count = min64(p.tile, p.rows - first);
    const int64_t* index = a.list.index + first;
    const auto rows = gather<T>(p, a.table, count, space, [=](int64_t i) { return index[i]; });
    gemm<T>(count, p.batch, p.width, rows, p.width, T::kPair, x.by_width.data, x.width_panel,
            space.logits.data, p.z_row, false);
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t i = 0; i < count; ++i) {
        const float z = space.logits.data[i * p.z_row + b];
        a.logits[b * p.rows + first + i] = index[i] < 0   ? -std::numeric_limits<float>::infinity()
                                           : a.table.bias ? z + a.table.bias[index[i]]
                                                          : z;
      }
  });
}

// dlogits as [S, batch_pad], zeros beyond the batch: an entry's gradients side by side.
struct Transposed {
  int64_t batch_pad;
  Buffer<float> data;

  Transposed(const float* dlogits, int64_t batch, int64_t size, int64_t pad, const Host& host)
      : batch_pad(pad), data(size * pad) {
    constexpr int64_t kBlock = 16;  // entries of one cache line
    for_each_item(host, ceil_div(size, kBlock), [&](int64_t item, int64_t) {
      const int64_t first = item * kBlock, last = min64(size, first + kBlock);
      for (int64_t b = 0; b < pad; ++b)
        for (int64_t s = first; s < last; ++s)
          data.data[s * pad + b] = b < batch ? dlogits[b * size + s] : 0;
    });
  }
};

// The gradient of unique row u's logits: the sum over its entries, in ascending order.
template <class T>
void gradient_of_row(const Plan& p, const ShortlistBackward& a, const Transposed& g, int64_t u,
                     float* z, uint16_t* half) {
  vf total{};
  for (int64_t j = 0; j < p.batch_pad; j += kLanes) {
    vf sum{};
    for (int64_t i = a.start[u]; i < a.start[u + 1]; ++i)
      sum = sum + load<vf>(g.data.data + a.place[i] * g.batch_pad + j);
    total = total + sum;
    if constexpr (T::kPair == 1)
      store(z + j, sum);
    else
      store_u16(half + j, f32_to_bf16(sum));
  }
  if (a.rows) a.rows[u] = a.list.index[a.place[a.start[u]]];
  if (a.dbias) a.dbias[u] = float(lane_sum(total));
}

struct RowSink {
  float* grad;
  int64_t width;

  void columns(int64_t) {}
  void row(int64_t row, int64_t column, int64_t count, const float* gradient) {
    std::memcpy(grad + row * width + column, gradient, size_t(count) * 4);
  }
};

template <class T>
void backward(const ShortlistBackward& a, const Host& host) {
  const Plan p = plan_of<T>(a.batch, *a.unique);
  const PackedBatch<T> x(a.batch, a.grad != nullptr, host);
  const Transposed g(a.dlogits, p.batch, a.list.size, p.batch_pad, host);
  const auto spaces = tile_spaces<T>(p, worker_count(host, p.segments));
  const int64_t partial = p.batch * p.width_pad;
  Buffer<float> partials(a.dx ? p.segments * partial : 0);
  for_each_item(host, p.segments, [&](int64_t segment, int64_t worker) {
    TileSpace<T>& space = *spaces[size_t(worker)];
    const int64_t begin = segment * p.segment_rows, end = min64(p.rows, begin + p.segment_rows);
    for (int64_t first = begin; first < end; first += p.tile) {
      const int64_t count = min64(p.tile, end - first);
      for (int64_t i = 0; i < count; ++i)
        gradient_of_row<T>(p, a, g, first + i, space.logits.data + i * p.z_row,
                           T::kPair == 2 ? space.half.data + i * p.z_row : nullptr);
      if (a.dx) {
        const auto row = [&](int64_t i) { return a.list.index[a.place[a.start[first + i]]]; };
        tile_dx<T>(p, gather<T>(p, a.table, count, space, row), count, space,
                   partials.data + segment * partial, first != begin, nullptr);
      }
      RowSink sink{a.grad, p.width};
      if (a.grad) tile_dw<T>(p, x, first, count, space, sink);
    }
  });
  if (a.dx) sum_partials(p, partials.data, 1, a.dx, host);
}

}  // namespace

void shared_matmul(const ShortlistMatmul& a, const Host& host) {
#if XK_ISA == 2
  if (products_in_bf16(a.table.dtype)) return forward<BF16>(a, host);
#endif
  forward<F32>(a, host);
}

void shared_backward(const ShortlistBackward& a, const Host& host) {
#if XK_ISA == 2
  if (products_in_bf16(a.table.dtype)) return backward<BF16>(a, host);
#endif
  backward<F32>(a, host);
}

}  // namespace xk::XK_NS
