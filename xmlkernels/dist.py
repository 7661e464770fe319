"""Several processes that train one model; nothing happens at world size 1.

The only caller of torch.distributed.

Every process draws the same global batch and encodes its own part of it (`part`). The vectors of
all parts are gathered (`gather_rows`), each process takes the same step on its copy of the label
tables with the whole batch, cuts the gradient of its own vectors from the result, and the gradients
of the encoder are summed (`sum_gradients`): the step is that of one process with the whole batch,
but for the order of additions. Labels are never sent: every process knows those of the whole batch.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from xmlkernels.errors import InputError
from xmlkernels.heartbeat import Heartbeat

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_BUCKET = 1 << 24  # values of gradients sent at once
# Of one message. One process makes a label tree or writes a checkpoint while the others wait:
# whether it lives shows its heartbeat, in `PATIENCE` seconds.
_LONGEST = timedelta(days=7)
# Long enough for a call that keeps Python's lock (a large sort, a swap to disk), in which no heart
# beats.
PATIENCE = 600.0
_heart: Heartbeat | None = None


class ProcessLost(RuntimeError):
    """Another process does not answer: it ended or hangs.

    Attributes:
        speaks: whether this process reports it; False where the other one says why
            itself, or another does.
    """

    def __init__(self, told: str, *, speaks: bool = True) -> None:
        super().__init__(told)
        self.speaks = speaks


def launched() -> tuple[int, int]:
    """Return this process's number and the number of processes; (0, 1) without torchrun.

    From torchrun's environment, also before `start`.

    Raises:
        InputError: they are no numbers.
    """
    found = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not all(value.isdecimal() for value in found):
        raise InputError(
            "environment", "numbers as RANK and WORLD_SIZE", str(found), "start it by torchrun"
        )
    return (int(found[0]), int(found[1])) if found[1] != "1" else (0, 1)


def start(device: torch.device, patience: float = PATIENCE) -> None:
    """Join the processes that torchrun started.

    Does nothing where it did not start this one, or started it alone.

    Args:
        device: where the model will be: NCCL sends tensors of a GPU, gloo those of a CPU.
        patience: seconds without a sign of life after which another process counts as lost
            (`when_lost`).

    Raises:
        InputError: torchrun's environment is incomplete, or this torch cannot talk to other
            processes.
    """
    found = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    if found.get("WORLD_SIZE", "1") == "1" or running():
        return
    missing = [name for name in _VARIABLES if name not in found]
    if missing:
        raise InputError(
            "environment",
            "all variables that torchrun sets",
            f"no {', '.join(missing)}",
            "start it by torchrun",
        )
    backends = ("gloo", "nccl") if device.type == "cuda" else ("gloo",)
    if not torch.distributed.is_available() or not all(
        map(torch.distributed.is_backend_available, backends)
    ):
        expected = f"one built with {' and '.join(backends)}"
        raise InputError(
            "torch", expected, "one without", "install another build, or use one process"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Its functions have the group as a default argument: imported after this (transformers does)
    # they would keep it for ever, with threads that want to free a tensor while the interpreter
    # ends: SIGABRT, now and then.
    importlib.import_module("torch.distributed.nn.functional")
    # Predictions of a split are gathered in the host's memory, besides the vectors on the cards.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=_LONGEST)
    global _heart  # noqa: PLW0603  (one process belongs to one group)
    # torchrun's store outlives the processes that it restarts.
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    port = int(found["MASTER_PORT"])
    distributed: Any = torch.distributed  # its stores are not in the stubs
    store = distributed.TCPStore(
        found["MASTER_ADDR"], port, timeout=timedelta(seconds=30), wait_for_workers=False
    )
    _heart = Heartbeat(distributed.PrefixStore(restarts, store), rank(), size(), patience)
    wait()
    _heart.start()


def when_lost(call: Callable[[str], None]) -> None:
    """Call `call` with a sentence when another process gives no sign for `patience` seconds.

    The call comes from a thread, for the program itself may be waiting for that process for ever.
    Of several processes that are left one is called at once, the others a little later.
    """
    if (heart := _heart) is None:
        return

    def lost(sentence: str) -> None:
        if not heart.speaks():
            time.sleep(3 * heart.interval)
        call(sentence)

    heart.lost = lost


def missing() -> str | None:
    """Return a sentence that names a process which ended without a word or does not move.

    None where all are alive, or say why not.
    """
    return None if _heart is None else _heart.find()


def stop(*, failed: bool = False) -> None:
    """Leave the other processes; nothing where there are none.

    Args:
        failed: tells them that this one has met an error, of which it says itself what it is, and
            breaks no connection yet.
    """
    global _heart  # noqa: PLW0603  (one process belongs to one group)
    if _heart is not None:
        _heart.stop(failed=failed)
    if running() and not failed:
        _heart = None
        torch.distributed.destroy_process_group()


def running() -> bool:
    """Whether `start` has joined other processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """Return this process's number, from 0."""
    return torch.distributed.get_rank() if running() else 0


