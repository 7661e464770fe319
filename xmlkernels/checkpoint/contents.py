"""Write, read and verify the files of a checkpoint."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Collection, Container, Mapping
from pathlib import Path
from typing import Any

import torch

from xmlkernels.checkpoint.head import (
    FORMAT,
    MEND,
    SHARDED,
    VERSION,
    RowRange,
    ShardedHead,
    parse_head,
    read_content,
    torch_dtype,
)
from xmlkernels.checkpoint.on_disk import TensorRows
from xmlkernels.checkpoint.places import STATE, TENSORS, holds_nothing_else
from xmlkernels.checkpoint.shards import OwnFile, ShardFiles, check_rows, merged, rows_of_whole
from xmlkernels.checkpoint.state import decode
from xmlkernels.checkpoint.writing import TensorFile, checksum_of, dtype_name, stat
from xmlkernels.checksums import ALGORITHM, checksum, compare
from xmlkernels.errors import InputError
from xmlkernels.files import naming, sync

_KEYS = {"identity", ALGORITHM}  # of the tensors' header


def write(
    fresh: Path,
    stored: Mapping[str, torch.Tensor],
    alias: Mapping[str, str],
    text: str,
    identity: str,
    files: Mapping[str, OwnFile] | None = None,
) -> None:
    """Write the whole tensors and the state into a new folder; on the disk when it returns.

    Args:
        fresh: the folder, which holds the shards already.
        stored: as `TensorFile` takes them.
        alias: names of repeated ones, with the names that they are stored under.
        text: the state as JSON.
        identity: of the checkpoint.
        files: what the processes say of their shards, by file; None where there are none.
    """
    metadata = {"identity": identity, ALGORITHM: "0" * 32}
    with TensorFile(fresh / TENSORS, stored, metadata) as file:
        sums = file.write_values(blocks=False)
        manifest = {
            k: {"shape": list(t.shape), "dtype": dtype_name(t), ALGORITHM: sums[k][0]}
            for k, t in stored.items()
        }
        head: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION if files is None else SHARDED,
            "identity": identity,
            "tensors": manifest,
            "alias": alias,
        }
        if files is not None:
            head["files"] = {name: told["facts"] for name, told in files.items()}
            head["sharded"] = merged(files)
        content = (json.dumps(head, ensure_ascii=False)[:-1] + f', "state": {text}}}\n').encode()
        with naming(fresh / STATE):
            (fresh / STATE).write_bytes(content)
            sync(fresh / STATE)
        file.finish(metadata | {ALGORITHM: checksum(content)})
    sync(fresh)


def read(
    found: Path,
    target: Path,
    keep: Callable[[str], bool],
    rows: Mapping[str, RowRange],
    on_disk: Container[str],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read the state and the tensors asked for.

    Files are read from `found`; messages name `target`, for `found` may be the place of an
    unfinished save.

    Args:
        found: the folder.
        target: its name.
        keep: which tensors.
        rows: which rows of some of them; all of the others.
        on_disk: of which tensors the rows stay there.
    """
    content = read_content(found, target)
    head = parse_head(content, target)
    tensors = _read_whole(found, target, content, head, keep, rows, on_disk)
    files = ShardFiles(found, target, head)
    for name, told in head["sharded"].items():
        if keep(name):
            first, end = 0, told["shape"][0]
            if name in rows:
                check_rows(rows[name], told["shape"], f"{target}, tensor {name}")
                first, end = rows[name].first, rows[name].end
            give = files.behind if name in on_disk else files.rows
            tensors[name] = give(name, first, end)
    return tensors, decode(head["state"])


