"""A run's output folder: who may write into it, its settings, its log."""

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xmlkernels import InputError, dist
from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.checksums import Files, check_files, of_files
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.inputs import Inputs
from xmlkernels.data.manifest import IDS, PROFILE
from xmlkernels.files import naming, replacing
from xmlkernels.predict.base import NAMES
from xmlkernels.predict.model import BESIDE
from xmlkernels.records import read_object
from xmlkernels.report.page import REPORT
from xmlkernels.report.run import CHOICES
from xmlkernels.training.config import Config, began_with, recorded
from xmlkernels.training.event_files import EVENTS, EventFile, check_tensorboard
from xmlkernels.training.owned import delete, refuse_foreign
from xmlkernels.tree.label_tree import LabelTree

log = logging.getLogger(__name__)

# In the order in which they are cleared: while config.json is there, the folder is known as a run
# that is not finished.
RUN_FILES = (
    REPORT,
    "metrics.json",
    "predictions.npz",
    CHOICES,
    PROFILE,
    "log.jsonl",
    EVENTS,
    "checkpoint",
    "config.json",
)
# `tree` is a place: which tree it is, the checkpoint knows by content. Tables are the same tables
# on any `label_device`, in any `table_store`.
MAY_CHANGE = (
    "resume",
    "overwrite",
    "output",
    "cache",
    "log_every",
    "report",
    "show",
    "tensorboard",
    "save_every",
    "keep",
    "background_save",
    "save_failure",
    "threads",
    "tree",
    "label_device",
    "table_store",
    "beyond_memory",
    "timeout",
    "shard_labels",
    "shard_encoder",
)


class RunFolder:
    """config.json, log.jsonl, metrics.json, predictions.npz and checkpoint/ of one run.

    Of several processes the first alone looks at what the folder holds, and writes; all read the
    checkpoints.

    Attributes:
        path: the folder.
        checkpoints: the last and the best checkpoint in it.
        writes: whether this process is the one that writes.
        beside: sizes and checksums of the files beside the checkpoints that predictions need; each
            checkpoint holds them.

    Raises:
        InputError: the folder holds what this configuration may not touch. Nothing is written
            before `begin`.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.path = config, Path(config.output)
        self.checkpoints = CheckpointFolder(self.path / "checkpoint", config.keep)
        self.log_file, self._settings = self.path / "log.jsonl", self.path / "config.json"
        self.writes = dist.rank() == 0
        self.beside: Files = {}
        self._events = EventFile(self.path) if config.tensorboard else None
        if config.tensorboard:
            check_tensorboard()
        if self.writes:
            self._check()

    def _check(self) -> None:
        config = self.config
        held = [name for name in RUN_FILES if (self.path / name).exists()]
        if config.resume and self._settings.exists():
            self._compare(read_json(self._settings))
        elif held and not config.overwrite:
            raise InputError(
                f"--output {self.path}",
                "a new folder",
                f"a folder that holds a run ({held[-1]})",
                "go on with it by --resume, replace it by --overwrite, or name another",
            )
        elif held:
            refuse_foreign(self.path, RUN_FILES)
        elif config.resume:
            log.info(f"--resume: {self.path}/ holds no run; starting from the beginning")

    def _compare(self, before: Mapping[str, Any]) -> None:
        now, then = recorded(self.config), began_with(before)
        for key in now:
            if key not in MAY_CHANGE and then[key] != now[key]:
                raise InputError(
                    f"--resume: {key}",
                    f"{then[key]!r}, as the run began",
                    repr(now[key]),
                    "resume with the same settings",
                )

    @property
    def resumable(self) -> bool:
        """Whether the first process finds a checkpoint to resume, and the configuration asks to."""
        return dist.from_first(self._resumable() if self.writes else False)

    def _resumable(self) -> bool:
        if not self.config.resume or not self._settings.exists():
            return False
        if not self.checkpoints.resumable():
            log.info("--resume: no checkpoint was written yet; starting from the beginning")
            return False
        return True

    def begin(self, dataset: Dataset, inputs: Inputs, tree: LabelTree | None) -> None:
        """Start a run: delete what an earlier one left; write settings, inputs, tree and names."""
        if not self.writes:
            return
        refuse_foreign(self.path, RUN_FILES)  # once more: data and model may have taken an hour
        for name in RUN_FILES[:-1]:
            delete(self.path / name)
        inner = self.path / "checkpoint"
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self._settings, json.dumps(recorded(self.config), indent=1) + "\n")
        inner.mkdir(exist_ok=True)
        if tree is not None:
            tree.save(inner)
        self._write_beside(dataset, inputs)
        copy_profile(self.path, dataset)
        self.log_file.touch()

    def go_on(self, beside: Files | None, dataset: Dataset, inputs: Inputs) -> None:
        """Resume a run: write again the files beside its checkpoint that have changed."""
        if not self.writes:
            return
        inner = self.path / "checkpoint"
        if beside is None:  # a checkpoint from before there were checksums
            self.beside = of_files(inner, BESIDE)
            return
        self.beside = beside
        try:
            check_files(inner, beside, "")
        except InputError as error:
            log.info(f"note: {error.where}: {error.got}; written again from the dataset")
            self._write_beside(dataset, inputs)

    def _write_beside(self, dataset: Dataset, inputs: Inputs) -> None:
        inner = self.path / "checkpoint"
        inputs.save(inner)
        write_names(inner, dataset)
        self.beside = of_files(inner, BESIDE)

    # ---- log ----

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line of strict JSON."""
        if not self.writes:
            return
        with naming(self.log_file), open(self.log_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(strict(line), allow_nan=False) + "\n")
        if self._events is not None:
            self._events.add(line)

    def sync_log(self) -> int:
        """Put the log on the disk and return its bytes.

        A checkpoint must never know of lines that a power cut takes.
        """
        if not self.writes:
            return 0
        with open(self.log_file, "ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def rewind_log(self, size: int) -> None:
        """Cut the log to what the checkpoint knew; later lines will be written again."""
        if not self.writes:
            return
        with open(self.log_file, "a+b") as file:
            found = file.seek(0, os.SEEK_END)
            if found >= size:
                file.truncate(size)
                return
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)
        log.info(
            f"note: {self.log_file} lost lines: {size:,} bytes were written up to the checkpoint, "
            f"{found:,} are there"
        )


def clear_leftovers(folder: Path) -> None:
    """Remove what a process killed while writing checkpoints left.

    Only for whoever holds the folder.
    """
    for name in ("last", "best"):
        for found in (folder / "checkpoint").glob(f".{name}.new-*"):
            shutil.rmtree(found, ignore_errors=True)


def strict(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    return [strict(item) for item in value] if isinstance(value, list | tuple) else value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a run.

    Raises:
        InputError: the file holds none, or is too large.
    """
    return read_object(path, mend="replace the run with --overwrite")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write strict JSON, whole or not at all."""
    write_text(path, json.dumps(strict(value), indent=1, allow_nan=False) + "\n")


def write_names(folder: Path, dataset: Dataset) -> None:
    """Write the names of a dataset's labels, and their ids; nothing where it has none."""
    for name, lines in ((NAMES, dataset.label_names), (IDS, dataset.label_ids)):
        if lines is not None:
            write_text(folder / name, "".join(f"{line}\n" for line in lines))


def copy_profile(folder: Path, dataset: Dataset) -> None:
    """Put the profile of a dataset beside a run; none where an older version made the dataset."""
    source = dataset.folder / PROFILE
    if source.is_file():
        write_text(folder / PROFILE, source.read_text("utf-8"))


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())
