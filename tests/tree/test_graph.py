"""Random walks over documents and labels: the definition in plain Python, probabilities, edges,
threads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix, random

from xmlkernels.errors import InputError
from xmlkernels.reference.rounding import philox
from xmlkernels.tree import graph as module
from xmlkernels.tree.graph import label_graph, normalised, prune, smooth


def matrix(documents: int, labels: int, seed: int = 0) -> csr_matrix:
    return csr_matrix(
        random(documents, labels, 0.1, "csr", np.float32, np.random.default_rng(seed)) != 0
    )


def words(seed: int, number: int, step: int) -> list[int]:
    parts = [seed % 2**32, seed >> 32, number, 0, step, 0]
    key = torch.tensor(parts[:2])
    found = philox((key[0], key[1]), tuple(torch.tensor(p) for p in parts[2:]))  # type: ignore[arg-type]
    return [int(word) % 2**32 for word in found]


def walk(
    labels: csr_matrix, origin: int, visits: int, restart: float, top: int, seed: int
) -> dict[int, int]:
    """What the module says, written a second time."""
    dense = labels.toarray() != 0
    if not dense[:, origin].any():
        return {origin: 1}
    times: Counter[int] = Counter()
    current = origin
    for visit in range(visits):
        first, second, third, _ = words(seed, origin, visit)
        documents = np.flatnonzero(dense[:, current])
        found = np.flatnonzero(dense[documents[first * len(documents) >> 32]])
        current = int(found[second * len(found) >> 32])
        times[current] += 1
        if third < round(restart * 2**32):
            current = origin
    best = sorted(times, key=lambda label: (-times[label], label))[:top]
    return {label: times[label] for label in best} | {origin: times[origin] or 1}


@pytest.mark.parametrize("restart", [0.0, 0.8, 1.0])
def test_every_step_is_the_definitions(restart: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LABELS", 5)
    labels = matrix(30, 12)
    graph = label_graph(labels, visits=25, restart=restart, top=3, seed=2**40 + 7)
    assert graph.has_sorted_indices and graph.dtype == np.float32
    for origin in range(12):
        row = graph[origin]
        assert dict(zip(row.indices.tolist(), row.data.tolist(), strict=True)) == walk(
            labels, origin, 25, restart, 3, 2**40 + 7
        )


def test_visits_have_the_probabilities_of_the_walk() -> None:
    labels = csr_matrix(np.array([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1]]))
    y = labels.toarray().astype(float)
    step = (y / y.sum(axis=0)).T @ (y / y.sum(axis=1, keepdims=True))
    graph = label_graph(labels, visits=100_000, restart=0.6, top=4)
    for origin in range(4):
        # before a visit the walk stands at the origin or at the label visited last
        visited = np.linalg.solve(np.eye(4) - 0.4 * step.T, 0.6 * step[origin])
        assert np.abs(graph[origin].toarray()[0] / 100_000 - visited).max() < 0.01


def test_what_threads_and_seeds_change(
    threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LABELS", 7)
    labels, found = matrix(80, 60), []
    for count in (1, 2, 5):
        threads(count)
        found.append(label_graph(labels))
    assert all((found[0] != other).nnz == 0 for other in found[1:])
    assert (found[0] != label_graph(labels, seed=1)).nnz > 0


def test_frequent_labels_and_labels_without_documents_stand_alone() -> None:
    labels = csr_matrix(np.array([[1, 1, 1, 0], [1, 0, 1, 0], [1, 0, 0, 0]]))
    graph = label_graph(labels, most_documents=2).toarray()
    assert graph[0].tolist() == [1, 0, 0, 0] and graph[3].tolist() == [0, 0, 0, 1]
    assert graph[1, 2] > 50 and graph[1, 0] == 0 and graph[2, 0] == 0
    assert label_graph(labels, most_documents=3).toarray()[1, 0] > 0
    alone = label_graph(csr_matrix(np.array([[1, 0]])), visits=9).toarray()
    assert alone.tolist() == [[9, 0], [0, 1]]


def test_the_label_itself_stays_beside_the_top() -> None:
    """A label hardly ever visited from itself: one document of it among thousands of labels,
    restart never.
    """
    labels = csr_matrix(np.concatenate([np.ones((1, 200)), np.tile(np.arange(200) > 0, (3, 1))]))
    graph = label_graph(labels, visits=30, restart=0.0, top=5)
    row = graph[0]
    assert row.nnz == 6 and row[0, 0] == 1


def test_one_document_with_one_label() -> None:
    assert label_graph(csr_matrix(np.ones((1, 1))), visits=400).toarray().tolist() == [[400]]
    assert label_graph(csr_matrix((0, 2))).toarray().tolist() == [[1, 0], [0, 1]]


def test_normalised_and_smoothed() -> None:
    graph = label_graph(matrix(40, 25), visits=50)
    dense = graph.toarray().astype(np.float64)
    expected = dense / np.sqrt(dense.sum(axis=1)[:, None] * dense.sum(axis=0)[None, :])
    assert np.allclose(normalised(graph).toarray(), expected, rtol=1e-5)
    features = csr_matrix(random(25, 40, 0.3, "csr", np.float32, np.random.default_rng(1)))
    assert np.allclose(smooth(graph, features).toarray(), expected @ features.toarray(), atol=1e-5)
    assert np.diff(smooth(graph, features, 7).indptr).max() == 7


def test_edges_between_unlike_labels_go(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = label_graph(matrix(60, 20), visits=60)
    vectors = np.random.default_rng(0).normal(size=(20, 3))
    vectors[4] = 0
    unit = (
        vectors
        / np.where(np.linalg.norm(vectors, axis=1) > 0, np.linalg.norm(vectors, axis=1), 1)[:, None]
    )
    stays = (unit @ unit.T >= 0.2) | np.eye(20, dtype=bool)
    stays[4] = stays[:, 4] = True
    expected = np.where(stays, graph.toarray(), 0)
    assert (prune(graph, vectors, 0.2).toarray() == expected).all()
    assert 0 < (expected > 0).sum() < graph.nnz
    with pytest.raises(InputError, match=r"vectors: expected \[20, D\], one a label, got \[3, 3\]"):
        prune(graph, vectors[:3], 0.2)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"visits": 0}, "visits: expected 1 to"),
        ({"restart": 1.5}, "restart: expected a probability, got 1.5"),
        ({"restart": float("nan")}, "restart: expected a probability, got nan"),
        ({"top": 0}, "top: expected at least 1, got 0"),
        ({"most_documents": -1}, "most_documents: expected 0"),
        ({"seed": 2**64}, "seed: expected an integer from 0"),
    ],
)
def test_settings_that_cannot_be(setting: dict[str, float], says: str) -> None:
    with pytest.raises(InputError, match=says):
        label_graph(matrix(5, 5), **setting)  # type: ignore[arg-type]
