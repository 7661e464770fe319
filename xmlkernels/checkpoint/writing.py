"""What all files of a checkpoint are written with.

safetensors' own writer wants every value in memory and reads nothing back, so checksums would cost
a second pass. Here values go from where they are into the file and into the checksum at once, block
by block. The library reads the files as its own.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch

from xmlkernels.checksums import checksum, new_digest
from xmlkernels.errors import InputError
from xmlkernels.files import naming
from xmlkernels.rows import as_rows, pages, row_bytes, rows_behind

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
BLOCK = 4 << 20  # bytes of rows that are written, and verified, at a time
KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


class TensorFile:
    """A safetensors file that is being written: first the values, then the header before them.

    Args:
        path: of the new file.
        tensors: contiguous, on any device, or standing in for rows that no memory holds.
        metadata: of the header; what is known later has other values of the same length here.

    Raises:
        InputError: a number format that safetensors does not have.
        OSError: the disk refuses, here or later, with the file's name.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
    ) -> None:
        self.path = path
        order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
        self._tensors = {name: tensors[name] for name in order}
        self._first = len(_header(self._tensors, metadata))
        with naming(path):
            self._file = os.open(path, _NEW, 0o666)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def write_values(self, *, blocks: bool) -> dict[str, list[str]]:
        """Write the values. Python's lock is free for most of the time.

        Args:
            blocks: take a checksum of each block of rows (`block_rows`), not one of each tensor.

        Returns:
            The checksums of each tensor.
        """
        sums: dict[str, list[str]] = {}
        place = self._first
        for name, tensor in self._tensors.items():
            digest, several = new_digest(), []
            for block in _blocks(tensor):
                values = block.flatten().view(torch.uint8).numpy()
                several.append(checksum(values)) if blocks else digest.update(values)
                place += self._put(values.data, place)
            sums[name] = several if blocks else [digest.hexdigest()]
        return sums

    def finish(self, metadata: Mapping[str, str]) -> bytes:
        """Write the header, and return it; the file is then on the disk."""
        header = _header(self._tensors, metadata)
        if len(header) != self._first:
            raise ValueError("the header has another length than was told")
        self._put(memoryview(header), 0)
        with naming(self.path):
            os.fsync(self._file)
        return header

    def _put(self, values: memoryview, place: int) -> int:
        done = 0
        with naming(self.path):
            while done < values.nbytes:
                done += os.pwrite(self._file, values[done:], place + done)
        return done


def _header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    told: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    place = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in KINDS:
            got = dtype_name(tensor)
            raise InputError(f"tensor {name!r}", "a format of safetensors", got, "convert it")
        end = place + tensor.numel() * tensor.dtype.itemsize
        shape = list(tensor.shape)
        told[name] = {"dtype": KINDS[tensor.dtype], "shape": shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that values are aligned
    return len(text).to_bytes(8, "little") + text


def _blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Give the rows of a tensor in turn, on the CPU; the next block may overwrite one."""
    rows = rows_behind(tensor)
    if tensor.dim() == 0:
        yield tensor.detach().cpu()
        return
    step, count = block_rows(row_bytes(tensor)), tensor.shape[0]
    held = None if rows is None else pages(min(step, count) * row_bytes(rows))
    for start in range(0, count, step):
        end = min(start + step, count)
        if rows is None or held is None:
            yield tensor.detach()[start:end].cpu()
        else:
            block = as_rows(held, end - start, rows)
            rows.read(start, block)
            yield block


def block_rows(size: int) -> int:
    """Count the rows of so many bytes that make a block."""
    return max(1, BLOCK // max(1, size))


def unshared(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return contiguous tensors, each view once, and name → stored name of repeated ones.

    Raises:
        InputError: a tensor is not dense.
    """
    stored: dict[str, torch.Tensor] = {}
    alias: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, given in tensors.items():
        if rows_behind(given) is not None:
            stored[name] = given
            continue
        if given.layout != torch.strided or given.is_meta:
            got = f"layout {given.layout} on {given.device}"
            raise InputError(
                f"tensor {name!r}", "a dense tensor with values", got, "store its parts instead"
            )
        tensor = given.detach()
        view = (
            str(tensor.device),
            tensor.data_ptr(),
            tensor.dtype,
            tuple(tensor.shape),
            tensor.stride(),
        )
        if tensor.numel() and view in first:
            alias[name] = first[view]
            continue
        first[view] = name
        stored[name] = tensor.contiguous()
    return stored, alias


def dtype_name(tensor: torch.Tensor) -> str:
    """Name a tensor's number format as state.json does: "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def checksum_of(tensor: torch.Tensor) -> str:
    """Return the checksum of the bytes of a tensor on the CPU."""
    return checksum(tensor.contiguous().flatten().view(torch.uint8).numpy())


def stat(path: Path) -> tuple[int, int] | None:
    """Return inode and time of change, which differ when a file is replaced; None for no file."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns
    return None
