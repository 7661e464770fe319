"""Where a table stands that is not on the device that trains it: the host's memory, or files."""

from __future__ import annotations

import json
import os
import re
import secrets
import weakref
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xmlkernels.errors import InputError
from xmlkernels.locks import LOCK, own_folder
from xmlkernels.nn.shard import Shard
from xmlkernels.rows import FileRows, Rows, as_rows, pages

HEADER = "header.json"
FORMAT = "xmlkernels table"
_FLAG = "--table-store"

Facts = tuple[torch.Size, torch.dtype]


class HostRows:
    """Rows in the host's memory, pinned where a card takes them from there."""

    writes = True

    def __init__(self, shape: torch.Size, dtype: torch.dtype, *, pinned: bool) -> None:
        self.shape, self.dtype = shape, dtype
        held = pages(shape.numel() * dtype.itemsize, pinned=pinned)
        self.values = as_rows(held, shape[0], torch.empty(shape, dtype=dtype, device="meta"))
        self.values.zero_()

    def read(self, start: int, out: Tensor) -> None:
        """Fill `out` with rows from `start` on; see `Rows.read`."""
        out.copy_(self.values[start : start + len(out)])

    def write(self, start: int, values: Tensor) -> None:
        """Write rows from `start` on."""
        self.values[start : start + len(values)].copy_(values)


@dataclass(frozen=True)
class TableStore:
    """Where a table stands that is not on the device that trains it.

    Attributes:
        kind: "host", the host's memory, or "file", a folder of a local disk.
        folder: of the files.
        part, parts: of the processes that share the table: each has files of its own.
        pinned: pages of the host's memory that a card can copy from by itself.
    """

    kind: str
    folder: Path = Path()
    part: int = 0
    parts: int = 1
    pinned: bool = False

    def make(self, facts: Mapping[str, Facts], shard: Shard) -> Place:
        """Make the rows of each buffer, all zeros, in place of what a run before left there.

        Raises:
            InputError: the folder cannot be used, holds something else, or has no room.
        """
        if self.kind == "host":
            return Place({n: HostRows(*told, pinned=self.pinned) for n, told in facts.items()})
        if self.part == 0:
            _clear_others(self.folder, self.parts)
        mine = self.folder / f"table-{self.part:05}-of-{self.parts:05}"
        return FilePlace(mine, facts, shard)


def parse_store(
    text: str, part: int = 0, parts: int = 1, *, pinned: bool = False
) -> TableStore | None:
    """Read `--table-store`: "ram" (None), "host", or "file:" and a folder.

    Args:
        text: as it stands there.
        part, parts, pinned: see `TableStore`.

    Raises:
        InputError: anything else.
    """
    if text == "ram":
        return None
    kind, _, folder = text.partition(":")
    if text == "host" or (kind == "file" and folder):
        return TableStore(kind, Path(folder), part, parts, pinned)
    expected = "ram, host, or file: and a folder on a local disk"
    raise InputError(_FLAG, expected, repr(text), "as file:/scratch/table")


class Place:
    """The rows of a table's buffers, wherever they are.

    Attributes:
        rows: by the name of the buffer.
    """

    def __init__(self, rows: Mapping[str, Rows]) -> None:
        self.rows = dict(rows)
        self._whole = True

    def begin(self) -> None:
        """Say that rows of a step are about to be written: until `end` they are of no whole one."""
        if self._whole:
            self._whole = False
            self._mark(None)

    def end(self, step: int) -> None:
        """Say that the rows are those of a step, as a whole."""
        self._whole = True
        self._mark(step)

    def _mark(self, step: int | None) -> None:
        """Say so outside of the process, where anybody looks."""

    def close(self) -> None:
        """Give up the rows, and what they stand in."""

    def check_whole(self) -> None:
        """Raise InputError where a step broke off: half of the rows are of another one."""
        if not self._whole:
            got = "some of a step that broke off"
            mend = "go on from the last checkpoint with --resume"
            raise InputError("label table", "rows of one step", got, mend)


class FilePlace(Place):
    """Files of raw rows in one folder, and a header that says which step they are of.

    `header.json` holds the shape, format and file of each buffer, the shard, and `step`: null while
    a step is under way. Nothing resumes from these files, which a kill leaves half-written; they
    go when the table does, or with the next table that is put there.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Facts], shard: Shard) -> None:
        self.folder = folder
        buffers = {
            name: {"shape": list(shape), "dtype": str(dtype)[6:], "file": f"{name}.bin"}
            for name, (shape, dtype) in facts.items()
        }
        self.header: dict[str, Any] = {
            "format": FORMAT,
            "version": 1,
            "identity": secrets.token_hex(8),
            "shard": [shard.first, shard.end, shard.rows],
            "buffers": buffers,
            "step": None,
        }
        held, made = ExitStack(), dict[str, FileRows]()
        held.enter_context(own_folder(folder, _FLAG))
        try:
            _empty(folder)
            self._text = json.dumps(self.header)
            (folder / HEADER).write_text(self._text, "utf-8")
            self._file = os.open(folder / HEADER, os.O_WRONLY)
            held.callback(os.close, self._file)
            for name, told in facts.items():
                made[name] = FileRows(folder / f"{name}.bin", *told, writes=True)
        except OSError as error:
            _leave(folder, held, os.getpid())
            size = sum(shape.numel() * dtype.itemsize for shape, dtype in facts.values())
            expected = f"a folder with room for a table of {size:,} bytes"
            mend = "name a folder of a local disk that has the room"
            raise InputError(_FLAG, expected, f"{folder}: {error.strerror}", mend) from None
        except InputError:
            held.close()
            raise
        super().__init__(made)
        self._leave = weakref.finalize(self, _leave, folder, held, os.getpid())

    def close(self) -> None:
        """Remove the files, and let the folder go."""
        self._leave()

    def _mark(self, step: int | None) -> None:
        # In its place, with blanks where it was longer: a step does so twice, and a file that is
        # renamed takes as long as many reads.
        self.header["step"] = step
        text = json.dumps(self.header)
        os.pwrite(self._file, text.ljust(len(self._text)).encode(), 0)
        self._text = text


def _leave(folder: Path, held: ExitStack, process: int) -> None:
    """Remove a table's files and its folder; not in a process that was forked off."""
    if os.getpid() != process:
        return
    with suppress(InputError, FileNotFoundError):
        _empty(folder)
    held.close()
    with suppress(OSError):
        folder.rmdir()


def _clear_others(folder: Path, parts: int) -> None:
    """Remove the tables that dead runs of another number of processes left in a folder."""
    for path in sorted(folder.glob("table-*-of-*")):
        if re.fullmatch(r"table-\d{5}-of-\d{5}", path.name) and path.name[-5:] != f"{parts:05}":
            with own_folder(path, _FLAG):
                _empty(path)
            with suppress(OSError):
                path.rmdir()


def _empty(folder: Path) -> None:
    """Remove a table's files; refuse a folder that holds anything else."""
    own = {LOCK, HEADER, f".{HEADER}.new"}  # the last of an older version
    found = [path for path in folder.iterdir() if path.name != LOCK]
    foreign = [path for path in found if path.name not in own and path.suffix != ".bin"]
    if foreign or (found and not (folder / HEADER).is_file()):
        got = f"{(foreign or found)[0]}, which is no part of one"
        mend = "name another folder; nothing was removed"
        raise InputError(_FLAG, "a folder for the table alone", got, mend)
    for path in sorted(found, key=lambda path: path.name == HEADER):
        path.unlink()
