"""Add labels to what is trained, or drop some, without training it again.

Letters: N documents, D width of an embedding, L labels.
"""

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from xmlkernels.data.dataset import Split
from xmlkernels.data.formats.text_lines import read_lines
from xmlkernels.errors import InputError
from xmlkernels.locks import own_folder
from xmlkernels.options import check_least
from xmlkernels.predict.base import FOREST, TextPredictor
from xmlkernels.predict.folders import load
from xmlkernels.predict.forest import Forest
from xmlkernels.predict.model import Predictor
from xmlkernels.predict.ranked import RankedPredictor
from xmlkernels.predict.source import forest_identity
from xmlkernels.records import parse_record
from xmlkernels.training.folder import write_json, write_text
from xmlkernels.training.inputs import dataset_of_run
from xmlkernels.training.owned import refuse_others
from xmlkernels.training.relabel_model import relabel_model
from xmlkernels.training.relabel_ranker import relabel_ranker
from xmlkernels.training.relabelled import Change

log = logging.getLogger(__name__)

_MEND = "write one JSON object per line"


class NewLabel(TypedDict):
    """A line of --add."""

    name: str
    text: str


class Document(TypedDict):
    """A line of --documents."""

    text: str
    labels: list[str]


@dataclass(frozen=True)
class LabelsConfig:
    """Which run, and which labels come and go."""

    run: str
    """The output folder of a run, of a linear ranker, or of `linear --trees N`."""
    output: str = ""
    """Folder of the new one; made when it is not there."""
    add: str = ""
    """A .jsonl file of new labels, per line {"name": …, "text": …}: the text, such as the name in
    words, stands for a document of the label."""
    documents: str = ""
    """With --add or --epochs: a .jsonl file of documents, per line {"text": …, "labels":
    [names]}."""
    drop: str = ""
    """A .txt file of names of labels that go, one per line."""
    sample: int = 2000
    """With --add or --epochs: training documents of the run, drawn at random; with them and the
    given ones rows are trained."""
    batch: int = 64
    """Documents per pass, and per step of --epochs."""
    # ---- the rows of labels that are there already ----
    epochs: int = 0
    """Passes over the given and the sampled documents in which the label table alone is trained
    further; 0 leaves the rows of labels that are there already as they are."""
    lr: float = 0.05
    """With --epochs: learning rate of the table, by plain SGD on the mean loss of a document."""
    freeze: str = ""
    """With --epochs: a .txt file of names of labels whose rows stay as they are, one per line."""


def relabel(options: LabelsConfig) -> dict[str, Any]:
    """Write a run with labels added and dropped; without --epochs the rows of all others stay.

    A new label's row is trained on its text and documents against those of other new labels and a
    sample of the run's training documents. On a label tree it joins the cluster that its text and
    documents point to. The encoder and the classifiers of clusters are not trained.

    Returns:
        How many labels there were, were added, dropped and frozen, and are.

    Raises:
        InputError: a run that cannot be changed so, files that cannot be used, or names that are
            there already or are not.
    """
    _check(options)
    refuse_others(options.output)
    predictor = load(options.run)
    _check_kind(options, predictor)
    names = predictor.label_names
    if names is None:
        raise InputError(options.run, "a run whose labels have names", "one without", "name them")
    change = _change(options, names)
    with own_folder(options.output) as folder:
        if isinstance(predictor, Predictor):
            relabel_model(predictor, change, folder)
        elif isinstance(predictor, Forest):
            _forest(predictor, change, folder)
        else:
            assert isinstance(predictor, RankedPredictor)
            relabel_ranker(predictor, change, folder)
        every, left = len(change.every), len(change.kept)
        told = {"before": len(names), "added": every - left, "dropped": len(names) - left}
        told |= {"frozen": len(change.frozen), "labels": every}
        write_json(folder / "labels.json", told | {"from": options.run})
    log.info(
        f"{told['before']:,} labels, {told['added']:,} added, {told['dropped']:,} dropped: "
        f"{told['labels']:,} in {options.output}/"
    )
    return told


