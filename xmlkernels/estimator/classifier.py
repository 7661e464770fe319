"""A scikit-learn estimator over the package's own training: many labels in little memory.

    from xmlkernels import XMLClassifier

    model = XMLClassifier(settings={"min_df": 1}).fit(texts, label_lists)
    places, probabilities = model.predict_topk(["a text to label"], k=5)
    print(model.classes_[places[0]])

Letters: N documents, V columns of features, L labels, k labels of each document.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from scipy.sparse import csr_matrix, issparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import validate_data

from xmlkernels.data.dataset import Dataset, Split
from xmlkernels.errors import InputError
from xmlkernels.estimator.further import continue_rankers, keep_rankers, rankers_of
from xmlkernels.estimator.targets import (
    LISTS,
    SINGLE,
    count,
    encode_targets,
    is_texts,
    joined,
    read_targets,
)
from xmlkernels.evaluation import predict_split
from xmlkernels.options import replaced
from xmlkernels.predict.base import RANKER, TextPredictor, check_k
from xmlkernels.predict.calibration import sigmoid
from xmlkernels.predict.folders import load
from xmlkernels.predict.model import Predictor
from xmlkernels.predict.ranked import RankedPredictor
from xmlkernels.ranker.blend import best
from xmlkernels.ranker.linear import Settings
from xmlkernels.training.linear import LinearConfig
from xmlkernels.training.loop import train
from xmlkernels.training.recipes import RECIPES

CSR_OUTPUT = "predict gives a sparse matrix, for a dense one of many labels would not fit"
EXPECTED_FAILED_CHECKS = {
    "check_classifiers_multilabel_representation_invariance": CSR_OUTPUT,
    "check_classifiers_multilabel_output_format_predict": CSR_OUTPUT,
}
"""For scikit-learn's `check_estimator(…, expected_failed_checks=…)`: what fails, and why."""
KEPT = 100  # best labels of a document that `predict` looks at
_CALIBRATED_FROM = 1000  # documents from which a tenth is held out by "auto"
_HELD_OUT = 0.1
_NO_PAIRS = np.zeros((0, 2), np.int64)


class XMLClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Many-label classification of texts or feature matrices, as scikit-learn has it.

    Training is that of `xmlkernels train`: a folder of data is written, a recipe runs on it, and
    the estimator asks what it has written. Neither N x L nor L x V numbers are ever held.

    Args:
        model: a recipe: "linear", "bow", or one with a transformer such as "minilm" (texts alone).
        settings: changes of the recipe's settings, by the names of its flags; those of `linear`'s
            classifiers (cost, epochs, negatives …) among them.
        threshold: `predict` gives labels of at least this probability; "f1" is the one that had the
            highest micro-F1 on the documents held out, and asks for a calibrated model.
        validation_share: of the documents, held out to choose the recipe's open settings and to
            calibrate probabilities. "auto" is 0.1 from 1,000 documents on, and 0 below.
        cache: a folder for data, label trees and the trained model, which stay there; a temporary
            one when not given, of which the trained model alone stays, as long as the estimator.
        max_dense: numbers N x L that `predict_proba` may make.
        threads: CPU threads; 0 takes all.
        random_state: seed of the split and of the training.

    Attributes:
        classes_: [L], the labels, sorted: strings, or numbers of columns or classes.
        n_features_in_: V, of feature matrices.
        predictor_: what answers: a `Predictor` or a `RankedPredictor`.
    """

    def __init__(
        self,
        model: str = "linear",
        *,
        settings: Mapping[str, Any] | None = None,
        threshold: float | str = 0.5,
        validation_share: float | str = "auto",
        cache: str | Path | None = None,
        max_dense: int = 100_000_000,
        threads: int = 0,
        random_state: int | None = 0,
    ) -> None:
        self.model = model
        self.settings = settings
        self.threshold = threshold
        self.validation_share = validation_share
        self.cache = cache
        self.max_dense = max_dense
        self.threads = threads
        self.random_state = random_state

    # ---- training ----

    def fit(self, X: Any, y: Any) -> Self:
        """Train on N documents.

        Args:
            X: texts, or a feature matrix [N, V], sparse or dense, whose values are taken as they
                are.
            y: a list of label names for each document; or a matrix [N, L] of zeros and ones,
                sparse where labels are many; or one class for each document.

        Raises:
            InputError: documents, labels or settings that cannot be used.
        """
        documents = self._documents(X, first=True)
        self._held = [(documents, read_targets(y, count(documents)))]
        self._train(None)
        self._held = []
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        """Train further on N documents; the first call, unless `fit` came before, trains a model.

        `linear` goes on from its weights, with words, tree and calibration of the first call. Any
        other model keeps documents, and trains on all of them when it is asked.

        Args:
            X, y: as of `fit`, of one kind in all calls.
            classes: in the first call all labels, where later calls bring more; an InputError
                refuses those that it did not name.
        """
        first = not (getattr(self, "_held", None) or hasattr(self, "predictor_"))
        documents = self._documents(X, first=first)
        targets = read_targets(y, count(documents))
        if not first and targets.kind != (self._held[0][1].kind if self._held else self._kind):
            raise InputError("y", "labels of the same kind as before", "others", "convert them")
        if not first and not self._held and rankers_of(self.predictor_):
            _, labels = encode_targets([targets], self.classes_)
            continue_rankers(self.predictor_, documents, labels)
            self._changed = True
            return self
        if not getattr(self, "_held", None):
            self._held, self._all_classes = [], None if classes is None else np.unique(classes)
        self._held.append((documents, targets))
        self._waiting = True
        if self.model in RECIPES and isinstance(RECIPES[self.model].config, LinearConfig):
            self._train(self._all_classes)
            self._held = []
        return self

    def _train(self, classes: np.ndarray | None) -> None:
        """Train on what is held."""
        documents = joined([documents for documents, _ in self._held])
        targets = [targets for _, targets in self._held]
        self.classes_, labels = encode_targets(targets, classes)
        self._kind, self._waiting = targets[0].kind, False
        own = None
        if self.cache is None:
            own = tempfile.TemporaryDirectory(prefix="xmlkernels-")
        folder = Path(own.name) if own is not None else Path(str(self.cache))
        data = folder / "data"
        recipe, changes, encoder = self._settings(data, folder, bags=issparse(documents))
        names = [str(name) for name in self.classes_] if self._kind == LISTS else None
        Dataset.from_texts(
            data,
            (documents, labels),
            tokenizer=encoder,
            label_names=names,
            validation_share=self._held_out(labels.shape[0]),
            seed=self.random_state or 0,
            overwrite=True,
        )
        train(recipe.replace(**changes))
        if own is not None:  # the model stays, as long as this estimator
            shutil.rmtree(data)
            shutil.rmtree(folder / "cache", ignore_errors=True)
        self._own, self._folder, self._changed = own, folder / "model", False
        self.predictor_: TextPredictor = self._load()

    def _settings(
        self, data: Path, folder: Path, *, bags: bool
    ) -> tuple[Any, dict[str, Any], str | None]:
        """Return the recipe, its changes, and the name of its tokenizer, where it has one."""
        if self.model not in RECIPES:
            mend = "xmlkernels train lists them"
            raise InputError("model", "the name of a recipe", repr(self.model), mend)
        if not isinstance(self.settings, Mapping | None):
            mend = 'give a dict, such as {"min_df": 1}'
            raise InputError("settings", "settings by name", repr(self.settings), mend)
        recipe, settings = RECIPES[self.model], dict(self.settings or {})
        seed = self.random_state or 0
        places = {"dataset": str(data), "output": str(folder / "model")}
        places["cache"] = str(folder / "cache")
        if taken := sorted((places.keys() | {"threads", "seed", "overwrite"}) & settings.keys()):
            mend = "use cache, threads and random_state"
            raise InputError("settings", "settings of the model", repr(taken[0]), mend)
        if isinstance(recipe.config, LinearConfig):
            solver = {field.name for field in fields(Settings)}
            inner = {name: settings.pop(name) for name in sorted(solver & settings.keys())}
            training = replaced(recipe.config.training, {"seed": seed, **inner})
            if bags and settings.get("trees", 1) != 1:
                mend = "leave trees out"
                raise InputError("settings", "one tree on a feature matrix", "trees", mend)
            more: dict[str, Any] = {"training": training, "overwrite": True}
            encoder = None
        else:
            more = {"seed": seed, "overwrite": True}
            encoder = None if recipe.config.encoder == "bow" else str(recipe.config.encoder)
            if bags and encoder is not None:
                mend = 'give texts, or take model="linear" or "bow"'
                raise InputError("X", f"texts, which {encoder} reads", "a feature matrix", mend)
        changes = settings | places | more | {"threads": self.threads}
        return recipe, changes, encoder

    def _held_out(self, documents: int) -> float:
        if self.validation_share == "auto":
            return _HELD_OUT if documents >= _CALIBRATED_FROM else 0.0
        if isinstance(self.validation_share, str):
            got = repr(self.validation_share)
            raise InputError("validation_share", 'a share below 1, or "auto"', got, "correct it")
        return float(self.validation_share)

    def _load(self) -> TextPredictor:
        if (self._folder / RANKER).is_file():
            return RankedPredictor.load(self._folder, threads=self.threads, features=True)
        return load(self._folder, threads=self.threads)

    # ---- questions ----

    def predict_topk(self, X: Any, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """Return the k best labels of each document, best first.

        Returns:
            Places in `classes_`, int64 [N, k], -1 where a shortlist has fewer; and probabilities
            fp64 [N, k], calibrated where documents were held out. k is L where there are fewer
            labels than asked for.
        """
        self._check_trained()
        check_k(k)
        k = min(k, len(self.classes_))
        documents, model = self._documents(X, first=False), self.predictor_
        if not issparse(documents):
            values, rows = model.predict_arrays(documents, k)
        elif isinstance(model, RankedPredictor):
            values, rows = best(model.score_features(documents, k), _NO_PAIRS, k)
        else:
            assert isinstance(model, Predictor)
            none = csr_matrix((documents.shape[0], model.labels), dtype=np.float32)
            split = Split("asked", Path(), documents, none, _NO_PAIRS)
            values, rows = predict_split(model.model, split, k, inputs=model.inputs)
        return rows, model.probabilities(values, rows)

    def predict(self, X: Any) -> Any:
        """Return the labels of each document that reach `threshold`, among its 100 best.

        Returns:
            CSR int8 [N, L] of ones; or, where y had one class for each document, the best class of
            each, [N].
        """
        single = self._is_single()
        rows, probabilities = self.predict_topk(X, 1 if single else min(KEPT, len(self.classes_)))
        if single:
            return self.classes_[np.maximum(rows[:, 0], 0)]
        kept = (rows >= 0) & (probabilities >= self._least())
        places = np.repeat(np.arange(len(rows)), kept.sum(1))
        ones = np.ones(len(places), np.int8)
        found = csr_matrix((ones, (places, rows[kept])), (len(rows), len(self.classes_)))
        found.sort_indices()
        return found

    def _least(self) -> float:
        """Return the probability that `predict` asks of a label."""
        if not isinstance(self.threshold, str) and 0 <= self.threshold <= 1:
            return self.threshold
        if self.threshold != "f1":
            expected = 'a probability from 0 to 1, or "f1"'
            raise InputError("threshold", expected, repr(self.threshold), "correct it")
        calibration = self.predictor_.calibration
        if calibration is None:
            mend = (
                f"hold documents out (validation_share; {_CALIBRATED_FROM:,} documents by default)"
            )
            raise InputError("threshold", "a calibrated model", "one without", mend)
        return float(sigmoid(np.array(calibration.f1_cut)))

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of every label, fp64 [N, L]; 0 for those that no shortlist holds.

        Where y had one class for each document, a row sums to 1.

        Raises:
            InputError: more than `max_dense` numbers.
        """
        single = self._is_single()
        documents, labels = self._documents(X, first=False), len(self.classes_)
        if (numbers := count(documents) * labels) > self.max_dense:
            got = f"{count(documents):,} x {labels:,}"
            mend = "ask predict_topk, or fewer documents at a time"
            raise InputError("predict_proba", f"{self.max_dense:,} numbers at most", got, mend)
        out = np.zeros((count(documents), labels))
        if numbers:
            rows, probabilities = self.predict_topk(X, labels)
            there = rows >= 0
            out[np.nonzero(there)[0], rows[there]] = probabilities[there]
        if single:
            total = out.sum(1, keepdims=True)
            out = np.where(total > 0, out / np.where(total > 0, total, 1), 1 / labels)
        return out

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return P@1, the share of documents whose best label is right.

        Of one class for each document it is the accuracy.
        """
        single = self._is_single()
        rows, _ = self.predict_topk(X, 1)
        targets = read_targets(y, len(rows))
        if single:
            right = self.classes_[np.maximum(rows[:, 0], 0)] == np.asarray(targets.labels)
        else:
            _, truth = encode_targets([targets], self.classes_, unknown="ignore")
            right = np.asarray(truth[np.arange(len(rows)), np.maximum(rows[:, 0], 0)]).ravel() > 0
        return float(np.average(right, weights=sample_weight))

    def _is_single(self) -> bool:
        self._check_trained()
        return self._kind == SINGLE

    def _check_trained(self) -> None:
        if getattr(self, "_waiting", False):
            self._train(self._all_classes)
        if not hasattr(self, "predictor_"):
            raise NotFittedError("XMLClassifier is not fitted yet; call fit first")

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "predictor_") or getattr(self, "_waiting", False)

    def _documents(self, X: Any, *, first: bool) -> Any:
        """Return texts as a list, or a feature matrix as CSR float32 [N, V]."""
        if is_texts(X):
            if not first and hasattr(self, "n_features_in_"):
                got = "texts"
                raise InputError("X", "a feature matrix, as before", got, "give the features")
            return [str(text) for text in X]
        if isinstance(X, list | tuple) and not X:
            if first:
                raise InputError("X", "documents", "none", "give one or more")
            if not hasattr(self, "n_features_in_"):
                return []
        if not first and not hasattr(self, "n_features_in_"):
            raise InputError("X", "texts, as before", "a feature matrix", "give the texts")
        found = validate_data(self, X, accept_sparse="csr", dtype=np.float32, reset=first)
        return csr_matrix(found)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.classifier_tags.multi_label = True
        return tags

    # ---- pickle ----

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with the trained model's files, so that a copy needs no folder."""
        if getattr(self, "_changed", False):  # since the files were written
            keep_rankers(self.predictor_)
        state = dict(super().__getstate__())
        if state.pop("predictor_", None) is not None:
            folder = state.pop("_folder")
            state.pop("_own")
            state["_files"] = {
                path.relative_to(folder).as_posix(): path.read_bytes()
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Write the files of a copy into a temporary folder of its own, and load the model."""
        files = state.pop("_files", None)
        super().__setstate__(state)
        if files is None:
            return
        self._own = tempfile.TemporaryDirectory(prefix="xmlkernels-")
        self._folder = Path(self._own.name) / "model"
        for name, content in files.items():
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self.predictor_ = self._load()
