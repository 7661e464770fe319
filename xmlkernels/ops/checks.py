"""Checks that the ops share: each raises InputError in one sentence.

Values are read on the CPU alone. Elsewhere reading one would wait for the device, and the caller's
word is taken.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from xmlkernels.errors import InputError

TABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
E4M3 = torch.float8_e4m3fn
LARGEST_SCALE = 100
"""Row scales lie between 2^-100 and 2^100: every scaled e4m3 value is exact in bf16 and fp32."""


def describe(t: Tensor) -> str:
    """Dtype, shape and device of a tensor, as the messages print them."""
    if t.is_nested or t.layout != torch.strided:
        return (
            f"a {'nested' if t.is_nested else str(t.layout).removeprefix('torch.')} tensor of "
            f"{t.dtype} on {t.device}"
        )
    return f"{t.dtype} {list(t.shape)} on {t.device}"


def expect(good: bool, where: str, expected: str, got: str, mend: str) -> None:
    """Raise InputError unless `good`."""
    if not good:
        raise InputError(where, expected, got, mend)


def check_tensor(
    op: str,
    name: str,
    t: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
    device: torch.device,
) -> None:
    """Check one argument's dtype, shape (None: any size), layout and device."""
    plain = not t.is_nested and t.layout == torch.strided
    fits = t.dtype in dtypes and plain and t.dim() == len(shape)
    fits = fits and all(s in (None, d) for s, d in zip(shape, t.shape, strict=True))
    wanted = " or ".join(str(d) for d in dtypes)
    sizes = "[" + ", ".join("any" if s is None else str(s) for s in shape) + "]"
    expect(
        fits and t.device == device,
        f"{op}: argument {name}",
        f"{wanted} {sizes} on {device}",
        describe(t),
        "convert, reshape or move it",
    )
    expect(
        t.is_contiguous(),
        f"{op}: argument {name}",
        "a contiguous tensor",
        f"strides {t.stride()} for shape {list(t.shape)}",
        "call .contiguous() on it (a table must be stored contiguously)",
    )


def check_memory(
    op: str, written: Mapping[str, Tensor | None], read: Mapping[str, Tensor | None]
) -> None:
    """Check that no tensor that the op writes shares memory with another argument.

    Reads addresses alone, nothing on a device.
    """
    spans = []
    for named, writes in ((written, True), (read, False)):
        for name, t in named.items():
            # A subclass (a fake tensor, one over several devices) may have no memory of its own;
            # meta tensors have none.
            if t is None or type(t) not in (Tensor, torch.nn.Parameter):
                continue
            if (size := t.numel() * t.element_size()) and (start := t.data_ptr()):
                spans.append((start, start + size, name, writes))
    end, last, end_written, last_written = 0, "", 0, ""  # where the spans so far end
    for start, stop, name, writes in sorted(spans):
        reach, other = (end, last) if writes else (end_written, last_written)
        if start < reach:
            raise InputError(
                f"{op}: arguments {other} and {name}",
                "memory of their own, since the op writes to it",
                "tensors that share memory",
                "clone one of them",
            )
        if stop > end:
            end, last = stop, name
        if writes and stop > end_written:
            end_written, last_written = stop, name


def check_row_offset(op: str, row_offset: int, n: int, table: str = "weight") -> None:
    """Check that every global row is an int64: it chooses random words, and is a result."""
    where, mend = f"{op}: argument row_offset", f"pass the global row of {table}[0]"
    expect(row_offset >= 0, where, "0 or more", str(row_offset), mend)
    most = f"at most 2^63 - 1 - {n}, so that row_offset + {n} rows fits in an int64"
    expect(row_offset <= 2**63 - 1 - n, where, most, str(row_offset), mend)


