"""Calls the host code of cuda_arithmetic.cpp on CPU tensors."""

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from nvcc import FLAGS, folder, need_nvcc, run
from sparse_common import ROW_STATES, RowStep

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def library() -> ctypes.CDLL:
    here, target = Path(__file__).parent, folder() / "cuda_arithmetic.so"
    # As torch computes on the CPU: every product and sum rounded by itself.
    host = "-O1,-fPIC,-ffp-contract=off,-Wall,-Wno-unknown-pragmas,-Werror,-fmax-errors=5"
    objects = []
    # Kernels tell the race record of each access by the calls that a sanitizer gets.
    for name, more in (("cuda_arithmetic", ",-fsanitize=thread"), ("race_record", "")):
        objects.append(str(folder() / f"{name}.o"))
        compiler = [need_nvcc(), "-x", "c++", *FLAGS, "-Xcompiler", host + more]
        run([*compiler, "-c", str(here / f"{name}.cpp"), "-o", objects[-1]])
    run([need_nvcc(), "-shared", *objects, "-Xlinker", "-zdefs", "-o", str(target)])
    return ctypes.CDLL(str(target))


def races(report: list[str]) -> tuple[dict[str, int], list[str]]:
    """Launches of each kernel (and "accesses" of all), and the races, in the lines of a report."""
    counts = {k: int(n) for line in report for k, _, n in [line.partition(" ")] if n.isdigit()}
    return counts, report[len(counts) :]


@contextlib.contextmanager
def recorded(report: list[str]) -> Iterator[None]:
    """Records the accesses of every launch within, and reports at the end."""
    library().record_races(ctypes.c_int64(1))
    try:
        yield
    finally:
        text = ctypes.create_string_buffer(1 << 16)
        library().races_found(text, ctypes.c_int64(len(text)))
        library().record_races(ctypes.c_int64(0))
        report += text.value.decode().splitlines()


def address(t: Tensor | None) -> int | None:
    if t is None:
        return None
    assert t.is_contiguous() and t.device.type == "cpu"
    return t.data_ptr()


def numbers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def pointers(*tensors: Tensor | None) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(address(t) for t in tensors))


def call(name: str, *arguments: Tensor | int) -> None:
    getattr(library(), name)(
        *(
            ctypes.c_void_p(address(a)) if isinstance(a, Tensor) else ctypes.c_int64(a)
            for a in arguments
        )
    )


def run_on_host(step: RowStep, *, reverse: bool = False, copy: bool = True) -> dict[str, Tensor]:
    """Every tensor that the step updates, after the CUDA kernels have run as host code.

    reverse: the other order of threads and blocks. copy: False to write to the step's own
        tensors."""
    t = {k: v.clone() if copy else v for k, v in step.tensors.items()}
    bag, second = "token" in t, t.get("second")
    dtypes = [DTYPES[t[k].dtype] if k in t else 0 for k in ("param", "momentum", "second", "grad")]
    row_wise, options = second is not None and second.dim() == 1, step.options
    n = numbers(
        *dtypes,
        t["param"].shape[1],
        row_wise,
        options.get("row_offset", 0),
        options.get("decoupled", False),
        t["param"].shape[0],
        (t["token"] if bag else t["rows"]).shape[0],
        t["grad"].shape[0] if bag else 0,
        reverse,
    )
    p = pointers(
        t["param"],
        t.get("momentum"),
        second,
        t.get("kahan"),
        t.get("row_step"),
        t.get("row_decay"),
        t.get("decay_sum"),
        t["hyper"],
        t["counter"],
        t["token"] if bag else t["rows"],
        t["grad"],
        t.get("offset"),
        t.get("token_weight"),
    )
    getattr(library(), "bag_step_host" if bag else "sparse_update_host")(p, n)
    return {k: t[k] for k in ("param", *ROW_STATES) if k in t}
