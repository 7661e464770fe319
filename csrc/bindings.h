// Checks that the two bindings share; included by them alone. The one for CUDA is compiled with
// -DXK_CUDA.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Undefined for a dtype that the stable ABI has no word for.
inline ScalarType scalar_type(const Tensor& t) {
  try {
    return t.scalar_type();
  } catch (const std::exception&) {
    return ScalarType::Undefined;
  }
}

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Float8_e4m3fn: return "torch.float8_e4m3fn";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Undefined: return "another dtype";
    default: return torch::headeronly::toString(dtype);
  }
}

inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return t.is_cuda() ? text("cuda:", t.get_device_index()) : "another device";
}

inline std::string describe(const Tensor& t) {
  if (!t.defined()) return "None";
  std::string sizes;
  for (int64_t d = 0; d < t.dim(); ++d) sizes += text(d ? ", " : "", t.size(d));
  return text(dtype_name(scalar_type(t)), " [", sizes, "] on ", device_name(t));
}

// A floating-point argument.
struct Floats {
  void* data;
  xk::DType dtype;
};

template <class T>
constexpr ScalarType kScalarType = ScalarType::Undefined;
template <>
inline constexpr ScalarType kScalarType<float> = ScalarType::Float;
template <>
inline constexpr ScalarType kScalarType<int32_t> = ScalarType::Int;
template <>
inline constexpr ScalarType kScalarType<int64_t> = ScalarType::Long;

// The arguments of one call: each is handed out as a pointer once its dtype, shape, layout and
// device are those documented and no memory that the call writes is another argument's too. All
// refusals are sentences in the form of InputError's.
class Arguments {
 public:
  const char* const op;

  Arguments(const char* op, const Tensor& table, const char* table_name)
      : op(op), device_(table.defined() ? table.get_device_index() : -1) {
    defined(table, table_name);
    if (!on_device(table))
      refuse(table_name, text("a tensor on ", kDevice), describe(table), "move it");
  }

  // The dispatcher takes None for a tensor, and hands on one that answers nothing.
  void defined(const Tensor& t, const char* name) const {
    if (!t.defined()) refuse(name, "a torch.Tensor", "None", "pass one");
  }

  [[noreturn]] void refuse(const char* names, const std::string& expected, const std::string& got,
                           const std::string& mend) const {
    const bool several = std::string(names).find(" and ") != std::string::npos;
    throw std::runtime_error(text(op, several ? ": arguments " : ": argument ", names,
                                  ": expected ", expected, ", got ", got, "; ", mend));
  }
  void expect(bool good, const char* name, const char* expected, const char* got,
              const char* mend) const {
    if (!good) refuse(name, expected, got, mend);
  }

