"""The rows that one process holds, in a file of its own; any rows of a tensor, out of any files.

A reader of some rows verifies the blocks that they lie in, and reads no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch

from xmlkernels.checkpoint.head import (
    MEND,
    Part,
    RowRange,
    Shape,
    Sharded,
    ShardedHead,
    ShardFile,
    torch_dtype,
)
from xmlkernels.checkpoint.on_disk import TensorRows
from xmlkernels.checkpoint.writing import (
    TensorFile,
    block_rows,
    checksum_of,
    dtype_name,
    stat,
)
from xmlkernels.checksums import Xxh3, checksum, compare, new_digest
from xmlkernels.errors import InputError
from xmlkernels.records import Count, Positive
from xmlkernels.rows import FileRows, as_rows, pages, row_blocks, row_bytes, stand_in

_MOST_HEADER = 100 << 20  # bytes, as safetensors itself allows


class OwnRows(TypedDict):
    """What a process says of its rows of a tensor."""

    shape: Shape
    dtype: str
    block: Positive
    first: Count
    end: Count
    blocks: list[Xxh3]


class OwnFile(TypedDict):
    """What a process says of its file."""

    facts: ShardFile
    tensors: dict[str, OwnRows]


def write_shard(
    path: Path, tensors: Mapping[str, torch.Tensor], shards: Mapping[str, RowRange], identity: str
) -> OwnFile:
    """Write a process's own rows; on the disk when it returns.

    Args:
        path: of the new file.
        tensors: as `TensorFile` takes them.
        shards: which rows of which table each of them is.
        identity: of the checkpoint.

    Raises:
        OSError: the disk refuses.
    """
    metadata = {"identity": identity}
    with TensorFile(path, tensors, metadata) as file:
        sums = file.write_values(blocks=True)
        header = file.finish(metadata)
    own: dict[str, OwnRows] = {}
    for name, tensor in tensors.items():
        own[name] = {
            "shape": [shards[name].rows, *tensor.shape[1:]],
            "dtype": dtype_name(tensor),
            "block": block_rows(row_bytes(tensor)),
            "first": shards[name].first,
            "end": shards[name].end,
            "blocks": sums[name],
        }
    return {"facts": {"bytes": path.stat().st_size, "header": checksum(header)}, "tensors": own}


def merged(files: Mapping[str, OwnFile]) -> dict[str, Sharded]:
    """Put together what the processes say of their rows.

    Args:
        files: by their names.
    """
    found: dict[str, Sharded] = {}
    for file, told in files.items():
        for name, own in told["tensors"].items():
            whole = found.setdefault(
                name,
                {
                    "shape": own["shape"],
                    "dtype": own["dtype"],
                    "block": own["block"],
                    "parts": [],
                },
            )
            if own["end"] > own["first"]:
                part: Part = {
                    "file": file,
                    "first": own["first"],
                    "end": own["end"],
                    "blocks": own["blocks"],
                }
                whole["parts"].append(part)
    return found


class ShardFiles:
    """The files of the parts of a checkpoint, opened where rows of them are asked for.

    Args:
        found: where they are.
        target: how messages name that.
        head: what state.json says.
    """

    def __init__(self, found: Path, target: Path, head: ShardedHead) -> None:
        self._found, self._target, self._head = found, target, head
        self._open: dict[tuple[str, str], FileRows] = {}

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """Read rows first:end of a tensor that is in parts.

        Raises:
            InputError: a file is missing or damaged; names the file, the tensor and the rows.
        """
        told = self._head["sharded"][name]
        out = torch.empty((end - first, *told["shape"][1:]), dtype=self.dtype(name))
        self.fill(name, first, out)
        return out

    def dtype(self, name: str) -> torch.dtype:
        """Return the number format of a tensor that is in parts. Raises InputError for none."""
        told = self._head["sharded"][name]
        return torch_dtype(told["dtype"], f"{self._target}, tensor {name}")

    def fill(self, name: str, first: int, out: torch.Tensor) -> None:
        """Fill `out` with as many rows from `first` on as it has; see `rows`."""
        told, end = self._head["sharded"][name], first + len(out)
        for part in told["parts"]:
            if part["first"] < end and first < part["end"]:
                for start, rows in self._blocks(name, told, part, first, end):
                    cut = rows[max(0, first - start) : end - start]
                    place = max(start, first) - first
                    out[place : place + len(cut)] = cut

    def behind(self, name: str, first: int, end: int) -> torch.Tensor:
        """Make a tensor that stands in for rows first:end; they are verified when they are read."""
        told = self._head["sharded"][name]
        for part in told["parts"]:
            if part["first"] < end and first < part["end"]:
                self._part(part["file"], name)  # now: a save may replace it before they are read
        shape = torch.Size((end - first, *told["shape"][1:]))

        def fill(start: int, out: torch.Tensor) -> None:
            self.fill(name, first + start, out)

        return stand_in(_Behind(shape, self.dtype(name), fill))

    def _blocks(
        self, name: str, told: Sharded, part: Part, first: int, end: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (its first row, verified block) of the blocks of a part that rows lie in."""
        step, where = told["block"], f"{self._target / part['file']}, tensor {name}"
        expected = [part["end"] - part["first"], *told["shape"][1:]]
        try:
            held = self._part(part["file"], name)
            if list(held.shape) != expected:
                got = str(list(held.shape))
                raise InputError(where, f"shape {expected}", got, MEND)
            if held.dtype != self.dtype(name):
                raise InputError(where, told["dtype"], str(held.dtype)[6:], MEND)
            buffer = pages(min(step, expected[0]) * row_bytes(held))
            begin = max(0, first - part["first"]) // step
            for number in range(begin, len(part["blocks"])):
                start = part["first"] + number * step
                if start >= end:
                    return
                rows = as_rows(buffer, min(step, expected[0] - number * step), held)
                held.read(number * step, rows)
                place = f"{where}, rows {start:,} to {start + len(rows):,}"
                compare(checksum_of(rows), part["blocks"][number], place, MEND)
                yield start, rows
        except OSError as error:
            raise InputError(where, "rows of a whole file", str(error), MEND) from error

    def _part(self, file: str, name: str) -> FileRows:
        """Open a tensor of a file once; compare size and header with what state.json says."""
        if (file, name) in self._open:
            return self._open[file, name]
        path, where, facts = self._found / file, str(self._target / file), self._head["files"][file]
        try:
            before = stat(path)
            if (size := path.stat().st_size) != facts["bytes"]:
                expected = f"{facts['bytes']:,} bytes, as it was written"
                raise InputError(where, expected, f"{size:,} bytes", MEND)
            compare(checksum(_header(path)), facts["header"], f"{where}, header", MEND)
            opened = TensorRows(path, where).open(name)
        except FileNotFoundError as error:
            raise InputError(where, "rows of the checkpoint", "no such file", MEND) from error
        except OSError as error:
            raise InputError(where, "a whole safetensors file", str(error), MEND) from error
        if stat(path) != before:
            raise InputError(where, "the rows of one checkpoint", "those of another", MEND)
        self._open[file, name] = opened
        return opened


