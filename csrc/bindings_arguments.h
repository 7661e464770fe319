// Tensors as the kernels' arguments, checked where a wrong value would corrupt memory. Included by bindings_cpu.cpp alone:
// it reads positives and indices, which on a card would wait for the device.
#pragma once

#include "bindings.h"

inline xk::Batch batch_of(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) && x.size(1) > 0,
                  "arguments x and weight: expected [B, D] and [n, D] with D >= 1");
  return {x.const_data_ptr(), dtype_of(x, "x"), x.size(0), x.size(1)};
}

inline xk::Table table_of(const Tensor& weight, const Maybe& bias, int64_t rows,
                   const Maybe& row_scale = std::nullopt) {
  const int64_t n = weight.size(0);
  STD_TORCH_CHECK(rows >= -1 && rows <= n, "argument rows: expected -1 to ", n, ", got ", rows);
  if (bias) check(*bias, "bias", ScalarType::Float), check_size(*bias, "bias", n);
  const xk::DType dtype = table_dtype_of(weight, row_scale);
  return {weight.const_data_ptr(), dtype, rows < 0 ? n : rows,
          bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
          row_scale ? static_cast<const float*>(row_scale->const_data_ptr()) : nullptr};
}

// Samples index a buffer, and rows are searched by bisection.
inline xk::Positives positives_of(const Tensor& row, const Tensor& sample, const Maybe& value, int64_t batch, int64_t rows) {
  check(row, "pos_row", ScalarType::Long);
  check(sample, "pos_sample", ScalarType::Int);
  check_size(sample, "pos_sample", row.numel());
  if (value) check(*value, "pos_value", ScalarType::Float), check_size(*value, "pos_value", row.numel());
  const xk::Positives p{static_cast<const int64_t*>(row.const_data_ptr()),
                        static_cast<const int32_t*>(sample.const_data_ptr()),
                        value ? static_cast<const float*>(value->const_data_ptr()) : nullptr, row.numel()};
  for (int64_t i = 0; i < p.count; ++i) {
    STD_TORCH_CHECK(p.row[i] >= (i ? p.row[i - 1] : 0), "argument pos_row: expected ascending rows, got ", p.row[i],
                    " at ", i);
    STD_TORCH_CHECK(p.row[i] >= rows || (p.sample[i] >= 0 && p.sample[i] < batch),
                    "argument pos_sample: expected 0 to ", batch - 1, ", got ", p.sample[i], " at ", i);
  }
  return p;
}

// Entries are addresses.
inline xk::Shortlist shortlist_of(const Tensor& index, int64_t batch, int64_t n) {
  check(index, "index", ScalarType::Long);
  const bool shared = index.dim() == 1;
  STD_TORCH_CHECK(shared || (index.dim() == 2 && index.size(0) == batch), "argument index: expected [B, S] or [S]");
  const xk::Shortlist list{static_cast<const int64_t*>(index.const_data_ptr()), index.size(shared ? 0 : 1), shared,
                           batch ? index.numel() : 0};
  int64_t low = -1, high = -1;
  for (int64_t i = 0; i < list.entries; ++i) {
    low = list.index[i] < low ? list.index[i] : low;
    high = list.index[i] > high ? list.index[i] : high;
  }
  STD_TORCH_CHECK(low == -1 && high < n, "argument index: expected rows from 0 to ", n - 1, " or -1, got ",
                  low < -1 ? low : high);
  return list;
}