def check_steering(op: str, hyper: Tensor, counter: Tensor, device: torch.device) -> None:
    """Check hyper and counter, the two tensors that steer a step."""
    check_tensor(op, "hyper", hyper, (torch.float32,), (7,), device)
    check_tensor(op, "counter", counter, (torch.int64,), (2,), device)
    if device.type != "cpu":
        return
    values = hyper.tolist()
    if not all(map(math.isfinite, values)):
        at = next(i for i, value in enumerate(values) if not math.isfinite(value))
        raise InputError(
            f"{op}: argument hyper",
            "seven finite numbers",
            f"{values[at]} at {at}",
            "look at what computed it: a step with it would fill the table with NaN",
        )
    step = counter.tolist()[1]
    expect(
        0 <= step < 2**63 - 1,
        f"{op}: argument counter",
        "a step from 0 to 2^63 - 2 at 1",
        str(step),
        "count steps from 0",
    )


def check_row_scale(op: str, weight: Tensor, row_scale: Tensor) -> None:
    """Check the scale and largest value of each row of an e4m3 table."""
    check_tensor(op, "row_scale", row_scale, (torch.float32,), (weight.shape[0], 2), weight.device)
    if weight.device.type != "cpu" or weight.shape[0] == 0:
        return
    code = row_scale.view(torch.int32)[:, 0]
    low, high = (127 - LARGEST_SCALE) << 23, (127 + LARGEST_SCALE) << 23
    good = (code & 0x7FFFFF == 0) & (code >= low) & (code <= high)
    if not bool(good.all()):
        at = int((~good).nonzero()[0])
        raise InputError(
            f"{op}: argument row_scale",
            f"powers of two from 2^-{LARGEST_SCALE} to 2^{LARGEST_SCALE} in column 0",
            f"{float(row_scale[at, 0])} in row {at}",
            "start with 2^-8 and leave the rest to rescale_rows_",
        )


def check_table(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: int,
    row_scale: Tensor | None = None,
    *,
    scaled: bool = False,
) -> None:
    """Check the label table, its input and bias, as every head op takes them.

    scaled: this op takes e4m3 tables too.
    """
    if "float8" in str(weight.dtype) and not (scaled and weight.dtype == E4M3):
        mend = "this op has no kernel for 8-bit tables"
        if scaled:
            mend = "of the 8-bit formats, tables take torch.float8_e4m3fn alone"
        raise InputError(
            f"{op}: argument weight",
            "a torch.float32, torch.bfloat16 or torch.float16 table",
            describe(weight),
            f"convert it: {mend}",
        )
    dtypes = (*TABLE_DTYPES, E4M3) if scaled else TABLE_DTYPES
    check_tensor(op, "weight", weight, dtypes, (None, None), weight.device)
    expect(
        weight.shape[1] >= 1,
        f"{op}: argument weight",
        "a table with at least one column",
        describe(weight),
        "give the embeddings a width of 1 or more",
    )
    if weight.dtype == E4M3:
        if row_scale is None:
            raise InputError(
                f"{op}: argument row_scale",
                f"torch.float32 [{weight.shape[0]}, 2] beside an 8-bit table",
                "None",
                "pass each row's scale (2^-8 to begin with) and largest |value|",
            )
        check_row_scale(op, weight, row_scale)
    else:
        expect(
            row_scale is None,
            f"{op}: argument row_scale",
            f"None for a {weight.dtype} table",
            "a tensor",
            "leave it out: only 8-bit tables have row scales",
        )
    check_tensor(op, "x", x, TABLE_DTYPES, (None, weight.shape[1]), weight.device)
    if bias is not None:
        check_tensor(op, "bias", bias, (torch.float32,), (weight.shape[0],), weight.device)
    expect(
        -1 <= rows <= weight.shape[0],
        f"{op}: argument rows",
        f"-1 (all) or a number from 0 to {weight.shape[0]}, the rows of weight",
        str(rows),
        "pass the number of real labels",
    )


