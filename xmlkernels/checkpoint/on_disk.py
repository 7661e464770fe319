"""Tensors of a safetensors file: by ranges of rows past the cache of files, or whole by mapping it.

The library's own slices map the file: each page that was read then counts as this process's memory,
until the system takes it back. Of a table of 13 GB that is 13 GB.

Whole tensors are mapped as the library maps them, but not by it: for torch, safetensors 0.8 leaves
64 bytes behind for each tensor that it gives, so that a process that loads for weeks would grow.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypedDict

import torch

from xmlkernels.checkpoint.writing import KINDS
from xmlkernels.errors import InputError
from xmlkernels.records import Count, check_record, parse_json
from xmlkernels.rows import FileRows

_DTYPES = {name: dtype for dtype, name in KINDS.items()}
_MEND = "restore the folder from a copy, or train from the start"


class _Tensor(TypedDict):
    dtype: str
    shape: list[Count]
    data_offsets: tuple[Count, Count]


class TensorRows:
    """A safetensors file whose header was compared with its checksum, or by safetensors itself.

    That is: its tensors lie one behind the other, and end where the file does.

    Args:
        path: of the file, which may be replaced as soon as `open` has been called for a tensor.
        where: it is, for messages.
    """

    def __init__(self, path: Path, where: str) -> None:
        self._path, self._where = path, where
        self._mapped: torch.Tensor | None = None
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._first = 8 + length
            self._header = parse_json(file.read(length), where, _MEND)

    def open(self, name: str) -> FileRows:
        """Open a tensor of the file.

        Raises:
            InputError: the file has none of that name.
            OSError: it cannot be opened.
        """
        shape, dtype, begin, _ = self._place(name)
        return FileRows(self._path, shape, dtype, offset=begin)

    def whole(self, name: str) -> torch.Tensor:
        """Map a tensor of the file, which must not be cut short meanwhile.

        It may be written to, and the file then stays as it is.

        Raises:
            InputError: the file has none of that name.
            RuntimeError: it cannot be mapped, says torch.
        """
        shape, dtype, begin, end = self._place(name)
        if self._mapped is None:
            size = self._path.stat().st_size
            kind = torch.uint8
            self._mapped = torch.from_file(str(self._path), shared=False, size=size, dtype=kind)
        # A storage of its own for each: of any alignment, and its memory is not the whole file's.
        values = self._mapped.untyped_storage()[begin:end]
        return torch.empty(0, dtype=dtype).set_(values).view(shape)

    def _place(self, name: str) -> tuple[torch.Size, torch.dtype, int, int]:
        """Return a tensor's shape, its number format, and where in the file it begins and ends."""
        found = self._header.get(name) if isinstance(self._header, dict) else None
        if found is None:
            raise InputError(self._where, f"a tensor {name}", "none", _MEND)
        where = f"{self._where}, header of {name}"
        told = check_record(found, _Tensor, where=where, mend=_MEND)
        if told["dtype"] not in _DTYPES:
            raise InputError(where, "a format that torch knows", told["dtype"], _MEND)
        begin, end = told["data_offsets"]
        dtype = _DTYPES[told["dtype"]]
        # torch's own count of values overflows.
        if end - begin != (size := math.prod(told["shape"]) * dtype.itemsize):
            raise InputError(where, f"{size:,} bytes", f"{end - begin:,}", _MEND)
        return torch.Size(told["shape"]), dtype, self._first + begin, self._first + end