def size() -> int:
    """How many processes there are."""
    return torch.distributed.get_world_size() if running() else 1


def local_rank() -> int:
    """Return this process's number on its machine: the GPU that is its own."""
    return int(os.environ.get("LOCAL_RANK", "0")) if running() or "WORLD_SIZE" in os.environ else 0


def parts(count: int) -> list[slice]:
    """Return `count` things in consecutive parts, one per process.

    Sizes differ by one at most; the first ones are larger.
    """
    whole, rest = divmod(count, size())
    ends = [whole * (r + 1) + min(r + 1, rest) for r in range(size())]
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def part(count: int) -> slice:
    """Return this process's part of `count` things."""
    return parts(count)[rank()]


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
    padded = own.new_zeros(widest, *own.shape[1:])
    padded[: own.shape[0]] = own
    everyone = [torch.empty_like(padded) for _ in counts]
    _talk(torch.distributed.all_gather, everyone, padded)
    return torch.cat([rows[:count] for rows, count in zip(everyone, counts, strict=True)])


def gather_ragged(own: Tensor) -> Tensor:
    """Gather rows where no process knows how many the others have: [sum of n, ...].

    Waits for the device.
    """
    if size() == 1:
        return own
    counts = gather_rows(torch.tensor([own.shape[0]])).tolist()
    return gather_rows(own, counts)


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


def sum_(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its sum over all processes, the same bits on each; return it."""
    if size() > 1:
        _talk(torch.distributed.all_reduce, tensor)
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
        _talk(torch.distributed.all_reduce, flat)
        parts = torch.split(flat, [g.numel() for g in some])
        for gradient, summed in zip(some, parts, strict=True):
            gradient.copy_(summed.view_as(gradient))


def agree(what: str, text: str, device: torch.device) -> None:
    """Refuse to go on unless `text` is the same on every process.

    It is a configuration, or the hash of a dataset.

    Raises:
        InputError: on every process, where it is not.
    """
    if size() == 1:
        return
    digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
    everyone = gather_rows(digest[None].to(torch.int32).to(device))
    other = [r for r in range(size()) if not torch.equal(everyone[r], everyone[0])]
    if other:
        raise InputError(
            what,
            "the same on every process",
            f"another on process {other[0]} than on process 0",
            "mend that one",
        )


def agree_on_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Refuse to go on where copies that ought to be the same differ.

    Compares sums of their bytes.

    Raises:
        RuntimeError: on every process, naming the first tensor that differs.
    """
    if size() == 1:
        return
    sums = [
        value.detach().contiguous().flatten().view(torch.uint8).sum(dtype=torch.int64).cpu()
        for value in tensors.values()
    ]
    everyone = gather_rows(torch.stack(sums)[None])
    for name, column in zip(tensors, everyone.T.tolist(), strict=True):
        if len(set(column)) > 1:
            raise RuntimeError(
                f"the processes hold different copies of {name}: their steps were not the same"
            )


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
            _talk(work.wait)
            answer = bool(said)
        said = torch.tensor([own], dtype=torch.int32)
        most = torch.distributed.ReduceOp.MAX
        self._asked = _talk(torch.distributed.all_reduce, said, most, async_op=True), said
        return answer


def wait() -> None:
    """Return when every process has come here."""
    sum_(torch.zeros(1))


def _talk(call: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    try:
        return call(*arguments, **more)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        lost = _lost(str(error).splitlines()[0])
        if lost is None:
            raise
        raise lost from error


def _lost(reason: str) -> ProcessLost | None:
    """Make the error that names the process which does not answer.

    None where all are alive: the fault is then in this process's own work (an error of the card
    that shows in the next call, say).
    """
    own = (
        f"process {rank()} of {size()} has no answer from the others, one of which ended: {reason}"
    )
    if _heart is None:
        return ProcessLost(own)
    found = _heart.find()
    if found is not None:
        return ProcessLost(found, speaks=_heart.speaks())
    return None if _heart.all_alive() else ProcessLost(own, speaks=not _heart.failed())
