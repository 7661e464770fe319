"""One implementation that is timed, and one op's page of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.shapes import Shape
from benchmarks.timing import Step

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LR = 1e-4
REFERENCE_ELEMENTS = 1 << 23
"""Larger tables are not given to the references: their whole matrices would not fit."""


@dataclass(frozen=True)
class Case:
    """One implementation of one shape.

    Attributes:
        impl: xmlkernels, fused (the same by one op of ours), reference, eager, compile, mm (the
            ceiling) or a peer's name.
        phase: what a call does.
        dtype: fp32, bf16 or fp16: the table's format, or that of a peer's products.
        flops, bytes: closed forms of one call.
        inputs: makes what a caller holds anyway: the table and the batch. Cases of one table format
            share it.
        start: makes the implementation's own state and returns the call to time; its memory counts
            into peak_mb.
    """

    impl: str
    phase: str
    dtype: str
    flops: int
    bytes: int
    inputs: Callable[[], Any]
    start: Callable[[Any], Step]

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells this case from the others of its shape."""
        return self.impl, self.phase, self.dtype


@dataclass(frozen=True)
class Benchmark:
    """What a module `cases_NAME.py` says of the op `NAME`, in its constant `BENCHMARK`.

    Attributes:
        functions: the public functions of `xmlkernels.ops` that are timed.
        cases: builds the cases of one shape, this package's first: (shape, device, compiled) ->
            cases; without `compiled` it leaves torch.compile out.
        shapes: measured on a CPU, in this order.
        gpu_shapes: measured on a large card, in this order; without any, `shapes`.
        small_gpu_shapes: take the place of gpu_shapes on a card that those do not fit.
        gpu_cases: builds what a card measures besides: (shape, device) -> cases.
        syncing: (impl, phase) of steps that read a size on the host, such as the number of distinct
            rows. They are never captured in a graph.
    """

    functions: tuple[str, ...]
    cases: Callable[[Shape, str, bool], list[Case]]
    shapes: tuple[Shape, ...]
    gpu_shapes: tuple[Shape, ...] = ()
    small_gpu_shapes: tuple[Shape, ...] = ()
    gpu_cases: Callable[[Shape, str], list[Case]] | None = None
    syncing: frozenset[tuple[str, str]] = frozenset()

    def for_card(self) -> tuple[Shape, ...]:
        """Every shape that a card may be asked for."""
        return (*self.gpu_shapes, *self.small_gpu_shapes) or self.shapes
