// Tensors as the kernels' arguments, checked where a wrong value would corrupt memory. Included by
// bindings_cpu.cpp alone: it reads positives and indices, which on a card would wait for the
// device.
#pragma once

#include "bindings.h"

inline xk::Batch batch_of(Arguments& args, const Tensor& x, const Tensor& weight) {
  const Floats floats = args.read_floats(x, "x", {-1, weight.size(1)});
  return {floats.data, floats.dtype, x.size(0), x.size(1)};
}

inline int64_t real_rows(const Arguments& args, int64_t rows, int64_t n) {
  if (rows < -1 || rows > n)
    args.refuse("rows", text("-1 (all) or a number from 0 to ", n), text(rows),
                "pass the number of real labels");
  return rows < 0 ? n : rows;
}

// A table that is read alone.
inline xk::Table table_of(Arguments& args, const Tensor& weight, const Maybe& bias, int64_t rows,
                          const Maybe& row_scale) {
  const Floats table = args.table(weight, "weight", false, true);
  const int64_t n = weight.size(0);
  return {table.data, table.dtype, real_rows(args, rows, n), args.read<float>(bias, "bias", {n}),
          args.row_scale(row_scale, table.dtype, n, false)};
}

// Samples index a buffer, and rows are searched by bisection.
inline xk::Positives positives_of(Arguments& args, const Tensor& row, const Tensor& sample,
                                  const Maybe& value, int64_t batch, int64_t rows) {
  const xk::Positives p{args.read<int64_t>(row, "pos_row", {-1}),
                        args.read<int32_t>(sample, "pos_sample", {row.numel()}),
                        args.read<float>(value, "pos_value", {row.numel()}), row.numel()};
  for (int64_t i = 0; i < p.count; ++i) {
    if (p.row[i] < (i ? p.row[i - 1] : 0))
      args.refuse("pos_row", "ascending rows from 0", text(p.row[i], " at ", i),
                  "sort the pairs in the collator");
    if (p.row[i] < rows && (p.sample[i] < 0 || p.sample[i] >= batch))
      args.refuse("pos_sample", text("samples from 0 to ", batch - 1), text(p.sample[i], " at ", i),
                  "number samples within the batch");
  }
  return p;
}

// Entries are addresses.
inline xk::Shortlist shortlist_of(Arguments& args, const Tensor& index, int64_t batch, int64_t n) {
  args.defined(index, "index");
  const bool shared = index.dim() == 1;
  const int64_t* const entry = shared ? args.read<int64_t>(index, "index", {-1})
                                      : args.read<int64_t>(index, "index", {batch, -1});
  const xk::Shortlist list{entry, index.size(shared ? 0 : 1), shared, batch ? index.numel() : 0};
  int64_t low = -1, high = -1;
  for (int64_t i = 0; i < index.numel(); ++i) {  // of an empty batch too: a shared list's rows are
                                                 // gathered all the same
    low = list.index[i] < low ? list.index[i] : low;
    high = list.index[i] > high ? list.index[i] : high;
  }
  if (low < -1 || high >= n)
    args.refuse("index", text("rows from 0 to ", n - 1, " or -1"), text(low < -1 ? low : high),
                "number the rows within weight and pad with -1");
  return list;
}

