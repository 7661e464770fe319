// The shortlist turned around: which samples select a cluster, in place of which clusters a sample
// selects.
//
// A counting sort, so clusters come in ascending order and the samples of each too: no result
// depends on the order in which a sample lists its clusters. Only clusters with samples and real
// rows are kept ("active").
#pragma once

#include "common.h"

namespace xk::XK_NS {

struct Group {
  int64_t first, rows;  // its real rows in the table
  int64_t place;        // active rows before it
  int64_t pair;         // its first pair (cluster, sample)
  int64_t samples;      // and how many it has
};

struct Groups {
  int64_t count = 0, rows = 0;     // active clusters, and their rows together
  Buffer<Group> group;             // ascending
  Buffer<int32_t> sample;          // [pairs] ascending within a group
  Buffer<int64_t> slot;            // [pairs] the pair's place in `clusters` [B, K]
  Buffer<int64_t> positive_row;    // the positives among the candidates,
  Buffer<int32_t> positive_place;  // their samples as places within the group
  Buffer<float> positive_value;
  int64_t positive_count = 0;

  Groups(const Clusters& c, int64_t batch, int64_t real_rows, const Positives& p)
      : group(min64(c.count, batch * c.per_sample)), sample(batch * c.per_sample),
        slot(batch * c.per_sample), positive_row(p.count), positive_place(p.count),
        positive_value(p.value ? p.count : 0), has_values(p.value != nullptr) {
    sort_pairs(c, batch * c.per_sample, real_rows);
    keep_positives(p);
  }
  Positives positives() const {
    return {positive_row.data, positive_place.data, has_values ? positive_value.data : nullptr,
            positive_count};
  }

 private:
  bool has_values;

  void sort_pairs(const Clusters& c, int64_t slots, int64_t real_rows) {
    Buffer<int64_t> next(c.count);  // pairs of each cluster, then the place of its next one
    for (int64_t i = 0; i < c.count; ++i) next.data[i] = 0;
    for (int64_t i = 0; i < slots; ++i)
      if (c.chosen[i] >= 0) ++next.data[c.chosen[i]];
    int64_t pairs = 0;
    for (int64_t i = 0; i < c.count; ++i) {
      const int64_t samples = next.data[i],
                    size = min64(c.row_ptr[i + 1], real_rows) - c.row_ptr[i];
      next.data[i] = -1;
      if (samples == 0 || size <= 0) continue;
      group.data[count++] = {c.row_ptr[i], size, rows, pairs, samples};
      next.data[i] = pairs;
      pairs += samples;
      rows += size;
    }
    for (int64_t i = 0; i < slots; ++i) {
      if (c.chosen[i] < 0 || next.data[c.chosen[i]] < 0) continue;
      const int64_t at = next.data[c.chosen[i]]++;
      sample.data[at] = int32_t(i / c.per_sample);
      slot.data[at] = i;
    }
  }

  void keep_positives(const Positives& p) {
    int64_t g = 0;
    for (int64_t i = 0; i < p.count && g < count; ++i) {
      while (g < count && p.row[i] >= group.data[g].first + group.data[g].rows) ++g;
      if (g == count || p.row[i] < group.data[g].first) continue;
      const int32_t* const samples = sample.data + group.data[g].pair;
      int64_t low = 0, high = group.data[g].samples;
      while (low < high) {
        const int64_t mid = low + (high - low) / 2;
        if (samples[mid] < p.sample[i])
          low = mid + 1;
        else
          high = mid;
      }
      if (low == group.data[g].samples || samples[low] != p.sample[i]) continue;
      positive_row.data[positive_count] = p.row[i];
      positive_place.data[positive_count] = int32_t(low);
      if (has_values) positive_value.data[positive_count] = p.value[i];
      ++positive_count;
    }
  }
};

}  // namespace xk::XK_NS
