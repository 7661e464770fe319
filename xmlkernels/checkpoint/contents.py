"""Write, read and verify the two files of a checkpoint."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

from xmlkernels.checkpoint.places import STATE, TENSORS, holds_nothing_else
from xmlkernels.checkpoint.state import decode
from xmlkernels.checksums import ALGORITHM, Xxh3, checksum, compare
from xmlkernels.errors import InputError
from xmlkernels.files import sync
from xmlkernels.records import MOST_BYTES, Count, parse_record

FORMAT, VERSION = "xmlkernels checkpoint", 1
_MEND = "restore the folder from a copy, or train from the start"
_KEYS = {"identity", ALGORITHM}  # of the tensors' header
_FOREIGN = "pass a folder that xmlkernels saved"


class _Tensor(TypedDict):
    shape: list[Count]
    dtype: str
    xxh3_128: NotRequired[Xxh3]


class _Head(TypedDict):
    identity: str
    tensors: dict[str, _Tensor]
    alias: dict[str, str]
    state: dict[str, Any]


def write(fresh: Path, tensors: Mapping[str, torch.Tensor], text: str) -> None:
    """Both files into a new folder, on the disk when it returns; `text` is the state as JSON."""
    from safetensors.torch import save_file

    stored, alias = _unshared(tensors)
    # Once, for the checksums and for the file.
    stored = {name: tensor.cpu() for name, tensor in stored.items()}
    manifest = {
        k: {"shape": list(t.shape), "dtype": _dtype(t), ALGORITHM: _checksum(t)}
        for k, t in stored.items()
    }
    identity = os.urandom(16).hex()
    head = {
        "format": FORMAT,
        "version": VERSION,
        "identity": identity,
        "tensors": manifest,
        "alias": alias,
    }
    content = (json.dumps(head, ensure_ascii=False)[:-1] + f', "state": {text}}}\n').encode()
    (fresh / STATE).write_bytes(content)
    sync(fresh / STATE)
    save_file(
        stored, fresh / TENSORS, metadata={"identity": identity, ALGORITHM: checksum(content)}
    )
    # safetensors renames a file that it made for its owner alone; the other one has the rights that
    # the umask gives.
    os.chmod(fresh / TENSORS, (fresh / STATE).stat().st_mode & 0o777)
    sync(fresh / TENSORS)
    sync(fresh)


def _unshared(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return contiguous tensors that share no memory, and name → stored name of repeated ones."""
    stored: dict[str, torch.Tensor] = {}
    alias: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    storages: set[tuple[str, int]] = set()
    for name, given in tensors.items():
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
        storage = (str(tensor.device), tensor.untyped_storage().data_ptr())
        whole = tensor.is_contiguous() and (tensor.numel() == 0 or storage not in storages)
        storages.add(storage)
        stored[name] = (
            tensor
            if whole
            else tensor.contiguous()
            if not tensor.is_contiguous()
            else tensor.clone()
        )
    return stored, alias


