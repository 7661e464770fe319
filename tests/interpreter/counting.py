"""Counts what a kernel reads and writes, element by element, per tensor."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import pytest
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

from xmlkernels.triton.bce_tile import Tiles

SCRATCH = ("gradient", "partial", "column_sum")


class Traffic:
    """Elements loaded and stored, by the name of the tensor; tensors without a name count as
    "other".
    """

    def __init__(self, named: dict[str, Tensor]) -> None:
        self.loads: Counter[str] = Counter()
        self.stores: Counter[str] = Counter()
        self._kept: list[
            Tensor
        ] = []  # an address must not be given to another tensor while we count
        self._ranges: list[tuple[str, int, int]] = []
        for name, t in named.items():
            self.watch(name, t)

    def watch(self, name: str, t: Tensor) -> None:
        if t.numel():
            self._kept.append(t)
            self._ranges.append((name, t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()))

    def count(self, to: Counter[str], addresses: Any, mask: Any) -> None:
        addresses, mask = numpy.broadcast_arrays(addresses, mask)
        left = addresses[mask.astype(bool)]  # a product of truth values is an integer
        for name, begin, end in self._ranges:
            hit = (left >= begin) & (left < end)
            to[name] += int(hit.sum())
            left = left[~hit]
        to["other"] += left.size


@contextmanager
def counted(patch: pytest.MonkeyPatch, named: dict[str, Tensor]) -> Iterator[Traffic]:
    """Counts every masked and unmasked access within the block; scratch memory of `Tiles` is named
    as its attributes.
    """
    traffic = Traffic(named)
    load = interpreter_builder.create_masked_load
    store = interpreter_builder.create_masked_store
    buffers = Tiles.buffers

    def counting_load(ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        # A descriptor's mask is an array.
        traffic.count(traffic.loads, ptrs.data, getattr(mask, "data", mask))
        return load(ptrs, mask, *rest, **named)

    def counting_store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.count(traffic.stores, ptrs.data, getattr(mask, "data", mask))
        return store(ptrs, value, mask, *rest)

    def watching_buffers(self: Tiles, **asked: bool) -> None:
        buffers(self, **asked)
        for name in (*SCRATCH, "loss"):
            if getattr(self, name) is not None:
                traffic.watch("loss_part" if name == "loss" else name, getattr(self, name))

    with patch.context() as inner:
        inner.setattr(interpreter_builder, "create_masked_load", counting_load)
        inner.setattr(interpreter_builder, "create_masked_store", counting_store)
        inner.setattr(Tiles, "buffers", watching_buffers)
        yield traffic
