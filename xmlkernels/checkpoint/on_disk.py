"""Tensors of a safetensors file, read by ranges of rows past the cache of files.

The library's own slices map the file: each page that was read then counts as this process's memory,
until the system takes it back. Of a table of 13 GB that is 13 GB.
"""

from __future__ import annotations

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

    Args:
        path: of the file, which may be replaced as soon as `open` has been called for a tensor.
        where: it is, for messages.
    """

    def __init__(self, path: Path, where: str) -> None:
        self._path, self._where = path, where
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
        found = self._header.get(name) if isinstance(self._header, dict) else None
        if found is None:
            raise InputError(self._where, f"a tensor {name}", "none", _MEND)
        where = f"{self._where}, header of {name}"
        told = check_record(found, _Tensor, where=where, mend=_MEND)
        if told["dtype"] not in _DTYPES:
            raise InputError(where, "a format that torch knows", told["dtype"], _MEND)
        begin, end = told["data_offsets"]
        shape, dtype = torch.Size(told["shape"]), _DTYPES[told["dtype"]]
        if end - begin != shape.numel() * dtype.itemsize:
            expected = f"{shape.numel() * dtype.itemsize:,} bytes"
            raise InputError(where, expected, f"{end - begin:,}", _MEND)
        return FileRows(self._path, shape, dtype, offset=self._first + begin)
