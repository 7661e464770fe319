"""The linear ranker: against scikit-learn, threads, pruning, files, shortlists, and one sentence
for every mistake.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from xmlkernels import InputError
from xmlkernels.ranker.blend import SHARES, Reranker, best, best_of_all, choose_share, log_odds
from xmlkernels.ranker.features import Features
from xmlkernels.ranker.linear import LinearRanker, Settings, fit
from xmlkernels.ranker.matcher import ClusterMatcher

DOCUMENTS, COLUMNS, WIDTH, LABELS = 150, 40, 7, 6
NO_PAIRS = np.zeros((0, 2), np.int64)


def made(seed: int = 0, documents: int = DOCUMENTS) -> tuple[Features, csr_matrix]:
    """Features of both blocks, and labels that depend on the sparse one, with noise."""
    random = np.random.default_rng(seed)
    sparse = scipy.sparse.random(
        documents, COLUMNS, 0.25, format="csr", random_state=random, dtype=np.float32
    )
    embedding = random.normal(size=(documents, WIDTH)).astype(np.float32)
    truth = np.random.default_rng(99).normal(size=(COLUMNS, LABELS))
    scores = sparse @ truth + 0.4 * random.normal(size=(documents, LABELS))
    return Features.join(embedding, sparse, embedding_weight=0.5), csr_matrix(
        (scores > 0.7).astype(np.float32)
    )


@pytest.fixture(scope="module")
def data() -> tuple[Features, csr_matrix]:
    return made()


@pytest.fixture(scope="module")
def shortlist() -> csr_matrix:
    """About 60% of the pairs, among them values of 0 and below, which count like any other."""
    matrix = scipy.sparse.random(
        DOCUMENTS,
        LABELS,
        0.6,
        format="csr",
        random_state=np.random.default_rng(1),
        dtype=np.float32,
    )
    matrix.data -= 0.5
    matrix.data[::7] = 0
    return matrix


def weights_of(ranker: LinearRanker, label: int) -> np.ndarray:
    return np.concatenate(
        [
            ranker.dense[label],
            ranker.sparse[label].toarray().ravel(),
            ranker.bias[label : label + 1],
        ]
    )


def rows_of(features: Features, bias: float = 1.0) -> np.ndarray:
    """float64 [N, D + V + 1], the constant feature last."""
    return np.hstack(
        [features.dense, features.sparse.toarray(), np.full((len(features), 1), bias)]
    ).astype(np.float64)


def objective(loss: str, w: np.ndarray, x: np.ndarray, y: np.ndarray, cost: np.ndarray) -> float:
    margin = y * (x @ w)
    each = np.maximum(0, 1 - margin) ** 2 if loss == "squared_hinge" else np.logaddexp(0, -margin)
    return float(0.5 * w @ w + cost @ each)


def by_sklearn(loss: str, x: np.ndarray, y: np.ndarray, cost: np.ndarray) -> np.ndarray:
    if loss == "squared_hinge":
        model = LinearSVC(C=1, tol=1e-10, max_iter=200_000, fit_intercept=False)
    else:
        model = LogisticRegression(C=1, tol=1e-10, max_iter=10_000, fit_intercept=False)
    return model.fit(x, y, sample_weight=cost).coef_.ravel()


def equal(a: LinearRanker, b: LinearRanker) -> bool:
    same = all(
        np.array_equal(getattr(a.sparse, n), getattr(b.sparse, n))
        for n in ("indptr", "indices", "data")
    )
    return same and np.array_equal(a.dense, b.dense) and np.array_equal(a.bias, b.bias)


# ---- training ----


@pytest.mark.parametrize("loss", ["squared_hinge", "logistic"])
@pytest.mark.parametrize("listed", [True, False])
def test_objective_is_that_of_sklearn(
    data: tuple[Features, csr_matrix], shortlist: csr_matrix, loss: Any, listed: bool
) -> None:
    features, labels = data
    settings = Settings(
        loss=loss, cost=2.0, positive_weight=1.5, tolerance=1e-5, epochs=5000, prune=0
    )
    ranker = fit(features, labels, shortlist if listed else None, settings)
    x, y = rows_of(features), np.where(labels.toarray() > 0, 1.0, -1.0)
    pattern = shortlist.copy()
    pattern.data[:] = 1
    for label in range(LABELS):
        docs = (
            (pattern.toarray()[:, label] > 0) | (y[:, label] > 0)
            if listed
            else np.ones(DOCUMENTS, bool)
        )
        cost = np.where(y[docs, label] > 0, 3.0, 2.0)
        # What the solver minimises has the bias as a weight of a feature of ones.
        w = weights_of(ranker, label)
        best_known = objective(
            loss, by_sklearn(loss, x[docs], y[docs, label], cost), x[docs], y[docs, label], cost
        )
        assert objective(loss, w, x[docs], y[docs, label], cost) == pytest.approx(
            best_known, rel=2e-5
        )


def test_a_loose_tolerance_and_few_passes_end_near_the_optimum(
    data: tuple[Features, csr_matrix],
) -> None:
    """Shrinking must not leave documents out for good: the defaults stay within some percent."""
    features, labels = data
    x, y, cost = rows_of(features), np.where(labels.toarray() > 0, 1.0, -1.0), np.ones(DOCUMENTS)
    for loss in ("squared_hinge", "logistic"):
        ranker = fit(features, labels, None, Settings(loss=loss, prune=0))  # type: ignore[arg-type]
        for label in range(LABELS):
            found = objective(loss, weights_of(ranker, label), x, y[:, label], cost)
            known = objective(loss, by_sklearn(loss, x, y[:, label], cost), x, y[:, label], cost)
            assert known <= found * (1 + 1e-6) and found <= 1.05 * known


def test_bias_is_a_feature_of_its_own_size(data: tuple[Features, csr_matrix]) -> None:
    features, labels = data
    settings = Settings(bias=3.0, tolerance=1e-5, epochs=5000, prune=0)
    ranker = fit(features, labels, None, settings)
    x = rows_of(features, 3.0)
    y = np.where(labels.toarray() > 0, 1.0, -1.0)
    cost = np.ones(DOCUMENTS)
    w = by_sklearn("squared_hinge", x, y[:, 0], cost)
    assert ranker.bias[0] == pytest.approx(3 * w[-1], rel=1e-3)
    assert (fit(features, labels, None, replace(settings, bias=0.0)).bias == 0).all()


def test_result_is_the_same_for_every_number_of_threads(
    data: tuple[Features, csr_matrix], shortlist: csr_matrix
) -> None:
    features, labels = data
    for loss in ("squared_hinge", "logistic"):
        settings = Settings(loss=loss, negatives=5)  # type: ignore[arg-type]
        rankers = [
            fit(features, labels, shortlist, settings, threads=threads) for threads in (1, 2, 3)
        ]
        assert equal(rankers[0], rankers[1]) and equal(rankers[0], rankers[2])
        scores = [rankers[0].score(features, shortlist, threads=threads).data for threads in (1, 3)]
        assert np.array_equal(*scores)
        assert not equal(rankers[0], fit(features, labels, shortlist, replace(settings, seed=1)))


def test_a_label_does_not_depend_on_the_others_beside_it(
    data: tuple[Features, csr_matrix], shortlist: csr_matrix
) -> None:
    """Blocks of labels, and the order in which they are trained, must not show."""
    features, labels = data
    some = labels.toarray()
    some[:, 3:] = 0
    fewer = fit(features, csr_matrix(some), shortlist)
    whole = fit(features, labels, shortlist)
    assert np.array_equal(fewer.dense[:3], whole.dense[:3])
    assert (fewer.sparse[:3] != whole.sparse[:3]).nnz == 0


def test_small_blocks_give_the_same(
    data: tuple[Features, csr_matrix], monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = data
    whole = fit(features, labels)
    monkeypatch.setattr("xmlkernels.ranker.linear._BLOCK_BYTES", 2 * 8 * (COLUMNS + WIDTH))
    assert equal(fit(features, labels), whole)


def test_pruning_removes_small_tfidf_weights_alone(data: tuple[Features, csr_matrix]) -> None:
    features, labels = data
    whole, pruned = (fit(features, labels, None, Settings(prune=prune)) for prune in (0.0, 0.2))
    dense = whole.sparse.toarray()
    assert 0 < pruned.sparse.nnz < whole.sparse.nnz
    assert np.array_equal(pruned.sparse.toarray(), np.where(np.abs(dense) > 0.2, dense, 0))
    assert pruned.sparse.has_sorted_indices and np.array_equal(pruned.dense, whole.dense)


def test_random_negatives_join_the_listed_documents() -> None:
    """A label with positives alone learns nothing to tell it from others; random documents teach
    it.
    """
    features, labels = made(3)
    positives = csr_matrix(labels)
    alone, taught = (
        fit(features, labels, positives, Settings(negatives=n, prune=0)) for n in (0, 60)
    )
    x, y = rows_of(features), np.where(labels.toarray() > 0, 1.0, -1.0)
    right = [
        np.mean([np.mean(np.sign(x @ weights_of(r, i)) == y[:, i]) for i in range(LABELS)])
        for r in (alone, taught)
    ]
    assert right[1] > right[0] + 0.2
    everything = fit(
        features, labels, positives, Settings(negatives=10**4, prune=0, tolerance=1e-4, epochs=2000)
    )
    one_vs_all = fit(features, labels, None, Settings(prune=0, tolerance=1e-4, epochs=2000))
    # So many draws meet every document.
    assert np.allclose(everything.dense, one_vs_all.dense, atol=1e-3)


def test_labels_without_documents_and_empty_blocks(data: tuple[Features, csr_matrix]) -> None:
    features, labels = data
    none = csr_matrix(labels.shape, dtype=np.float32)
    empty = fit(features, none, none)
    assert empty.sparse.nnz == 0
    assert not empty.dense.any()
    assert (empty.score(features, labels).data == 0).all()
    for part in (Features.join(features.dense), Features.join(None, features.sparse)):
        ranker = fit(part, labels)
        assert (ranker.dense.shape[1], ranker.sparse.shape[1]) == part.widths
        assert best(ranker.score(part, labels), NO_PAIRS, 1)[1].shape == (DOCUMENTS, 1)


# ---- scores ----


def test_scores_are_those_of_dense_matrices(
    data: tuple[Features, csr_matrix], shortlist: csr_matrix
) -> None:
    features, labels = data
    ranker = fit(features, labels)
    full = (
        features.dense @ ranker.dense.T
        + (features.sparse @ ranker.sparse.T).toarray()
        + ranker.bias
    )
    got = ranker.score(features, shortlist)
    assert got.nnz == shortlist.nnz and np.array_equal(got.indices, shortlist.indices)
    rows = np.repeat(np.arange(DOCUMENTS), np.diff(shortlist.indptr))
    assert np.allclose(got.data, full[rows, shortlist.indices], atol=1e-5)
    top = best_of_all(ranker, features, 2)
    assert (np.diff(top.indptr) == 2).all()
    assert np.array_equal(best(top, NO_PAIRS, 1)[1].ravel(), full.argmax(1))


def test_log_probabilities_and_their_log_odds() -> None:
    margins = np.array([-3.0, 0.0, 0.5, 1.0, 40.0])
    features, labels = made(0, 30)
    hinge, logistic = (
        fit(features, labels, None, Settings(loss=loss)) for loss in ("squared_hinge", "logistic")
    )
    assert hinge.log_probability(margins) == pytest.approx([-16, -1, -0.25, 0, 0])
    assert logistic.log_probability(margins) == pytest.approx(-np.log1p(np.exp(-margins)))
    z = log_odds(np.array([-800.0, -1.0, -1e-20, 0.0]))
    assert np.isfinite(z).all()
    assert (np.diff(z[:3]) > 0).all()
    assert z[1] == pytest.approx(np.log(np.exp(-1) / (1 - np.exp(-1))))


def test_blends(data: tuple[Features, csr_matrix], shortlist: csr_matrix) -> None:
    features, labels = data
    product = Reranker(fit(features, labels), 0.3, "product")
    margins = product.ranker.score(features, shortlist)
    mixed = product.mix(shortlist, margins)
    expected = (1 / (1 + np.exp(-shortlist.data))) ** 0.7 * np.exp(
        -(np.maximum(0, 1 - margins.data) ** 2)
    ) ** 0.3
    assert np.allclose(1 / (1 + np.exp(-mixed.data)), expected, atol=1e-5)
    assert mixed.nnz == shortlist.nnz
    odds = replace(product, how="log_odds")
    assert np.allclose(
        odds.mix(shortlist, margins).data, 0.7 * shortlist.data + 0.3 * margins.data, atol=1e-6
    )
    for reranker in (product, odds):
        assert np.array_equal(
            replace(reranker, share=0.0).mix(shortlist, margins).data, shortlist.data
        )
        assert np.array_equal(
            replace(reranker, share=1.0).mix(shortlist, margins).data, margins.data
        )


def test_share_is_the_best_one_on_validation(
    data: tuple[Features, csr_matrix], shortlist: csr_matrix
) -> None:
    features, labels = data
    pairs = np.array([[0, 0], [0, 1], [5, 2]])
    reranker = Reranker(fit(features, labels))
    margins = reranker.ranker.score(features, shortlist)
    chosen, tried = choose_share(reranker, shortlist, margins, labels, pairs, by=("P@1",))
    assert list(tried) == [(how, share) for how in ("log_odds", "product") for share in SHARES]
    reached = tried[chosen.how, chosen.share]["P@1"]
    assert reached == max(m["P@1"] for m in tried.values())
    before = list(tried).index((chosen.how, chosen.share))
    assert all(m["P@1"] < reached for m in list(tried.values())[:before])
    # The shortlist's own values are noise here.
    assert tried["product", 1.0]["P@1"] > tried["product", 0.0]["P@1"]
    rows = best(replace(reranker, share=0.5).mix(shortlist, margins), pairs, LABELS)[1]
    assert not set(rows[0]) & {0, 1} and 2 not in rows[5]
    with pytest.raises(InputError, match="by: expected some of P@1"):
        choose_share(reranker, shortlist, margins, labels, pairs, by=("PSP@1",))


# ---- files ----


def test_round_trip(
    data: tuple[Features, csr_matrix], shortlist: csr_matrix, tmp_path: Path
) -> None:
    features, labels = data
    ranker = fit(
        features, labels, shortlist, Settings(loss="logistic", cost=0.5), facts={"name": "é"}
    )
    reranker = Reranker(ranker, 0.25, "product", embedding_weight=0.5)
    reranker.save(tmp_path / "r.safetensors")
    read = Reranker.load(tmp_path / "r.safetensors")
    assert equal(read.ranker, ranker)
    assert read.ranker.settings == ranker.settings
    assert read.ranker.facts["name"] == "é"
    assert (read.share, read.how, read.embedding_weight, read.tfidf_weight) == (
        0.25,
        "product",
        0.5,
        1.0,
    )
    assert [p.name for p in tmp_path.iterdir()] == ["r.safetensors"]
    scores = read.rerank(shortlist, features.dense, features.sparse)
    margins = ranker.score(
        Features.join(features.dense, features.sparse, embedding_weight=0.5), shortlist
    )
    assert np.array_equal(scores.data, reranker.mix(shortlist, margins).data)


def test_files_that_are_no_ranker(data: tuple[Features, csr_matrix], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file of that name"):
        LinearRanker.load(tmp_path / "none")
    (tmp_path / "text").write_text("text")
    save_file({"x": np.zeros(3)}, tmp_path / "other")
    ranker = fit(*data)
    ranker.save(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    for name in ("text", "other", "cut"):
        expected = (
            "head: expected JSON"
            if name == "other"
            else "expected a ranker's file, got one that cannot be read"
        )
        with pytest.raises(InputError, match=expected) as told:
            LinearRanker.load(tmp_path / name)
        assert "\n" not in str(told.value)
    replace(ranker, sparse=replace_columns(ranker.sparse)).save(tmp_path / "damaged")
    with pytest.raises(InputError, match="indices, entry 0: expected indices from 0 to"):
        LinearRanker.load(tmp_path / "damaged")
    replace(ranker, bias=ranker.bias + np.float32(np.nan)).save(tmp_path / "nan")
    with pytest.raises(InputError, match="bias: expected finite weights, got a NaN or an infinity"):
        LinearRanker.load(tmp_path / "nan")
    with pytest.raises(InputError, match="a ranker with its weights"):
        Reranker.load(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": "8"}, r"head, \$.columns: expected a whole number, got \"8\""),
        ({"columns": -1}, r"head, \$.columns: expected a whole number >= 0, got -1"),
        ({"settings": []}, r"head, \$.settings: expected an object, got a list of 0"),
        ({"settings": {"cost": "1"}}, r"head, \$.settings.cost: expected a number, got \"1\""),
        (
            {"settings": {"cost": -1}},
            r"head, settings.cost: expected a finite number above 0, got -1",
        ),
        ({"settings": {"seed": 1.5}}, r"head, \$.settings.seed: expected a whole number, got 1.5"),
        ({"facts": None}, r"head, \$.facts: expected an object, got null"),
        ({"format": 1}, "head: expected format xmlkernels-ranker 1, got 1"),
    ],
)
def test_heads_that_lie(
    data: tuple[Features, csr_matrix], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    fit(*data).save(tmp_path / "r")
    with safe_open(tmp_path / "r", "numpy") as file:
        head = json.loads(file.metadata()["ranker"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "r", {"ranker": json.dumps(head | change)})
    with pytest.raises(InputError, match=message):
        LinearRanker.load(tmp_path / "r")
    save_file(tensors, tmp_path / "r", {"ranker": "[" * 100_000})
    with pytest.raises(InputError, match="at most 100 levels, got more"):
        LinearRanker.load(tmp_path / "r")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], r"facts.weights: expected an object, got a list of 1"),
        ({"share": "x"}, r"facts.weights, \$.share: expected a number, got \"x\""),
        ({"share": 0.5, "how": "sum"}, r"facts.weights: expected a key 'embedding_weight'"),
    ],
)
def test_weights_that_lie(
    data: tuple[Features, csr_matrix], tmp_path: Path, weights: Any, message: str
) -> None:
    fit(*data, facts={"weights": weights}).save(tmp_path / "r")
    with pytest.raises(InputError, match=message):
        Reranker.load(tmp_path / "r")


def replace_columns(matrix: csr_matrix) -> csr_matrix:
    """A matrix with a column outside its shape."""
    matrix = matrix.copy()
    matrix.indices[0] = 10**6
    return matrix


# ---- clusters ----


def test_cluster_matcher_finds_the_labels_of_the_right_clusters(tmp_path: Path) -> None:
    """32 labels, 8 clusters in 4: each document's words name its label, so that both levels are
    learnt.
    """
    random = np.random.default_rng(0)
    label = random.integers(32, size=400)
    words = np.zeros((400, 64), np.float32)
    words[np.arange(400), label] = 1
    words[np.arange(400), random.integers(32, 64, size=400)] = 0.5  # words that mean nothing
    features = Features.join(None, csr_matrix(words))
    labels = csr_matrix((np.ones(400, np.float32), (np.arange(400), label)), (400, 32))
    clusters = [np.arange(32) // 8, np.arange(32) // 4]
    matcher = ClusterMatcher.fit(
        features, labels, clusters, beam=2, settings=Settings(tolerance=0.01)
    )
    listed = matcher.shortlist(features)
    # Two clusters of four.
    assert listed.shape == labels.shape
    assert (np.diff(listed.indptr) == 8).all()
    assert (listed.astype(bool).multiply(labels).sum(1) == 1).all()
    rows = best(listed, NO_PAIRS, 4)[1]
    assert (
        rows // 4 == label[:, None] // 4
    ).all()  # the true cluster comes first, for its labels share its score
    odds = listed.data.reshape(400, 8)
    assert np.isfinite(odds).all() and (odds.max(1) > odds.min(1)).all()
    matcher.save(tmp_path / "clusters")
    again = ClusterMatcher.load(tmp_path / "clusters").shortlist(features)
    assert (again != listed).nnz == 0
    # The ranker on these shortlists, with the clusters as the plain model, finds the label itself.
    reranker = Reranker(fit(features, labels, listed))
    assert (
        best(reranker.rerank(listed, None, features.sparse), NO_PAIRS, 1)[1].ravel() == label
    ).all()


def test_cluster_matcher_in_small_parts(
    data: tuple[Features, csr_matrix], monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = data
    matcher = ClusterMatcher.fit(features, labels, [np.arange(LABELS) // 2], beam=2)
    whole = matcher.shortlist(features)
    monkeypatch.setattr("xmlkernels.ranker.matcher._PAIRS", 20)
    assert (matcher.shortlist(features) != whole).nnz == 0
    monkeypatch.setattr("xmlkernels.ranker.blend._PAIRS", 20)
    ranker = fit(features, labels)
    few = best_of_all(ranker, features, 3)
    monkeypatch.undo()
    assert (few != best_of_all(ranker, features, 3)).nnz == 0


# ---- mistakes ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "hinge"}, "loss: expected squared_hinge or logistic, got 'hinge'"),
        ({"cost": 0}, "cost: expected a finite number above 0"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"prune": -1}, "prune: expected a finite number from 0"),
        ({"negatives": -1}, "negatives"),
        ({"epochs": 0}, "epochs: expected 1 or more"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_that_cannot_be_used(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings(**changes)


def test_inputs_that_do_not_fit(data: tuple[Features, csr_matrix], shortlist: csr_matrix) -> None:
    features, labels = data
    ranker = fit(features, labels)
    wrong: list[tuple[str, Any]] = [
        ("features: expected an embedding, TF-IDF or both", Features.join),
        ("embedding: expected a float array", lambda: Features.join(np.zeros(3))),
        (
            "embedding, row 1: expected finite numbers",
            lambda: Features.join(np.array([[0.0], [np.nan]])),
        ),
        (
            "tfidf: expected 2 rows, as the embedding has",
            lambda: Features.join(np.zeros((2, 3)), features.sparse),
        ),
        (
            "embedding_weight: expected a finite number above 0",
            lambda: Features.join(np.zeros((2, 3)), embedding_weight=0),
        ),
        ("labels: expected 150 rows, got 100", lambda: fit(features, labels[:100])),
        ("shortlist: expected 6 columns, got 5", lambda: fit(features, labels, shortlist[:, :5])),
        ("threads: expected 0 or more", lambda: fit(features, labels, threads=-1)),
        ("shortlist: expected 150 rows, got 9", lambda: ranker.score(features, shortlist[:9])),
        (
            "features: width and TF-IDF columns",
            lambda: ranker.score(Features.join(features.dense), shortlist),
        ),
        ("share: expected a number from 0 to 1", lambda: Reranker(ranker, 1.5)),
        ("how: expected log_odds or product", lambda: Reranker(ranker, 0.5, "sum")),  # type: ignore[arg-type]
        (
            "margins: expected the pairs of the logits",
            lambda: Reranker(ranker).mix(shortlist, labels),
        ),
        (
            "beam: expected 1 or more",
            lambda: ClusterMatcher.fit(features, labels, [np.zeros(LABELS, int)], beam=0),
        ),
        (
            "clusters: expected the cluster of each of 6 labels",
            lambda: ClusterMatcher.fit(features, labels, [np.zeros(5, int)]),
        ),
        (
            "clusters, level 1: expected clusters inside those above",
            lambda: ClusterMatcher.fit(
                features, labels, [np.arange(LABELS) // 2, np.arange(LABELS) % 2]
            ),
        ),
    ]
    for message, call in wrong:
        with pytest.raises(InputError, match=message):
            call()
