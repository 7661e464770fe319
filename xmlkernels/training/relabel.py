"""Add labels to a trained model, or drop some, without training it again.

Letters: N documents, D width of an embedding, L labels.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.checkpoint.folder import load as load_checkpoint
from xmlkernels.checksums import of_files
from xmlkernels.data.formats.text_lines import read_lines
from xmlkernels.data.manifest import IDS
from xmlkernels.errors import InputError
from xmlkernels.locks import own_folder
from xmlkernels.options import check_least
from xmlkernels.predict.base import NAMES
from xmlkernels.predict.model import BESIDE, Predictor, checkpoint_identity
from xmlkernels.records import parse_record
from xmlkernels.training.folder import write_json, write_text
from xmlkernels.training.inputs import dataset_of_run
from xmlkernels.training.owned import refuse_others

log = logging.getLogger(__name__)

_STRENGTH = 10.0  # how little the rows of new labels are held small
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
    """The output folder of a run end to end."""
    output: str = ""
    """Folder of the new one; made when it is not there."""
    add: str = ""
    """A .jsonl file of new labels, per line {"name": …, "text": …}: the text, such as the name in
    words, stands for a document of the label."""
    documents: str = ""
    """With --add: a .jsonl file of documents, per line {"text": …, "labels": [names]}."""
    drop: str = ""
    """A .txt file of names of labels that go, one per line."""
    sample: int = 2000
    """With --add: training documents of the run, drawn at random, that have none of the new
    labels; with them and the given ones the new rows are trained."""
    batch: int = 64
    """Documents per pass."""


def relabel(options: LabelsConfig) -> dict[str, Any]:
    """Write a run with labels added and dropped; the rows of all others stay bit for bit.

    A new label's row is a logistic regression on embeddings: of its text and documents against
    those of other new labels and a sample of the run's training documents. The encoder and the
    other rows are not trained.

    Returns:
        How many labels there were, were added and dropped, and are.

    Raises:
        InputError: a run that cannot be changed so, files that cannot be used, or names that are
            there already or are not.
    """
    check_least(options, 1, "sample", "batch")
    if not options.add and not options.drop:
        raise InputError("--add", "labels to add or to --drop", "neither", "name a file")
    if not options.output:
        raise InputError("--output", "a folder for the new run", "none", "name one")
    if options.documents and not options.add:
        raise InputError("--documents", "--add with it", "none", "leave it out")
    refuse_others(options.output)
    predictor = Predictor.load(options.run)
    model, names = predictor.model, predictor.label_names
    if model.kind != "end_to_end":
        mend = "train the cascade again with its new labels"
        raise InputError(options.run, "a model end to end", "a cascade on a label tree", mend)
    if names is None:
        raise InputError(options.run, "a run whose labels have names", "one without", "name them")
    tensors = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    if "head.row_scale" in tensors:
        mend = "train it with --table bf16 or fp32"
        raise InputError(options.run, "a table of fp32, bf16 or fp16", "one of fp8", mend)
    gone = _dropped(options.drop, names) if options.drop else []
    kept = np.setdiff1d(np.arange(len(names)), gone)
    if not len(kept):
        raise InputError("--drop", "some of the labels", "all of them", "leave one")
    rows = {name: tensors[name][torch.from_numpy(kept)] for name in _tables(tensors, len(names))}
    added: list[str] = []
    if options.add:
        texts, documents = _read(options, set(names))
        added = list(texts)
        weight, bias = _new_rows(options, predictor, texts, documents)
        rows["head.weight"] = torch.cat([rows["head.weight"], weight.to(rows["head.weight"].dtype)])
        if "head.bias" in rows:
            rows["head.bias"] = torch.cat([rows["head.bias"], bias.to(rows["head.bias"].dtype)])
    every = [names[label] for label in kept] + added
    with own_folder(options.output) as folder:
        _write(folder, predictor, tensors | rows, every, kept)
    told = {"before": len(names), "added": len(added), "dropped": len(gone), "labels": len(every)}
    log.info(
        f"{told['before']:,} labels, {told['added']:,} added, {told['dropped']:,} dropped: "
        f"{told['labels']:,} in {options.output}/"
    )
    return told


def _tables(tensors: Mapping[str, Tensor], labels: int) -> list[str]:
    """Name the tensors of the label table."""
    return [name for name in ("head.weight", "head.bias") if name in tensors]


def _dropped(path: str, names: Sequence[str]) -> list[int]:
    """Return the numbers of the labels that a file names."""
    place = {name: number for number, name in enumerate(names)}
    found = []
    for line, name in enumerate(read_lines(path), 1):
        if name not in place:
            raise InputError(f"{path}:{line}", "the name of a label", repr(name), "leave it out")
        found.append(place[name])
    return found


def _read(
    options: LabelsConfig, known: set[str]
) -> tuple[dict[str, str], list[tuple[str, list[str]]]]:
    """Return the text of each new label by its name, and the documents with their labels."""
    texts: dict[str, str] = {}
    for line, told in enumerate(read_lines(options.add), 1):
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
        documents.append((one["text"], one["labels"]))
    return texts, documents


def _new_rows(
    options: LabelsConfig,
    predictor: Predictor,
    texts: Mapping[str, str],
    documents: Sequence[tuple[str, Sequence[str]]],
) -> tuple[Tensor, Tensor]:
    """Return weights fp32 [new, D] and biases fp32 [new]."""
    from sklearn.linear_model import LogisticRegression

    own = predictor.embed([*texts.values(), *(text for text, _ in documents)])
    x = np.concatenate([own, _sampled(options, predictor)])
    biased = predictor.model.head.bias is not None  # type: ignore[union-attr]
    weight, bias = np.zeros((len(texts), x.shape[1])), np.zeros(len(texts))
    for number, name in enumerate(texts):
        y = np.zeros(len(x), bool)
        y[number] = True
        y[len(texts) : len(own)] = [name in labels for _, labels in documents]
        found = LogisticRegression(C=_STRENGTH, fit_intercept=biased, max_iter=1000).fit(x, y)
        weight[number] = found.coef_[0]
        bias[number] = found.intercept_[0] if biased else 0.0
    return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()


def _sampled(options: LabelsConfig, predictor: Predictor) -> np.ndarray:
    """Embed a sample of the run's training documents: fp32 [n, D]."""
    split = dataset_of_run(Path(options.run)).splits["train"]
    found: list[np.ndarray] = []
    for batch in predictor.inputs.batches(split, options.batch, seed=0).epoch(0):
        found.append(predictor.model.embed(batch.to(predictor.model.device)).cpu().numpy())
        if sum(map(len, found)) >= options.sample:
            break
    return np.concatenate(found)[: options.sample]