def read(
    found: Path, target: Path, keep: Callable[[str], bool]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read the state and the tensors asked for.

    Files are read from `found`; messages name `target`, for `found` may be the place of an
    unfinished save.
    """
    from safetensors import SafetensorError, safe_open

    content = _content(found, target)
    head = _head(content, target)
    where = str(target / TENSORS)
    before = stat(found / TENSORS)
    _check_size(found / TENSORS, head, where)
    try:
        with safe_open(found / TENSORS, framework="pt") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            kept = {
                head["alias"].get(name, name) for name in (*names, *head["alias"]) if keep(name)
            }
            tensors = {name: file.get_tensor(name) for name in sorted(kept & names)}
    except FileNotFoundError as error:
        raise InputError(where, "the tensors of the checkpoint", "no such file", _MEND) from error
    except (
        SafetensorError,
        OSError,
        RuntimeError,
    ) as error:  # torch, mapping the values, raises RuntimeError
        raise InputError(where, "a whole safetensors file", str(error), _MEND) from error
    # safetensors opens the file by name twice, for the header and for the values, and may meet two
    # files.
    if metadata.get("identity") != head["identity"] or stat(found / TENSORS) != before:
        raise InputError(
            where, f"tensors that belong to {STATE}", "those of another checkpoint", _MEND
        )
    summed = _check_state(content, head, metadata, target)
    facts = {name: (told["shape"], told["dtype"]) for name, told in head["tensors"].items()}
    got = {name: (list(t.shape), _dtype(t)) for name, t in tensors.items()}
    expected = {name: told for name, told in facts.items() if name in kept or name not in names}
    if got != expected:
        wrong = sorted(n for n in got.keys() | expected.keys() if got.get(n) != expected.get(n))
        raise InputError(
            where,
            f"{wrong[0]} as {expected.get(wrong[0])}",
            f"{got.get(wrong[0])}; {len(wrong)} differ",
            _MEND,
        )
    if summed:
        for name, tensor in tensors.items():
            compare(
                _checksum(tensor),
                head["tensors"][name]["xxh3_128"],
                f"{where}, tensor {name}",
                _MEND,
            )
    if lost := sorted(
        same for name, same in head["alias"].items() if keep(name) and same not in tensors
    ):
        raise InputError(str(target / STATE), "an alias of a tensor", repr(lost[0]), _MEND)
    tensors |= {name: tensors[same] for name, same in head["alias"].items() if keep(name)}
    return {name: t for name, t in tensors.items() if keep(name)}, decode(head["state"])


def _check_size(path: Path, head: _Head, where: str) -> None:
    """Raise InputError where a file is not as long as its tensors make it.

    Checked before anything of its length is mapped.
    """
    values = 0
    for name, told in head["tensors"].items():
        kind = getattr(torch, told["dtype"], None)
        if not isinstance(kind, torch.dtype):
            raise InputError(
                f"{where}, tensor {name}",
                "a format that torch knows",
                repr(told["dtype"])[:40],
                _MEND,
            )
        values += math.prod(told["shape"]) * kind.itemsize
    # A missing file is reported where it is opened.
    with (
        contextlib.suppress(OSError),
        open(path, "rb") as file,
    ):
        size, header = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if size != 8 + header + values:
            got = (
                f"{size:,} bytes, {values:,} of them for the tensors and {header:,} for the header"
            )
            raise InputError(where, "a whole safetensors file", got, _MEND)


def _check_state(content: bytes, head: _Head, metadata: Mapping[str, str], target: Path) -> bool:
    """Compare state.json with its checksum; return whether the checkpoint has checksums."""
    summed = ["xxh3_128" in told for told in head["tensors"].values()]
    if ALGORITHM in metadata:
        compare(checksum(content), metadata[ALGORITHM], str(target / STATE), _MEND)
    if (
        len(set(summed)) > 1
        or (summed and summed[0] != (ALGORITHM in metadata))
        or metadata.keys() - _KEYS
    ):
        raise InputError(str(target / TENSORS), "checksums in both files or in none", "some", _MEND)
    return any(summed)


def _content(found: Path, target: Path) -> bytes:
    where = str(target / STATE)
    try:
        if (size := (found / STATE).stat().st_size) > MOST_BYTES:
            raise InputError(where, f"at most {MOST_BYTES:,} bytes", f"{size:,} bytes", _FOREIGN)
        return (found / STATE).read_bytes()
    except FileNotFoundError as error:
        raise InputError(where, "a checkpoint", "no such file", _FOREIGN) from error
    except OSError as error:
        raise InputError(
            where, "a file that can be read", str(error.strerror or error), _FOREIGN
        ) from error


def _head(content: bytes, target: Path) -> _Head:
    kind = {"format": FORMAT, "version": VERSION}
    return parse_record(content, _Head, where=str(target / STATE), mend=_FOREIGN, kind=kind)


def refuse_foreign(target: Path) -> None:
    """Raise InputError where something other than a checkpoint is; a damaged one is one."""
    if not target.exists() or (target.is_dir() and holds_nothing_else(target)):
        return
    if not target.is_dir():
        raise InputError(
            str(target), "a folder", "a file", "choose another name for the checkpoint"
        )
    try:
        _head(_content(target, target), target)
    except InputError as error:
        mend = "choose another folder; nothing was overwritten"
        raise InputError(
            str(target), "an earlier checkpoint or no folder", "something else", mend
        ) from error


def _checksum(tensor: torch.Tensor) -> str:
    return checksum(tensor.cpu().flatten().view(torch.uint8).numpy())


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def stat(path: Path) -> tuple[int, int] | None:
    """Return inode and time of change, which differ when a file is replaced; None for no file."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns
    return None
