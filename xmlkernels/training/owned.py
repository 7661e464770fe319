"""Recognise by content what a run wrote in its output folder: nothing else is deleted or replaced.

What a person put there stays.
"""

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from xmlkernels import InputError
from xmlkernels.checkpoint import FORMAT, STATE
from xmlkernels.data.manifest import MANIFEST, PROFILE
from xmlkernels.report.page import REPORT
from xmlkernels.training.event_files import EVENTS

OURS, FOREIGN, DAMAGED = "ours", "foreign", "damaged"
# Beside the checkpoints of a run: what reads its inputs, its tree, its labels' names, what its
# scores mean; and what a kill left of writing them.
_BESIDE = re.compile(
    r"tokenizer|vocabulary|label_(names|ids)\.txt|(tree|calibration)\.safetensors"
    r"|\..*\.[0-9a-f]{12}\.part"
)
_CHECKPOINT = re.compile(r"(last|best)([-.]\d+)?|\.(last|best)([-.]\d+)?\.(old|new-[0-9a-f]+)")


def refuse_foreign(folder: Path, names: tuple[str, ...]) -> None:
    """Refuse a folder where one of a run's names is somebody else's file.

    A file that cannot be read counts as the run's where another one is.

    Raises:
        InputError: naming the file.
    """
    found = {
        name: _kind(folder / name)
        for name in names
        if (folder / name).exists() or (folder / name).is_symlink()
    }
    alone = OURS not in found.values()
    foreign = [
        name for name, kind in found.items() if kind == FOREIGN or (kind == DAMAGED and alone)
    ]
    if foreign:
        inner = _stranger(folder / foreign[0]) if (folder / foreign[0]).is_dir() else None
        got = f"{folder / foreign[0]}, which {f'holds {inner}' if inner else 'no run wrote'}"
        raise InputError(
            "--overwrite",
            "files of a run, to replace them",
            got,
            "nothing was deleted: move it, or name another --output",
        )


def delete(path: Path) -> None:
    """Delete a file or folder that `refuse_foreign` has passed.

    A folder that is a symbolic link is emptied and stays.
    """
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for inner in path.iterdir():
        if inner.is_dir() and not inner.is_symlink():
            shutil.rmtree(inner)
        else:
            inner.unlink()
    if not path.is_symlink():
        path.rmdir()


def refuse_others(path: str, *, run: bool = True) -> None:
    """Refuse an --output that holds a dataset, checkpoints or a run, whose files would be replaced.

    Args:
        path: the folder.
        run: False allows one that holds a run.

    Raises:
        InputError: naming what it holds.
    """
    folder = Path(path)
    for what, names in (("a dataset", (MANIFEST,)), ("checkpoints", ("last", "best"))):
        if any((folder / name).exists() for name in names):
            raise InputError(
                "--output", "a folder of its own", f"{path}, which holds {what}", "name another"
            )
    held = [name for name in ("config.json", "checkpoint") if (folder / name).exists()]
    if held and run:
        raise InputError(
            "--output",
            "a folder of its own",
            f"{path}, which holds a run ({held[0]})",
            "name another",
        )
    if run and _kind(folder / "metrics.json") == FOREIGN:
        got = f"{folder / 'metrics.json'}, which no ranker wrote"
        raise InputError("--output", "a folder of its own", got, "move it, or name another")


def _kind(path: Path) -> str:
    if not path.exists():
        return DAMAGED  # nothing there, or a link to nothing
    try:
        good = _CHECKS[path.name](path)
    except (OSError, ValueError, RecursionError, zipfile.BadZipFile):
        return DAMAGED
    return OURS if good else FOREIGN


def _json_with(*keys: str) -> Callable[[Path], bool]:
    def check(path: Path) -> bool:
        value = json.loads(path.read_text("utf-8"))
        return isinstance(value, Mapping) and all(key in value for key in keys)

    return check


def _is_log(path: Path) -> bool:
    with open(path, encoding="utf-8") as file:
        first = file.readline()
    return not first or (isinstance(value := json.loads(first), Mapping) and "step" in value)


def _is_events(path: Path) -> bool:
    return path.is_dir() and all("tfevents" in inner.name for inner in path.iterdir())


def _is_report(path: Path) -> bool:
    with open(path, encoding="utf-8") as file:
        return "report of a run</title>" in file.read(1000)


def _is_matrix(path: Path) -> bool:
    with zipfile.ZipFile(path) as packed:
        return {"indices.npy", "indptr.npy", "shape.npy", "data.npy"} <= set(packed.namelist())


def _stranger(folder: Path) -> str | None:
    """Find a name in a folder of checkpoints that no run writes."""
    for inner in sorted(folder.iterdir()):
        if _CHECKPOINT.fullmatch(inner.name):
            if not inner.is_dir() or (
                (inner / STATE).exists() and not _is_checkpoint(inner / STATE)
            ):
                return inner.name
            if strange := [
                p.name
                for p in inner.iterdir()
                if p.suffix not in (".safetensors", ".json", ".part")
            ]:
                return f"{inner.name}/{strange[0]}"
        elif not _BESIDE.fullmatch(inner.name):
            return inner.name
    return None


def _is_checkpoint(state: Path) -> bool:
    """Whether a checkpoint's head says so; one that is damaged may be."""
    try:
        head: Any = json.loads(state.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return True
    return isinstance(head, Mapping) and head.get("format") == FORMAT


def _is_checkpoint_folder(path: Path) -> bool:
    if not path.is_dir() or _stranger(path):
        return False
    heads = [state for state in path.glob(f"*/{STATE}") if _is_checkpoint(state)]
    if not heads and any(path.iterdir()):
        raise ValueError("no checkpoint: names alone do not tell whose it is")
    return bool(heads)


_CHECKS: dict[str, Callable[[Path], bool]] = {
    "config.json": _json_with("dataset", "encoder", "epochs", "output"),
    "metrics.json": _json_with("dataset_hash", "seconds"),
    "predictions.npz": _is_matrix,
    "choices.json": _json_with("choices", "minutes"),
    PROFILE: _json_with("deciles", "suspicions"),
    "log.jsonl": _is_log,
    REPORT: _is_report,
    EVENTS: _is_events,
    "checkpoint": _is_checkpoint_folder,
}
