"""Registers ops with torch, and the checks that they share."""

import functools
import importlib
import inspect
import math
import numbers
import operator
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, library

from xmlkernels import native
from xmlkernels.errors import InputError

_library = library.Library("xmlkernels", "DEF")
missing: str | None = native.load()
"""Why the native library is not loaded; None when it is."""

TABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
E4M3 = torch.float8_e4m3fn
LARGEST_SCALE = 100
"""Row scales lie between 2^-100 and 2^100: there, every scaled e4m3 value is exact in bf16 and
fp32.
"""
_INT64 = range(-(2**63), 2**63)
P = ParamSpec("P")
R = TypeVar("R")


def define(
    schema: str, reference: Callable[..., Any], fake: Callable[..., Any], check: Callable[..., None]
) -> None:
    """Defines one op: its schema, the reference as default kernel, and the shapes of its results.

    check takes the op's arguments and raises InputError where they do not fit. The public function
    has called it; the reference, which `torch.ops` reaches without that function, calls it too.
    (The native kernels have checks of their own.)
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)

    def default(*args: Any, **kwargs: Any) -> Any:
        device = next(a for a in args if isinstance(a, Tensor)).device.type
        reason = {"cpu": missing, "cuda": native.missing_cuda}.get(
            device
        ) or f"no kernel of `{name}` is built for {device}"
        native.warn_reference(device, reason)
        for argument, value in zip(
            getattr(torch.ops.xmlkernels, name).default._schema.arguments, args, strict=False
        ):
            if (
                value is None and str(argument.type) == "Tensor"
            ):  # the dispatcher takes it for one that is not defined
                _check_type(name, argument.name, value, Tensor, optional=False)
        check(*args, **kwargs)
        return reference(*args, **kwargs)

    _library.impl(name, default, "CompositeExplicitAutograd")
    library.register_fake(f"xmlkernels::{name}", fake, lib=_library)


def register_cuda(name: str, module: str) -> None:
    """The CUDA kernel of an op: the function of that name in a module that is imported on the first
    call.
    """

    def kernel(*args: Any, **kwargs: Any) -> Any:
        try:
            function = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise ModuleNotFoundError(
                f"{name}: its GPU kernel needs triton: `pip install triton`", name="triton"
            ) from error
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(next(a for a in args if isinstance(a, Tensor)).device):
            return function(*args, **kwargs)

    _library.impl(name, kernel, "CUDA")


def public(function: Callable[P, R]) -> Callable[P, R]:
    """A public op whose arguments are held to the types that its signature names, before it asks
    them anything.
    """
    op = function.__name__
    names, kinds = [], {}
    for parameter in inspect.signature(function).parameters.values():
        one = getattr(parameter.annotation, "__args__", (parameter.annotation,))
        kinds[parameter.name] = one[0], type(None) in one
        names.append(parameter.name)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            kind, optional = kinds.get(
                name, (None, False)
            )  # Python itself refuses a name that is none
            if (
                kind is None
                or (isinstance(value, Tensor) and kind is Tensor)
                or (value is None and optional)
            ):
                continue
            _check_type(op, name, value, kind, optional)
        return function(*args, **kwargs)

    return checked


def _check_type(op: str, name: str, value: object, kind: type, optional: bool) -> None:
    if kind is Tensor:
        good, expected = False, "a torch.Tensor"
        mend = "convert it, for example with torch.as_tensor" if value is not None else "pass one"
    elif kind is int:
        # NumPy's integers are meant, a tensor is not: on a card it would have to be waited for.
        good = isinstance(value, torch.SymInt) or _fits_int64(value)
        expected, mend = "an int of 64 bits", "pass a whole number"
    elif kind is float:
        good = isinstance(value, numbers.Real) and not isinstance(value, bool)
        expected, mend = "a float", "pass a number"
    else:
        good = isinstance(value, int) or (
            str(getattr(value, "dtype", "")) == "bool" and getattr(value, "shape", None) == ()
        )
        expected, mend = "a bool", "pass True or False"
    if optional:
        expected, mend = f"{expected} or None", f"{mend}, or leave it out"
    if not good:
        raise InputError(f"{op}: argument {name}", expected, _told(value), mend)


def _fits_int64(value: object) -> bool:
    if isinstance(value, bool | Tensor):
        return False
    try:
        return operator.index(value) in _INT64  # type: ignore[arg-type]
    except TypeError:  # an array of several
        return False


def _told(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor, {describe(value)}"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    module, name = type(value).__module__, type(value).__qualname__
    name = name if module == "builtins" else f"{module}.{name}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def mark_written(*tensors: Tensor | None) -> None:
    """Tells autograd that an op is about to change tensors in place, so that a later backward that
    needs their old values is refused rather than wrong."""
    torch.autograd.graph.increment_version(
        [t for t in tensors if t is not None and not t.is_inference()]
    )


def describe(t: Tensor) -> str:
    if t.is_nested or t.layout != torch.strided:
        return (
            f"a {'nested' if t.is_nested else str(t.layout).removeprefix('torch.')} tensor of "
            f"{t.dtype} on {t.device}"
        )
    return f"{t.dtype} {list(t.shape)} on {t.device}"


def expect(good: bool, where: str, expected: str, got: str, mend: str) -> None:
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
    """One argument's dtype, shape (None: any size), layout and device."""
    fits = (
        t.dtype in dtypes
        and not t.is_nested
        and t.layout == torch.strided
        and t.dim() == len(shape)
    )
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
    op: str, written: dict[str, Tensor | None], read: dict[str, Tensor | None]
) -> None:
    """No tensor that the op writes may share memory with another argument. Reads addresses alone,
    nothing on a device.
    """
    spans = []
    for named, writes in ((written, True), (read, False)):
        for name, t in named.items():
            # A subclass (a fake tensor, one over several devices) may have no memory of its own,
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
    """Global rows choose random words, and are results: the last one must be an int64 too."""
    expect(
        row_offset >= 0,
        f"{op}: argument row_offset",
        "0 or more",
        str(row_offset),
        f"pass the global row of {table}[0]",
    )
    expect(
        row_offset <= 2**63 - 1 - n,
        f"{op}: argument row_offset",
        f"at most 2^63 - 1 - {n}, so that row_offset + {n} rows fits in an int64",
        str(row_offset),
        f"pass the global row of {table}[0]",
    )


