"""Starts several processes that know each other, on one CPU."""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from patience import PATIENCE

from xmlkernels import dist
from xmlkernels.nn.shard import Shard
from xmlkernels.rows import in_memory

CPU = torch.device("cpu")


def _child(
    rank: int, size: int, port: int, work: Callable[..., None], folder: str, args: tuple[Any, ...]
) -> None:
    names = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    dist.start(CPU)
    try:
        assert (dist.rank(), dist.size(), dist.local_rank(), dist.launched()) == (
            rank,
            size,
            rank,
            (rank, size),
        )
        work(*args)
        dist.wait()  # a process that left early would break the others' connections
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        raise
    finally:
        dist.stop()
    # A thread of gloo that outlives its group may free a tensor while the interpreter ends, and
    # abort the process.
    threads = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # a thread that ends meanwhile
            threads.append(path.read_text().strip())
    if left := [name for name in threads if "gloo" in name]:
        Path(folder, f"error-{rank}").write_text(f"threads left by process {rank}: {left}")
        sys.exit(1)


def together(size: int, work: Callable[..., None], folder: Path, *args: Any) -> None:
    """Runs `work(*args)` in `size` processes that know each other; what one of them raises is
    told.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # One process imports torch, once for all tests; those that a test starts are forked from it.
    multiprocessing.set_forkserver_preload(["xmlkernels.evaluation"])
    given, end = (size, port, work, str(folder), args), time.monotonic() + PATIENCE
    try:
        running = torch.multiprocessing.start_processes(
            _child, given, nprocs=size, join=False, start_method="forkserver"
        )
        while not running.join(1.0):
            if time.monotonic() > end:
                left = [process for process in running.processes if process.is_alive()]
                for process in left:
                    process.kill()
                    process.join(60)
                pytest.fail(f"{len(left)} of {size} processes still ran after {PATIENCE:g} s")
    except Exception:
        told = [path.read_text() for path in sorted(folder.glob("error-*"))]
        pytest.fail("\n".join(told) or traceback.format_exc())


def collected(
    tensors: dict[str, torch.Tensor], shards: Mapping[str, Shard]
) -> dict[str, torch.Tensor]:
    """Bring the rows of shared tables to the first process; the others keep what is not shared."""
    found = {name: in_memory(tensor) for name, tensor in tensors.items() if name not in shards}
    for name in shards:
        counts = dist.gather_rows(torch.tensor([shards[name].count])).tolist()
        whole = dist.collect_rows(in_memory(tensors[name]), counts)
        if whole is not None:
            found[name] = whole
    return found
