"""What one timed implementation is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.timing import Step

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LR = 1e-4
REFERENCE_ELEMENTS = 1 << 23
"""Above, the references' whole matrices would not fit common memories."""


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
            have the same one.
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
        return self.impl, self.phase, self.dtype
