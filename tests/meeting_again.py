"""Processes that torchrun starts again, in the store of those before; one that ends while they
connect.

    python tests/meeting_again.py

Prints a line of JSON per process: {"attempt": …, "rank": …, "told": "met", or why not}.
"""

import json
import os
import time
from datetime import timedelta
from typing import Any

import torch
from patience import status_of

from xmlkernels import dist
from xmlkernels.dist import group

MET, LATE, LOST = range(3)  # what an attempt is about


def process(attempt: int, rank: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
    }
    connect = torch.distributed.init_process_group

    def slowly(*args: Any, **more: Any) -> None:
        if attempt == LATE and rank == 1:
            time.sleep(1)  # the first finds what the store had before
        if attempt == LOST:
            if rank == 1:
                os._exit(9)
            more["timeout"] = timedelta(seconds=2)
        connect(*args, **more)

    torch.distributed.init_process_group = slowly
    told = "met"
    try:
        dist.start(torch.device("cpu"))
        dist.wait()
    except dist.ProcessLost as error:
        told = str(error)
    line = json.dumps({"attempt": attempt, "rank": rank, "told": told})
    os.write(1, f"{line}\n".encode())  # at once: both write
    os._exit(0)


def main() -> None:
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    group._CONNECTING = timedelta(seconds=10)
    for attempt in (MET, LATE, LOST):
        children = []
        for rank in range(2):
            if (child := os.fork()) == 0:
                process(attempt, rank)
            children.append(child)
        for child in children:
            status_of(child)


if __name__ == "__main__":
    main()
