"""The processes that work together: who they are, how they meet and part, which one is lost."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed

from xmlkernels.dist.board import Board
from xmlkernels.errors import InputError
from xmlkernels.heartbeat import Heartbeat, Standing, beat, interval
from xmlkernels.life import Beater, Idleness, Turn

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Of one message. One process makes a label tree or writes a checkpoint while the others wait:
# whether it lives shows its heartbeat, in `PATIENCE` seconds.
_LONGEST = timedelta(days=7)
# Until all have come, whose machines may be slow to start; then until they are connected: gloo would
# wait as long as for a message for one that has ended since.
_COMING, _CONNECTING = timedelta(minutes=10), timedelta(seconds=45)
# A minute after one is lost all others have ended. Long enough for a machine that swaps; a call that
# keeps Python's lock is no silence.
PATIENCE = 45.0
_beater: Beater | None = None
_heart: Heartbeat | None = None
_board: Board | None = None
_turn: Turn | None = None
_partings: list[Callable[[], None]] = []  # what must let go of the group before it is left


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
        ProcessLost: another process has not come, or ended before all were connected.
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
    _meet(backend, patience)


def _meet(backend: str, patience: float) -> None:
    """Meet the other processes: their hearts first, so that one which ends meanwhile is named."""
    global _heart, _board, _beater, _turn  # noqa: PLW0603  (one process belongs to one group)
    number, count = launched()
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    distributed: Any = torch.distributed  # its stores are not in the stubs
    if Beater.possible():  # before gloo has threads
        _turn = Turn()
        beats = partial(_beats, where, number, os.getpid(), _turn)
        _beater = Beater(beats, interval(patience))
    try:
        shelf, _, _ = next(distributed.rendezvous("env://", timeout=_COMING))
        store = _store(*where)
        _heart = Heartbeat(store, number, count, patience, beats=_beater is None, turn=_turn)
        store.wait(_heart.keys(), _COMING)
        _heart.start()
    except RuntimeError as error:
        told = f"process {number} of {count} has not met the others: {_reason(error)}"
        raise ProcessLost(told) from error
    # Without the prefix processes that torchrun starts again would connect to the addresses that
    # those before them have left.
    meeting = distributed.PrefixStore(f"attempt {_attempt()}", shelf)
    how = {"store": meeting, "rank": number, "world_size": count, "timeout": _CONNECTING}
    try:
        talk(torch.distributed.init_process_group, backend, **how)
    except ProcessLost:
        raise
    except RuntimeError as error:  # all are alive
        told = f"process {number} of {count} got no connection to the others: {_reason(error)}"
        raise ProcessLost(told) from error
    torch.distributed.distributed_c10d._set_pg_timeout(_LONGEST)
    _board = Board(_store(*where), number, count, _check_alive)
    talk(torch.distributed.all_reduce, torch.zeros(1))  # until all have made theirs


def _beats(
    where: tuple[str, int], rank: int, pid: int, turn: Turn
) -> Callable[[int], None]:
    """Make, in the child of a process, what gives its signs of life."""
    store, idle = _store(*where), Idleness(pid, turn)

    def tell(number: int) -> None:
        beat(store, rank, number, Standing(turn.count, turn.abreast, idle.seconds()))

    return tell


def _attempt() -> str:
    """Return how often torchrun has started these processes again."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _reason(error: RuntimeError) -> str:
    return str(error).partition("\n")[0]


def _store(host: str, port: int) -> Any:
    """Connect once more to torchrun's store, which outlives the processes that it restarts."""
    distributed: Any = torch.distributed  # its stores are not in the stubs
    own = distributed.TCPStore(host, port, timeout=timedelta(seconds=30), wait_for_workers=False)
    return distributed.PrefixStore(_attempt(), own)


def _check_alive() -> None:
    """Raise ProcessLost where another process has said that it ends, or gives no sign for long."""
    if (heart := _heart) is None:
        return
    if gone := heart.missing(heart.patience):
        raise ProcessLost(heart.sentence(gone), speaks=heart.speaks())
    if not heart.all_alive():
        raise ProcessLost("another process has ended", speaks=not heart.failed())


def board() -> Board | None:
    """Return where processes leave each other texts, from any thread; None for one process."""
    return _board


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


@contextmanager
def abreast() -> Iterator[None]:
    """Say that all processes do the same inside the block, and none may stand still.

    One that does nothing there while the others have waited for it for `patience` seconds counts
    as lost (`when_lost`). Work is no standing still, however long: of the processor, of children
    (compilers), of a disk. Outside of such a block one process may do something alone while the
    others wait.
    """
    with _going(abreast=True):
        yield


@contextmanager
def apart() -> Iterator[None]:
    """Say, within `abreast`, that inside this block one process may do something alone."""
    with _going(abreast=False):
        yield


@contextmanager
def _going(*, abreast: bool) -> Iterator[None]:
    if (turn := _turn) is None:
        yield
        return
    before = turn.go(abreast=abreast)
    try:
        yield
    finally:
        turn.go(abreast=before)


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
    global _heart, _board, _beater, _turn  # noqa: PLW0603  (one process belongs to one group)
    if _heart is not None:
        _heart.stop(failed=failed)
    if _beater is not None:
        _beater.stop()
        _beater = None
    if running() and not failed:
        _heart = _board = _turn = None
        while _partings:
            _partings.pop()()
        torch.distributed.destroy_process_group()


def before_parting(call: Callable[[], None]) -> None:
    """Have something done once, before this process leaves the others in order."""
    if call not in _partings:
        _partings.append(call)


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


def talk(call: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """Call a function of torch.distributed; an error says which process is lost, if one is.

    All processes make the same calls, in the same order, but for those of `talk_to_one`.
    """
    if _turn is not None:
        _turn.arrive()
    return talk_to_one(call, *arguments, **more)


def talk_to_one(call: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """As `talk`, for a message between two processes, in which the others have no part."""
    try:
        return call(*arguments, **more)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        lost = _lost(_reason(error))
        if lost is None:
            raise
        raise lost from error


def _lost(reason: str) -> ProcessLost | None:
    """Make the error that names the process which does not answer.

    None where all are alive: the fault is then in this process's own work (an error of the card
    that shows in the next call, say).
    """
    number, count = launched()  # there may be no group yet
    own = f"process {number} of {count} has no answer from the others, one of which ended: {reason}"
    if _heart is None:
        return ProcessLost(own)
    found = _heart.find()
    if found is not None:
        return ProcessLost(found, speaks=_heart.speaks())
    return None if _heart.all_alive() else ProcessLost(own, speaks=not _heart.failed())
