"""What `state.json` says of a checkpoint: which tensors, in which files, under which checksums.

Version 1 has its tensors in one file. Version 2 has tables of which several processes hold some
rows each, too: a file per process, `shard-00001-of-00004.safetensors`, and here the parts of every
table, with a checksum for each block of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired, Protocol, TypedDict, cast

import torch

from xmlkernels.checkpoint.places import STATE
from xmlkernels.checksums import Xxh3
from xmlkernels.errors import InputError
from xmlkernels.records import (
    MOST_BYTES,
    Count,
    Meta,
    Positive,
    check_record,
    parse_json,
)

FORMAT, VERSION, SHARDED = "xmlkernels checkpoint", 1, 2
MEND = "restore the folder from a copy, or train from the start"
FOREIGN = "pass a folder that xmlkernels saved"

Shape = Annotated[list[Count], Meta(max_length=64)]
_Name = Annotated[str, Meta(pattern="^shard-[0-9]{5,9}-of-[0-9]{5,9}[.]safetensors$")]


class RowRange(Protocol):
    """Which rows of a tensor are meant: `first` to `end` - 1 of `rows`."""

    @property
    def first(self) -> int:
        """The first one."""

    @property
    def end(self) -> int:
        """The one behind the last."""

    @property
    def rows(self) -> int:
        """Rows of the whole tensor."""


class Told(TypedDict):
    """A tensor of tensors.safetensors."""

    shape: Shape
    dtype: str
    xxh3_128: NotRequired[Xxh3]


class Part(TypedDict):
    """Rows `first` to `end` - 1 of a tensor, in a file, with a checksum for each block of them."""

    file: _Name
    first: Count
    end: Count
    blocks: list[Xxh3]


class Sharded(TypedDict):
    """A tensor in parts.

    Attributes:
        shape: of the whole.
        block: rows under one checksum, counted from the first of each part.
        parts: without those that have no row.
    """

    shape: Annotated[list[Count], Meta(min_length=1, max_length=64)]
    dtype: str
    block: Positive
    parts: list[Part]


class ShardFile(TypedDict):
    """A file of one process: its size, and the checksum of its header."""

    bytes: Count
    header: Xxh3


class Head(TypedDict):
    """state.json of version 1; `state` is what the caller saved."""

    identity: str
    tensors: dict[str, Told]
    alias: dict[str, str]
    state: dict[str, Any]


class ShardedHead(Head):
    """state.json of version 2."""

    files: Annotated[dict[_Name, ShardFile], Meta(min_length=1)]
    sharded: dict[str, Sharded]


def read_content(found: Path, target: Path) -> bytes:
    """Read state.json; messages name `target`.

    Raises:
        InputError: it is missing, too large, or cannot be read.
    """
    where = str(target / STATE)
    try:
        if (size := (found / STATE).stat().st_size) > MOST_BYTES:
            raise InputError(where, f"at most {MOST_BYTES:,} bytes", f"{size:,} bytes", FOREIGN)
        return (found / STATE).read_bytes()
    except FileNotFoundError as error:
        raise InputError(where, "a checkpoint", "no such file", FOREIGN) from error
    except OSError as error:
        raise InputError(
            where, "a file that can be read", str(error.strerror or error), FOREIGN
        ) from error


def parse_head(content: bytes, target: Path) -> ShardedHead:
    """Parse state.json of either version; one without shards has none.

    Raises:
        InputError: it is none, of another version, or says what cannot be.
    """
    where = str(target / STATE)
    value = parse_json(content, where, FOREIGN)
    sharded = isinstance(value, Mapping) and value.get("version") not in (None, VERSION)
    kind = {"format": FORMAT, "version": SHARDED if sharded else VERSION}
    if not sharded:
        head = check_record(value, Head, where=where, mend=FOREIGN, kind=kind)
        return cast(ShardedHead, {**head, "files": {}, "sharded": {}})
    whole = check_record(value, ShardedHead, where=where, mend=FOREIGN, kind=kind)
    for name, told in whole["sharded"].items():
        check_parts(told, f"{where}, tensor {name}")
        if name in whole["tensors"] or name in whole["alias"]:
            raise InputError(f"{where}, tensor {name}", "one place for it", "two", MEND)
        if lost := sorted({part["file"] for part in told["parts"]} - whole["files"].keys()):
            raise InputError(where, f"the size of {lost[0]}", "none", MEND)
    return whole


def check_parts(told: Sharded, where: str) -> None:
    """Refuse parts that are not all rows, each once, with a checksum for each block.

    Raises:
        InputError: the first row that is missing or there twice, or a checksum too many or few.
    """
    following = 0
    for part in sorted(told["parts"], key=lambda part: (part["first"], part["end"])):
        if part["first"] != following or part["end"] <= part["first"]:
            got = f"a part of rows {part['first']:,} to {part['end']:,}"
            raise InputError(where, f"a part that begins at row {following:,}", got, MEND)
        following = part["end"]
        blocks = -(-(part["end"] - part["first"]) // told["block"])
        if len(part["blocks"]) != blocks:
            expected = f"{blocks:,} checksums of {part['file']}"
            raise InputError(where, expected, f"{len(part['blocks']):,}", MEND)
    if following != told["shape"][0]:
        raise InputError(where, f"parts up to row {told['shape'][0]:,}", f"{following:,}", MEND)


def torch_dtype(name: str, where: str) -> torch.dtype:
    """Return a number format by its name. Raises InputError where torch knows none."""
    kind = getattr(torch, name, None)
    if not isinstance(kind, torch.dtype):
        raise InputError(where, "a format that torch knows", repr(name)[:40], MEND)
    return kind
