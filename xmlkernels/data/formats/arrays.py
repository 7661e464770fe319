"""NumPy's files (.npy, .npz), read without believing them.

What a header claims (dtype, shape, size) is compared with what is wanted, with the bytes that the
file has and with the memory that is free, before anything is allocated. Object arrays, which are
pickles, are refused.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import numpy as np

from xmlkernels.errors import InputError
from xmlkernels.files import PathLike, check_file
from xmlkernels.memory import free_memory

DEFLATE_RATIO = 1032
"""The most that deflate can shrink anything: a member that claims more is a lie."""
_CHUNK = 1 << 24
_LARGER = "free some memory, or use a larger machine"


@dataclass(frozen=True)
class Head:
    """What the header of an array claims."""

    shape: tuple[int, ...]
    dtype: np.dtype
    columns_first: bool  # Fortran's order

    @property
    def bytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def read_npy(
    path: PathLike,
    *,
    kinds: str,
    shape: Sequence[int | None],
    expected: str,
    mend: str = "write it again with numpy.save",
    dtype: np.dtype | type | None = None,
    finite: bool = False,
) -> np.ndarray:
    """Read the array of an .npy file.

    Args:
        path: the file.
        kinds: kinds of dtype that are taken, as NumPy's letters: "f", "iu".
        shape: of each dimension the size, or None for any.
        expected: what messages call the array.
        mend: how to put it right.
        dtype: the one dtype that is taken, in any byte order; None leaves it to `kinds`.
        finite: whether a NaN or an infinity is refused.

    Returns:
        a new array in C order and native byte order.

    Raises:
        InputError: no such file, no array, a pickle, another dtype or shape, a file that is longer
            or shorter than its header says, an array that does not fit into memory, or a value that
            is not finite.
    """
    name = os.fspath(check_file(path))
    try:
        with open(name, "rb") as file:
            head = read_head(file, name, mend)
            size = os.fstat(file.fileno()).st_size - file.tell()
            _check_kind(head, name, kinds, dtype, expected, mend)
            _check_shape(head, name, shape, expected, mend)
            if size != head.bytes:
                got = f"{size:,} bytes"
                raise InputError(
                    name, f"{head.bytes:,} bytes of values, as its header says", got, mend
                )
            check_memory(name, head.bytes)
            array = _values(file, head, name, mend)
    except OSError as error:
        raise InputError(
            name, "a file that can be read", str(error.strerror or error), "check the path"
        ) from None
    if finite and not np.isfinite(array).all():
        at = [int(place) for place in np.argwhere(~np.isfinite(array))[0]]
        raise InputError(f"{name}, place {at}", "a finite number", str(array[tuple(at)]), mend)
    return array


def read_head(file: IO[bytes], where: str, mend: str) -> Head:
    """Read the header of an array at the stream's position.

    Raises:
        InputError: there is none, it names a pickle, or a shape that no array has.
    """
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"format version {version}")
        shape, columns_first, dtype = read(file)
    except OSError:
        raise
    except (
        Exception
    ) as error:  # Python's own parser reads the text: its errors on foreign bytes are of every kind
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise InputError(
            where,
            "an array that NumPy wrote",
            f"a header that cannot be read ({reason[:120]})",
            mend,
        ) from None
    if dtype.hasobject:
        raise InputError(
            where, "an array of numbers", "one of Python objects, which is a pickle", mend
        )
    if dtype.names is not None or dtype.shape or dtype.itemsize == 0:
        raise InputError(where, "an array of numbers", f"dtype {dtype}", mend)
    if (
        any(size < 0 or size >= 2**60 for size in shape)
        or math.prod(shape) * dtype.itemsize >= 2**60
    ):
        raise InputError(where, "an array that can be", f"shape {list(shape)}", mend)
    return Head(tuple(int(size) for size in shape), dtype, bool(columns_first))


def check_memory(where: str, needed: int, *, copies: int = 1) -> None:
    """Raise InputError where `copies` arrays of `needed` bytes exceed the free memory."""
    free = free_memory()
    if free is not None and needed * copies > free:
        expected = f"arrays for the {free:,} bytes of memory that are free"
        got = f"{needed * copies:,} bytes of arrays"
        raise InputError(where, expected, got, _LARGER)


class Members:
    """The arrays of an .npz file, by name; nothing is read before it is asked for.

    Every member is looked at when the file is opened: it is stored or deflated, and claims no more
    bytes than that can hold and than the file has.
    """

    def __init__(self, name: str, archive: zipfile.ZipFile, size: int, mend: str) -> None:
        self.name, self._archive, self._mend = name, archive, mend
        infos = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        self._infos: Mapping[str, zipfile.ZipInfo] = {
            info.filename.removesuffix(".npy"): info for info in infos
        }
        if len(self._infos) != len(infos):
            raise self._bad("each array once", "two of one name")
        if sum(info.compress_size for info in infos) > size:
            raise self._bad(f"arrays inside its {size:,} bytes", "arrays that claim more")
        for info in infos:
            most = info.compress_size * (
                DEFLATE_RATIO if info.compress_type == zipfile.ZIP_DEFLATED else 1
            )
            if (
                info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                or info.flag_bits & 1
            ):
                raise self._bad(
                    "arrays as numpy.savez writes them", "another compression, or a password"
                )
            if info.file_size > most + 1024:
                got = f"{info.filename} of {info.file_size:,} bytes, in {info.compress_size:,}"
                raise self._bad("arrays that the file can hold", got)

    def _bad(self, expected: str, got: str) -> InputError:
        return InputError(self.name, expected, got, self._mend)

    def __contains__(self, key: str) -> bool:
        return key in self._infos

    def head(self, key: str) -> Head:
        """Return what the array claims to be.

        Raises:
            InputError: Where it is missing, or claims other bytes than its member has.
        """
        if key not in self._infos:
            raise self._bad(
                "a sparse matrix that scipy.sparse.save_npz wrote",
                f"none: the array {key!r} is missing",
            )
        with self._archive.open(self._infos[key]) as file:
            head = read_head(file, f"{self.name}, {key}", self._mend)
            size = self._infos[key].file_size - file.tell()
        if size != head.bytes:
            got = f"{head.bytes:,}, as its header says"
            raise InputError(f"{self.name}, {key}", f"{size:,} bytes of values", got, self._mend)
        return head

    def read(self, key: str) -> np.ndarray:
        """Read the array: new, in C order and native byte order.

        Call `head` and `check_memory` first.
        """
        with self._archive.open(self._infos[key]) as file:
            where = f"{self.name}, {key}"
            array = _values(file, read_head(file, where, self._mend), where, self._mend)
            file.read(1)  # at the end the checksum is compared
            return array


@contextmanager
def open_members(path: PathLike, mend: str) -> Iterator[Members]:
    """Open the arrays of an .npz file.

    Raises:
        InputError: no file, no zip file, or a damaged one (also while the block reads from it).
    """
    name = os.fspath(check_file(path))
    try:
        with zipfile.ZipFile(name) as archive:
            yield Members(name, archive, os.stat(name).st_size, mend)
    except InputError:
        raise
    except MemoryError:
        raise InputError(
            name, "arrays that fit into memory", "more than is free", _LARGER
        ) from None
    except (
        Exception
    ) as error:  # zipfile's on foreign bytes: struct.error, NotImplementedError, IndexError, …
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise InputError(
            name, "a scipy sparse .npz file", f"one that cannot be read ({reason})", mend
        ) from error


def _check_kind(
    head: Head, where: str, kinds: str, dtype: np.dtype | type | None, expected: str, mend: str
) -> None:
    good = (
        head.dtype.kind in kinds
        if dtype is None
        else head.dtype.newbyteorder("=") == np.dtype(dtype)
    )
    if not good:
        raise InputError(where, expected, str(head), mend)


def _check_shape(
    head: Head, where: str, shape: Sequence[int | None], expected: str, mend: str
) -> None:
    fits = len(head.shape) == len(shape) and all(
        b is None or a == b for a, b in zip(head.shape, shape, strict=True)
    )
    if not fits:
        raise InputError(where, expected, str(head), mend)


def _values(file: IO[bytes], head: Head, where: str, mend: str) -> np.ndarray:
    """Read the values behind a header.

    Raises:
        InputError: Where there are fewer bytes than the header says, or more.
    """
    try:
        # Of its own type from the start: scipy copies an array whose base has many more elements.
        flat = np.empty(math.prod(head.shape), head.dtype)
    except (MemoryError, ValueError):
        raise InputError(where, "an array that fits into memory", f"{head}", _LARGER) from None
    done, view = 0, flat.view(np.uint8).data
    while done < head.bytes:
        part = file.read(min(_CHUNK, head.bytes - done))
        if not part:
            raise InputError(where, f"{head.bytes:,} bytes of values", f"{done:,}", mend)
        view[done : done + len(part)] = part
        done += len(part)
    array = flat.reshape(head.shape, order="F" if head.columns_first else "C")
    return array.astype(head.dtype.newbyteorder("="), order="C", copy=False)


def read_tensors(
    path: PathLike, expected: str, mend: str
) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Read a safetensors file: (text of the header, arrays).

    That library compares sizes and offsets.

    Args:
        expected: what messages call the file.

    Raises:
        InputError: no such file, none of that format, damaged, or of types that NumPy lacks.
    """
    from safetensors import safe_open

    name = os.fspath(check_file(path))
    try:
        with safe_open(name, framework="numpy") as file:
            head = file.metadata() or {}
            return head, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (
        Exception
    ) as error:  # SafetensorError and, for types that NumPy lacks, whatever NumPy says of them
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise InputError(name, expected, f"one that cannot be read ({reason})", mend) from None
