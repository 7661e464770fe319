"""The scikit-learn estimator: texts and matrices, three kinds of labels, and what scikit-learn's
own tools ask of it.
"""

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix, issparse
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator

import xmlkernels as xk
from xmlkernels import InputError
from xmlkernels.estimator import further
from xmlkernels.estimator.classifier import EXPECTED_FAILED_CHECKS
from xmlkernels.predict.calibration import sigmoid

NAMES = [f"l{n}" for n in range(7)] + [f"m{n}" for n in range(5)]
TEXTS = [f"w{n % 7} {'v' + str(n * 3 % 5) if n % 2 else ''} w{n % 7}" for n in range(70)]
LISTS = [[f"l{n % 7}"] + ([f"m{n * 3 % 5}"] if n % 2 else []) for n in range(70)]
SMALL: dict[str, Any] = {"settings": {"min_df": 1}, "threads": 1}
BOW: dict[str, Any] = {
    "model": "bow",
    "settings": {"epochs": 5, "batch": 16, "bow_width": 16, "min_df": 1},
    "threads": 1,
}


@pytest.fixture(scope="module")
def matrices() -> tuple[csr_matrix, csr_matrix]:
    truth = np.array([[name in row for name in NAMES] for row in LISTS])
    return TfidfVectorizer().fit_transform(TEXTS), csr_matrix(truth.astype(int))


@pytest.fixture(scope="module")
def fitted() -> Any:
    return xk.XMLClassifier(**SMALL).fit(TEXTS, LISTS)


def test_texts_and_lists_of_names(fitted: Any) -> None:
    assert fitted.classes_.tolist() == NAMES and fitted.score(TEXTS, LISTS) == 1.0
    rows, probabilities = fitted.predict_topk(TEXTS, 3)
    assert rows.shape == probabilities.shape == (70, 3)
    dense = fitted.predict_proba(TEXTS)
    assert np.allclose(np.take_along_axis(dense, rows, 1), probabilities)
    assert (np.diff(probabilities, axis=1) <= 0).all()
    low, high = (clone(fitted).set_params(threshold=t).fit(TEXTS, LISTS) for t in (0.35, 0.65))
    for model in (low, high):
        found = model.predict(TEXTS)
        assert issparse(found) and found.shape == (70, 12)
        assert ((found.toarray() > 0) == (dense >= model.threshold)).all()
    assert low.predict(TEXTS).nnz > high.predict(TEXTS).nnz > 0


@pytest.mark.parametrize("how", [SMALL, BOW], ids=["linear", "bow"])
def test_matrices(how: dict[str, Any], matrices: tuple[csr_matrix, csr_matrix]) -> None:
    words, truth = matrices
    settings = dict(how["settings"])
    model = xk.XMLClassifier(**how | {"settings": settings}).fit(words, truth)
    assert model.classes_.tolist() == list(range(12)) and model.n_features_in_ == words.shape[1]
    assert model.score(words, truth) > 0.9
    dense = xk.XMLClassifier(**how | {"settings": settings}).fit(words.toarray(), truth.toarray())
    assert np.array_equal(dense.predict_proba(words), model.predict_proba(words))
    with pytest.raises(InputError, match="expected a feature matrix, as before, got texts"):
        model.predict(TEXTS)


def test_one_class_each(matrices: tuple[csr_matrix, csr_matrix]) -> None:
    classes = np.array([row[0] for row in LISTS])
    model = xk.XMLClassifier(**SMALL).fit(TEXTS, classes)
    assert model.predict(TEXTS).tolist() == classes.tolist() and model.score(TEXTS, classes) == 1
    assert np.allclose(model.predict_proba(TEXTS).sum(1), 1)


def test_a_part_at_a_time(fitted: Any) -> None:
    """The first call is `fit`; later ones learn from their documents, and keep what was known."""
    model = xk.XMLClassifier(**SMALL).partial_fit(TEXTS, LISTS)
    assert np.array_equal(model.predict_proba(TEXTS), fitted.predict_proba(TEXTS))
    ranker = model.predictor_.reranker.ranker
    # One label moves to other words, in a batch of ten documents.
    text, (old, *_), other = TEXTS[0], LISTS[0], next(x for x in LISTS if x[0] not in LISTS[0])[0]
    before = model.predict_proba([text])[0]
    model.partial_fit([text] * 10, [[other]] * 10)
    after, place = model.predict_proba([text])[0], model.classes_.tolist().index
    assert after[place(other)] > before[place(other)] and after[place(old)] < before[place(old)]
    assert model.score(TEXTS[20:], LISTS[20:]) > 0.5
    assert ranker is not model.predictor_.reranker.ranker
    copy = pickle.loads(pickle.dumps(model))
    assert np.array_equal(copy.predict_proba(TEXTS), model.predict_proba(TEXTS))
    assert not np.array_equal(copy.predict_proba(TEXTS), fitted.predict_proba(TEXTS))
    with pytest.raises(InputError, match="labels among classes, got 'new'; name every class in"):
        model.partial_fit(TEXTS[:1], [["new"]])
    with pytest.raises(InputError, match="labels of the same kind as before"):
        model.partial_fit(TEXTS[:1], ["new"])
    one = xk.XMLClassifier(**SMALL).partial_fit(TEXTS[:3], ["a", "b", "a"], classes=["a", "b", "c"])
    assert one.predict_proba(TEXTS[:2]).shape == (2, 3)
    one.partial_fit([TEXTS[5]] * 4, ["c"] * 4)
    assert one.predict([TEXTS[5]]).tolist() == ["c"]
    with pytest.raises(InputError, match="labels among classes, got 'd'"):
        one.partial_fit(TEXTS[:1], ["d"])


