// Checks that the two bindings share; included by them alone. The one for CUDA is compiled with -DXK_CUDA.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

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

inline xk::State state_of(const Maybe& state, const char* name, const Tensor& weight) {
  if (!state) return {nullptr, xk::DType::f32};
  const xk::DType dtype = dtype_of(*state, name);
  check_size(*state, name, weight.numel());
  return {state->mutable_data_ptr(), dtype};
}

inline Tensor empty(std::initializer_list<int64_t> size, ScalarType dtype = ScalarType::Float) {
  return torch::stable::empty(size, dtype);
}