@dataclass
class _Behind:
    """Rows of a checkpoint that stay on the disk (`xmlkernels.rows.Rows`)."""

    shape: torch.Size
    dtype: torch.dtype
    fill: Callable[[int, torch.Tensor], None]

    def read(self, start: int, out: torch.Tensor) -> None:
        """Fill `out` with rows from `start` on; see `Rows.read`."""
        self.fill(start, out)


def rows_of_whole(
    held: FileRows, rows: RowRange | None, shape: list[int], *, behind: bool
) -> tuple[torch.Tensor, str]:
    """Read some rows of a tensor that is stored whole under one checksum.

    All of it is read, a block at a time.

    Args:
        held: the whole tensor.
        rows: which; None: all.
        shape: of the whole tensor.
        behind: give a tensor that stands in for the rows, which are read again.

    Returns:
        The rows, and the checksum of the whole tensor.
    """
    count, digest = shape[0], new_digest()
    first, end = (0, count) if rows is None else (rows.first, rows.end)
    out = torch.empty((0 if behind else end - first, *shape[1:]), dtype=held.dtype)
    # Rows of no bytes may be as many as a damaged header says: there is nothing to read.
    step = block_rows(row_bytes(held)) if row_bytes(held) else max(1, count)
    for start, block in zip(range(0, count, step), row_blocks(held, step), strict=True):
        digest.update(block.flatten().view(torch.uint8).numpy())
        if not behind and start < end and first < start + len(block):
            cut = block[max(0, first - start) : end - start]
            out[max(start, first) - first :][: len(cut)] = cut
    if behind:

        def fill(start: int, into: torch.Tensor) -> None:
            held.read(first + start, into)

        out = stand_in(_Behind(torch.Size((end - first, *shape[1:])), held.dtype, fill))
    return out, digest.hexdigest()


def check_rows(rows: RowRange, shape: list[int], where: str) -> None:
    """Refuse rows of a tensor of another size. Raises InputError."""
    if not shape or shape[0] != rows.rows:
        got = f"shape {shape}"
        raise InputError(
            where, f"{rows.rows:,} rows", got, "use the checkpoint's own configuration"
        )


def _header(path: Path) -> bytes:
    """Read a safetensors file's header with the length before it, as far as it is there."""
    with open(path, "rb") as file:
        length = file.read(8)
        return length + file.read(min(int.from_bytes(length, "little"), _MOST_HEADER))
