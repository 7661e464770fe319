"""Checks shared by the ops that update touched rows in place."""

import math

import torch
from torch import Tensor

from xmlkernels.ops._registry import (
    STATE_DTYPES,
    TABLE_DTYPES,
    check_memory,
    check_row_offset,
    check_steering,
    check_tensor,
    describe,
    expect,
)


def check_table_shape(op: str, name: str, weight: Tensor) -> None:
    """The table `name` [n, D], before anything beside it is measured by it."""
    check_tensor(op, name, weight, TABLE_DTYPES, (None, None), weight.device)
    mend = "give it a width of 1 or more"
    expect(
        weight.shape[1] >= 1,
        f"{op}: argument {name}",
        "a table with at least one column",
        describe(weight),
        mend,
    )


def check_updated_table(
    op: str,
    name: str,
    weight: Tensor,
    hyper: Tensor,
    counter: Tensor,
    *,
    momentum: Tensor | None = None,
    second: Tensor | None = None,
    kahan: Tensor | None = None,
    row_step: Tensor | None = None,
    row_decay: Tensor | None = None,
    decay_sum: Tensor | None = None,
    row_offset: int = 0,
    decoupled: bool = False,
    rest: dict[str, Tensor | None],
) -> None:
    """What is updated beside the table `name` [n, D], checked itself already, and the two tensors
    that steer the step.

    rest: the op's other tensors, checked too; they must not share memory with those that it
        updates.
    """
    device, where = weight.device, f"{op}: argument "
    n, d = weight.shape
    expect(
        not weight.requires_grad,
        where + name,
        "a tensor that requires no gradient",
        "one that does",
        "pass .detach() of a parameter: the op writes to it outside autograd",
    )
    check_steering(op, hyper, counter, device)
    if momentum is not None:
        check_tensor(op, "momentum", momentum, STATE_DTYPES, (n, d), device)
    if second is not None:
        expect(
            second.dim() in (1, 2),
            where + "second",
            f"shape [{n}, {d}], or [{n}] for one value per row",
            describe(second),
            "reshape it",
        )
        check_tensor(op, "second", second, STATE_DTYPES, (n, d)[: second.dim()], device)
    if kahan is not None:
        check_tensor(op, "kahan", kahan, (weight.dtype,), (n, d), device)
        expect(
            weight.dtype != torch.float32,
            where + "kahan",
            "a table below fp32",
            "an fp32 table",
            "leave kahan out: fp32 needs no compensation",
        )
    if row_step is not None:
        check_tensor(op, "row_step", row_step, (torch.int64,), (n,), device)
        expect(
            momentum is not None and second is not None,
            where + "row_step",
            "momentum and second beside it (it serves Adam)",
            "momentum=None" if momentum is None else "second=None",
            "leave it out: no other rule corrects a bias",
        )
    expect(
        (row_decay is None) == (decay_sum is None),
        f"{op}: arguments row_decay and decay_sum",
        "both or neither",
        "row_decay alone" if decay_sum is None else "decay_sum alone",
        "pass both for the exact decay applied late",
    )
    if row_decay is not None and decay_sum is not None:
        check_tensor(op, "row_decay", row_decay, (torch.float32,), (n,), device)
        check_tensor(op, "decay_sum", decay_sum, (torch.float32,), (1,), device)
        expect(
            device.type != "cpu" or math.isfinite(float(decay_sum)),
            where + "decay_sum",
            "a finite number",
            str(decay_sum.tolist()[0]) if device.type == "cpu" else "",
            "add up log1p(-lr decay), with lr decay below 1",
        )
        expect(
            decoupled,
            where + "row_decay",
            "decoupled=True beside it",
            "decoupled=False",
            "pass decoupled=True: a decay inside the gradient cannot be applied late",
        )
    check_row_offset(op, row_offset, n, name)
    written = {name: weight, "momentum": momentum, "second": second, "kahan": kahan}
    written |= {"row_step": row_step, "row_decay": row_decay}
    check_memory(op, written, {"hyper": hyper, "counter": counter, "decay_sum": decay_sum, **rest})


def check_touched_rows(op: str, rows: Tensor, grad: Tensor, param: Tensor) -> None:
    """rows [N] and grad [N, D]; real rows ascending and unique, fill (n or more) at the end."""
    check_tensor(op, "rows", rows, (torch.int64,), (None,), param.device)
    check_tensor(op, "grad", grad, STATE_DTYPES, (rows.shape[0], param.shape[1]), param.device)
    if param.device.type != "cpu" or rows.numel() == 0:
        return  # elsewhere reading the values would wait for the device
    expect(
        int(rows[0]) >= 0,
        f"{op}: argument rows",
        f"rows from 0 to {param.shape[0] - 1}, and {param.shape[0]} or more as fill",
        f"{int(rows[0])} at 0",
        "number rows within param",
    )
    later = (rows[1:] > rows[:-1]) | ((rows[1:] == rows[:-1]) & (rows[1:] >= param.shape[0]))
    if not bool(later.all()):
        at = int((~later).nonzero()[0]) + 1
        expect(
            False,
            f"{op}: argument rows",
            "unique rows in ascending order",
            f"{int(rows[at])} after {int(rows[at - 1])} at {at}",
            "sort them and add up the gradients of equal rows (a coalesced sparse gradient has "
            "both done)",
        )
