"""Show how near the step of a table in files, or on the host, comes to what carries its rows.

    python benchmarks/stored_table.py --folder /scratch --gigabytes 2
    python benchmarks/stored_table.py --folder /scratch --gigabytes 2 --clusters 64 --batch 64

In one process, in turns, so that what else the machine does meets all alike:

- raw: rows are read and written back as the step does it, tile by tile, one tile read while the one
  before the last is written, by plain system calls (or copies of memory) on buffers of the same
  size and a file next to the table's, and nothing else;
- stream: the table's own tiles come and go, without an op;
- memory: the op alone, on a table in memory of the size of a tile, per byte of rows;
- step: `StoredHead.step`, all of it.

With `--clusters` it is the label level of a cascade, of which a step carries the pages that hold
the rows of so many clusters per document, drawn at random. Raw carries the same pages, from the
same places of a file, sixteen at once by plain calls from native threads; "in line" carries as many
bytes one after the other, which no disk does more slowly; and memory is the step of the same level
in memory, so that it must have room there.

A step can be no faster than the slower of raw and memory. Rates are medians, in GB/s of rows read
and rows written together. The load average and torch's own rate of a matrix product stand beside
them: on a machine that others use, an op gets a part of the cores, and a disk of its own does not
notice.
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from xmlkernels.nn import tiles
from xmlkernels.nn.cascade_level import CascadeLevel
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.pieces import AT_ONCE
from xmlkernels.nn.stored import StoredTable
from xmlkernels.nn.stored_head import StoredHead
from xmlkernels.nn.stored_level import StoredLevel
from xmlkernels.nn.table import RowOptimizer
from xmlkernels.nn.table_store import TableStore
from xmlkernels.rows import PAGE, pages, row_bytes


def raw_file(path: Path, size: int, tile: int) -> Callable[[], None]:
    """Make a file, and return what reads and writes all of it back once."""
    direct = getattr(os, "O_DIRECT", 0)
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | direct)
    except OSError:
        file = os.open(path, os.O_RDWR | os.O_CREAT)
    buffers = [pages(tile).numpy().data for _ in range(3)]
    for start in range(0, size, tile):
        os.pwrite(file, buffers[0], start)

    def there(start: int, n: int) -> None:
        if os.preadv(file, [buffers[n % 3]], start) != tile:
            raise OSError("the disk gave less than a tile")

    def back(start: int, n: int) -> None:
        if os.pwrite(file, buffers[n % 3], start) != tile:
            raise OSError("the disk took less than a tile")

    return lambda: _both(there, back, size, tile)


def raw_memory(size: int, tile: int) -> Callable[[], None]:
    """Take memory, and return what copies all of it out and back once."""
    held, buffers = pages(size), [pages(tile) for _ in range(3)]

    def there(start: int, n: int) -> None:
        buffers[n % 3].copy_(held[start : start + tile])

    def back(start: int, n: int) -> None:
        held[start : start + tile].copy_(buffers[n % 3])

    return lambda: _both(there, back, size, tile)


def _both(
    there: Callable[[int, int], None], back: Callable[[int, int], None], size: int, tile: int
) -> None:
    """Read a tile while the one before the last is written."""
    starts = range(0, size, tile)
    for n in range(len(starts) + 2):
        writer = None
        if n >= 2:
            writer = threading.Thread(target=back, args=(starts[n - 2], n - 2))
            writer.start()
        if n < len(starts):
            there(starts[n], n)
        if writer is not None:
            writer.join()


def raw_pieces(path: Path, size: int, pieces: list[np.ndarray]) -> Callable[[], None]:
    """Make a file, and return what reads and writes back pieces of it.

    Args:
        path, size: of the file, and its bytes.
        pieces: of each tile, int64 [n, 2]: where each begins, and its bytes, in whole pages.
    """
    from xmlkernels._host import carry

    file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_DIRECT", 0))
    whole = pages(tiles.TILE_BYTES).numpy().data
    for start in range(0, size, len(whole)):
        os.pwrite(file, whole, start)
    buffers = [pages(max(int(tile[:, 1].sum()) for tile in pieces)) for _ in range(3)]

    def carried(tile: int, writes: bool) -> None:
        place, count = pieces[tile].T
        memory = buffers[tile % 3].data_ptr() + np.cumsum(count) - count
        if carry(np.full_like(place, file), place, memory, count, writes, AT_ONCE) is not None:
            raise OSError("the disk gave or took less than a piece")

    return lambda: _both(
        lambda _, tile: carried(tile, False), lambda _, tile: carried(tile, True), len(pieces), 1
    )


def streamed(table: StoredTable, windows: Sequence[tiles.Window] | None = None) -> None:
    """Bring every tile, or the rows of some, and write it back."""
    names = list(table.place.rows)
    for _ in table.tiles.stream(windows, reads=names, writes=names):
        pass


def seconds(work: Callable[[], object]) -> float:
    """Measure one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Measure, print and return the medians in GB/s, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--store", choices=("file", "host"), default="file")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of rows, with their state")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--clusters", type=int, default=0, help="of a document; a cascade's level")
    parser.add_argument("--cluster-rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--tile", type=int, default=tiles.TILE_BYTES, help="bytes of a tile, at most"
    )
    args = parser.parse_args(argv)
    before, tiles.TILE_BYTES = tiles.TILE_BYTES, args.tile
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        table, works, size, what = (_level if args.clusters else _full)(args, Path(folder))
        found = _in_turns(works, args.rounds)
        table.place.close()
    tiles.TILE_BYTES = before
    rates = {name: 2 * size / taken / 1e9 for name, taken in found.items()}
    slower = min(rates["raw"], rates["memory"])
    rates |= {
        "stream of raw": rates["stream"] / rates["raw"],
        "step of raw": rates["step"] / rates["raw"],
        "step of the slower": rates["step"] / slower,
    }
    if "in line" in rates:
        rates["raw of in line"] = rates["raw"] / rates["in line"]
        rates["step of in line"] = rates["step"] / rates["in line"]
    print(f"{what}, batch {args.batch}, {torch.get_num_threads()} threads")
    for name in works:
        print(f"  {name:8} {rates[name]:6.2f} GB/s, read and written")
    for name in (name for name in rates if " of " in name):
        print(f"  {name}: {rates[name]:.2f}")
    print(f"  load average {os.getloadavg()[0]:.1f}; torch.mm {_product():.0f} GFLOP/s")
    return rates