def _check(options: LabelsConfig) -> None:
    check_least(options, 1, "sample", "batch")
    check_least(options, 0, "epochs")
    if not options.add and not options.drop and not options.epochs:
        mend = "name a file"
        raise InputError("--add", "labels to add or to --drop, or --epochs", "neither", mend)
    if not options.output:
        raise InputError("--output", "a folder for the new run", "none", "name one")
    if options.documents and not options.add and not options.epochs:
        expected = "--add or --epochs with it"
        raise InputError("--documents", expected, "neither", "leave it out")
    if options.freeze and not options.epochs:
        mend = "leave it out: without --epochs no row that is there changes"
        raise InputError("--freeze", "--epochs of 1 or more", "0", mend)
    if not 0 < options.lr < float("inf"):
        raise InputError("--lr", "a finite number above 0", repr(options.lr), "choose another")


def _check_kind(options: LabelsConfig, predictor: TextPredictor) -> None:
    """Refuse what has no label table of its own to change."""
    if isinstance(predictor, Predictor):
        return
    parts = predictor.rankers if isinstance(predictor, Forest) else (predictor,)
    assert all(isinstance(part, RankedPredictor) for part in parts)
    if any(part.source.shortlist == "model" for part in parts):  # type: ignore[attr-defined]
        mend = "change the labels of the run, then train the ranker beside it again"
        raise InputError(options.run, "a run or a linear ranker", "a ranker beside a run", mend)
    if any(part.source.words != "same" for part in parts):  # type: ignore[attr-defined]
        mend = "train it again with its new labels"
        raise InputError(options.run, "a ranker of one text each", "one of pairs", mend)
    if options.epochs:
        mend = "leave it out, or train the ranker again"
        raise InputError("--epochs", "the run of a model", "a linear ranker", mend)


def _change(options: LabelsConfig, names: Sequence[str]) -> Change:
    """Read what is to change."""
    place = {name: number for number, name in enumerate(names)}
    gone = _numbers(options.drop, place)
    kept = np.setdiff1d(np.arange(len(names)), gone)
    if not len(kept):
        raise InputError("--drop", "some of the labels", "all of them", "leave one")
    left = [names[label] for label in kept]
    texts, documents = _read(options, set(names), set(left))
    frozen = _numbers(options.freeze, {name: number for number, name in enumerate(left)})
    split: Split | None = None
    if options.add or options.epochs:
        split = dataset_of_run(Path(options.run)).splits["train"]
    return Change(
        kept=kept,
        every=[*left, *texts],
        texts=list(texts.values()),
        documents=documents,
        frozen=np.array(sorted(set(frozen)), np.int64),
        train=split,
        sample=options.sample,
        batch=options.batch,
        epochs=options.epochs,
        lr=options.lr,
    )


def _numbers(path: str, place: dict[str, int]) -> list[int]:
    """Return the numbers of the labels that a file names; none without a file."""
    found = []
    for line, name in enumerate(read_lines(path) if path else (), 1):
        if name not in place:
            raise InputError(f"{path}:{line}", "the name of a label", repr(name), "leave it out")
        found.append(place[name])
    return found


def _read(
    options: LabelsConfig, known: Collection[str], left: Collection[str]
) -> tuple[dict[str, str], list[tuple[str, list[str]]]]:
    """Return the text of each new label by its name, and the documents with their labels."""
    texts: dict[str, str] = {}
    for line, told in enumerate(read_lines(options.add) if options.add else (), 1):
        where = f"{options.add}:{line}"
        label = parse_record(told, NewLabel, where=where, mend=_MEND)
        if label["name"] in known or label["name"] in texts:
            raise InputError(where, "a new name", repr(label["name"]), "give each label once")
        texts[label["name"]] = label["text"]
    documents = []
    for line, told in enumerate(read_lines(options.documents) if options.documents else (), 1):
        where = f"{options.documents}:{line}"
        one = parse_record(told, Document, where=where, mend=_MEND)
        if other := [name for name in one["labels"] if name not in texts and name not in known]:
            raise InputError(where, "names of labels", repr(other[0]), "add it to --add")
        stay = [name for name in one["labels"] if name in texts or name in left]
        documents.append((one["text"], stay))
    return texts, documents


def _forest(forest: Forest, change: Change, folder: Path) -> None:
    """Change every ranker of a forest."""
    write_text(folder / FOREST, json.dumps({"trees": len(forest.rankers)}) + "\n")
    made = []
    for number, ranker in enumerate(forest.rankers):
        inner = folder / f"tree{number}"
        inner.mkdir()
        made.append(relabel_ranker(ranker, change, inner))
    if forest.calibration is not None:
        change.calibrated(forest.calibration, forest_identity(made)).save(folder)