def check_positives(
    op: str, x: Tensor, pos_row: Tensor, pos_sample: Tensor, pos_value: Tensor | None, rows: int
) -> None:
    """Check positives: (row, sample) pairs, sorted by row, then sample, and unique.

    Rows from `rows` on are fill at the end.
    """
    check_tensor(op, "pos_row", pos_row, (torch.int64,), (None,), x.device)
    check_tensor(op, "pos_sample", pos_sample, (torch.int32,), (pos_row.shape[0],), x.device)
    if pos_value is not None:
        check_tensor(op, "pos_value", pos_value, (torch.float32,), (pos_row.shape[0],), x.device)
    if x.device.type != "cpu" or pos_row.numel() == 0:
        # elsewhere reading the values would wait for the device; there the collator's word is taken
        return
    low, high = (int(v) for v in torch.aminmax(pos_sample))
    expect(
        low >= 0 and high < x.shape[0] and int(pos_row[0]) >= 0,
        f"{op}: arguments pos_row and pos_sample",
        f"rows from 0 and samples from 0 to {x.shape[0] - 1}",
        f"first row {int(pos_row[0])}, samples from {low} to {high}",
        "number samples within the batch and rows within weight",
    )
    above = (pos_sample[1:] > pos_sample[:-1]) | (pos_row[1:] >= rows)
    later = (pos_row[1:] > pos_row[:-1]) | ((pos_row[1:] == pos_row[:-1]) & above)
    if not bool(later.all()):
        at = int((~later).nonzero()[0]) + 1
        raise InputError(
            f"{op}: arguments pos_row and pos_sample",
            "unique pairs sorted by row, then sample",
            f"({int(pos_row[at])}, {int(pos_sample[at])}) after ({int(pos_row[at - 1])}, "
            f"{int(pos_sample[at - 1])}) at {at}",
            "sort the pairs and drop duplicates in the collator",
        )


def check_states(
    op: str,
    weight: Tensor,
    momentum: Tensor | None,
    second: Tensor | None,
    kahan: Tensor | None,
    *,
    row_wise: bool,
) -> None:
    """Check the optimizer states of a label table.

    row_wise: the second moment may be one number per row.
    """
    n, d = weight.shape
    if momentum is not None:
        check_tensor(op, "momentum", momentum, STATE_DTYPES, (n, d), weight.device)
    if second is not None:
        shape = (n,) if row_wise and second.dim() == 1 else (n, d)
        check_tensor(op, "second", second, STATE_DTYPES, shape, weight.device)
    if kahan is not None:
        expect(
            weight.dtype != E4M3,
            f"{op}: argument kahan",
            "None for an 8-bit table",
            "a tensor",
            "leave it out: e4m3 stores round stochastically, without bias; take a bf16 table for "
            "compensation",
        )
        _check_kahan(op, weight, kahan)
    expect(
        second is None or momentum is not None,
        f"{op}: argument second",
        "momentum beside it (Adam has both moments)",
        "momentum=None",
        "pass momentum too",
    )


def _check_kahan(op: str, weight: Tensor, kahan: Tensor) -> None:
    check_tensor(op, "kahan", kahan, (weight.dtype,), tuple(weight.shape), weight.device)
    expect(
        weight.dtype != torch.float32,
        f"{op}: argument kahan",
        "a table below fp32",
        "an fp32 table",
        "leave kahan out: fp32 needs no compensation",
    )


def check_no_gradient(op: str, weight: Tensor) -> None:
    """Check that a table which the op trains is out of autograd."""
    expect(
        not weight.requires_grad,
        f"{op}: argument weight",
        "a tensor that requires no gradient",
        "one that does",
        "keep the table out of autograd (a buffer, not an nn.Parameter): the step is its whole "
        "training",
    )


def check_table_shape(op: str, name: str, weight: Tensor) -> None:
    """Check the table `name` [n, D]; the shapes of other arguments are compared with its own."""
    check_tensor(op, name, weight, TABLE_DTYPES, (None, None), weight.device)
    where, expected = f"{op}: argument {name}", "a table with at least one column"
    expect(weight.shape[1] >= 1, where, expected, describe(weight), "give it a width of 1 or more")


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
    """Check what a row-sparse update takes besides the table `name` [n, D] itself.

    rest: the op's other tensors, checked already; they must not share memory with those that the op
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
        _check_kahan(op, weight, kahan)
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