  // sizes: -1 for any.
  template <class T>
  const T* read(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes) {
    check(t, name, {kScalarType<T>}, sizes);
    return static_cast<const T*>(note(t, name, t.const_data_ptr(), false));
  }
  template <class T>
  const T* read(const Maybe& t, const char* name, std::initializer_list<int64_t> sizes) {
    return t ? read<T>(*t, name, sizes) : nullptr;
  }
  template <class T>
  T* write(const Maybe& t, const char* name, std::initializer_list<int64_t> sizes) {
    if (!t) return nullptr;
    check(*t, name, {kScalarType<T>}, sizes);
    return static_cast<T*>(note(*t, name, t->mutable_data_ptr(), true));
  }
  Floats read_floats(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes) {
    check(t, name, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}, sizes);
    return {note(t, name, t.const_data_ptr(), false), dtype_of(t)};
  }
  xk::State state(const Maybe& t, const char* name, std::initializer_list<int64_t> sizes) {
    if (!t) return {nullptr, xk::DType::f32};
    check(*t, name, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}, sizes);
    return {note(*t, name, t->mutable_data_ptr(), true), dtype_of(*t)};
  }
  // weight [n, D], D >= 1; scaled: 8-bit ones too.
  Floats table(const Tensor& t, const char* name, bool written, bool scaled) {
    if (scaled)
      check(t, name,
            {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Float8_e4m3fn},
            {-1, -1});
    else
      check(t, name, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}, {-1, -1});
    if (t.size(1) < 1)
      refuse(name, "a table with at least one column", describe(t), "give it a width of 1 or more");
    return {note(t, name, written ? t.mutable_data_ptr() : t.const_data_ptr(), written),
            dtype_of(t)};
  }
  // Scale and largest value [n, 2] of an 8-bit table's rows; null for other tables.
  float* row_scale(const Maybe& t, xk::DType dtype, int64_t n, bool written) {
    expect((dtype == xk::DType::f8) == t.has_value(), "row_scale",
           "one beside an 8-bit weight, else None", t ? "a tensor" : "None",
           t ? "leave it out" : "pass each row's scale and largest |value|");
    return written ? write<float>(t, "row_scale", {n, 2})
                   : const_cast<float*>(read<float>(t, "row_scale", {n, 2}));
  }
  // A new tensor. Torch's own refusal comes through the stable ABI without its reason.
  Tensor result(std::initializer_list<int64_t> sizes, ScalarType dtype = ScalarType::Float) const {
    try {
      return torch::stable::empty(sizes, dtype);
    } catch (const std::exception&) {
      throw std::runtime_error(text(op, ": results: expected memory for ", dtype_name(dtype), " ",
                                    shape_of(sizes), ", got none; ask for less at once"));
    }
  }
  // Global rows are row_offset + row: they choose random words, and are results.
  void offset(int64_t row_offset, int64_t n) const {
    if (row_offset < 0 || row_offset > std::numeric_limits<int64_t>::max() - n)
      refuse("row_offset",
             text("0 to 2^63 - 1 - ", n, ", so that row_offset + rows fits in an int64"),
             text(row_offset), "pass the global row of the table's first");
  }
  // Steers every update. On a card its values stay where they are: to read them would wait for the
  // device.
  void steering(const float* hyper, const int64_t* counter) const {
#ifndef XK_CUDA
    for (int i = 0; i < xk::kHyperCount; ++i)
      if (!std::isfinite(hyper[i]))
        refuse("hyper", "seven finite numbers", text(hyper[i], " at ", i),
               "a step with it would fill the table with NaN");
    if (counter[1] < 0 || counter[1] == std::numeric_limits<int64_t>::max())
      refuse("counter", "a step from 0 to 2^63 - 2 at 1", text(counter[1]),
             "count the steps from 0");
#else
    (void)hyper, (void)counter;
#endif
  }

 private:
  struct Span {
    const char* name;
    uintptr_t begin, end;
    bool written;
  };
  static constexpr int kMost = 24;
  Span spans_[kMost];
  int count_ = 0;
  const int32_t device_;

#ifdef XK_CUDA
  static constexpr const char* kDevice = "a CUDA device";
  static bool on_device(const Tensor& t) { return t.is_cuda(); }
#else
  static constexpr const char* kDevice = "cpu";
  static bool on_device(const Tensor& t) { return t.is_cpu(); }
