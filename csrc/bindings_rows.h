// The row-sparse ops, whose arguments both devices take alike. Run hands them to the device's kernel, with the table.
#pragma once

#include "bindings.h"

// The three sparse updates are one kernel: the rule follows from the states.
template <void (*Run)(const xk::SparseUpdate&, const Tensor&)>
void sparse_update(xk::RowState state, const Tensor& param, const Tensor& rows, const Tensor& grad) {
  check(rows, "rows", ScalarType::Long);
  check_devices(param, {{"rows", rows}, {"grad", grad}});
  xk::SparseUpdate a{};
  a.state = state;
  a.n = param.size(0);
  a.rows = static_cast<const int64_t*>(rows.const_data_ptr());
  a.count = rows.numel();
  a.grad = grad.const_data_ptr();
  a.grad_dtype = dtype_of(grad, "grad");
  check_size(grad, "grad", a.count * state.width);
  Run(a, param);
}

template <void (*Run)(const xk::SparseUpdate&, const Tensor&)>
void sparse_sgd_(Tensor param, Maybe momentum, Tensor rows, Tensor grad, Tensor hyper, Tensor counter, Maybe kahan,
                 Maybe row_decay, Maybe decay_sum, int64_t row_offset, bool decoupled) {
  sparse_update<Run>(row_state_of(param, momentum, {}, kahan, {}, row_decay, decay_sum, {}, hyper, counter, row_offset,
                                  decoupled),
                     param, rows, grad);
}

template <void (*Run)(const xk::SparseUpdate&, const Tensor&)>
void sparse_adagrad_(Tensor param, Tensor second, Tensor rows, Tensor grad, Tensor hyper, Tensor counter, Maybe kahan,
                     Maybe row_decay, Maybe decay_sum, int64_t row_offset, bool decoupled) {
  sparse_update<Run>(row_state_of(param, {}, second, kahan, {}, row_decay, decay_sum, {}, hyper, counter, row_offset,
                                  decoupled),
                     param, rows, grad);
}

template <void (*Run)(const xk::SparseUpdate&, const Tensor&)>
void sparse_adam_(Tensor param, Tensor momentum, Tensor second, Tensor rows, Tensor grad, Tensor hyper, Tensor counter,
                  Maybe kahan, Maybe row_step, Maybe row_decay, Maybe decay_sum, int64_t row_offset, bool decoupled) {
  sparse_update<Run>(row_state_of(param, momentum, second, kahan, row_step, row_decay, decay_sum, {}, hyper, counter,
                                  row_offset, decoupled),
                     param, rows, grad);
}

template <void (*Run)(const xk::BagStep&, const Tensor&)>
void bag_step_(Tensor weight, Tensor grad, Tensor token, Tensor offset, Tensor hyper, Tensor counter,
               Maybe token_weight, Maybe momentum, Maybe second, Maybe kahan, Maybe row_step, Maybe row_decay,
               Maybe decay_sum, int64_t row_offset, bool decoupled) {
  check(token, "token", ScalarType::Long);
  check(offset, "offset", ScalarType::Long);
  check_devices(weight, {{"grad", grad}, {"token", token}, {"offset", offset}, {"token_weight", token_weight}});
  xk::BagStep a{};
  a.state = row_state_of(weight, momentum, second, kahan, row_step, row_decay, decay_sum, {}, hyper, counter,
                         row_offset, decoupled);
  a.n = weight.size(0);
  a.grad = grad.const_data_ptr();
  a.grad_dtype = dtype_of(grad, "grad");
  a.bags = offset.numel() - 1;
  STD_TORCH_CHECK(a.bags >= 0, "argument offset: expected [B + 1], got no element");
  check_size(grad, "grad", a.bags * a.state.width);
  a.token = static_cast<const int64_t*>(token.const_data_ptr());
  a.count = token.numel();
  a.offset = static_cast<const int64_t*>(offset.const_data_ptr());
  if (token_weight) {
    check(*token_weight, "token_weight", ScalarType::Float);
    check_size(*token_weight, "token_weight", a.count);
    a.token_weight = static_cast<const float*>(token_weight->const_data_ptr());
  }
  Run(a, weight);
}
