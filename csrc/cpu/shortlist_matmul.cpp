// shortlist_matmul and its backward for lists per sample: bound by memory, so every gathered row is
// read once a pass.
//
// Work is cut by (sample, block of entries) for the logits and dX, and by unique row for the
// table's gradient. Which entries share a partial sum of dX depends on the shapes alone.
#include "shortlist.h"

#include <limits>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace xk::XK_NS {

namespace {

constexpr int64_t kMinItems = 64;    // parts of dX: enough for the threads of a large machine
constexpr int64_t kUniqueRows = 64;  // rows of the gradient in one work item
constexpr int kDigit = 11;           // bits of one sorting pass: its counters stay in the L1 cache

// The real entries of a stretch of one sample's list.
struct Entries {
  int64_t count = 0;
  int64_t at[kEntries];
  const char* row[kEntries + kAhead];

  Entries(const Shortlist& list, int64_t b, int64_t first, int64_t last, const Table& table,
          int64_t row_bytes) {
    const char* weight = static_cast<const char*>(table.weight);
    for (int64_t i = b * list.size + first; i < b * list.size + last; ++i)
      if (list.index[i] >= 0) {
        at[count] = i;
        row[count++] = weight + list.index[i] * row_bytes;
      }
    for (int i = 0; i < kAhead; ++i)
      row[count + i] = count ? row[count - 1] : weight;  // to be fetched once more
  }
};

template <DType kRow>
void logits_of(const ShortlistMatmul& a, const float* x, const Entries& entries) {
  float z[kGroup];
  int64_t i = 0;
  const auto write = [&](int count) {
    for (int n = 0; n < count; ++n) {
      const int64_t at = entries.at[i + n], row = a.list.index[at];
      const float score = kRow == DType::f8 ? z[n] * scale_of(a.table, row) : z[n];
      a.logits[at] = a.table.bias ? score + a.table.bias[row] : score;
    }
    i += count;
  };
  const char* const* row = entries.row;
  while (i + kGroup <= entries.count) {
    dot_rows<kRow, kGroup>(x, row + i, row + i + kAhead, a.batch.width, z);
    write(kGroup);
  }
  while (i < entries.count) {
    dot_rows<kRow, 1>(x, row + i, row + i, a.batch.width, z);
    write(1);
  }
}

template <DType kRow>
void add_entries(const ShortlistBackward& a, const Entries& entries, bool fresh, float* out) {
  float g[kGroup];
  int64_t i = 0;
  const char* const* row = entries.row;
  const auto gradient = [&](int64_t at) {
    return kRow == DType::f8 ? a.dlogits[at] * scale_of(a.table, a.list.index[at]) : a.dlogits[at];
  };
  for (; i + kGroup <= entries.count; i += kGroup, fresh = false) {
    for (int n = 0; n < kGroup; ++n) g[n] = gradient(entries.at[i + n]);
    add_rows<kRow, kGroup>(g, row + i, row + i + kAhead, a.batch.width, fresh, out);
  }
  for (; i < entries.count; ++i, fresh = false) {
    g[0] = gradient(entries.at[i]);
    add_rows<kRow, 1>(g, row + i, nullptr, a.batch.width, fresh, out);
  }
}

// dX in parts: part s of sample b sums the entries from s * part_size on.
struct DxPlan {
  int64_t parts, part_size;
  DxPlan(int64_t batch, int64_t size) {
    const int64_t wanted = max64(1, ceil_div(kMinItems, max64(batch, 1)));
    parts = max64(1, min64(wanted, ceil_div(size, kEntries)));
    part_size = ceil_div(size, parts);
  }
};

template <DType kRow>
void dx_part(const ShortlistBackward& a, const DxPlan& p, int64_t b, int64_t part, float* out) {
  const int64_t row_bytes = a.batch.width * dtype_size(kRow),
                end = min64(a.list.size, (part + 1) * p.part_size);
  std::memset(out, 0, size_t(a.batch.width) * 4);
  for (int64_t first = part * p.part_size; first < end; first += kEntries)
    add_entries<kRow>(
        a, Entries(a.list, b, first, min64(end, first + kEntries), a.table, row_bytes), false, out);
}

struct Entry {
  int64_t row, at;
};

// Entries of index sorted by row, stable, and where each row's begin. A radix sort: linear, and
// without comparisons.
struct Grouping {
  const ShortlistBackward& a;
  Buffer<Entry> from, to;
  Buffer<int64_t> count;

  explicit Grouping(const ShortlistBackward& args)
      : a(args), from(a.place ? a.list.entries : 0), to(a.place ? a.list.entries : 0),
        count(int64_t(1) << kDigit) {}