def _read_whole(
    found: Path,
    target: Path,
    content: bytes,
    head: ShardedHead,
    keep: Callable[[str], bool],
    rows: Mapping[str, RowRange],
    on_disk: Container[str],
) -> dict[str, torch.Tensor]:
    """Read the tensors asked for of tensors.safetensors, and compare state.json with its header."""
    from safetensors import SafetensorError, safe_open

    where = str(target / TENSORS)
    before = stat(found / TENSORS)
    _check_size(found / TENSORS, head, where)
    alias = head["alias"]
    # Of a tensor with two names all rows are read, and cut for each name.
    twice = {same for name, same in alias.items() if keep(name)}
    tensors: dict[str, torch.Tensor] = {}
    sums: dict[str, str] = {}  # of those that were read in parts
    try:
        # For its checks alone; see on_disk.py.
        with safe_open(found / TENSORS, framework="numpy") as file:
            own = TensorRows(found / TENSORS, where)
            metadata = file.metadata() or {}
            names = set(file.keys())
            kept = {alias.get(name, name) for name in (*names, *alias) if keep(name)}
            for name in sorted(kept & names):
                told = head["tensors"].get(name)
                shape = file.get_slice(name).get_shape()
                parted = (name in rows or name in on_disk) and name not in twice
                if parted and told is not None and told["shape"] == shape and shape:
                    if name in rows:
                        check_rows(rows[name], shape, f"{where}, tensor {name}")
                    behind = name in on_disk
                    held = own.open(name)
                    part, sums[name] = rows_of_whole(held, rows.get(name), shape, behind=behind)
                    tensors[name] = part
                    continue
                tensors[name] = own.whole(name)
    except FileNotFoundError as error:
        raise InputError(where, "the tensors of the checkpoint", "no such file", MEND) from error
    except (
        SafetensorError,
        OSError,
        RuntimeError,
    ) as error:  # torch, mapping the values, raises RuntimeError
        raise InputError(where, "a whole safetensors file", str(error), MEND) from error
    # The file is opened by name more than once, for its header and its values: these may be two.
    if metadata.get("identity") != head["identity"] or stat(found / TENSORS) != before:
        raise InputError(
            where, f"tensors that belong to {STATE}", "those of another checkpoint", MEND
        )
    summed = _check_state(content, head, metadata, target)
    expected = {name for name in head["tensors"] if name in kept or name not in names}
    _check_facts(head, tensors, sums.keys(), expected, where)
    if summed:
        for name, tensor in tensors.items():
            compare(
                sums[name] if name in sums else checksum_of(tensor),
                head["tensors"][name]["xxh3_128"],
                f"{where}, tensor {name}",
                MEND,
            )
    if lost := sorted(same for name, same in alias.items() if keep(name) and same not in tensors):
        raise InputError(str(target / STATE), "an alias of a tensor", repr(lost[0]), MEND)
    tensors |= {name: tensors[same] for name, same in alias.items() if keep(name)}
    for name in tensors.keys() & rows.keys() - sums.keys():
        check_rows(rows[name], list(tensors[name].shape), f"{where}, tensor {name}")
        tensors[name] = tensors[name][rows[name].first : rows[name].end].clone()
    return {name: t for name, t in tensors.items() if keep(name)}


def _check_facts(
    head: ShardedHead,
    tensors: Mapping[str, torch.Tensor],
    parted: Collection[str],
    expected: set[str],
    where: str,
) -> None:
    """Refuse tensors of another name, shape or format than state.json says.

    The shapes of those that were read in parts have been looked at.
    """
    facts = {n: (head["tensors"][n]["shape"], head["tensors"][n]["dtype"]) for n in expected}
    got = {name: (list(t.shape), dtype_name(t)) for name, t in tensors.items()}
    for name in parted:
        got[name] = (facts[name][0], got[name][1])
    if got != facts:
        wrong = sorted(n for n in got.keys() | facts.keys() if got.get(n) != facts.get(n))
        raise InputError(
            where,
            f"{wrong[0]} as {facts.get(wrong[0])}",
            f"{got.get(wrong[0])}; {len(wrong)} differ",
            MEND,
        )


def _check_size(path: Path, head: ShardedHead, where: str) -> None:
    """Raise InputError where a file is not as long as its tensors make it.

    Checked before anything of its length is mapped.
    """
    values = 0
    for name, told in head["tensors"].items():
        kind = torch_dtype(told["dtype"], f"{where}, tensor {name}")
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
            raise InputError(where, "a whole safetensors file", got, MEND)


def _check_state(
    content: bytes, head: ShardedHead, metadata: Mapping[str, str], target: Path
) -> bool:
    """Compare state.json with its checksum; return whether the checkpoint has checksums."""
    summed = ["xxh3_128" in told for told in head["tensors"].values()]
    summed += [True] * bool(head["files"])  # shards always had them
    if ALGORITHM in metadata:
        compare(checksum(content), metadata[ALGORITHM], str(target / STATE), MEND)
    if (
        len(set(summed)) > 1
        or (summed and summed[0] != (ALGORITHM in metadata))
        or metadata.keys() - _KEYS
    ):
        raise InputError(str(target / TENSORS), "checksums in both files or in none", "some", MEND)
    return any(summed)


def refuse_foreign(target: Path) -> None:
    """Raise InputError where something other than a checkpoint is; a damaged one is one."""
    if not target.exists() or (target.is_dir() and holds_nothing_else(target)):
        return
    if not target.is_dir():
        raise InputError(
            str(target), "a folder", "a file", "choose another name for the checkpoint"
        )
    try:
        parse_head(read_content(target, target), target)
    except InputError as error:
        mend = "choose another folder; nothing was overwritten"
        raise InputError(
            str(target), "an earlier checkpoint or no folder", "something else", mend
        ) from error
