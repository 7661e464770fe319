"""Checksums: XXH3 of 128 bits, written next to their data and compared when it is read.

They find damage (a flipped bit, a cut, another run's file), not forgery. XXH3 is chosen for its
speed: it costs a small part of what reading the file costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypedDict

import numpy as np
import xxhash

from xmlkernels.errors import InputError
from xmlkernels.records import Count, Meta

ALGORITHM = "xxh3_128"
_CHUNK = 1 << 20

Xxh3 = Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
"""A checksum in hexadecimal."""


class FileFacts(TypedDict):
    """Size and checksum of a file."""

    bytes: Count
    xxh3_128: Xxh3


Files = dict[str, FileFacts]
"""Files below a folder, by their names with `/`."""


def checksum(content: Any) -> str:
    """Of bytes, or of a contiguous NumPy array."""
    return xxhash.xxh3_128_hexdigest(content)


def new_digest() -> Any:
    """Begin a checksum of bytes that come in parts: `update` it, then take its `hexdigest`."""
    return xxhash.xxh3_128()


def file_checksum(path: Path) -> str:
    """Of a file, a chunk at a time. OSError where it cannot be read."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def compare(found: str, expected: str, where: str, mend: str) -> None:
    """InputError where a checksum is not the one that was written."""
    if found != expected:
        got = f"that of {found[:12]}: it is damaged, or another one"
        raise InputError(where, f"the content of checksum {expected[:12]}", got, mend)


def seal(arrays: Mapping[str, Any], texts: Mapping[str, str]) -> str:
    """Return a checksum of NumPy arrays and texts with their names, types and shapes.

    It is for the header of the file that holds them.
    """
    digest = xxhash.xxh3_128()
    for name, array in sorted(arrays.items()):
        whole = np.ascontiguousarray(array)
        digest.update(f"{name}\0{whole.dtype.str}\0{list(array.shape)}\0".encode())
        digest.update(whole.reshape(-1).view(np.uint8).data)
    for name, text in sorted(texts.items()):
        digest.update(f"{name}\0{len(text)}\0{text}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def check_seal(
    head: Mapping[str, str], arrays: Mapping[str, Any], keys: set[str], where: str, mend: str
) -> None:
    """Compare a header and arrays with the checksum in the header.

    A file from before there were checksums has none.

    Args:
        keys: of the header, besides its checksum.

    Raises:
        InputError: other content, or a key that no writer writes.
    """
    if more := sorted(head.keys() - keys - {ALGORITHM}):
        raise InputError(where, f"a header with {', '.join(sorted(keys))}", repr(more[0]), mend)
    if ALGORITHM in head:
        compare(
            seal(arrays, {key: text for key, text in head.items() if key in keys}),
            head[ALGORITHM],
            where,
            mend,
        )


def of_files(folder: Path, names: Iterable[str]) -> Files:
    """Return sizes and checksums of files, and of all files below named folders.

    Missing ones are left out.
    """
    found: Files = {}
    for name in names:
        top = folder / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file():
                facts: FileFacts = {"bytes": path.stat().st_size, "xxh3_128": file_checksum(path)}
                found[path.relative_to(folder).as_posix()] = facts
    return found


def check_files(folder: Path, files: Files, mend: str) -> None:
    """Compare files with what `of_files` found before.

    Raises:
        InputError: one is missing, cannot be read, or is of another size or content.
    """
    for name, facts in files.items():
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(str(folder), "names of files inside the folder", repr(name), mend)
        try:
            if (size := path.stat().st_size) != facts["bytes"]:
                raise InputError(
                    str(path),
                    f"{facts['bytes']:,} bytes, as it was written",
                    f"{size:,} bytes",
                    mend,
                )
            compare(file_checksum(path), facts["xxh3_128"], str(path), mend)
        except FileNotFoundError:
            raise InputError(str(path), "a file that belongs here", "no such file", mend) from None
        except OSError as error:
            raise InputError(
                str(path), "a file that can be read", str(error.strerror or error), mend
            ) from None
