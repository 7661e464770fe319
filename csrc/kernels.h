// The kernels as plain functions on pointers, sizes and dtypes. No torch here: the bindings
// translate.
//
// Letters: B batch, n table rows, D width, K top-k, E excluded rows per sample, P positives, S
// shortlist, U its rows.
#pragma once

#include <cstdint>

#include "kernels.def"

namespace xk {

enum class DType : int32_t { f32, bf16, f16, f8 };  // f8: e4m3, no infinities; tables alone

// What a kernel may ask of the process it runs in.
struct Host {
  // Calls body(begin, end, ctx) on disjoint ranges that cover 0..n, on several threads where there
  // are some.
  void (*parallel_for)(int64_t n, void (*body)(int64_t begin, int64_t end, void* ctx), void* ctx);
  int (*threads)();
};

// x [B, D], contiguous.
struct Batch {
  const void* x;
  DType dtype;
  int64_t size;
  int64_t width;
};

// weight [n, D] contiguous, of which the first `rows` are real and the rest padding. bias [n] fp32
// or null.
struct Table {
  const void* weight;
  DType dtype;
  int64_t rows;
  const float* bias;
  const float* row_scale;  // [n, 2] for f8, else null: the row's power-of-two scale, and its
                           // largest |value| so far
};

// Pairs (table row, sample) sorted by (row, sample), unique; rows at or beyond Table::rows are
// fill.
struct Positives {
  const int64_t* row;
  const int32_t* sample;
  const float* value;  // targets, or null: all 1
  int64_t count;
};

constexpr int64_t kSkipGroup = 128;  // rows that bce_step skips together, counted from the first of
                                     // the table

// An optional array of the table's shape that the step updates in place.
struct State {
  void* data;  // null: absent
  DType dtype;
};

// What steers a step: the seven numbers of the `hyper` argument, in its order
// (xmlkernels/ops/hyper.py).
struct Hyper {
  float lr;
  float decay;
  float beta1;  // or the momentum of SGD
  float beta2;
  float epsilon;
  float scale;     // of the gradient and the loss
  float dx_scale;  // of dx alone
};
constexpr int kHyperCount = sizeof(Hyper) / sizeof(float);

// A table whose rows are updated one at a time and whole, with all that belongs to a row. Absent
// parts are null. The states name the rule: none SGD, momentum SGD with momentum, second Adagrad,
// both Adam.
struct RowState {
  void* weight;  // [n, D]
  DType dtype;
  int64_t width;
  State momentum, second, kahan;
  bool row_wise;      // second is [n]: from the mean over D of the squared gradient
  int64_t* row_step;  // [n] updates that the row has had, or null: the counter's step corrects the
                      // bias
  float* row_decay;   // [n] the share of decay_sum that the row has had, or null
  const float* decay_sum;  // [1] sum of log1p(-lr decay) over all steps, this one included
  float* row_scale;  // [n, 2] scale and largest |weight| of each row of an 8-bit table, else null
  const Hyper* hyper;
  const int64_t* counter;  // seed, step
  int64_t row_offset;      // global row of weight[0]: the generator counts global rows
  bool decoupled;
};

struct BceStep {
  Batch batch;
  RowState state;  // second is as large as the table; no row_step, no row_decay
  int64_t rows;    // the real ones; the rest is padding
  float* bias;     // [n] updated, or null
  Positives positives;
  float* dx;          // [B, D]
  float* loss;        // [1] or null
  double skip_below;  // groups of kSkipGroup rows that would change by less are skipped; 0: none
  int64_t* skipped;   // [2] groups skipped and groups seen are added to it, or null
};

struct BceLoss {
  Batch batch;
  Table table;
  Positives positives;
  float* loss;  // [1]
};

struct BceLossBackward {
  Batch batch;
  Table table;
  Positives positives;
  float* dx;       // [B, D]
  float* dweight;  // [rows, D] or null
  float* dbias;    // [rows] or null
};

// The shortlist: cluster c owns the rows row_ptr[c]..row_ptr[c + 1].
struct Clusters {
  const int64_t* chosen;   // [B, K] clusters, -1 pads
  int64_t per_sample;      // K
  const int64_t* row_ptr;  // [count + 1] ascending
  int64_t count;
  int64_t most;  // M, at least the largest number of rows in a cluster
};

struct ClusterStep {
  Batch batch;
  RowState state;  // no row_step, no row_decay
  int64_t rows;    // the real ones; the rest is padding
  float* bias;     // [n] updated, or null
  Positives positives;
  Clusters clusters;
  float* dx;      // [B, D]
  float* scores;  // [B, K, M]
  float* loss;    // [1] or null
};

// Rows whose largest |value| lies beyond half their range get a larger scale.
struct RescaleRows {
  void* weight;  // [n, D] f8
  int64_t rows, width;
  float* row_scale;  // [n, 2]
  const int64_t* counter;
  int64_t row_offset;
  int64_t* count;  // [1]
};

struct MatmulTopk {
  Batch batch;
  Table table;
  int64_t k;
  const int64_t* exclude;  // [B, E] global rows, -1 pads, or null
  int64_t exclude_width;
  int64_t row_offset;
  float* values;  // [B, K]
  int64_t* rows;  // [B, K]
};

// The rule follows from the states that are given (see RowState).
struct SparseUpdate {
  RowState state;
  int64_t n;            // rows of the table
  const int64_t* rows;  // [N] unique, ascending; those of n or more are fill at the end
  int64_t count;        // N
  const void* grad;     // [N, D]
  DType grad_dtype;
};

struct BagStep {
  RowState state;
  int64_t n;         // rows of the table
  const void* grad;  // [B, D]
  DType grad_dtype;
  int64_t bags;               // B
  const int64_t* token;       // [T] rows; those outside 0..n are fill
  int64_t count;              // T
  const int64_t* offset;      // [B + 1] ascending, within 0..T
  const float* token_weight;  // [T] or null: all 1
};

// Table rows to score: index [B, S], or [S] where one shortlist serves the whole batch. -1 pads;
// others lie in the table.
struct Shortlist {
  const int64_t* index;
  int64_t size;  // S
  bool shared;
  int64_t entries;  // B * S, or S; 0 where there is no sample
};

struct ShortlistMatmul {
  Batch batch;
  Table table;
  Shortlist list;
  float* logits;  // [B, S]
};

// Two kernels share it, because the caller can make room for the U rows only when they are counted:
// shortlist_group fills place, start and unique (and dx of lists per sample), shortlist_rows the
// rest.
struct ShortlistBackward {
  Batch batch;
  Table table;
  Shortlist list;
  const float* dlogits;  // [B, S]
  float* dx;             // [B, D] or null
  int64_t* place;   // [entries] real entries of index sorted by (row, entry), or null: rows are not
                    // asked for
  int64_t* start;   // [entries + 1] those of unique row u lie from start[u] to start[u + 1]
  int64_t* unique;  // [1] U
  int64_t* rows;    // [U]
  float* grad;      // [U, D] or null
  float* dbias;     // [U] or null
};

// The candidates of a sample are the nodes of its clusters. A key holds one: whether it is forced,
// its score, and its place among all of the level.
struct ShortlistSelect {
  const float* scores;  // [B, K, M]
  Clusters clusters;
  int64_t samples;        // B
  const int64_t* node;    // [P] positives, forced where they are candidates
  const int32_t* sample;  // [P]
  int64_t count;          // P
  const int64_t* first;   // [B, K] place of each cluster's first node, or null: slot * M
  int64_t k, width;       // k are kept, or all that are forced, up to width
  int64_t* keys;          // [B, width] of what is kept, in the order of places; -1 pads
};

struct ShortlistMerge {
  const int64_t* keys;  // [B, count] of shortlist_select, -1 pads anywhere
  int64_t samples, count;
  Clusters clusters;  // of the whole level; places lie within K * M
  int64_t k, width;
  int64_t* nodes;   // [B, width] ascending, -1 pads
  int64_t* places;  // [B, width], 0 for pads
  float* scores;    // [B, width], -inf for pads
  int64_t* forced;  // [1] how many there are
};

// Each chooses the best instruction set of this processor. Throws std::bad_alloc before anything is
// written.
#define XK_DECLARE(ns, kernel, Args) void kernel(const Args& args, const Host& host);
XK_EACH_KERNEL(XK_DECLARE, -)
#undef XK_DECLARE

// Name of the instruction set in use: "avx512_bf16", "avx512", "avx2" or "portable".
const char* instruction_set();

}  // namespace xk
