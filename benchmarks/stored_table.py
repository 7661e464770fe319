"""Show how near the step of a table in files, or on the host, comes to what carries its rows.

    python benchmarks/stored_table.py --folder /scratch --gigabytes 2

In one process, in turns, so that what else the machine does meets all alike:

- raw: rows are read and written back as the step does it, tile by tile, one tile read while the one
  before the last is written, by plain system calls (or copies of memory) on buffers of the same
  size and a file next to the table's, and nothing else;
- stream: the table's own tiles come and go, without an op;
- memory: the op alone, on a table in memory of the size of a tile, per byte of rows;
- step: `StoredHead.step`, all of it.

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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from xmlkernels.nn import tiles
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.stored_head import StoredHead
from xmlkernels.nn.table import RowOptimizer
from xmlkernels.nn.table_store import TableStore
from xmlkernels.rows import pages, row_bytes


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


def streamed(table: StoredHead) -> None:
    """Bring every tile and write it back."""
    names = list(table.place.rows)
    for _ in table.tiles.stream(table.tiles.ranges(), reads=names, writes=names):
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--tile", type=int, default=tiles.TILE_BYTES, help="bytes of a tile, at most"
    )
    args = parser.parse_args(argv)
    options = {"dtype": args.dtype, "optimizer": RowOptimizer("sgd", momentum=args.momentum)}
    with torch.device("meta"):
        one = FullHead(1, args.width, std=0, **options)
    each = sum(row_bytes(held) for held in one.row_buffers().values())
    before, tiles.TILE_BYTES = tiles.TILE_BYTES, args.tile
    per_tile = tiles.tile_rows(one.row_buffers().values())
    rows = max(3, round(args.gigabytes * 1e9 / (each * per_tile))) * per_tile
    size, tile = rows * each, per_tile * each
    x = torch.randn(args.batch, args.width)
    row = torch.arange(args.batch) * (rows // args.batch)
    sample = torch.arange(args.batch, dtype=torch.int32)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        store = TableStore(args.store, Path(folder) / "table")
        table = StoredHead(rows, args.width, store=store, std=0, **options)
        memory = FullHead(per_tile, args.width, std=0, **options)
        raw = (
            raw_memory(size, tile)
            if args.store == "host"
            else raw_file(Path(folder) / "raw", size, tile)
        )

        def op() -> None:
            for _ in table.tiles.ranges():
                memory.step(x, row, sample, lr=0.01)

        works: dict[str, Callable[[], object]] = {
            "raw": raw,
            "stream": lambda: streamed(table),
            "memory": op,
            "step": lambda: table.step(x, row, sample, lr=0.01),
        }
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
    print(
        f"{rows:,} rows x {args.width} {args.dtype}, {size / 1e9:.2f} GB in {args.store}, tiles of "
        f"{tile / 2**20:.0f} MiB, batch {args.batch}, {torch.get_num_threads()} threads"
    )
    for name in works:
        print(f"  {name:8} {rates[name]:6.2f} GB/s, read and written")
    for name in ("stream of raw", "step of raw", "step of the slower"):
        print(f"  {name}: {rates[name]:.2f}")
    print(f"  load average {os.getloadavg()[0]:.1f}; torch.mm {_product():.0f} GFLOP/s")
    return rates


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