@pytest.mark.parametrize("trees", [1, 2])
def test_a_later_part_works_on_its_own_documents_alone(
    trees: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SMALL["settings"] | {"depths": (1,), "trees": trees}
    model = xk.XMLClassifier(**SMALL | {"settings": settings}).partial_fit(TEXTS, LISTS)
    monkeypatch.setattr(model, "_train", pytest.fail)
    seen: list[int] = []
    whole = further.train_further

    def counted(ranker: Any, features: Any, *arguments: Any) -> Any:
        seen.append(len(features))
        return whole(ranker, features, *arguments)

    monkeypatch.setattr(further, "train_further", counted)
    other = next(x for x in LISTS if x[0] not in LISTS[0])[0]
    before = model.predict_proba(TEXTS[:1])[0]
    for _ in range(3):
        model.partial_fit(TEXTS[:1] * 2, [[other]] * 2)
    assert seen == [2] * 6 * trees  # of a level of clusters and of the labels
    place = model.classes_.tolist().index(other)
    assert model.predict_proba(TEXTS[:1])[0][place] > before[place]
    copy = pickle.loads(pickle.dumps(model))
    assert np.array_equal(copy.predict_proba(TEXTS), model.predict_proba(TEXTS))


def test_another_model_is_trained_again_on_everything() -> None:
    small = SMALL | {"settings": {"min_df": 1, "epochs": 1, "bow_width": 8}}
    model = xk.XMLClassifier("bow", **small).partial_fit(TEXTS[:30], LISTS[:30])
    model.partial_fit(TEXTS[30:], LISTS[30:])
    whole = xk.XMLClassifier("bow", **small).fit(TEXTS, LISTS)
    assert np.array_equal(model.predict_proba(TEXTS), whole.predict_proba(TEXTS))


def test_pipeline_search_and_copies(fitted: Any, matrices: tuple[csr_matrix, csr_matrix]) -> None:
    _, truth = matrices
    pipeline = make_pipeline(TfidfVectorizer(), xk.XMLClassifier(threads=1))
    search = GridSearchCV(pipeline, {"xmlclassifier__settings": [None, {"cost": 1e-6}]}, cv=2)
    search.fit(TEXTS, truth)
    assert search.best_params_ == {"xmlclassifier__settings": None} and search.best_score_ == 1
    copy = pickle.loads(pickle.dumps(fitted))
    folder = fitted._folder
    assert copy._folder != folder
    assert np.array_equal(copy.predict_proba(TEXTS), fitted.predict_proba(TEXTS))
    with pytest.raises(NotFittedError):
        clone(fitted).predict(TEXTS)


def test_settings_and_places(tmp_path: Path, fitted: Any) -> None:
    """The folder keeps data and model; validation calibrates; the seed and the share are used."""
    model = xk.XMLClassifier(
        **SMALL, cache=tmp_path / "kept", validation_share=0.4, random_state=3, max_dense=100
    ).fit(TEXTS * 8, LISTS * 8)
    kept = xk.Dataset.open(tmp_path / "kept" / "data")
    assert len(kept.splits["val"]) == round(0.4 * 560) and model.predictor_.calibration is not None
    other = xk.XMLClassifier(**SMALL, validation_share=0.4, random_state=4).fit(
        TEXTS * 8, LISTS * 8
    )
    assert not np.array_equal(other.predict_topk(TEXTS, 2)[1], model.predict_topk(TEXTS, 2)[1])
    assert xk.load(tmp_path / "kept" / "model").labels == 12
    with pytest.raises(InputError, match=r"100 numbers at most, got 70 x 12; ask predict_topk"):
        model.predict_proba(TEXTS)
    assert model.predict_proba(TEXTS[:2]).shape == (2, 12)
    rows, probabilities = model.predict_topk(TEXTS, 12)
    model.threshold = "f1"
    least = sigmoid(np.array(model.predictor_.calibration.f1_cut))
    places = np.zeros((70, 12), bool)
    np.put_along_axis(places, rows, probabilities >= least, 1)
    assert np.array_equal(model.predict(TEXTS).toarray() > 0, places) and places.any()
    model.threshold = "calibrated"
    with pytest.raises(InputError, match='threshold: expected a probability from 0 to 1, or "f1"'):
        model.predict(TEXTS)
    plain = clone(fitted).set_params(threshold="f1").fit(TEXTS, LISTS)
    with pytest.raises(InputError, match="threshold: expected a calibrated model, got one without"):
        plain.predict(TEXTS)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"model": "no"}, "model: expected the name of a recipe"),
        ({"settings": {"dataset": "x"}}, "use cache, threads and random_state"),
        ({"settings": {"min_dff": 1}}, "did you mean min_df"),
        ({"validation_share": "some"}, 'a share below 1, or "auto"'),
        ({"settings": "min_df=1"}, "settings: expected settings by name, got 'min_df=1'"),
        ({"settings": {"min_df": "x"}}, "min_df: expected a whole number, got 'x'"),
        ({"settings": {"min_df": True}}, "min_df: expected a whole number, got True"),
        ({"settings": {"prune": "x"}}, "prune: expected a number, got 'x'"),
    ],
)
def test_wrong_settings(how: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        xk.XMLClassifier(**how).fit(TEXTS, LISTS)


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (LISTS[:3], "labels of 70 documents, got 3"),
        (np.full((70, 2), 0.5), "a matrix of zeros and ones"),
        (np.zeros((70, 2, 2)), "an array of 3 dimensions"),
        ([["a", None]] * 70, "y: document 0: expected names of labels, got None or NaN"),
        ([[1, 2]] * 70, "zeros and ones, got other values; correct it, or write the names of"),
    ],
)
def test_wrong_labels(labels: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        xk.XMLClassifier(**SMALL).fit(TEXTS, labels)


def test_documents_that_are_no_texts(fitted: Any) -> None:
    for documents, told in (
        ("one text", r"X: expected a list of texts, .* got 'one text'; write \[text\]"),
        (["a", None], "X: document 1: expected a text, got NoneType"),
        ([b"a"], "X: document 0: expected a text, got bytes"),
    ):
        with pytest.raises(InputError, match=told):
            fitted.predict(documents)
        with pytest.raises(InputError, match=told):
            clone(fitted).fit(documents, LISTS)
    with pytest.raises(InputError, match="X: expected documents, got none"):
        clone(fitted).fit([], [])
    assert fitted.predict([]).shape == (0, 12) and fitted.predict_topk([], 2)[0].shape == (0, 2)


def test_no_more_places_than_labels_and_no_other_thresholds(fitted: Any) -> None:
    places, probabilities = fitted.predict_topk(TEXTS[:2], 99)
    assert places.shape == probabilities.shape == (2, 12) and (places >= 0).all()
    with pytest.raises(InputError, match="k: expected a whole number from 1, got 0"):
        fitted.predict_topk(TEXTS, 0)
    other = pickle.loads(pickle.dumps(fitted)).set_params(threshold=3)
    with pytest.raises(
        InputError, match="threshold: expected a probability from 0 to 1, or .f1., got 3"
    ):
        other.predict(TEXTS)


def test_matrices_that_a_model_cannot_read(matrices: tuple[csr_matrix, csr_matrix]) -> None:
    for how, told in (
        ({"model": "minilm"}, "texts, which .* reads, got a feature matrix"),
        ({"settings": {"trees": 2}}, "one tree on a feature matrix"),
    ):
        with pytest.raises(InputError, match=told):
            xk.XMLClassifier(**how).fit(*matrices)  # type: ignore[arg-type]


def test_what_scikit_learn_asks() -> None:
    """All of its checks but the two that want a dense matrix."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = check_estimator(
            xk.XMLClassifier(threads=1), expected_failed_checks=EXPECTED_FAILED_CHECKS
        )
    failed = {one["check_name"] for one in found if one["status"] == "xfail"}
    assert failed == set(EXPECTED_FAILED_CHECKS) and len(found) > 50


def test_the_page_of_the_estimator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every program of docs/guide/python.md runs, and prints what the page says."""
    page = (Path(__file__).parents[2] / "docs" / "guide" / "python.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    for program in re.findall(r"```python\n(.*?)```", page, re.S):
        if "push_to_hub" in program:
            continue  # tests/predict/test_hub.py has it, with a Hub of its own
        promised = re.findall(r"#  → (.*)", program)
        exec(compile(program, "python.md", "exec"), {})
        told = capsys.readouterr().out
        assert all(line in told for line in promised), told
