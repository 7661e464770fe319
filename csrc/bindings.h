// Checks that the two bindings share; included by them alone. The one for CUDA is compiled with -DXK_CUDA.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>

#include "kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

#ifdef XK_CUDA
constexpr const char* kDeviceName = "a CUDA device";
inline bool on_device(const Tensor& t) { return t.is_cuda(); }
#else
constexpr const char* kDeviceName = "the CPU";
inline bool on_device(const Tensor& t) { return t.is_cpu(); }
#endif

inline void check(const Tensor& t, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(on_device(t) && t.is_contiguous() && t.scalar_type() == dtype, "argument ", name,
                  ": expected a contiguous tensor of the documented dtype on ", kDeviceName);
}

// The dispatcher asks only that all are on a CUDA device: a kernel of one card must not be handed another's addresses.
inline void check_devices(const Tensor& table, std::initializer_list<std::pair<const char*, Maybe>> arguments) {
  for (const auto& [name, t] : arguments)
    STD_TORCH_CHECK(!t || t->get_device_index() == table.get_device_index(), "argument ", name, ": expected device ",
                    table.get_device_index(), ", the table's, got device ", t->get_device_index());
}

inline void check_size(const Tensor& t, const char* name, int64_t numel) {
  STD_TORCH_CHECK(t.numel() == numel, "argument ", name, ": expected ", numel, " elements, got ", t.numel());
}

inline xk::DType dtype_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(on_device(t) && t.is_contiguous(), "argument ", name, ": expected a contiguous tensor on ",
                  kDeviceName);
  switch (t.scalar_type()) {
    case ScalarType::Float: return xk::DType::f32;
    case ScalarType::BFloat16: return xk::DType::bf16;
    case ScalarType::Half: return xk::DType::f16;
    default: STD_TORCH_CHECK(false, "argument ", name, ": expected float32, bfloat16 or float16");
  }
  return xk::DType::f32;
}

// A table's dtype; row_scale [n, 2] belongs to 8-bit tables alone.
inline xk::DType table_dtype_of(const Tensor& weight, const Maybe& row_scale) {
  const bool small = weight.scalar_type() == ScalarType::Float8_e4m3fn;
  STD_TORCH_CHECK(small == row_scale.has_value(), "argument row_scale: expected one beside an 8-bit weight, else None");
  if (!small) return dtype_of(weight, "weight");
  check(weight, "weight", ScalarType::Float8_e4m3fn);
  check(*row_scale, "row_scale", ScalarType::Float), check_size(*row_scale, "row_scale", 2 * weight.size(0));
  return xk::DType::f8;
}

inline xk::State state_of(const Maybe& state, const char* name, const Tensor& weight) {
  if (!state) return {nullptr, xk::DType::f32};
  const xk::DType dtype = dtype_of(*state, name);
  check_size(*state, name, weight.numel());
  return {state->mutable_data_ptr(), dtype};
}

// Everything that belongs to the rows of a table; momentum, second and kahan as large as the table, or second [n].
inline xk::RowState row_state_of(const Tensor& weight, const Maybe& momentum, const Maybe& second, const Maybe& kahan,
                                 const Maybe& row_step, const Maybe& row_decay, const Maybe& decay_sum,
                                 const Maybe& row_scale, const Tensor& hyper, const Tensor& counter,
                                 int64_t row_offset, bool decoupled) {
  STD_TORCH_CHECK(weight.dim() == 2, "argument weight: expected [n, D]");
  check_devices(weight, {{"momentum", momentum}, {"second", second}, {"kahan", kahan}, {"row_step", row_step},
                         {"row_decay", row_decay}, {"decay_sum", decay_sum}, {"row_scale", row_scale},
                         {"hyper", hyper}, {"counter", counter}});
  const int64_t n = weight.size(0);
  check(hyper, "hyper", ScalarType::Float), check_size(hyper, "hyper", 7);
  check(counter, "counter", ScalarType::Long), check_size(counter, "counter", 2);
  xk::RowState s{};
  s.dtype = table_dtype_of(weight, row_scale);
  s.row_scale = row_scale ? static_cast<float*>(row_scale->mutable_data_ptr()) : nullptr;
  s.weight = weight.mutable_data_ptr();
  s.width = weight.size(1);
  s.momentum = state_of(momentum, "momentum", weight);
  s.row_wise = second && second->dim() == 1;
  if (s.row_wise) {
    check_size(*second, "second", n);
    const xk::DType dtype = dtype_of(*second, "second");
    s.second = {second->mutable_data_ptr(), dtype};
  } else {
    s.second = state_of(second, "second", weight);
  }
  s.kahan = state_of(kahan, "kahan", weight);
  STD_TORCH_CHECK(!kahan || (s.kahan.dtype == s.dtype && s.dtype != xk::DType::f32),
                  "argument kahan: expected the table's dtype, bfloat16 or float16");
  if (row_step) {
    check(*row_step, "row_step", ScalarType::Long), check_size(*row_step, "row_step", n);
    s.row_step = static_cast<int64_t*>(row_step->mutable_data_ptr());
  }
  STD_TORCH_CHECK(row_decay.has_value() == decay_sum.has_value() && (!row_decay || decoupled),
                  "argument row_decay: expected decay_sum beside it, and decoupled decay");
  if (row_decay) {
    check(*row_decay, "row_decay", ScalarType::Float), check_size(*row_decay, "row_decay", n);
    check(*decay_sum, "decay_sum", ScalarType::Float), check_size(*decay_sum, "decay_sum", 1);
    s.row_decay = static_cast<float*>(row_decay->mutable_data_ptr());
    s.decay_sum = static_cast<const float*>(decay_sum->const_data_ptr());
  }
  s.hyper = static_cast<const float*>(hyper.const_data_ptr());
  s.counter = static_cast<const int64_t*>(counter.const_data_ptr());
  s.row_offset = row_offset;
  s.decoupled = decoupled;
  return s;
}

inline Tensor empty(std::initializer_list<int64_t> size, ScalarType dtype = ScalarType::Float) {
  return torch::stable::empty(size, dtype);
}