#endif

  static xk::DType dtype_of(const Tensor& t) {
    switch (t.scalar_type()) {
      case ScalarType::Float: return xk::DType::f32;
      case ScalarType::BFloat16: return xk::DType::bf16;
      case ScalarType::Half: return xk::DType::f16;
      default: return xk::DType::f8;
    }
  }

  // A kernel of one card must not be handed another's addresses: the dispatcher asks only that all
  // are on a CUDA device.
  bool beside_table(const Tensor& t) const {
#ifdef XK_CUDA
    return t.is_cuda() && t.get_device_index() == device_;
#else
    return t.is_cpu();
#endif
  }

  static std::string shape_of(std::initializer_list<int64_t> sizes) {
    std::string shape;
    for (const int64_t size : sizes)
      shape += text(shape.empty() ? "" : ", ", size < 0 ? "any" : text(size));
    return text("[", shape, "]");
  }

  void check(const Tensor& t, const char* name, std::initializer_list<ScalarType> dtypes,
             std::initializer_list<int64_t> sizes) const {
    defined(t, name);
    bool fits = false;
    for (const ScalarType dtype : dtypes) fits |= scalar_type(t) == dtype;
    fits = fits && beside_table(t) && t.dim() == int64_t(sizes.size());
    int64_t d = 0;
    for (const int64_t size : sizes) {
      if (!fits) break;
      fits = size < 0 || t.size(d) == size;
      ++d;
    }
    if (fits && t.is_contiguous()) return;
    if (fits)
      refuse(name, "a contiguous tensor", "another layout of its strides",
             "call .contiguous() on it");
    std::string kinds;
    for (const ScalarType dtype : dtypes)
      kinds += text(kinds.empty() ? "" : " or ", dtype_name(dtype));
#ifdef XK_CUDA
    const std::string device = text("cuda:", device_);
#else
    const std::string device = kDevice;
#endif
    refuse(name, text(kinds, " ", shape_of(sizes), " on ", device), describe(t),
           "convert, reshape or move it");
  }

  void* note(const Tensor& t, const char* name, const void* data, bool written) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    const Span span{name, begin, begin + size_t(t.numel()) * t.element_size(), written};
    if (span.begin == span.end) return const_cast<void*>(data);
    for (int i = 0; i < count_; ++i)
      if ((written || spans_[i].written) && span.begin < spans_[i].end &&
          spans_[i].begin < span.end)
        refuse(text(spans_[i].name, " and ", name).c_str(),
               "memory of their own, since the call writes to it", "tensors that share memory",
               "clone one of them");
    if (count_ == kMost) throw std::logic_error("too many arguments for Arguments::kMost");
    spans_[count_++] = span;
    return const_cast<void*>(data);
  }
};

// Everything that belongs to the rows of a table; momentum, second and kahan as large as the table,
// or second [n].
struct RowArguments {
  const Maybe &momentum, &second, &kahan, &row_step, &row_decay, &decay_sum, &row_scale;
};

inline xk::RowState row_state_of(Arguments& args, const Tensor& weight, const char* name,
                                 const RowArguments& given, const Tensor& hyper,
                                 const Tensor& counter, int64_t row_offset, bool decoupled,
                                 bool scaled) {
  const Floats table = args.table(weight, name, true, scaled);
  const int64_t n = weight.size(0), d = weight.size(1);
  xk::RowState s{};
  s.weight = table.data;
  s.dtype = table.dtype;
  s.width = d;
  s.row_scale = args.row_scale(given.row_scale, s.dtype, n, true);
  const float* const numbers = args.read<float>(hyper, "hyper", {xk::kHyperCount});
  s.hyper = reinterpret_cast<const xk::Hyper*>(numbers);
  s.counter = args.read<int64_t>(counter, "counter", {2});
  args.steering(numbers, s.counter);
  s.momentum = args.state(given.momentum, "momentum", {n, d});
  if (given.second) args.defined(*given.second, "second");
  s.row_wise = given.second && given.second->dim() == 1;
  s.second = s.row_wise ? args.state(given.second, "second", {n})
                        : args.state(given.second, "second", {n, d});
  s.kahan = args.state(given.kahan, "kahan", {n, d});
  args.expect(!given.kahan || (s.kahan.dtype == s.dtype && s.dtype != xk::DType::f32), "kahan",
              "the table's dtype, bfloat16 or float16", "another",
              "leave it out of fp32 and 8-bit tables");
  s.row_step = args.write<int64_t>(given.row_step, "row_step", {n});
  args.expect(!given.row_step || (given.momentum && given.second), "row_step",
              "momentum and second beside it", "one of them alone", "leave it out: it serves Adam");
  args.expect(
      given.row_decay.has_value() == given.decay_sum.has_value() && (!given.row_decay || decoupled),
      "row_decay", "decay_sum beside it, and decoupled decay", "one without the other",
      "pass all three or none");
  s.row_decay = args.write<float>(given.row_decay, "row_decay", {n});
  s.decay_sum = args.read<float>(given.decay_sum, "decay_sum", {1});
#ifndef XK_CUDA
  if (s.decay_sum && !std::isfinite(*s.decay_sum))
    args.refuse("decay_sum", "a finite number", text(*s.decay_sum),
                "a step with it would fill the table with NaN");
#endif
  args.offset(row_offset, n);
  s.row_offset = row_offset;
  s.decoupled = decoupled;
  return s;
}