Case = tuple[StoredTable, dict[str, Callable[[], object]], int, str]


def _full(args: argparse.Namespace, folder: Path) -> Case:
    """Return a table, what is measured of it, the bytes that a step carries, and a title."""
    options = {"dtype": args.dtype, "optimizer": RowOptimizer("sgd", momentum=args.momentum)}
    with torch.device("meta"):
        one = FullHead(1, args.width, std=0, **options)
    each = sum(row_bytes(held) for held in one.row_buffers().values())
    per_tile = tiles.tile_rows(one.row_buffers().values())
    rows = max(3, round(args.gigabytes * 1e9 / (each * per_tile))) * per_tile
    size, tile = rows * each, per_tile * each
    x = torch.randn(args.batch, args.width)
    row = torch.arange(args.batch) * (rows // args.batch)
    sample = torch.arange(args.batch, dtype=torch.int32)
    store = TableStore(args.store, folder / "table")
    table = StoredHead(rows, args.width, store=store, std=0, **options)
    memory = FullHead(per_tile, args.width, std=0, **options)
    host = args.store == "host"
    raw = raw_memory(size, tile) if host else raw_file(folder / "raw", size, tile)

    def op() -> None:
        for _ in table.tiles.ranges():
            memory.step(x, row, sample, lr=0.01)

    works: dict[str, Callable[[], object]] = {
        "raw": raw,
        "stream": lambda: streamed(table),
        "memory": op,
        "step": lambda: table.step(x, row, sample, lr=0.01),
    }
    what = f"{rows:,} rows x {args.width} {args.dtype}, {size / 1e9:.2f} GB in {args.store}, "
    return table, works, size, f"{what}tiles of {tile / 2**20:.0f} MiB"


def _level(args: argparse.Namespace, folder: Path) -> Case:
    """Do what `_full` does, of a level whose clusters are all of one size."""
    most = args.cluster_rows
    row = RowOptimizer("adam", row_wise=True, state_dtype="bf16")
    options: dict[str, Any] = {"dtype": args.dtype, "optimizer": row, "seed": 0, "fill": False}
    with torch.device("meta"):
        one = CascadeLevel(1, args.width, 1, **options)
    each = sum(row_bytes(held) for held in one.row_buffers().values())
    count = max(args.clusters, round(args.gigabytes * 1e9 / (each * most)))
    rows, seen = count * most, args.clusters * most
    store = TableStore("file", folder / "table")
    table = StoredLevel(rows, args.width, seen, store=store, most=most, **options)
    memory = CascadeLevel(rows, args.width, seen, **options)
    drawn = torch.stack([torch.randperm(count)[: args.clusters] for _ in range(args.batch)])
    clusters = drawn.sort(1).values
    row_ptr = torch.arange(count + 1) * most
    none = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32)
    x, scale = torch.randn(args.batch, args.width), torch.full((1,), 1 / (args.batch * seen))
    how: dict[str, Any] = {"lr": 0.01, "beta1": None, "scale": scale, "dx_scale": 1.0}

    def step(level: CascadeLevel) -> None:
        level.step(x, clusters, row_ptr, most, none, **how, need_loss=False)

    chosen = clusters.unique()
    windows = table.tiles.windows(row_ptr[chosen], row_ptr[chosen + 1])
    size, place = 0, dict[str, int]()
    for name, held in table.place.rows.items():
        place[name] = size
        size += -(-rows * row_bytes(held) // PAGE) * PAGE
    pieces = list[np.ndarray]()
    for window in windows:
        parts = list[np.ndarray]()
        for name, found in table.tiles._pieces(window, place).items():
            width = row_bytes(table.place.rows[name])
            bytes_ = -(-(found.stop - found.start) * width // PAGE) * PAGE
            parts.append(np.stack([place[name] + found.start * width, bytes_], 1))
        pieces.append(np.concatenate(parts))
    carried = sum(int(tile[:, 1].sum()) for tile in pieces)
    tile = min(tiles.TILE_BYTES // PAGE * PAGE or PAGE, carried)
    works: dict[str, Callable[[], object]] = {
        "in line": raw_file(folder / "line", carried // tile * tile, tile),
        "raw": raw_pieces(folder / "raw", size, pieces),
        "stream": lambda: streamed(table, windows),
        "memory": lambda: step(memory),
        "step": lambda: step(table),
    }
    what = (
        f"{rows:,} rows x {args.width} {args.dtype} of a cascade, {size / 1e9:.2f} GB in a file, "
        f"{len(chosen):,} of {count:,} clusters in {sum(map(len, pieces)):,} pieces of "
        f"{carried / 1e6:.0f} MB, {len(pieces)} tiles"
    )
    return table, works, carried, what


def _in_turns(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each, after one call that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            spent = seconds(work)
            if number:
                taken[name].append(spent)
    return {name: statistics.median(values) for name, values in taken.items()}


def _product() -> float:
    """Return GFLOP/s of a product of fp32 matrices."""
    a: Tensor = torch.randn(1024, 1024)
    return 2 * 1024**3 / min(seconds(lambda: a @ a) for _ in range(5)) / 1e9


if __name__ == "__main__":
    main()
