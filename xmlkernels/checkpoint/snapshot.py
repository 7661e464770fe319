"""A copy of what a checkpoint holds, so that training may go on while it is written."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch

from xmlkernels.checkpoint.together import Content
from xmlkernels.rows import rows_behind

_ALIGNED = 64  # bytes, of which the beginnings of tensors are multiples
_PART = 16 << 20  # bytes that a thread copies at a time


def snapshot_bytes(tensors: Mapping[str, torch.Tensor]) -> int | None:
    """Count the bytes of a copy of tensors; None where some stand in for rows in no memory."""
    if any(rows_behind(tensor) is not None for tensor in tensors.values()):
        return None
    return sum(_room(tensor) for tensor in tensors.values())


class Snapshot:
    """Memory for one copy, which is kept from one checkpoint to the next.

    The system hands out memory page by page, as it is touched, at a fraction of the speed of a
    copy: so it is touched beforehand, by a thread.

    Args:
        size: bytes that the copies will take; a larger one makes room for itself.
    """

    def __init__(self, size: int) -> None:
        self._held = _pages(size)
        view = self._held.numpy()
        self._touch = threading.Thread(
            target=_touch, args=(view,), name="xmlkernels-snapshot", daemon=True
        )
        self._touch.start()

    def take(self, content: Content) -> Content:
        """Copy all tensors; the copy is good until the next one is taken.

        Waits for the device that they are on.
        """
        self._touch.join()
        stored, own = dict(content.stored), dict(content.own)
        needed = sum(map(_room, (*stored.values(), *own.values())))
        if needed > len(self._held):
            self._held = _pages(needed)
        place, pairs = 0, []
        for part in (stored, own):
            for name, tensor in part.items():
                size = tensor.numel() * tensor.element_size()
                into = self._held[place : place + size].view(tensor.dtype).view(tensor.shape)
                pairs.append((into, tensor.detach()))
                part[name] = into
                place += _room(tensor)
        _copy(pairs)
        return replace(content, stored=stored, own=own)


def _room(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED


def _pages(size: int) -> torch.Tensor:
    held = mmap.mmap(-1, max(1, size))
    with suppress(AttributeError, OSError):  # large pages are a wish, absent on some systems
        held.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(held, dtype=torch.uint8)


def _touch(view: np.ndarray) -> None:
    for start in range(0, len(view), 1 << 26):  # Python's lock is let go between the parts
        view[start : start + (1 << 26) : mmap.PAGESIZE] = 0


def _copy(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy the second of each pair into the first, by as many threads as torch computes on."""
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for into, tensor in pairs:
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            into.copy_(tensor)
            continue
        ours, theirs = (t.flatten().view(torch.uint8).numpy() for t in (into, tensor))
        cuts = [slice(start, start + _PART) for start in range(0, len(ours), _PART)]
        parts += [(ours[cut], theirs[cut]) for cut in cuts]
    # By memmove, which writes past the caches: a third less traffic than torch's own copy.
    threads = min(torch.get_num_threads(), len(parts))
    if threads < 2 or len(parts) <= len(pairs):
        for ours, theirs in parts:
            np.copyto(ours, theirs)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: np.copyto(*part), parts))
