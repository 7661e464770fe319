"""Checkpoints: a folder of `tensors.safetensors` and `state.json` that is either the old one or the new one, never half.

A save writes a folder beside the target, syncs it, moves the old one to `.NAME.old`, moves the new one in, and removes
the old one. Whoever finds the target missing reads `.NAME.old`: at every instant one of the two is whole. Both files
carry the same random identity, so that a reader beside a running save never mixes two checkpoints.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from xmlkernels._state import decode, encode
from xmlkernels._state import load_optimizer_tensors as load_optimizer_tensors
from xmlkernels._state import optimizer_tensors as optimizer_tensors
from xmlkernels._state import rng_state as rng_state
from xmlkernels._state import set_rng_state as set_rng_state
from xmlkernels.errors import InputError

FORMAT, VERSION = "xmlkernels checkpoint", 1
TENSORS, STATE = "tensors.safetensors", "state.json"


def save(folder: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint, replacing the one that stands there; a crash at any instant leaves the old or the new one.

    Args:
        folder: where it shall stand. Anything else than an earlier checkpoint there is left alone and told.
        tensors: dense; any shape, dtype, strides and device. Names that share one tensor are stored once and come
            back as one tensor; other overlapping views are stored apart.
        state: JSON values; non-finite floats and integers of any size come back exactly, tuples as lists.

    Raises:
        InputError: `state` is no JSON, a tensor is not dense, or something else stands at `folder`.
        OSError: the disk refuses (full, read-only); the old checkpoint is then unchanged.
    """
    target = Path(folder).resolve()
    text = json.dumps(encode(state), ensure_ascii=False, allow_nan=False)
    _refuse_foreign(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _recover(target)
    fresh = _temporary(target)
    try:
        _write(fresh, tensors, text)
        _swap_in(fresh, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        _recover(target)
        raise


def load(
    folder: str | os.PathLike[str], keep: Callable[[str], bool] = lambda name: True
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a checkpoint: (tensors on the CPU, state), with names, shapes and dtypes compared with its manifest.

    Args:
        keep: which tensors to read, by name: prediction needs no optimizer state.

    Raises:
        InputError: no checkpoint there, another format version, a file missing, cut short or foreign.
    """
    target = Path(folder).resolve()
    for _ in range(16):
        # Beside a running save the folder may move between the two reads: begin again with the one now in place.
        found = target if (target / STATE).exists() else _old(target)
        if not (found / STATE).exists():
            found = target
        before = _stat(found / STATE)
        try:
            result = _read(found, target, keep)
        except InputError:
            if _stat(target / STATE) in (before, None) and _stat(found / STATE) == before:
                raise
            continue
        return result
    raise InputError(str(target), "a checkpoint that stands still", "one replaced all the time", "try again")


class CheckpointFolder:
    """The `last` and the `best` checkpoint of a run, in one folder.

    Args:
        folder: holds `last/` and `best/`; made by the first save.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def save_last(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """`save` as `last`."""
        save(self.folder / "last", tensors, state)

    def save_best(self) -> None:
        """Makes `last` the `best` too, by hard links (copies where the file system has none).

        Raises:
            InputError: there is no `last` to link.
        """
        source, target = (self.folder / "last").resolve(), (self.folder / "best").resolve()
        _recover(source)
        if not (source / STATE).exists():
            raise InputError(str(source), "a checkpoint to keep as best", "none", "call save_last first")
        _refuse_foreign(target)
        _recover(target)
        fresh = _temporary(target)
        try:
            for name in (TENSORS, STATE):
                # Safe to share: a save never writes into a file that stands, it makes new ones.
                try:
                    os.link(source / name, fresh / name)
                except OSError:
                    shutil.copyfile(source / name, fresh / name)
                    _sync(fresh / name)
            _sync(fresh)
            _swap_in(fresh, target)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            _recover(target)
            raise

    def load(
        self, which: str = "last", keep: Callable[[str], bool] = lambda name: True
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """`load` the "last" or the "best" one."""
        return load(self._path(which), keep)

    def exists(self, which: str = "last") -> bool:
        """Whether there is one to load (whole or not)."""
        path = self._path(which).resolve()
        return (path / STATE).exists() or (_old(path) / STATE).exists()

    def _path(self, which: str) -> Path:
        if which not in ("last", "best"):
            raise InputError("checkpoint", "'last' or 'best'", repr(which), "choose one of the two")
        return self.folder / which


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _temporary(target: Path) -> Path:
    fresh = target.with_name(f".{target.name}.new-{secrets.token_hex(4)}")
    fresh.mkdir()
    return fresh


def _recover(target: Path) -> None:
    """Put right what a crash left: the old checkpoint back in its place, unfinished and outlived ones away."""
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()  # made by a caller; taken for a checkpoint it would cost the old one its life below
    if not target.exists() and _old(target).exists():
        os.rename(_old(target), target)
        _sync(target.parent)
    if target.exists():
        shutil.rmtree(_old(target), ignore_errors=True)
    for stale in target.parent.glob(f".{glob.escape(target.name)}.new-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _swap_in(fresh: Path, target: Path) -> None:
    # rename() cannot replace a folder that holds files, hence two steps; between them readers use the old one.
    if target.exists():
        os.rename(target, _old(target))
    os.rename(fresh, target)
    _sync(target.parent)
    shutil.rmtree(_old(target), ignore_errors=True)


def _write(fresh: Path, tensors: Mapping[str, torch.Tensor], text: str) -> None:
    from safetensors.torch import save_file

    stored, alias = _unshared(tensors)
    manifest = {k: {"shape": list(t.shape), "dtype": _dtype(t)} for k, t in stored.items()}
    identity = secrets.token_hex(16)
    save_file(stored, fresh / TENSORS, metadata={"identity": identity})
    _sync(fresh / TENSORS)
    head = {"format": FORMAT, "version": VERSION, "identity": identity, "tensors": manifest, "alias": alias}
    content = json.dumps(head, ensure_ascii=False)[:-1] + f', "state": {text}}}\n'
    (fresh / STATE).write_text(content, encoding="utf-8")
    _sync(fresh / STATE)
    _sync(fresh)


def _unshared(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Contiguous tensors with memory of their own, and name → stored name for those that are one and the same."""
    stored: dict[str, torch.Tensor] = {}
    alias: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    storages: set[tuple[str, int]] = set()
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            got = f"layout {tensor.layout} on {tensor.device}"
            raise InputError(f"tensor {name!r}", "a dense tensor with values", got, "store its parts instead")
        tensor = tensor.detach()
        view = (str(tensor.device), tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and view in first:
            alias[name] = first[view]
            continue
        first[view] = name
        storage = (str(tensor.device), tensor.untyped_storage().data_ptr())
        whole = tensor.is_contiguous() and (tensor.numel() == 0 or storage not in storages)
        storages.add(storage)
        stored[name] = tensor if whole else tensor.contiguous() if not tensor.is_contiguous() else tensor.clone()
    return stored, alias


def _read(found: Path, target: Path, keep: Callable[[str], bool]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    head = _head(found, target)
    where, mend = str(target / TENSORS), "restore the folder from a copy, or train from the start"
    before = _stat(found / TENSORS)
    try:
        with safe_open(found / TENSORS, framework="pt") as file:
            identity = (file.metadata() or {}).get("identity")
            names = set(file.keys())
            kept = {head["alias"].get(name, name) for name in (*names, *head["alias"]) if keep(name)}
            tensors = {name: file.get_tensor(name) for name in sorted(kept & names)}
    except FileNotFoundError as error:
        raise InputError(where, "the tensors of the checkpoint", "no such file", mend) from error
    except (SafetensorError, OSError, RuntimeError) as error:  # torch, mapping the values, raises RuntimeError
        raise InputError(where, "a whole safetensors file", str(error), mend) from error
    # safetensors opens the file by name twice, for the header and for the values, and may meet two files.
    if identity != head["identity"] or _stat(found / TENSORS) != before:
        raise InputError(where, f"tensors that belong to {STATE}", "those of another checkpoint", mend)
    got = {name: {"shape": list(t.shape), "dtype": _dtype(t)} for name, t in tensors.items()}
    expected = {name: facts for name, facts in head["tensors"].items() if name in kept or name not in names}
    if got != expected:
        wrong = sorted(n for n in got.keys() | expected.keys() if got.get(n) != expected.get(n))
        raise InputError(where, f"{wrong[0]} as {expected.get(wrong[0])}", f"{got.get(wrong[0])}; {len(wrong)} differ", mend)
    tensors |= {name: tensors[same] for name, same in head["alias"].items() if keep(name)}
    return {name: t for name, t in tensors.items() if keep(name)}, decode(head["state"])


def _head(found: Path, target: Path) -> dict[str, Any]:
    where, mend = str(target / STATE), "pass a folder that xmlkernels saved"
    try:
        head = json.loads((found / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(where, "a checkpoint", "no such file", mend) from error
    except (OSError, ValueError) as error:
        raise InputError(where, "a whole JSON file", f"{type(error).__name__} {error}", mend) from error
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise InputError(where, f"the format {FORMAT!r}", "another JSON file", mend)
    if head.get("version") != VERSION:
        got = f"version {head.get('version')}"
        raise InputError(where, f"version {VERSION}", got, "read it with the xmlkernels that wrote it")
    if missing := {"identity", "tensors", "alias", "state"} - head.keys():
        raise InputError(where, "a whole head", f"no {sorted(missing)}", mend)
    return head


def _refuse_foreign(target: Path) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise InputError(str(target), "a folder", "a file", "choose another name for the checkpoint")
    try:
        _head(target, target)
    except InputError as error:
        mend = "choose another folder; nothing was overwritten"
        raise InputError(str(target), "an earlier checkpoint or no folder", "something else", mend) from error


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _stat(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns
    return None


def _sync(path: Path) -> None:
    """fsync of a file or, where the system allows it, of a folder."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
