"""Messages between processes: rows gathered, summands scattered, lists merged, sums."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from xmlkernels.dist import wire
from xmlkernels.dist.group import parts, rank, size, talk, talk_to_one
from xmlkernels.errors import InputError

# torch 2.13 has renamed it.
_all_gather: Any = getattr(
    torch.distributed, "all_gather_single", torch.distributed.all_gather_into_tensor
)
_BUCKET = 1 << 24  # values of gradients sent at once


def gather_rows(own: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Return the rows of all processes, in the order of their numbers.

    Args:
        own: [n, ...], this process's rows; n is counts[rank()].
        counts: rows of each process; by default each has as many as this one.

    Returns:
        [sum of counts, ...], on every process.
    """
    if size() == 1:
        return own
    counts = [own.shape[0]] * size() if counts is None else list(counts)
    if own.shape[0] != counts[rank()]:
        raise InputError(
            "gather_rows: own",
            f"{counts[rank()]} rows",
            str(own.shape[0]),
            "pass this process's part",
        )
    widest = max(counts)
    padded = own.contiguous()
    if own.shape[0] < widest:
        padded = own.new_zeros(widest, *own.shape[1:])
        padded[: own.shape[0]] = own
    everyone = own.new_empty(len(counts) * widest, *own.shape[1:])
    wire.note("gathered", (size() - 1) * padded.numel() * padded.element_size())
    talk(_all_gather, everyone, padded)
    if min(counts) == widest:
        return everyone
    starts = range(0, len(everyone), max(1, widest))
    return torch.cat([everyone[s : s + n] for s, n in zip(starts, counts, strict=False)])


def gather_ragged(own: Tensor) -> Tensor:
    """Gather rows where no process knows how many the others have: [sum of n, ...].

    Waits for the device.
    """
    return gather_together([own])[0]


def gather_together(own: Sequence[Tensor]) -> list[Tensor]:
    """Gather the rows of several tensors as `gather_ragged` does, in two messages for all of them.

    A short message takes about as long as one of some hundred kilobytes. Waits for the device.

    Args:
        own: [n, ...] each, of any numbers of rows and dtypes, on one device.
    """
    if size() == 1:
        return list(own)
    counts = gather_rows(torch.tensor([[len(t) for t in own]]))
    rows = [t.contiguous().view(len(t), -1) if len(t) else t.reshape(0, 1) for t in own]
    widths = [math.prod(t.shape[1:]) * t.element_size() for t in own]
    sizes = [width * most for width, most in zip(widths, counts.amax(0).tolist(), strict=True)]
    padded = torch.zeros(1, sum(sizes), dtype=torch.uint8, device=own[0].device)
    for held, place in zip(rows, torch.split(padded[0], sizes), strict=True):
        sent = held.view(torch.uint8).flatten()
        place[: len(sent)] = sent
    found = []
    columns = torch.split(gather_rows(padded), sizes, 1)
    for tensor, width, sent, count in zip(own, widths, columns, counts.T.tolist(), strict=True):
        whole = torch.cat([part[: width * n] for part, n in zip(sent, count, strict=True)])
        found.append(whole.view(tensor.dtype).view(-1, *tensor.shape[1:]))
    return found


def gather_columns(own: Tensor) -> Tensor:
    """Gather tensors [B, c] of all processes side by side: [B, G c], in the order of processes."""
    if size() == 1:
        return own
    everyone = gather_rows(own).view(size(), *own.shape)
    return everyone.transpose(0, 1).flatten(1)


def fill_rows(own: Sequence[np.ndarray], *arrays: np.ndarray) -> None:
    """Fill [N, ...] arrays with the rows that the other processes have found.

    Args:
        own: numbers of the rows that this process has found, in any parts.
    """
    if size() == 1:
        return
    mine = np.concatenate([np.zeros(0, np.int64), *own])
    rows = gather_ragged(torch.from_numpy(mine)).numpy()
    for array in arrays:
        array[rows] = gather_ragged(torch.from_numpy(array[mine])).numpy()


