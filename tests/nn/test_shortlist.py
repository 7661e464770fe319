"""Shortlists on cases small enough to follow by hand, and at random beside sets."""

import numpy as np
import pytest
import torch

from xmlkernels.nn.shortlist import best, candidates, count, locate, select

# Clusters 0 to 3 own 2, 1, 3 and 1 nodes: 0 1 | 2 | 3 4 5 | 6.
ROW_PTR = torch.tensor([0, 2, 3, 6, 7])
CLUSTERS = torch.tensor([[0, 2], [1, 3], [2, -1]])
INF = float("inf")
# The places beyond a cluster's end hold what the op gives there, and once something else: it must
# not matter.
SCORES = torch.tensor(
    [
        [[0.5, -1.0, -INF], [0.2, 0.9, -3.0]],
        [[0.1, -INF, 9.0], [0.3, 7.0, -INF]],
        [[0.0, -0.0, 0.0], [5.0, 5.0, 5.0]],
    ]
)


def positives(*found: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """From (sample, node)."""
    both = sorted((n, s) for s, n in found)
    return torch.tensor([n for n, _ in both]), torch.tensor([s for _, s in both], dtype=torch.int32)


def test_candidates_are_the_children_of_the_clusters() -> None:
    node, real = candidates(CLUSTERS, ROW_PTR, 3)
    assert [n[r].tolist() for n, r in zip(node, real, strict=True)] == [
        [0, 1, 3, 4, 5],
        [2, 6],
        [3, 4, 5],
    ]
    assert count(CLUSTERS, ROW_PTR).tolist() == [5, 2, 3]


def test_nodes_are_found_where_they_stand() -> None:
    node = torch.tensor([0, 4, 6, 6, 2, 5, 4, 7, -1, -1])
    sample = torch.tensor([0, 0, 0, 1, 1, 2, 1, 0, 0, 1])  # 7 is a table's fill; -1 is a pad
    place, found = locate(node, sample, CLUSTERS, ROW_PTR, 3)
    assert found.tolist() == [True, True, False, True, True, True, False, False, False, False]
    assert place[found].tolist() == [0, 4, 6 + 3, 6 + 0, 12 + 2]
    assert not place[~found].any()


def test_the_best_are_kept_in_ascending_order() -> None:
    kept, place, forced, _ = select(SCORES, CLUSTERS, ROW_PTR, 2)
    assert kept.tolist() == [[0, 4], [2, 6], [3, 4]]  # of equal scores (-0 equals 0) the lower node
    assert place.tolist() == [[0, 4], [0, 3], [0, 1]]
    assert forced.tolist() == [0]


def test_fewer_candidates_than_k_leave_pads() -> None:
    kept = select(SCORES, CLUSTERS, ROW_PTR, 4).nodes
    assert kept.tolist() == [[0, 1, 3, 4], [2, 6, -1, -1], [3, 4, 5, -1]]
    kept, place, _, _ = select(SCORES, CLUSTERS, ROW_PTR, 99)
    assert kept.shape == (3, 6)
    assert kept[1].tolist() == [2, 6, -1, -1, -1, -1]
    assert place[1].tolist() == [0, 3, 0, 0, 0, 0]


def test_positives_are_forced_in_before_better_ones() -> None:
    kept, _, forced, _ = select(
        SCORES, CLUSTERS, ROW_PTR, 2, positives=positives((0, 5), (1, 2), (2, 4))
    )
    assert kept.tolist() == [[4, 5], [2, 6], [3, 4]] and forced.tolist() == [3]


def test_a_row_with_more_positives_than_k_grows_up_to_the_bound() -> None:
    true = positives((0, 0), (0, 1), (0, 3), (0, 5), (1, 6), (2, 5))
    kept, _, forced, _ = select(SCORES, CLUSTERS, ROW_PTR, 1, width=4, positives=true)
    assert kept.tolist() == [
        [0, 1, 3, 5],
        [6, -1, -1, -1],
        [5, -1, -1, -1],
    ]
    assert forced.tolist() == [6]
    kept, _, forced, _ = select(SCORES, CLUSTERS, ROW_PTR, 1, width=3, positives=true)
    # 5, at -3, had no room.
    assert kept.tolist() == [[0, 1, 3], [6, -1, -1], [5, -1, -1]]
    assert forced.tolist() == [5]
    kept, _, forced, _ = select(SCORES, CLUSTERS, ROW_PTR, 2, width=3, positives=positives((0, 5)))
    assert kept.tolist() == [[4, 5, -1], [2, 6, -1], [3, 4, -1]] and forced.tolist() == [1]


def test_positives_that_are_no_candidates_change_nothing() -> None:
    kept, _, forced, _ = select(
        SCORES, CLUSTERS, ROW_PTR, 2, positives=positives((0, 2), (1, 0), (2, 7))
    )
    assert kept.tolist() == [[0, 4], [2, 6], [3, 4]] and forced.tolist() == [0]


def test_nan_scores_still_give_real_nodes() -> None:
    """A skipped step goes on to the next level; what it selects must be nodes that exist."""
    kept, _, forced, _ = select(
        torch.full((3, 2, 3), torch.nan), CLUSTERS, ROW_PTR, 5, positives=positives((1, 6))
    )
    assert kept.tolist() == [
        [0, 1, 3, 4, 5],
        [2, 6, -1, -1, -1],
        [3, 4, 5, -1, -1],
    ]
    assert forced.tolist() == [1]


def test_ties_and_signs_are_ranked_by_place() -> None:
    scores = torch.tensor([[-1.0, 2.0, -0.0, 0.0, 2.0, -INF, 1e-45, -1e-45, INF]])
    place, there = best(scores, torch.ones_like(scores, dtype=torch.bool), 11)
    assert place[0, :9].tolist() == [8, 1, 4, 6, 2, 3, 7, 0, 5]
    assert there.tolist() == [[True] * 9 + [False] * 2]


@pytest.mark.parametrize("seed", range(5))
def test_random_shortlists_equal_sets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, 30)
    row_ptr = torch.from_numpy(np.concatenate([[0], sizes.cumsum()]))
    batch, slots, k, width = 9, 12, 7, 10
    clusters = torch.full((batch, slots), -1)
    for row in clusters:
        chosen = np.sort(rng.choice(30, rng.integers(1, slots + 1), replace=False))
        row[: len(chosen)] = torch.from_numpy(chosen)
    # Many ties.
    scores = torch.from_numpy(rng.integers(-3, 3, (batch, slots, 5)).astype(np.float32))
    pairs = [
        (s, int(n))
        for s in range(batch)
        for n in rng.choice(int(row_ptr[-1]), rng.integers(0, 40), replace=False)
    ]
    kept, _, forced, _ = select(
        scores, clusters, row_ptr, k, width=width, positives=positives(*pairs)
    )
    total = 0
    for s in range(batch):
        there = [
            (-float(scores[s, j, n - int(row_ptr[c])]), n)
            for j, c in enumerate(clusters[s].tolist())
            if c >= 0
            for n in range(int(row_ptr[c]), int(row_ptr[c + 1]))
        ]
        ranked = sorted(((s, n) not in pairs, z, n) for z, n in there)
        many = sum(not other for other, _, _ in ranked)
        expected = sorted(n for _, _, n in ranked[: min(width, max(k, many))])
        assert kept[s].tolist() == expected + [-1] * (kept.shape[1] - len(expected))
        total += min(many, width)
    assert forced.tolist() == [total]


def test_no_sample_and_no_cluster_are_no_place_and_no_choice() -> None:
    node, sample, row_ptr = torch.tensor([0, 3]), torch.tensor([0, 0]), torch.tensor([0, 2, 5])
    for size, slots in ((0, 2), (2, 0)):
        clusters = torch.zeros(size, slots, dtype=torch.int64)
        place, found = locate(node, sample, clusters, row_ptr, 3)
        assert place.tolist() == [0, 0] and not found.any()
        scores = torch.zeros(size, slots, 3)
        kept, place, forced, _ = select(scores, clusters, row_ptr, 2, positives=(node, sample))
        assert kept.shape == place.shape == (size, 2 if slots else 0) and int(forced) == 0
