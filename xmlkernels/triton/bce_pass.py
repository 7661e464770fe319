"""The second pass of `bce_step_` in CUTLASS for sm_90a (csrc/cuda/sm90), beside `step_tiles`.

It is off until rows of a card show that it is faster by a fifth; `chosen` turns it on, for the
tests and benchmarks of a card alone.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from xmlkernels.triton.bce_tile import Tiles

SAMPLES = 128  # a block of samples, no smaller: the products have one size
CARD = (9, 0)  # its machine code runs on no other
_chosen = False


@contextlib.contextmanager
def chosen() -> Iterator[None]:
    """Let every `bce_step_` within take this pass, or refuse where it cannot."""
    global _chosen  # noqa: PLW0603  (a switch of the process)
    before, _chosen = _chosen, True
    try:
        yield
    finally:
        _chosen = before


def is_chosen() -> bool:
    """Return whether `bce_step_` is to take this pass."""
    return _chosen


def is_built() -> bool:
    """Return whether the CUDA library has the pass."""
    return hasattr(torch.ops.xmlkernels, "bce_pass_")


def missing(device: torch.device) -> str | None:
    """Return why the pass cannot run on a card, or None."""
    if not is_built():
        return "the CUDA library is built without CUTLASS (nvidia-cutlass, XMLKERNELS_CUTLASS)"
    if torch.cuda.get_device_capability(device) != CARD:
        return "it is for sm_90a alone"
    return None


def refusal(tiles: Tiles, plain: bool) -> str | None:
    """Return why the pass does not serve a step, or None; plain: as in `step_rows`."""
    if reason := missing(tiles.weight.device):
        return reason
    if not plain or tiles.kind != torch.bfloat16:
        return "it serves SGD of a bf16 table without bias, states and skipped rows"
    if not tiles.tma or tiles.b_blocks != 1 or tiles.pitch != SAMPLES:
        return f"it serves {SAMPLES // 2 + 1} to {SAMPLES} samples and widths divisible by 8"
    return None


def step_rows(
    tiles: Tiles,
    first: int,
    hyper: Tensor,
    counter: Tensor,
    *,
    plain: bool,
    row_offset: int,
    decoupled: bool,
) -> None:
    """Add the chunk's Gᵀ W to the partial sums and update its rows by SGD.

    Args:
        tiles: the call's, whose `make_gradient(first)` has run.
        first: the chunk's first row.
        hyper, counter, row_offset, decoupled: see `xmlkernels.ops.bce_step_`.
        plain: the step has no bias, no states, no rows' scales, and no rows that are skipped.

    Raises:
        NotImplementedError: the pass is not built, or does not serve such a step.
    """
    if reason := refusal(tiles, plain):
        raise NotImplementedError(f"xmlkernels: bce_pass_ was chosen, but {reason}")
    torch.ops.xmlkernels.bce_pass_(
        tiles.weight,
        tiles.x,
        tiles.gradient,
        tiles.partial,
        hyper,
        counter,
        tiles.flag,
        tiles.rows,
        first,
        row_offset,
        decoupled,
    )