def gather_texts(own: str) -> list[str]:
    """Return the text of every process, in the order of their numbers."""
    if size() == 1:
        return [own]
    content = torch.tensor(list(own.encode()), dtype=torch.uint8)
    lengths = gather_rows(torch.tensor([len(content)])).tolist()
    parts = torch.split(gather_rows(content, lengths), lengths)
    return [bytes(part.tolist()).decode() for part in parts]


def from_first(value: bool) -> bool:
    """Return what the first process says."""
    return bool(gather_rows(torch.tensor([value], dtype=torch.uint8))[0]) if size() > 1 else value


@contextmanager
def first_alone() -> Iterator[None]:
    """Let the first process go through the block alone, then all others at once.

    They find the files that it has made.
    """
    if rank() > 0:
        wait()
    yield
    if rank() == 0:
        wait()


class Scattered:
    """The sum of this process's rows over all processes, on its way; `rows` waits for it."""

    def __init__(self, partial: Tensor, counts: Sequence[int]) -> None:
        self._own = partial
        self._work: Any = None
        if size() == 1:
            return
        self._sent = partial.contiguous()  # the message reads it until it has gone
        own = counts[rank()]
        self._own = partial.new_empty(size() * own, *partial.shape[1:])
        received = (size() - 1) * own * partial[:1].numel() * partial.element_size()
        wire.note("scattered", received)
        self._work = talk(
            torch.distributed.all_to_all_single,
            self._own,
            self._sent,
            [own] * size(),
            list(counts),
            async_op=True,
        )

    def rows(self) -> Tensor:
        """Wait, and return the sum [n, ...] of this process's rows, in the order of processes."""
        if self._work is not None:
            talk(self._work.wait)
            self._work = None
            summands = self._own.view(size(), -1, *self._own.shape[1:])
            self._own = summands[0]
            for other in summands[1:]:
                self._own += other
        return self._own


@dataclass(frozen=True)
class ScatteredColumns:
    """Some columns of rows on their way.

    Attributes:
        whole: the rows, [n, D].
        columns: of them.
    """

    whole: Scattered
    columns: slice

    def rows(self) -> Tensor:
        """Wait, and return the columns of the rows' sum."""
        return self.whole.rows()[:, self.columns]


def scatter_sum(partial: Tensor, counts: Sequence[int] | None = None) -> Scattered:
    """Sum rows over all processes and give each its own, in the background.

    Begin it as soon as the summands are there and ask for the rows as late as they are needed. A
    step of the label table begins it before the table counts the step: sending hides the re-encoding
    of an fp8 table's rows and the sum of the loss. It cannot hide the update of the weights, for a
    fused step gives dx and the weights at once.

    Every summand goes to its owner alone, by one all-to-all: (G - 1) / G of the bytes of a sum on
    every process. The owner adds them in the order of the processes, so that a run repeats to the
    bit with any backend, which a ring of NCCL does not promise.

    Args:
        partial: [B, ...], this process's summand of all rows; it must not change before the wait.
        counts: rows of each process, B together; `parts` by default.

    Raises:
        InputError: the counts are not one for each process, B together.
    """
    if counts is None:
        counts = [part.stop - part.start for part in parts(partial.shape[0])]
    if len(counts) != size() or sum(counts) != partial.shape[0]:
        expected = f"{partial.shape[0]} rows in {size()} parts"
        mend = "pass the rows of each process"
        raise InputError("scatter_sum: counts", expected, str(list(counts)), mend)
    return Scattered(partial, counts)


def scatter_sums(
    partials: Sequence[Tensor], counts: Sequence[int] | None = None
) -> list[ScatteredColumns]:
    """Do what `scatter_sum` does for several tensors [B, D] of one dtype, in one message."""
    whole = scatter_sum(torch.cat(list(partials), 1), counts)
    ends = accumulate((t.shape[1] for t in partials), initial=0)
    return [ScatteredColumns(whole, slice(*pair)) for pair in pairwise(ends)]


