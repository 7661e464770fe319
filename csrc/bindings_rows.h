// The row-sparse ops, whose arguments both devices take alike. Run hands them to the device's
// kernel, with the table.
#pragma once

#include "bindings.h"

template <class A>
using Runner = void (*)(const A&, const Arguments&, const Tensor&);

// The three sparse updates are one kernel: the rule follows from the states.
inline xk::SparseUpdate sparse_update_of(Arguments& args, xk::RowState state, const Tensor& param,
                                         const Tensor& rows, const Tensor& grad) {
  xk::SparseUpdate a{};
  a.state = state;
  a.n = param.size(0);
  a.rows = args.read<int64_t>(rows, "rows", {-1});
  a.count = rows.numel();
  const Floats floats = args.read_floats(grad, "grad", {a.count, state.width});
  a.grad = floats.data;
  a.grad_dtype = floats.dtype;
  return a;
}

template <Runner<xk::SparseUpdate> Run>
void sparse_sgd_(Tensor param, Maybe momentum, Tensor rows, Tensor grad, Tensor hyper,
                 Tensor counter, Maybe kahan, Maybe row_decay, Maybe decay_sum, int64_t row_offset,
                 bool decoupled) {
  Arguments args("sparse_sgd_", param, "param");
  const xk::RowState state =
      row_state_of(args, param, "param", {momentum, {}, kahan, {}, row_decay, decay_sum, {}}, hyper,
                   counter, row_offset, decoupled, false);
  Run(sparse_update_of(args, state, param, rows, grad), args, param);
}

template <Runner<xk::SparseUpdate> Run>
void sparse_adagrad_(Tensor param, Tensor second, Tensor rows, Tensor grad, Tensor hyper,
                     Tensor counter, Maybe kahan, Maybe row_decay, Maybe decay_sum,
                     int64_t row_offset, bool decoupled) {
  Arguments args("sparse_adagrad_", param, "param");
  const xk::RowState state =
      row_state_of(args, param, "param", {{}, second, kahan, {}, row_decay, decay_sum, {}}, hyper,
                   counter, row_offset, decoupled, false);
  Run(sparse_update_of(args, state, param, rows, grad), args, param);
}

template <Runner<xk::SparseUpdate> Run>
void sparse_adam_(Tensor param, Tensor momentum, Tensor second, Tensor rows, Tensor grad,
                  Tensor hyper, Tensor counter, Maybe kahan, Maybe row_step, Maybe row_decay,
                  Maybe decay_sum, int64_t row_offset, bool decoupled) {
  Arguments args("sparse_adam_", param, "param");
  const xk::RowState state = row_state_of(
      args, param, "param", {momentum, second, kahan, row_step, row_decay, decay_sum, {}}, hyper,
      counter, row_offset, decoupled, false);
  Run(sparse_update_of(args, state, param, rows, grad), args, param);
}

template <Runner<xk::BagStep> Run>
void bag_step_(Tensor weight, Tensor grad, Tensor token, Tensor offset, Tensor hyper,
               Tensor counter, Maybe token_weight, Maybe momentum, Maybe second, Maybe kahan,
               Maybe row_step, Maybe row_decay, Maybe decay_sum, int64_t row_offset,
               bool decoupled) {
  Arguments args("bag_step_", weight, "weight");
  xk::BagStep a{};
  a.state = row_state_of(args, weight, "weight",
                         {momentum, second, kahan, row_step, row_decay, decay_sum, {}}, hyper,
                         counter, row_offset, decoupled, false);
  a.n = weight.size(0);
  const Floats floats = args.read_floats(grad, "grad", {-1, a.state.width});
  a.grad = floats.data;
  a.grad_dtype = floats.dtype;
  a.bags = grad.size(0);
  a.token = args.read<int64_t>(token, "token", {-1});
  a.count = token.numel();
  a.offset = args.read<int64_t>(offset, "offset", {a.bags + 1});
  a.token_weight = args.read<float>(token_weight, "token_weight", {a.count});
  Run(a, args, weight);
}
