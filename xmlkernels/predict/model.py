"""Predict labels of texts with a trained model.

from xmlkernels import Predictor

predictor = Predictor.load("runs/demo")
for labels in predictor.predict(["open a file and read its lines"], k=5):
    print([(label.name, round(label.probability, 3)) for label in labels])
"""

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.checksums import Files, check_files
from xmlkernels.data.inputs import Inputs, load_inputs
from xmlkernels.data.manifest import IDS
from xmlkernels.errors import InputError
from xmlkernels.memory import free_memory
from xmlkernels.models.base import Documents, Model
from xmlkernels.models.kinds import KINDS
from xmlkernels.models.restore import DIVERGED, check_config, check_finite, restored
from xmlkernels.models.running_mean import PREFIX
from xmlkernels.models.saved import model_config, needed_for_prediction
from xmlkernels.models.scored import Scored
from xmlkernels.nn.quantized import INT8
from xmlkernels.nn.stored import READ, StoredTable
from xmlkernels.precision import TABLE_DTYPES
from xmlkernels.predict.base import (
    AHEAD,
    HUB_NAMES,
    NAMES,
    RANKER,
    Text,
    TextPredictor,
    check_texts,
    names_file,
    read_ids,
    read_names,
)
from xmlkernels.predict.calibration import calibration_beside
from xmlkernels.predict.limits import Given, Limit, Limits
from xmlkernels.records import check_record
from xmlkernels.rows import in_memory
from xmlkernels.threads import check_threads, torch_threads

_FEW = 1024  # exclusions that each candidate is compared with
BESIDE = (NAMES, IDS, "tokenizer", "vocabulary")  # next to a run's checkpoints, for predictions


class CheckpointWarning(UserWarning):
    """Another checkpoint is used than one would expect."""