def _write(
    folder: Path,
    predictor: Predictor,
    tensors: dict[str, Tensor],
    names: Sequence[str],
    kept: np.ndarray,
) -> None:
    """Write the checkpoint and what lies beside it, the calibration too."""
    assert predictor.folder is not None
    before, inner = predictor.folder.parent, folder / "checkpoint"
    inner.mkdir()
    for name in ("tokenizer", "vocabulary"):
        if (before / name).is_dir():
            shutil.copytree(before / name, inner / name)
    write_text(inner / NAMES, "".join(f"{name}\n" for name in names))
    if (ids := predictor.label_ids) is not None:
        every = [*(ids[label] for label in kept), *names[len(kept) :]]
        write_text(inner / IDS, "".join(f"{line}\n" for line in every))
    state = load_checkpoint(predictor.folder, lambda name: False)[1]
    config = predictor.model.config()
    config["head"] = config["head"] | {"labels": len(names)}
    # Whoever resumes a training needs the labels of its dataset.
    told = {"model": config, "inputs": state["inputs"], "beside": of_files(inner, BESIDE)}
    checkpoints = CheckpointFolder(inner)
    checkpoints.save_last(tensors, told)
    checkpoints.save_best()
    if (calibration := predictor.calibration) is not None:
        identity = checkpoint_identity(inner, "best")
        calibration.of_labels(kept, len(names) - len(kept), identity).save(inner)
    write_json(folder / "labels.json", {"labels": len(names), "from": predictor.identity})
