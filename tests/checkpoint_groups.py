"""Checkpoints of several processes: a table in parts, written by threads that stand for them."""

import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from xmlkernels.checkpoint import new_identity, save
from xmlkernels.nn.shard import Shard

ROWS, WIDTH = 23, 5
FORMATS = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


class Board:
    """What `dist` gives each process, for threads of this one."""

    def __init__(self, rank: int, size: int, texts: dict[str, str]) -> None:
        self.rank, self.size, self._texts, self.lost = rank, size, texts, False

    def post(self, key: str, text: str) -> None:
        self._texts[key] = text

    def read(self, key: str) -> str | None:
        return self._texts.get(key)

    def check(self) -> None:
        if self.lost:
            raise RuntimeError("another process has ended")


def together(size: int, work: Callable[[Board], None]) -> list[BaseException | None]:
    """Call `work` for each process at once; return what each has raised."""
    errors: list[BaseException | None] = [None] * size
    texts: dict[str, str] = {}
    boards = [Board(rank, size, texts) for rank in range(size)]

    def run(board: Board) -> None:
        try:
            work(board)
        except BaseException as error:
            errors[board.rank] = error

    threads = [threading.Thread(target=run, args=(board,)) for board in boards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a process waits for ever"
    return errors


def cuts(size: int, rows: int = ROWS) -> list[Shard]:
    """Uneven shards; where there are four, the third has no row."""
    ends = {1: [rows], 2: [9, rows], 3: [1, 15, rows], 4: [6, 7, 7, rows]}[size]
    return [Shard(a, b, rows) for a, b in itertools.pairwise([0, *ends])]


def tables(number: int = 0, rows: int = ROWS) -> dict[str, torch.Tensor]:
    """A table in every format, one of one dimension, and tensors that every process has whole."""
    random = torch.Generator().manual_seed(number)
    found = {
        f"table.{str(dtype)[6:]}": torch.randn(rows, WIDTH, generator=random).to(dtype)
        for dtype in FORMATS
    }
    whole = torch.randn(7, 2, generator=random)
    return found | {
        "table.bias": torch.randn(rows, generator=random),
        "encoder": whole,
        "again": whole,
        "number": torch.tensor(number),
    }


def of_process(
    shard: Shard, number: int = 0, rows: int = ROWS
) -> tuple[dict[str, torch.Tensor], dict[str, Shard]]:
    """What a process holds of `tables`, and its shards."""
    found = tables(number, rows)
    sharded = {name: shard for name in found if name.startswith("table.")}
    own = {name: found[name][shard.first : shard.end].clone() for name in sharded}
    return found | own, sharded


def save_by(size: int, folder: Path, number: int = 0, *, keep: int = 0, rows: int = ROWS) -> None:
    """Save `tables(number)` by so many processes; raises what the first of them raises."""
    identity = new_identity()

    def one(board: Board) -> None:
        held, shards = of_process(cuts(board.size, rows)[board.rank], number, rows)
        save(
            folder,
            held,
            {"number": number},
            keep=keep,
            shards=shards,
            group=board,
            identity=identity,
        )

    for error in together(size, one):
        if error is not None:
            raise error


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors are the same to the bit."""
    return (
        ours.dtype == theirs.dtype
        and ours.shape == theirs.shape
        and torch.equal(ours.flatten().view(torch.uint8), theirs.flatten().view(torch.uint8))
    )