def check_steering(op: str, hyper: Tensor, counter: Tensor, device: torch.device) -> None:
    """The two tensors that steer a step; their values on the CPU alone, for elsewhere reading them
    would wait.
    """
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
    """Scale and largest value of each row of an e4m3 table."""
    check_tensor(op, "row_scale", row_scale, (torch.float32,), (weight.shape[0], 2), weight.device)
    if weight.device.type != "cpu" or weight.shape[0] == 0:
        return  # elsewhere reading the values would wait for the device
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
    """The label table, its input and bias, as every head op takes them. scaled: this op takes e4m3
    tables too.
    """
    if "float8" in str(weight.dtype) and not (scaled and weight.dtype == E4M3):
        raise InputError(
            f"{op}: argument weight",
            "a torch.float32, torch.bfloat16 or torch.float16 table",
            describe(weight),
            "convert it: "
            + (
                "of the 8-bit formats, tables take torch.float8_e4m3fn alone"
                if scaled
                else "this op has no kernel for 8-bit tables"
            ),
        )
    check_tensor(
        op,
        "weight",
        weight,
        (*TABLE_DTYPES, E4M3) if scaled else TABLE_DTYPES,
        (None, None),
        weight.device,
    )
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
    """Positives as (row, sample) pairs, sorted by row then sample, unique; rows from `rows` on are
    fill at the end.
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
    same = (pos_row[1:] == pos_row[:-1]) & (
        (pos_sample[1:] > pos_sample[:-1]) | (pos_row[1:] >= rows)
    )
    later = (pos_row[1:] > pos_row[:-1]) | same
    if not bool(later.all()):
        at = int((~later).nonzero()[0]) + 1
        raise InputError(
            f"{op}: arguments pos_row and pos_sample",
            "unique pairs sorted by row, then sample",
            f"({int(pos_row[at])}, {int(pos_sample[at])}) after ({int(pos_row[at - 1])}, "
            f"{int(pos_sample[at - 1])}) at {at}",
            "sort the pairs and drop duplicates in the collator",
        )
