"""Why a text got its labels: the training documents that are most like it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from xmlkernels.data.dataset import Dataset
from xmlkernels.data.text_parts import TextParts
from xmlkernels.errors import InputError
from xmlkernels.predict.base import TextPredictor
from xmlkernels.predict.folders import dataset_folder, named_in
from xmlkernels.predict.forest import Forest
from xmlkernels.predict.ranked import RankedPredictor
from xmlkernels.ranker.knn import KNNBaseline

_SHOWN = 600  # characters of a document


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The training documents of a model, to be searched by their words.

    Attributes:
        baseline: their TF-IDF; None where there is no search.
        texts: N of them.
        labels: of each the numbers of its labels.
        reason: why there is no search; "" where there is one.
    """

    baseline: KNNBaseline | None
    texts: list[str]
    labels: list[list[int]]
    reason: str = ""

    def nearest(self, text: str, count: int) -> list[dict[str, Any]]:
        """Find the documents with the most similar words, the most similar first.

        Args:
            text: what they are compared with.
            count: of documents at most.

        Returns:
            Of each the beginning of its `text`, its `similarity` (cosine of TF-IDF, from 0 to 1)
            and the numbers of its `labels`.
        """
        if self.baseline is None:
            return []
        similarity, rows = self.baseline.nearest([text], count)
        return [
            {
                "text": TextParts().plain(self.texts[row])[:_SHOWN],
                "similarity": float(value),
                "labels": self.labels[row],
            }
            for value, row in zip(similarity[0].tolist(), rows[0].tolist(), strict=True)
            if row >= 0
        ]


def find_neighbours(predictor: TextPredictor, folder: Path, dataset: str, most: int) -> Neighbours:
    """Prepare the search among the documents that a model was trained on.

    Args:
        predictor: the model.
        folder: where it was loaded from.
        dataset: its dataset folder; "" for the one that its own files name.
        most: training documents that are searched at most; 0 switches the search off.

    Raises:
        InputError: a dataset that was named and cannot be used.
    """
    if most == 0:
        return _none("it is switched off (--neighbours 0)")
    try:
        opened = Dataset.open(dataset or _trained_on(predictor, folder))
        _check(opened, predictor)
        train = opened.splits["train"]
        if len(train) > most:
            return _none(
                f"the model has {len(train):,} training documents, and --neighbours searches "
                f"{most:,} at most"
            )
        texts = train.texts
        labels = train.labels
        baseline = KNNBaseline(texts, labels)
    except InputError as error:
        if dataset:
            raise
        return _none(str(error))
    ends = labels.indptr.tolist()
    return Neighbours(
        baseline,
        texts,
        [labels.indices[a:b].tolist() for a, b in pairwise(ends)],
    )


def _none(reason: str) -> Neighbours:
    return Neighbours(None, [], [], reason)


def _check(dataset: Dataset, predictor: TextPredictor) -> None:
    where, mend = str(dataset.folder), "name the model's own dataset with --dataset"
    if "train" not in dataset.splits:
        raise InputError(where, "training documents", "none", mend)
    names = predictor.label_names
    same = dataset.num_labels == predictor.labels
    if not same or (names is not None and dataset.label_names not in (None, names)):
        raise InputError(where, "the labels of this model", "others", mend)


def _trained_on(predictor: TextPredictor, folder: Path) -> str:
    """Return the dataset folder that the files of a model name."""
    mend = "name it with --dataset"
    if isinstance(predictor, Forest):
        predictor = predictor.rankers[0]
    if (place := dataset_folder(folder)) is not None:
        return str(place)
    if isinstance(predictor, RankedPredictor):
        found = predictor.reranker.ranker.facts.get("options", {}).get("dataset")
    else:
        found = named_in(folder, "config.json", "dataset")
    if not isinstance(found, str) or not found:
        raise InputError(str(folder), "the dataset that it was trained on", "no word of it", mend)
    if not Path(found).is_dir():
        raise InputError(found, "the dataset that the model was trained on", "no such folder", mend)
    return found
