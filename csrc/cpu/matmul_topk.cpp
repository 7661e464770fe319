// matmul_topk: scores of one tile of labels at a time against each sample's running k-th best.
//
// The order (score descending, row ascending) is total, so the top k are one set whatever the split
// into tiles and workers: each worker keeps candidates of its own, and the lists are merged at the
// end.
#include <algorithm>
#include <limits>
#include <memory>

#include "bce_tile.h"

namespace xk::XK_NS {

namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Candidate {
  float score;
  int64_t row;  // local
};

struct Better {
  bool operator()(const Candidate& a, const Candidate& b) const {
    return a.score > b.score || (a.score == b.score && a.row < b.row);
  }
};

// One worker's candidates for every sample: more than k are kept, and cut back to k when the room
// is full.
struct Candidates {
  int64_t k, room;
  Buffer<Candidate> list;
  Buffer<int64_t> count;
  Buffer<float> threshold;  // [batch_pad] the k-th best so far; only higher scores may enter

  Candidates(int64_t batch, int64_t batch_pad, int64_t keep)
      : k(keep), room(2 * keep + 64), list(batch * room), count(batch), threshold(batch_pad) {
    for (int64_t b = 0; b < batch; ++b) count.data[b] = 0;
    // Lanes beyond the batch never pass.
    for (int64_t b = 0; b < batch_pad; ++b) threshold.data[b] = b < batch ? kNone : -kNone;
  }
  void add(int64_t b, float score, int64_t row) {
    Candidate* c = list.data + b * room;
    c[count.data[b]++] = {score, row};
    if (count.data[b] < room) return;
    std::nth_element(c, c + k - 1, c + room, Better());
    count.data[b] = k;
    // Rows come in ascending order, so a later equal score loses the tie.
    threshold.data[b] = c[k - 1].score;
  }
};

struct Excluded {
  int64_t width = 0;
  const int64_t* rows = nullptr;
  int64_t offset = 0;
  bool contains(int64_t b, int64_t row) const {
    for (int64_t e = 0; e < width; ++e)
      if (rows[b * width + e] == row + offset) return true;
    return false;
  }
};

void scan_tile(const Plan& p, const float* scores, const float* bias, int64_t first, int64_t count,
               const Excluded& excluded, Candidates& best) {
  for (int64_t j = 0; j < p.batch_pad; j += kLanes)
    for (int64_t i = 0; i < count; ++i) {
      const float* z = scores + i * p.z_row + j;
      const vf v = bias ? load<vf>(z) + bias[first + i] : load<vf>(z);
      uint32_t hits = greater_mask(v, load<vf>(best.threshold.data + j));
      for (; hits; hits &= hits - 1) {
        const int lane = __builtin_ctz(hits);
        if (!excluded.contains(j + lane, first + i)) best.add(j + lane, v[lane], first + i);
      }
    }
}

// The k best of all workers' candidates for one sample.
void merge(const MatmulTopk& a, int64_t b, std::unique_ptr<Candidates>* best, int64_t workers,
           Candidate* all) {
  int64_t total = 0;
  for (int64_t w = 0; w < workers; ++w) {
    const Candidates& c = *best[w];
    std::memcpy(static_cast<void*>(all + total), c.list.data + b * c.room,
                size_t(c.count.data[b]) * sizeof(Candidate));
    total += c.count.data[b];
  }
  const int64_t found = min64(total, a.k);
  std::partial_sort(all, all + found, all + total, Better());
  for (int64_t i = 0; i < a.k; ++i) {
    a.values[b * a.k + i] = i < found ? all[i].score : kNone;
    a.rows[b * a.k + i] = i < found ? all[i].row + a.row_offset : -1;
  }
}

template <class T>
void topk(const MatmulTopk& a, const Host& host) {
  const Plan p(a.batch, a.table, sizeof(typename T::elem));
  const int64_t tiles = ceil_div(p.rows, p.tile), workers = worker_count(host, tiles),
                keep = min64(a.k, p.rows);
  const PackedBatch<T> x(a.batch, false, host);
  const Excluded excluded{a.exclude_width, a.exclude, a.row_offset};
  using Best = std::unique_ptr<Candidates>;
  std::unique_ptr<Best[]> best(new Best[size_t(workers)]);
  std::unique_ptr<std::unique_ptr<TileSpace<T>>[]> spaces(
      new std::unique_ptr<TileSpace<T>>[size_t(workers)]);
  for (int64_t w = 0; w < workers; ++w) {
    best[size_t(w)].reset(new Candidates(p.batch, p.batch_pad, keep));
    spaces[size_t(w)].reset(new TileSpace<T>(p, a.table.dtype != T::kDType));
  }
  const int64_t row_bytes = p.width * dtype_size(a.table.dtype);
  if (keep > 0)
    for_each_item(host, tiles, [&](int64_t tile, int64_t worker) {
      TileSpace<T>& space = *spaces[size_t(worker)];
      const int64_t first = tile * p.tile, count = min64(p.tile, p.rows - first);
      // With few workers the next tile but `workers` is most likely this one's.
      const int64_t after = min64(p.rows, first + workers * p.tile);
      Prefetch prefetch(static_cast<const char*>(a.table.weight) + after * row_bytes,
                        min64(p.tile, p.rows - after) * row_bytes);
      gemm<T>(count, p.batch, p.width, tile_rows<T>(p, a.table, first, count, space), p.width,
              T::kPair, x.by_width.data, x.width_panel, space.logits.data, p.z_row, false,
              &prefetch);
      scan_tile(p, space.logits.data, a.table.bias, first, count, excluded, *best[size_t(worker)]);
    });
  const int64_t room = best[0]->room * workers;
  Buffer<Candidate> all(room * workers);
  for_each_item(host, workers, [&](int64_t part, int64_t) {
    for (int64_t b = part; b < p.batch; b += workers)
      merge(a, b, best.get(), workers, all.data + part * room);
  });
}

}  // namespace

void matmul_topk(const MatmulTopk& a, const Host& host) {
#if XK_ISA == 2
  if (products_in_bf16(a.table.dtype)) return topk<BF16>(a, host);
#endif
  topk<F32>(a, host);
}

}  // namespace xk::XK_NS