class Predictor(TextPredictor):
    """A trained model with the way it reads texts and its label names.

    Attributes:
        model: the model, in evaluation mode.
        inputs: texts to batches, as in training.
        identity: `checkpoint_identity` of the checkpoint that it was loaded from.
        threads: CPU threads that its model computes on; 0 leaves torch's choice.
    """

    def __init__(
        self,
        model: Model,
        inputs: Inputs,
        label_names: list[str] | None = None,
        identity: str = "",
        *,
        threads: int = 0,
    ) -> None:
        self.model, self.inputs, self.identity = model, inputs, identity
        self.labels, self.label_names, self.parts = model.labels, label_names, inputs.parts
        self.threads = check_threads(threads)
        # A running mean takes the place of weights, and a stored table has one set of tiles.
        single = model.average is not None or any(
            isinstance(table, StoredTable) for table in model.tables().values()
        )
        self._alone: Any = Lock() if single else nullcontext()
        model.eval()

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        which: str | None = None,
        device: str | torch.device = "cpu",
        threads: int = 0,
        table_store: str = "auto",
    ) -> "Predictor":
        """Load the `checkpoint` folder of a run.

        A process that has loaded a model on the CPU and not yet used it can fork, and its children
        can predict: loading starts no threads that a child would wait for. After the first
        prediction this no longer holds, as with torch itself.

        Args:
            folder: a run's `checkpoint` folder, or the run's output folder.
            which: "best" or "last". By default the best one. While a run has none yet, or where it
                is damaged, it is the last one or, where that is damaged too, the newest before it,
                with a CheckpointWarning.
            device: where the model computes.
            threads: CPU threads that this predictor's model computes on, whatever the rest of the
                process uses; 0 leaves torch's choice. Tokenisers have threads of their own
                (TOKENIZERS_PARALLELISM=false turns them off).
            table_store: "file" leaves the label table in the checkpoint's file and streams it for
                every batch; "ram" loads it; "auto" leaves it where it would fill more than half of
                the free memory.

        Raises:
            InputError: no such checkpoint, one that is damaged, damaged files next to it, or one
                whose training has diverged.
        """
        check_threads(threads)
        if (Path(folder) / RANKER).is_file():
            mend = "give it without the flag, or load it by xmlkernels.load"
            raise InputError(str(folder), "the output folder of a run", "one of a ranker", mend)
        check_run(Path(folder), "the output folder of a run")
        checkpoints, order = _located(folder, which)
        table = _left_in_file(checkpoints, order, table_store)
        tensors, state, found = _first(checkpoints, order, needed_for_prediction, table)
        if any(f"{PREFIX}{name}" in tensors for name in table):
            # Predictions use the running mean of the table, which is in another format.
            tensors = {name: in_memory(tensor) for name, tensor in tensors.items()}
        path = checkpoints.folder
        check_files(
            path,
            files_beside(state, str(path / found), path),
            "copy the whole checkpoint folder again",
        )
        # Not slower: new memory is filled as fast as the system hands it out, on one thread or on
        # several.
        with torch_threads(1):
            model = restored(model_config(state), tensors)
            model.load_tensors(tensors)
            check_finite(model, str(path / found))
            model = model.to(torch.device(device))
        names = read_names(path, model.labels)
        identity = _identity(state)
        found_one = cls(model, load_inputs(path, state), names, identity, threads=threads)
        found_one.folder, found_one.label_ids = path / found, read_ids(path, model.labels)
        found_one.calibration = calibration_beside(path, model.labels, identity)
        return found_one

    def predict_and_embed(
        self,
        texts: Sequence[str],
        k: int,
        *,
        batch_size: int = 64,
        allow: Given = None,
        exclude: Given = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predict one text or more: what `predict_arrays` gives, and their embeddings fp32 [N, D].

        The embedding of a text is what the label table meets of it. `allow` and `exclude` are
        those of `predict`.
        """
        limits = Limits(self.numbers, allow, exclude)
        found = self._in_order(texts, k, batch_size, AHEAD, 0, limits, embed=True)
        values, rows, embedding = zip(*found, strict=True)
        return np.stack(values), np.stack(rows), np.stack(embedding)

    def embed(self, texts: Iterable[Text], *, batch_size: int = 64) -> np.ndarray:
        """Embed N texts: fp32 [N, D], what the label table meets of each; reads all of them."""
        check_texts(texts)
        found: dict[int, np.ndarray] = {}
        single: Any = texts
        for batch in self.inputs.text_batches(single, batch_size, window=AHEAD, prefetch=2):
            with self._alone, torch_threads(self.threads):
                rows = self.model.embed(batch.to(self.model.device)).float().cpu().numpy()
            found.update(zip(batch.index.tolist(), rows, strict=True))
        if not found:
            return np.zeros((0, self.model.width), np.float32)
        return np.stack([found[number] for number in range(len(found))])

    def _in_order(
        self,
        texts: Iterable[Text],
        k: int,
        batch_size: int,
        window: int,
        prefetch: int,
        limits: Limits,
        *,
        embed: bool = False,
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """Logits [k], labels [k] and, if asked for, the embedding [D] of each text."""
        waiting: dict[int, tuple[np.ndarray, ...]] = {}
        following = 0
        taken: dict[int, Limit] = {}
        # Pairs are for rankers.
        single: Any = texts if limits.same is not None else limits.taking(texts, taken)
        for batch in self.inputs.text_batches(single, batch_size, window=window, prefetch=prefetch):
            index = batch.index.tolist()
            own = [limits.same or taken.pop(number) for number in index]
            # Never across a yield: the caller's own work must keep its threads.
            with self._alone, torch_threads(self.threads):
                found = self._scored(batch.to(self.model.device), k, own, embed)
            parts = [t for t in (found.values, found.labels, found.embedding) if t is not None]
            rows_of = zip(*(t.cpu().numpy() for t in parts), strict=True)
            waiting.update(zip(index, rows_of, strict=True))
            while following in waiting:
                yield waiting.pop(following)
                following += 1

    def _scored(self, batch: Documents, k: int, limits: Sequence[Limit], embed: bool) -> Scored:
        """Score a batch under the limit of each of its texts; see `TextPredictor.predict`."""
        if self.model.tree is None:
            # Without a tree every label is scored anyway, and long lists of exclusions are slow.
            spelled: dict[int, Limit] = {}
            for limit in limits:
                if len(limit.exclude) > _FEW and id(limit) not in spelled:
                    spelled[id(limit)] = limit.spelled_out(self.labels)
            limits = [spelled.get(id(limit), limit) for limit in limits]
        exclude, device = _excluded(limits), self.model.device
        found = self.model.score(
            batch,
            k,
            exclude=None if exclude is None else exclude.to(device),
            embedding=embed,
            allow=_allowed(limits),
        )
        there = (found.labels >= 0).sum(1).tolist()
        # Of a label tree: the kept clusters may hold little else than what is excluded.
        short = [
            len(limit.exclude) > 0 and count < min(k, limit.count(self.labels))
            for limit, count in zip(limits, there, strict=True)
        ]
        if any(short):
            whole = [
                limit.spelled_out(self.labels) if few else limit
                for limit, few in zip(limits, short, strict=True)
            ]
            return self._scored(batch, k, whole, embed)
        _check_answers(found.values, found.labels, [x.count(self.labels) > 0 for x in limits])
        return found


def _allowed(limits: Sequence[Limit]) -> list[torch.Tensor | None]:
    """Return the allow-list of each text; one tensor for those with the same limit."""
    made = {
        id(limit): None if limit.allow is None else torch.from_numpy(limit.allow)
        for limit in limits
    }
    return [made[id(limit)] for limit in limits]


def _excluded(limits: Sequence[Limit]) -> torch.Tensor | None:
    """Return the exclusions of each text as int64 [B, E], -1 pads; None where there are none."""
    widest = max((len(limit.exclude) for limit in limits), default=0)
    if not widest:
        return None
    barred = np.full((len(limits), widest), -1)
    for row, limit in zip(barred, limits, strict=True):
        row[: len(limit.exclude)] = limit.exclude
    return torch.from_numpy(barred)


def _check_answers(values: torch.Tensor, rows: torch.Tensor, some: Sequence[bool]) -> None:
    """Refuse scores that overflowed although the weights are finite.

    Every text that may have a label has at least one, with a finite score.
    """
    if not rows.shape[1]:
        return
    sound = torch.isfinite(values[:, 0]) & (rows[:, 0] >= 0)
    if not bool((sound | ~torch.tensor(some, device=sound.device)).all()):
        got = "NaN or infinity for a text"
        raise InputError("model", "scores that are finite numbers", got, DIVERGED)


def checkpoint_identity(folder: str | Path, which: str | None = None) -> str:
    """Identify a checkpoint: no other has the same text, not even a later one of its run.

    A copy has the same. Arguments as of `Predictor.load`.
    """
    return _identity(_first(*_located(folder, which), keep=lambda name: False)[1])


def files_beside(state: Mapping[str, Any], where: str, folder: Path | None = None) -> Files:
    """Sizes and checksums of the files next to a checkpoint or a ranker, as its state has them.

    Empty where it was written before there were any. In a `folder` to be shared, the names of the
    labels are in `labels.txt`.
    """
    files = check_record(
        state.get("beside", {}), Files, where=f"{where}, $.beside", mend="use another one"
    )
    if folder is None or names_file(folder).name == NAMES:
        return files
    return {HUB_NAMES if name == NAMES else name: facts for name, facts in files.items()}


def check_run(path: Path, expected: str, lacks: str = "checkpoint/") -> None:
    """Refuse what is no folder of checkpoints, and none with one in it.

    Args:
        path: what was given.
        expected: what it must be, in words.
        lacks: what a folder that is neither has not, in words.

    Raises:
        InputError: it is neither.
    """
    if not path.is_dir():
        got = "a file" if path.exists() else "no such folder"
        raise InputError(str(path), expected, got, "check the path")
    if not any((path / name).is_dir() for name in ("checkpoint", "best", "last")):
        raise InputError(str(path), expected, f"a folder without {lacks}", "check the path")


def _identity(state: Mapping[str, Any]) -> str:
    # The state holds the seconds spent and the random generators: no two saves share it.
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _located(folder: str | Path, which: str | None) -> tuple[CheckpointFolder, tuple[str, ...]]:
    """Find the checkpoints of a run's output folder, or of the folder itself, and their order."""
    path = Path(folder)
    checkpoints = CheckpointFolder(path / "checkpoint" if (path / "checkpoint").is_dir() else path)
    if which is not None:
        return checkpoints, (which,)
    order: tuple[str, ...] = ("best", "last", "earlier")
    if not checkpoints.exists("best") and checkpoints.resumable():
        note = f"{checkpoints.folder} holds no best checkpoint yet; the last one is used"
        warnings.warn(note, CheckpointWarning, stacklevel=3)
        order = order[1:]
    return checkpoints, order


def _left_in_file(
    checkpoints: CheckpointFolder, order: tuple[str, ...], table_store: str
) -> set[str]:
    """Name the tensors of the label table where it is to stay in its file; else none."""
    if table_store not in ("auto", "ram", "file"):
        mend = "choose one of them"
        raise InputError("table_store", "auto, ram or file", repr(table_store), mend)
    if table_store == "ram":
        return set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reading that follows will warn
        config = model_config(_first(checkpoints, order, keep=lambda name: False)[1])
    check_config(config)
    if config["head"]["dtype"] == INT8:
        if table_store == "file":
            mend = "leave it out, or load the run that it was exported from"
            raise InputError("table_store", "ram for a table of int8", "file", mend)
        return set()
    *_, (name, shape) = KINDS[config["kind"]].table_shapes(config["head"]).items()
    dtype = TABLE_DTYPES.get(config["head"]["dtype"], torch.float32)
    free = free_memory()
    if table_store == "auto" and (free is None or 2 * math.prod(shape) * dtype.itemsize <= free):
        return set()
    return {f"{name.removesuffix('weight')}{buffer}" for buffer in READ}


def _first(
    checkpoints: CheckpointFolder,
    order: tuple[str, ...],
    keep: Callable[[str], bool],
    on_disk: Container[str] = (),
) -> tuple[dict[str, torch.Tensor], dict[str, Any], str]:
    """Load the first checkpoint that is whole; warn where an earlier one of the order is not."""
    tensors, state, found, reason = checkpoints.load_first(order, keep, on_disk=on_disk)
    if reason is not None:
        note = f"{reason.where}: {reason.got}; {checkpoints.folder / found} is used in its place"
        warnings.warn(note, CheckpointWarning, stacklevel=3)
    return tensors, state, found