// Clusters choose rows, so both are held to the table.
inline xk::Clusters clusters_of(Arguments& args, const Tensor& clusters, const Tensor& row_ptr,
                                int64_t most, int64_t batch, int64_t n) {
  const int64_t* const chosen = args.read<int64_t>(clusters, "clusters", {batch, -1});
  const int64_t* const starts = args.read<int64_t>(row_ptr, "row_ptr", {-1});
  args.expect(row_ptr.size(0) >= 1, "row_ptr", "int64 [C + 1], at least one entry", "none",
              "give the first row of each cluster, and the end of the last");
  if (most < 0)
    args.refuse("cluster_rows", "0 or more", text(most), "pass the size of the largest cluster");
  const xk::Clusters c{chosen, clusters.size(1), starts, row_ptr.size(0) - 1, most};
  for (int64_t i = 0; i <= c.count; ++i) {
    const int64_t before = i ? c.row_ptr[i - 1] : 0;
    if (c.row_ptr[i] < before || c.row_ptr[i] > n || (i && c.row_ptr[i] - before > most))
      args.refuse("row_ptr",
                  text("ascending rows from 0 to ", n, ", at most cluster_rows = ", most, " apart"),
                  text(c.row_ptr[i], " at ", i), "number clusters in the order of their rows");
  }
  for (int64_t i = 0; i < clusters.numel(); ++i)
    if (c.chosen[i] < -1 || c.chosen[i] >= c.count)
      args.refuse("clusters", text("clusters from 0 to ", c.count - 1, " or -1"),
                  text(c.chosen[i], " at ", i), "number clusters as row_ptr does");
  return c;
}

// Clusters whose nodes are candidates: there is no table, but places have 30 bits.
inline xk::Clusters selected_of(Arguments& args, const Tensor& clusters, const Tensor& row_ptr,
                                int64_t most, int64_t batch, int64_t k, int64_t width) {
  constexpr int64_t kMostPlaces = int64_t(1) << 30;
  const xk::Clusters c =
      clusters_of(args, clusters, row_ptr, most, batch, std::numeric_limits<int64_t>::max());
  if (c.most > kMostPlaces || (c.most && c.per_sample > kMostPlaces / c.most))
    args.refuse("clusters", "at most 2^30 candidates of a sample",
                text(c.per_sample, " clusters of ", c.most), "keep fewer clusters");
  for (const auto& [name, value] : {std::pair{"k", k}, std::pair{"width", width}})
    if (value < 0)
      args.refuse(name, "0 or more", text(value), "pass the number of nodes to keep");
  return c;
}

// Samples index a buffer.
inline void check_samples(const xk::ShortlistSelect& a, const Arguments& args) {
  for (int64_t i = 0; i < a.count; ++i)
    if (a.sample[i] < 0 || a.sample[i] >= a.samples)
      args.refuse("sample", text("samples from 0 to ", a.samples - 1),
                  text(a.sample[i], " at ", i), "number samples within the batch");
}

// Places are those of clusters, which are addresses.
inline void check_keys(const xk::ShortlistMerge& a, const Arguments& args) {
  constexpr int64_t kPlaces = (int64_t(1) << 30) - 1;
  const int64_t places = a.clusters.per_sample * a.clusters.most;
  for (int64_t i = 0; i < a.samples * a.count; ++i)
    if (a.keys[i] >= 0 && kPlaces - (a.keys[i] & kPlaces) >= places)
      args.refuse("keys", text("places below ", places, ", K times most"),
                  text(a.keys[i], " at ", i),
                  "pass what shortlist_select gave for parts of these clusters");
}

// A row that stood twice would be two threads' at once, and after fill none is looked for.
inline void check_rows(const xk::SparseUpdate& a, const Arguments& args) {
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t before = i ? a.rows[i - 1] : -1;
    if (a.rows[i] < before || (a.rows[i] == before && a.rows[i] < a.n))
      args.refuse("rows", text("unique rows in ascending order from 0 to ", a.n - 1, ", then fill"),
                  text(a.rows[i], " at ", i), "sort them and add up the gradients of equal rows");
  }
}

inline void check_bags(const xk::BagStep& a, const Arguments& args) {
  for (int64_t b = 0; b <= a.bags; ++b)
    if (a.offset[b] < (b ? a.offset[b - 1] : 0) || a.offset[b] > a.count)
      args.refuse("offset", text("ascending numbers from 0 to ", a.count),
                  text(a.offset[b], " at ", b),
                  "let bag b begin at offset[b] and end at offset[b + 1]");
  for (int64_t j = 0; j < a.count; ++j)
    if (a.token[j] < -1 || a.token[j] >= a.n)
      args.refuse("token", text("rows from 0 to ", a.n - 1, ", or -1 as fill"),
                  text(a.token[j], " at ", j), "number tokens within weight");
}
