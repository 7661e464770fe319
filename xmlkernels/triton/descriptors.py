"""Matrices as kernels take them: by the Tensor Memory Accelerator's descriptors, or as they are."""

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from xmlkernels.triton import common

MOST_ROWS = (1 << 31) - (1 << 10)  # coordinates have 32 bits, those of a last block's end too


def card_has_tma(device: torch.device) -> bool:
    """Return whether a card has the Tensor Memory Accelerator, and room for what it feeds.

    From sm_120 on, cards have it with 99 KB of shared memory a block, as those before sm_90: they
    take the same tiles as those, by pointers.
    """
    return not common.emulated() and (9, 0) <= torch.cuda.get_device_capability(device) < (12, 0)


def are_aligned(*matrices: Tensor) -> bool:
    """Return whether all rows begin at multiples of 16 bytes: one access moves that many."""
    return all(t.data_ptr() % 16 == 0 and t.shape[1] * t.element_size() % 16 == 0 for t in matrices)


def serve_descriptors(x: Tensor, weight: Tensor, rows: int) -> bool:
    """Return whether kernels take x and the table by TMA descriptors.

    That needs such a card and addresses that are multiples of 16 bytes. fp32 products have no
    tensor cores, which descriptors feed. Results have the same bits either way.
    """
    fits = x.element_size() == 2 and x.shape[0] > 0 and 0 < rows <= MOST_ROWS
    return fits and are_aligned(x, weight) and card_has_tma(weight.device)


def box(matrix: Tensor, rows: int, *block: int, tma: bool = True) -> Any:
    """Return a contiguous matrix as kernels take it: a descriptor of such blocks, or itself.

    rows: its end; blocks hold zeros from there on. A single row may have any stride of its own.
    """
    if not tma:
        return matrix
    width = matrix.shape[1]
    return TensorDescriptor(matrix, [rows, width], [width, 1], [*block])
