// shortlist_select: the candidates that each sample hands on, as keys. shortlist_merge: the best of
// such keys from several parts of a level, and which nodes they are.
//
// A key orders as its candidate's score does; of equal scores the lower place is ahead, and forced
// ones are ahead of all others. No two candidates of a sample have one key, so the best ones are a
// set, whatever finds it.
#include <algorithm>

#include "simd.h"

namespace xk::XK_NS {

namespace {

constexpr int64_t kBlock = 8;  // samples of one work item
constexpr int kPlaceBits = 30;
constexpr int64_t kPlaces = (int64_t(1) << kPlaceBits) - 1;
constexpr int64_t kForced = int64_t(1) << 62;

int64_t place_of(int64_t key) { return kPlaces - (key & kPlaces); }

// Ascends as the scores do; -0 and 0 are one.
uint32_t ordered(float score) {
  const float sum = score + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &sum, 4);
  return bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
}

float score_of(int64_t key) {
  const auto order = uint32_t(uint64_t(key) >> kPlaceBits);
  const uint32_t bits = order & 0x80000000u ? order ^ 0x80000000u : ~order;
  float score;
  std::memcpy(&score, &bits, 4);
  return score;
}

// The least of the `wanted` best keys, by bisection: to pass over some hundred keys a dozen times
// takes less time than to move them. -1 is no key; there are `real` others.
int64_t least_kept(const int64_t* keys, int64_t count, int64_t real, int64_t wanted) {
  if (wanted >= real) return 0;
  if (wanted <= 0) return INT64_MAX;
  int64_t low = 0, high = 0;  // at least `wanted` keys reach low, fewer reach high + 1
  for (int64_t i = 0; i < count; ++i) high = keys[i] > high ? keys[i] : high;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2 + 1;
    int64_t reach = 0;
    for (int64_t i = 0; i < count; ++i) reach += keys[i] >= middle;
    if (reach == wanted) return middle;
    if (reach > wanted)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// Keeps the best k keys, but all forced ones before others; of these no more than `width`. `out`
// has room for one more than that. They stay in their order.
int64_t keep(const int64_t* keys, int64_t count, int64_t real, int64_t forced, int64_t k,
             int64_t width, int64_t* out) {
  const int64_t least = least_kept(keys, count, real, min64(width, max64(k, forced)));
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    out[kept] = keys[i];
    kept += keys[i] >= least;
  }
  return kept;
}

struct EarlierPlace {
  bool operator()(int64_t a, int64_t b) const { return place_of(a) < place_of(b); }
};

// The positives of each sample.
struct BySample {
  Buffer<int64_t> start, node;

  explicit BySample(const ShortlistSelect& a) : start(a.samples + 1), node(a.count) {
    std::memset(start.data, 0, size_t(a.samples + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < a.count; ++i) ++start.data[a.sample[i]];
    int64_t end = 0;
    for (int64_t b = 0; b <= a.samples; ++b) start.data[b] = end += start.data[b];
    for (int64_t i = a.count; i-- > 0;) node.data[--start.data[a.sample[i]]] = a.node[i];
  }
};

// The slot of the cluster that holds a node, or -1: clusters ascend, pads come last.
int64_t slot_of(const Clusters& c, const int64_t* chosen, int64_t node) {
  int64_t low = 0, high = c.per_sample;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (chosen[middle] >= 0 && c.row_ptr[chosen[middle]] <= node)
      low = middle + 1;
    else
      high = middle;
  }
  return low && node < c.row_ptr[chosen[low - 1] + 1] ? low - 1 : -1;
}

}  // namespace

