"""Predict labels of texts with several rankers as one.

    from xmlkernels import Forest

    predictor = Forest.load(["runs/words/tree0", "runs/words/tree1"])
    for labels in predictor.predict(["open a file and read its lines"], k=5):
        print([(label.name, round(label.probability, 3)) for label in labels])

Letters: N texts, L labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.errors import InputError
from xmlkernels.predict.base import Text
from xmlkernels.predict.calibration import calibration_beside
from xmlkernels.predict.limits import FREE, Limit
from xmlkernels.predict.ranked import Ranked, RankedPredictor
from xmlkernels.predict.source import forest_identity
from xmlkernels.ranker.blend import combine


class Forest(Ranked):
    """Several rankers as one: the mean of their probabilities, given as log-odds.

    A label that a ranker's shortlist lacks has probability 0 by that ranker: the price of a short
    search. An allow-list needs no search, so every ranker scores every label of it, and a label
    that some of the shortlists lack has a higher score than without the list. Log-odds keep labels
    apart whose probabilities all round to 0 or to 1.

    Source: Prabhu et al., "Parabel" (WWW 2018), section 4: an ensemble of label trees.

    Args:
        rankers: one or more, of the same labels.

    Raises:
        InputError: none, rankers of different labels, or some of single texts and some of pairs.
    """

    def __init__(self, rankers: Sequence[RankedPredictor]) -> None:
        kinds = {(ranker.labels, ranker.takes_pairs) for ranker in rankers}
        if len(kinds) != 1:
            got = " and ".join(
                f"{labels:,} labels of {'pairs' if pairs else 'texts'}"
                for labels, pairs in sorted(kinds)
            )
            raise InputError(
                "rankers",
                "rankers of the same labels and texts",
                got or "none",
                "train them on one dataset",
            )
        self.rankers, self.label_names = tuple(rankers), rankers[0].label_names
        self.label_ids = rankers[0].label_ids
        self.labels, self.takes_pairs = rankers[0].labels, rankers[0].takes_pairs
        self.parts = rankers[0].parts

    @classmethod
    def load(
        cls, folders: Sequence[str | Path], checkpoint: str | Path | None = None, **options: Any
    ) -> Forest:
        """Load rankers as one.

        Where they are all that one folder holds, a calibration in it is theirs.

        Args:
            folders: the output folder of each.
            checkpoint, options: as of `RankedPredictor.load`.

        Raises:
            InputError: one cannot be loaded, or the rankers do not go together.
        """
        forest = cls([RankedPredictor.load(path, checkpoint, **options) for path in folders])
        identity = forest_identity([ranker.reranker for ranker in forest.rankers])
        parents = {Path(path).resolve().parent for path in folders}
        if len(forest.rankers) == 1:
            forest.calibration = forest.rankers[0].calibration
        elif len(parents) == 1:
            forest.calibration = calibration_beside(parents.pop(), forest.labels, identity)
        return forest

    def embed(self, texts: Iterable[Text], *, batch_size: int = 64) -> np.ndarray:
        """Embed N texts by the model that all its rankers have; see `TextPredictor.embed`."""
        models = {ranker.source.checkpoint for ranker in self.rankers}
        if len(models) > 1:
            mend = "ask one of the rankers"
            raise InputError("embed", "rankers of one model", f"those of {len(models)}", mend)
        return self.rankers[0].embed(texts, batch_size=batch_size)

    def scores(
        self,
        texts: Sequence[str],
        words: Sequence[str],
        k: int,
        *,
        batch_size: int = 64,
        limit: Limit = FREE,
    ) -> csr_matrix:
        """Score what is on any ranker's shortlist; see `Ranked.scores`."""
        parts = [
            ranker.scores(texts, words, k, batch_size=batch_size, limit=limit)
            for ranker in self.rankers
        ]
        return combine(
            parts,
            [part.data.astype(np.float64) for part in parts],
            [1.0] * len(parts),
            "probability",
        )