  void run() {
    int64_t real = 0;
    Entry *source = from.data, *target = to.data;
    for (int64_t i = 0; i < a.list.entries; ++i)
      if (a.list.index[i] >= 0) source[real++] = {a.list.index[i], i};
    for (int shift = 0; shift < 63 && (a.table.rows - 1) >> shift > 0; shift += kDigit) {
      pass(source, target, real, shift);
      Entry* const swap = source;
      source = target, target = swap;
    }
    int64_t unique = 0;
    for (int64_t i = 0; i < real; ++i) {
      if (i == 0 || source[i].row != source[i - 1].row) a.start[unique++] = i;
      a.place[i] = source[i].at;
    }
    a.start[unique] = real;
    *a.unique = unique;
  }
  void pass(const Entry* source, Entry* target, int64_t real, int shift) {
    const int64_t digits = int64_t(1) << kDigit;
    std::memset(count.data, 0, size_t(digits) * sizeof(int64_t));
    for (int64_t i = 0; i < real; ++i) ++count.data[(source[i].row >> shift) & (digits - 1)];
    for (int64_t digit = 0, sum = 0; digit < digits; ++digit) {
      const int64_t here = count.data[digit];
      count.data[digit] = sum;
      sum += here;
    }
    for (int64_t i = 0; i < real; ++i)
      target[count.data[(source[i].row >> shift) & (digits - 1)]++] = source[i];
  }
};

// Asks for pages of 2 MB where an array is large: touching it for the first time in pages of 4 KB
// costs as much as filling it. A wish that the system may refuse.
void ask_for_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kPage = 2 << 20;
  const int64_t begin = round_up(reinterpret_cast<int64_t>(data), kPage);
  const int64_t end = (reinterpret_cast<int64_t>(data) + bytes) / kPage * kPage;
  if (end - begin >= 4 * kPage)
    madvise(reinterpret_cast<void*>(begin), size_t(end - begin), MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// grad[u] = sum over the entries of row u of dlogits * x[sample], in ascending order.
void gradient_row(const ShortlistBackward& a, const PaddedBatch& x, int64_t u) {
  const int64_t end = a.start[u + 1], width = a.batch.width;
  float g[kGroup], *out = a.grad + u * width;
  const char* row[kGroup];
  for (int64_t i = a.start[u]; i < end; i += kGroup) {
    const int64_t count = min64(kGroup, end - i);
    for (int64_t n = 0; n < count; ++n) {
      const int64_t at = a.place[i + n];
      g[n] = a.dlogits[at];
      row[n] = reinterpret_cast<const char*>(x.row(at / a.list.size));
    }
    const bool fresh = i == a.start[u];
    switch (count) {
      case 1: add_rows<DType::f32, 1>(g, row, nullptr, width, fresh, out); break;
      case 2: add_rows<DType::f32, 2>(g, row, nullptr, width, fresh, out); break;
      case 3: add_rows<DType::f32, 3>(g, row, nullptr, width, fresh, out); break;
      default: add_rows<DType::f32, 4>(g, row, nullptr, width, fresh, out);
    }
  }
}

}  // namespace

void shortlist_matmul(const ShortlistMatmul& a, const Host& host) {
  if (a.list.shared) return shared_matmul(a, host);
  const int64_t blocks = ceil_div(a.list.size, kEntries),
                row_bytes = a.batch.width * dtype_size(a.table.dtype);
  const PaddedBatch x(a.batch);
  for_dtype(a.table.dtype, [&]<DType kRow>() {
    for_each_item(host, a.batch.size * blocks, [&](int64_t item, int64_t) {
      const int64_t b = item / blocks, first = item % blocks * kEntries,
                    last = min64(a.list.size, first + kEntries);
      for (int64_t i = b * a.list.size + first; i < b * a.list.size + last; ++i)
        if (a.list.index[i] < 0) a.logits[i] = -std::numeric_limits<float>::infinity();
      logits_of<kRow>(a, x.row(b), Entries(a.list, b, first, last, a.table, row_bytes));
    });
  });
}

void shortlist_group(const ShortlistBackward& a, const Host& host) {
  const bool dx = a.dx && !a.list.shared;
  const DxPlan p(a.batch.size, a.list.size);
  const int64_t width = a.batch.width;
  Grouping grouping(a);
  Buffer<float> partials(dx && p.parts > 1 ? a.batch.size * p.parts * width : 0);
  float* const parts = p.parts > 1 ? partials.data : a.dx;
  for_dtype(a.table.dtype, [&]<DType kRow>() {
    // One worker sorts while the others already sum.
    for_each_item(host, 1 + (dx ? a.batch.size * p.parts : 0), [&](int64_t item, int64_t) {
      if (item > 0)
        dx_part<kRow>(a, p, (item - 1) / p.parts, (item - 1) % p.parts, parts + (item - 1) * width);
      else if (a.place)
        grouping.run();
    });
  });
  if (!dx || p.parts == 1) return;
  for_each_item(host, a.batch.size, [&](int64_t b, int64_t) {
    for (int64_t d = 0; d < width; ++d) {
      float sum = 0;
      for (int64_t s = 0; s < p.parts; ++s) sum += parts[(b * p.parts + s) * width + d];
      a.dx[b * width + d] = sum;
    }
  });
}

void shortlist_rows(const ShortlistBackward& a, const Host& host) {
  if (a.list.shared) return shared_backward(a, host);
  if (!a.rows) return;
  const PaddedBatch x(a.batch);
  if (a.grad) ask_for_large_pages(a.grad, *a.unique * a.batch.width * 4);
  for_each_item(host, ceil_div(*a.unique, kUniqueRows), [&](int64_t item, int64_t) {
    for (int64_t u = item * kUniqueRows; u < min64(*a.unique, (item + 1) * kUniqueRows); ++u) {
      a.rows[u] = a.list.index[a.place[a.start[u]]];
      if (a.grad) gradient_row(a, x, u);
      if (!a.dbias) continue;
      double sum = 0;
      for (int64_t i = a.start[u]; i < a.start[u + 1]; ++i) sum += a.dlogits[a.place[i]];
      a.dbias[u] = float(sum);
    }
  });
}

}  // namespace xk::XK_NS