void shortlist_select(const ShortlistSelect& a, const Host& host) {
  const Clusters& c = a.clusters;
  const int64_t most = c.most, count = c.per_sample * most;
  const int64_t items = ceil_div(a.samples, kBlock), workers = worker_count(host, items);
  const int64_t stride = round_up(count + 1, kCacheLine / 8);
  Buffer<int64_t> room(2 * workers * stride);
  const BySample positives(a);
  for_each_item(host, items, [&](int64_t item, int64_t worker) {
    int64_t *const keys = room.data + 2 * worker * stride, *const kept = keys + stride;
    for (int64_t b = item * kBlock; b < min64(a.samples, (item + 1) * kBlock); ++b) {
      const int64_t* const chosen = c.chosen + b * c.per_sample;
      int64_t real = 0, forced = 0;
      for (int64_t slot = 0; slot < c.per_sample; ++slot) {
        const int64_t at = slot * most, own = chosen[slot];
        const int64_t size = own < 0 ? 0 : c.row_ptr[own + 1] - c.row_ptr[own];
        const int64_t first = kPlaces - (a.first ? a.first[b * c.per_sample + slot] : at);
        const float* const score = a.scores + b * count + at;
        for (int64_t i = 0; i < size; ++i)
          keys[at + i] = int64_t(ordered(score[i])) << kPlaceBits | (first - i);
        for (int64_t i = size; i < most; ++i) keys[at + i] = -1;
        real += size;
      }
      for (int64_t p = positives.start.data[b]; p < positives.start.data[b + 1]; ++p) {
        const int64_t node = positives.node.data[p], slot = slot_of(c, chosen, node);
        if (slot < 0) continue;
        int64_t& key = keys[slot * most + node - c.row_ptr[chosen[slot]]];
        forced += key < kForced;
        key |= kForced;
      }
      const int64_t found = keep(keys, count, real, forced, a.k, a.width, kept);
      int64_t* const out = a.keys + b * a.width;
      std::memcpy(out, kept, size_t(found) * sizeof(int64_t));
      for (int64_t i = found; i < a.width; ++i) out[i] = -1;
    }
  });
}

void shortlist_merge(const ShortlistMerge& a, const Host& host) {
  const Clusters& c = a.clusters;
  const int64_t items = ceil_div(a.samples, kBlock), workers = worker_count(host, items);
  const int64_t stride = round_up(a.count + 1, kCacheLine / 8);
  Buffer<int64_t> room(workers * stride);
  std::atomic<int64_t> all_forced{0};
  for_each_item(host, items, [&](int64_t item, int64_t worker) {
    int64_t* const kept = room.data + worker * stride;
    int64_t forced_here = 0;
    for (int64_t b = item * kBlock; b < min64(a.samples, (item + 1) * kBlock); ++b) {
      const int64_t *const keys = a.keys + b * a.count, *const chosen = c.chosen + b * c.per_sample;
      int64_t real = 0, forced = 0;
      for (int64_t i = 0; i < a.count; ++i) {
        real += keys[i] >= 0;
        forced += keys[i] >= kForced;
      }
      const int64_t found = keep(keys, a.count, real, forced, a.k, a.width, kept);
      // The parts of a level follow each other, so they are in order as a rule.
      if (!std::is_sorted(kept, kept + found, EarlierPlace()))
        std::sort(kept, kept + found, EarlierPlace());
      forced_here += min64(forced, a.width);
      int64_t* const nodes = a.nodes + b * a.width;
      int64_t* const places = a.places + b * a.width;
      float* const scores = a.scores + b * a.width;
      int64_t slot = 0, begin = 0, start = 0;  // of the cluster in which the last place lay
      for (int64_t i = 0; i < found; ++i) {
        const int64_t place = place_of(kept[i]);
        if (i == 0 || place >= begin + c.most) {
          while (place >= begin + c.most) ++slot, begin += c.most;
          start = c.row_ptr[max64(chosen[slot], 0)] - begin;
        }
        places[i] = place;
        nodes[i] = start + place;
        scores[i] = score_of(kept[i]);
      }
      for (int64_t i = found; i < a.width; ++i) {
        places[i] = 0;
        nodes[i] = -1;
        scores[i] = -__builtin_inff();
      }
    }
    all_forced.fetch_add(forced_here, std::memory_order_relaxed);
  });
  *a.forced = all_forced.load();
}

}  // namespace xk::XK_NS