def merge_topk(values: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k best of all processes' candidates: by value, of equal ones the lower row.

    Args:
        values, rows: [B, c] and int64 [B, c], this process's candidates, c the same on each; -inf
            and -1 pad.
        k: at most this many are kept.

    Returns:
        values [B, k] and rows [B, k], best first, the same on every process; -inf and -1 pad.
    """
    values, rows = gather_columns(values), gather_columns(rows)
    # Two stable sorts: of equal values the lower row stands first, pads behind every row.
    order = (
        torch.where(rows < 0, torch.iinfo(torch.int64).max, rows).sort(stable=True, dim=1).indices
    )
    values, rows = values.gather(1, order), rows.gather(1, order)
    values, order = values.sort(stable=True, dim=1, descending=True)
    values, rows = values[:, :k], rows.gather(1, order)[:, :k]
    if (missing := k - values.shape[1]) > 0:
        values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
        rows = torch.nn.functional.pad(rows, (0, missing), value=-1)
    return values, rows


def collect_rows(own: Tensor, counts: Sequence[int]) -> Tensor | None:
    """Bring the rows of all processes to the first one: [sum of counts, ...] there, None elsewhere.

    A few million values at a time, so that no other process holds more than its own rows.

    Args:
        own: [n, ...], this process's rows; n is counts[rank()].
        counts: rows of each process.
    """
    if size() == 1:
        return own
    if own.element_size() == 1 and own.dtype != torch.uint8:  # gloo sends no fp8
        whole = collect_rows(own.view(torch.uint8), counts)
        return None if whole is None else whole.view(own.dtype)
    step = max(1, _BUCKET // max(1, own[:1].numel()))
    whole = own.new_empty(sum(counts), *own.shape[1:]) if rank() == 0 else None
    first = 0
    for source, count in enumerate(counts):
        for start in range(0, count, step):
            end = min(start + step, count)
            if source == 0:
                if whole is not None:
                    whole[start:end] = own[start:end]
            elif rank() == source:
                talk_to_one(torch.distributed.send, own[start:end].contiguous(), 0)
            elif whole is not None:
                block = own.new_empty(end - start, *own.shape[1:])
                wire.note("gathered", block.numel() * block.element_size())
                talk_to_one(torch.distributed.recv, block, source)
                whole[first + start : first + end] = block
        first += count
    return whole


def sum_(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its sum over all processes, the same bits on each; return it."""
    if size() > 1:
        _note_sum(tensor)
        talk(torch.distributed.all_reduce, tensor)
    return tensor


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum every gradient over all processes, in few large messages.

    A parameter without a gradient counts as zero.

    A parameter that no process gave a gradient stays without one only where it is left out of
    `parameters`: what each process sends must have the same size.
    """
    if size() == 1:
        return
    bucket: list[Tensor] = []
    waiting = 0
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        waiting += parameter.grad.numel()
        if waiting >= _BUCKET:
            _sum_together(bucket)
            bucket, waiting = [], 0
    _sum_together(bucket)


def _sum_together(gradients: list[Tensor]) -> None:
    for dtype in dict.fromkeys(g.dtype for g in gradients):
        some = [g for g in gradients if g.dtype == dtype]
        flat = torch.cat([g.reshape(-1) for g in some])
        _note_sum(flat)
        talk(torch.distributed.all_reduce, flat)
        parts = torch.split(flat, [g.numel() for g in some])
        for gradient, summed in zip(some, parts, strict=True):
            gradient.copy_(summed.view_as(gradient))


def _note_sum(tensor: Tensor) -> None:
    wire.note("summed", wire.ring(tensor.numel() * tensor.element_size(), size()))


class Vote:
    """A repeated question to all processes, at the same places of each: does any say yes?

    Of several processes the answer is that of the question before: it travels while the work goes
    on, and nobody waits.
    """

    def __init__(self) -> None:
        self._asked: tuple[Any, Tensor] | None = None

    def yes(self, own: bool) -> bool:
        """Return the answer, the same on every process."""
        if size() == 1:
            return own
        answer = False
        if self._asked is not None:
            work, said = self._asked
            talk(work.wait)
            answer = bool(said)
        said = torch.tensor([own], dtype=torch.int32)
        _note_sum(said)
        most = torch.distributed.ReduceOp.MAX
        self._asked = talk(torch.distributed.all_reduce, said, most, async_op=True), said
        return answer


def wait() -> None:
    """Return when every process has come here."""
    sum_(torch.zeros(1))
