"""Metrics: hand-computed figures, agreement with napkinxc, properties, filter pairs, mistakes."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from napkinxc import metrics as napkin
from scipy.sparse import csr_matrix

from xmlkernels import InputError, metrics

KS = (1, 2, 3, 4, 5)
LOG3 = math.log2(3)

# Three points over four labels; the last point has no positive.
TOP = np.array([[0, 2, 1], [3, -1, -1], [1, 0, -1]])
TRUE = csr_matrix(np.array([[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]], np.float32))
WEIGHT = np.array([1.0, 2.0, 5.0, 4.0])


def test_precision_by_hand():
    got = metrics.evaluate(TOP, TRUE, ks=(1, 2, 3))
    # hits by place: point 0: 1 0 1; point 1: 1 - -; point 2: 0 0 -
    assert got["P@1"] == pytest.approx(100 * (1 + 1 + 0) / 3)
    assert got["P@2"] == pytest.approx(100 * (1 + 1 + 0) / (3 * 2))
    assert got["P@3"] == pytest.approx(100 * (2 + 1 + 0) / (3 * 3))


def test_recall_by_hand():
    got = metrics.evaluate(TOP, TRUE, ks=(1, 2, 3))
    # two positives each; the point without one adds 0 to the mean over three points
    assert got["R@1"] == pytest.approx(100 * (1 / 2 + 1 / 2) / 3)
    assert got["R@3"] == pytest.approx(100 * (2 / 2 + 1 / 2) / 3)


def test_ndcg_by_hand():
    got = metrics.evaluate(TOP, TRUE, ks=(1, 2, 3))
    # places weigh 1, 1/log2(3), 1/2; with two positives the best is 1 at k=1 and 1 + 1/log2(3) from
    # k=2 on
    best = 1 + 1 / LOG3
    assert got["nDCG@1"] == pytest.approx(100 * (1 + 1) / 3)
    assert got["nDCG@2"] == pytest.approx(100 * (1 / best + 1 / best) / 3)
    assert got["nDCG@3"] == pytest.approx(100 * (1.5 / best + 1 / best) / 3)


def test_propensity_scored_by_hand():
    got = metrics.evaluate(TOP, TRUE, WEIGHT, ks=(1, 2, 3))
    # gained: point 0: 1 (label 0), 0, 2 (label 1); point 1: 4 (label 3); best: point 0: 2, 1; point
    # 1: 4, 1
    assert got["PSP@1"] == pytest.approx(100 * (1 + 4) / (2 + 4))
    assert got["PSP@2"] == pytest.approx(100 * (1 + 4) / (3 + 5))
    assert got["PSP@3"] == pytest.approx(100 * (3 + 4) / (3 + 5))
    # both sides divided by the same unweighted 1 + 1/log2(3) at k=3
    assert got["PSnDCG@1"] == pytest.approx(100 * (1 + 4) / (2 + 4))
    assert got["PSnDCG@3"] == pytest.approx(100 * (1 + 2 / 2 + 4) / (2 + 1 / LOG3 + 4 + 1 / LOG3))
    recall = metrics.propensity_scored_recall(TOP, TRUE, WEIGHT, ks=(1, 3))
    assert recall == pytest.approx(
        {"PSR@1": 100 * (1 + 4) / (2 + 4), "PSR@3": 100 * (3 + 4) / (3 + 5)}
    )


def test_keys_and_order():
    names = ("P", "nDCG", "PSP", "PSnDCG", "R", "RP", "sampleF1", "microF1")
    assert list(metrics.evaluate(TOP, TRUE, WEIGHT)) == [
        f"{name}@{k}" for name in names for k in KS
    ]
    plain = [name for name in names if not name.startswith("PS")]
    assert list(metrics.evaluate(TOP, TRUE, ks=(3, 1))) == [
        f"{name}@{k}" for name in plain for k in (1, 3)
    ]


def test_inverse_propensity_by_hand():
    train = csr_matrix(np.array([[1, 0], [1, 0], [1, 1], [0, 0]], np.float32))
    # N = 4, n = (3, 1), A = 0.5, B = 1: C = (ln 4 - 1)·sqrt 2
    scale = (math.log(4) - 1) * math.sqrt(2)
    np.testing.assert_allclose(
        metrics.inverse_propensity(train, 0.5, 1.0), [1 + scale / 2, 1 + scale / math.sqrt(2)]
    )


def test_macro_by_hand():
    got = metrics.macro_metrics(TOP, TRUE, ks=(1, 3))
    # k=1: shown 0, 3, 1; right 0 and 3. Positives: label 0 twice, labels 1 and 3 once, label 2
    # never.
    assert got["macroP@1"] == pytest.approx(100 * (1 + 0 + 0 + 1) / 4)
    assert got["macroR@1"] == pytest.approx(100 * (1 / 2 + 0 + 0 + 1) / 4)
    assert got["macroF1@1"] == pytest.approx(100 * (2 / 3 + 0 + 0 + 1) / 4)
    assert got["coverage@1"] == pytest.approx(100 * 2 / 3)
    assert got["abandonment@1"] == pytest.approx(100 / 3)
    # k=3: shown 0 twice, 1 twice, 2 and 3 once; right 0, 1, 3 once each
    assert got["macroP@3"] == pytest.approx(100 * (1 / 2 + 1 / 2 + 0 + 1) / 4)
    assert got["macroF1@3"] == pytest.approx(100 * (2 / 4 + 2 / 3 + 0 + 1) / 4)
    assert got["coverage@3"] == pytest.approx(100)


def test_deciles_are_ten_groups_of_nearly_equal_size():
    """Of 23 labels the first three groups hold three, the rarest first; of 7 labels each is a
    group.
    """
    for labels, sizes in ((23, [3] * 3 + [2] * 7), (10, [1] * 10), (7, [1] * 7)):
        # Label l in labels - l documents.
        train = csr_matrix(np.tril(np.ones((labels, labels), np.float32)))
        table = metrics.decile_table(np.zeros((labels, 1), np.int64), train, train, ks=(1,))
        assert [line["labels"] for line in table] == sizes
        assert [line["decile"] for line in table] == list(range(1, len(sizes) + 1))
        assert table[0]["min_frequency"] == 1 and table[-1]["max_frequency"] == labels


def test_decile_table_by_hand():
    # Frequencies 3, 2, 0, 3.
    train = csr_matrix(np.array([[1, 1, 0, 1]] * 2 + [[1, 0, 0, 1]], np.float32))
    table = metrics.decile_table(TOP, TRUE, train, ks=(1, 3))
    assert [line["labels"] for line in table] == [1, 1, 1, 1]
    assert [line["min_frequency"] for line in table] == [0, 2, 3, 3]  # labels 2, 1, 0, 3
    assert [line["positives"] for line in table] == [0, 1, 2, 1]
    assert [line["share"] for line in table] == pytest.approx([0, 25, 50, 25])
    assert [line["R@1"] for line in table] == pytest.approx([0, 0, 50, 100])
    assert [line["R@3"] for line in table] == pytest.approx([0, 100, 50, 100])
    assert [line["P@3"] for line in table] == pytest.approx([0, 100 / 9, 100 / 9, 100 / 9])


def random_case(seed: int, n: int = 300, labels: int = 60, kept: int = 8):
    rng = np.random.default_rng(seed)
    true = (rng.random((n, labels)) < rng.random(labels) * 0.12).astype(np.float32)
    true[:5] = 0
    true[5:25, labels - 1] = 1  # napkinxc averages up to the highest label it meets
    scores = rng.random((n, labels)) + 0.5 * true
    top = np.argsort(-scores, axis=1)[:, :kept]
    top[rng.random(n) < 0.1, 3:] = -1
    train = csr_matrix((rng.random((n, labels)) < 0.1).astype(np.float32))
    return top, csr_matrix(true), train


@pytest.mark.parametrize("seed", range(3))
def test_equals_napkinxc(seed):
    top, true, train = random_case(seed)
    weight = metrics.inverse_propensity(train, 0.55, 1.5)
    # Computes in Y's own type.
    theirs_weight = napkin.Jain_et_al_inverse_propensity(train.astype(np.float64), 0.55, 1.5)
    np.testing.assert_allclose(weight, theirs_weight, rtol=1e-12)
    lists = [[int(label) for label in row if label >= 0] for row in top]
    truth = [true[i].indices.tolist() for i in range(true.shape[0])]
    ours = (
        metrics.evaluate(top, true, weight)
        | metrics.macro_metrics(top, true)
        | metrics.propensity_scored_recall(top, true, weight)
    )
    theirs = {
        "P": napkin.precision_at_k(truth, lists),
        "R": napkin.recall_at_k(truth, lists),
        "nDCG": napkin.ndcg_at_k(truth, lists),
        "PSP": napkin.psprecision_at_k(truth, lists, weight, normalize=True),
        "PSnDCG": napkin.psndcg_at_k(truth, lists, weight, normalize=True),
        "PSR": napkin.psrecall_at_k(truth, lists, weight, normalize=True),
        "macroP": napkin.macro_precision_at_k(truth, lists),
        "macroR": napkin.macro_recall_at_k(truth, lists),
        "macroF1": napkin.macro_f1_measure_at_k(truth, lists),
        "coverage": napkin.coverage_at_k(truth, lists),
        "abandonment": 1
        - napkin.abandonment_at_k(
            truth, lists
        ),  # its function of that name gives the share with a hit
    }
    for name, curve in theirs.items():
        np.testing.assert_allclose(
            [ours[f"{name}@{k}"] for k in KS], 100 * curve, atol=1e-6, err_msg=name
        )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_properties(seed):
    top, true, train = random_case(seed, n=40, labels=25)
    weight = metrics.inverse_propensity(train, 0.55, 1.5)
    got = metrics.evaluate(top, true, weight) | metrics.macro_metrics(top, true)
    assert all(-1e-9 <= value <= 100 + 1e-9 for value in got.values())
    gained = [got[f"P@{k}"] * k for k in KS]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(gained))
    assert all(got[f"R@{k}"] <= got[f"R@{k + 1}"] + 1e-9 for k in KS[:-1])
    order = np.random.default_rng(seed).permutation(len(top))
    again = metrics.evaluate(top[order], true[order], weight) | metrics.macro_metrics(
        top[order], true[order]
    )
    assert again == pytest.approx(got)
    table = metrics.decile_table(top, true, train)
    assert sum(line["P@5"] for line in table) == pytest.approx(got["P@5"])
    assert sum(line["labels"] for line in table) == 25
    assert sum(line["share"] for line in table) == pytest.approx(100)
    best, _ = ideal(true, weight)
    full = metrics.evaluate(best, true, weight)
    assert full["PSP@5"] == pytest.approx(100) and full["PSnDCG@3"] == pytest.approx(100)


def ideal(true: csr_matrix, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, rows = metrics.top_rows_from_csr(true.multiply(weight).tocsr(), 5)
    return rows, values


def test_blocks_do_not_change_a_figure(monkeypatch):
    top, true, train = random_case(7)
    weight = metrics.inverse_propensity(train, 0.6, 2.6)

    def everything() -> dict[str, float]:
        curves = metrics.evaluate(top, true, weight) | metrics.macro_metrics(top, true)
        return curves | {
            f"decile {key}": value
            for key, value in metrics.decile_table(top, true, train)[3].items()
        }

    whole = everything()
    monkeypatch.setattr("xmlkernels.metrics.points.BLOCK", 37)
    assert everything() == pytest.approx(whole, rel=1e-12)


def test_stored_zeros_and_repeated_positives():
    messy = csr_matrix(
        (np.array([1, 1, 0, 1], np.float32), np.array([1, 1, 2, 0]), np.array([0, 3, 4])),
        shape=(2, 3),
    )
    before = messy.data.copy()
    got = metrics.evaluate(np.array([[1, 2], [2, 1]]), messy, ks=(1, 2))
    assert got["P@2"] == pytest.approx(25) and got["R@2"] == pytest.approx(50)
    np.testing.assert_array_equal(messy.data, before)


def test_nothing_positive_gives_zero():
    got = metrics.evaluate(TOP, csr_matrix((3, 4), dtype=np.float32), WEIGHT)
    assert set(got.values()) == {0.0}


def test_top_rows_from_csr_breaks_ties_by_label():
    scores = csr_matrix(
        (np.array([0.5, 0.5, -1.0, 0.0, 0.5, 2.0], np.float32), [4, 1, 0, 3, 2, 2], [0, 5, 5, 6]),
        shape=(3, 5),
    )
    values, rows = metrics.top_rows_from_csr(scores, 4)
    # a stored 0 is a candidate, a stored negative score ranks last but before labels that are
    # absent
    np.testing.assert_array_equal(rows, [[1, 2, 4, 3], [-1, -1, -1, -1], [2, -1, -1, -1]])
    np.testing.assert_array_equal(values[0], np.array([0.5, 0.5, 0.5, 0.0], np.float32))
    assert np.isneginf(values[1]).all() and values.dtype == np.float32


def test_top_rows_from_csr_by_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    dense = np.round(rng.random((50, 20)), 1)
    _values, rows = metrics.top_rows_from_csr(csr_matrix(dense), 6)
    np.testing.assert_array_equal(rows, np.argsort(-dense, axis=1, kind="stable")[:, :6])
    monkeypatch.setattr("xmlkernels.topk._BLOCK", 30)
    np.testing.assert_array_equal(metrics.top_rows_from_csr(csr_matrix(dense), 6)[1], rows)


def test_filter_pairs_are_removed_before_the_cut():
    rows = np.array([[4, 2, 0, 1], [3, 1, 0, 2], [1, 0, -1, -1]])
    values = np.array([[9, 8, 7, 6], [9, 8, 7, 6], [5, 4, -np.inf, -np.inf]], np.float32)
    pairs = np.array([[0, 4], [0, 0], [2, 1], [2, 3], [0, 4]])
    got_rows, got_values = metrics.drop_filtered(rows, values, pairs, 2)
    np.testing.assert_array_equal(got_rows, [[2, 1], [3, 1], [0, -1]])
    np.testing.assert_array_equal(got_values, np.array([[8, 6], [9, 8], [4, -np.inf]], np.float32))
    assert rows[0, 0] == 4 and values[0, 0] == 9
    assert metrics.candidates_needed(2, pairs) == 4 and metrics.candidates_needed(2, pairs, 3) == 3
    assert metrics.candidates_needed(5, np.zeros((0, 2), np.int64)) == 5


def test_too_few_candidates_are_refused():
    rows, values = np.array([[0, 1]]), np.array([[2.0, 1.0]])
    pairs = np.array([[0, 1]])
    with pytest.raises(InputError, match="keep 3 candidates"):
        metrics.drop_filtered(rows, values, pairs, 2)
    # No label is missing: nothing was lost.
    got, _ = metrics.drop_filtered(rows, values, pairs, 2, num_labels=2)
    np.testing.assert_array_equal(got, [[0, -1]])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_filtering_equals_ranking_without_the_pairs(seed):
    rng = np.random.default_rng(seed)
    n, labels, k = 12, 15, 4
    scores = rng.permutation(n * labels).reshape(n, labels) + 1.0
    pairs = np.argwhere(rng.random((n, labels)) < 0.2)
    kept = metrics.candidates_needed(k, pairs, labels)
    values, rows = metrics.top_rows_from_csr(csr_matrix(scores), kept)
    got, got_values = metrics.drop_filtered(rows, values, pairs, k, num_labels=labels)
    scores[tuple(pairs.T)] = 0
    want_values, want = metrics.top_rows_from_csr(csr_matrix(scores), k)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got_values, want_values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.evaluate(TOP[:2], TRUE), "3 points as in targets"),
        (lambda: metrics.evaluate(TOP.astype(float), TRUE), "integer array"),
        (lambda: metrics.evaluate(TOP + 2, TRUE), "point 0.*got 4"),
        (lambda: metrics.evaluate(TOP - 1, TRUE), "got -2"),
        (lambda: metrics.evaluate(np.array([[1, 1], [0, -1], [-1, -1]]), TRUE), "point 0.*twice"),
        (lambda: metrics.evaluate(TOP, TRUE.toarray()), "scipy sparse"),
        (lambda: metrics.evaluate(TOP, TRUE, WEIGHT[:3]), "one per label"),
        (lambda: metrics.evaluate(TOP, TRUE, ks=(0, 1)), "whole numbers from 1"),
        (lambda: metrics.evaluate(TOP[:0], TRUE[:0]), "at least one point"),
        (lambda: metrics.inverse_propensity(TRUE[:0], 0.5, 0.4), "at least one training point"),
        (lambda: metrics.inverse_propensity(TRUE, 0.5, -1), "B > 0"),
        (lambda: metrics.decile_table(TOP, TRUE, TRUE[:, :3]), "4 labels as in targets"),
        (
            lambda: metrics.top_rows_from_csr(csr_matrix([[0.0, np.nan]]), 1),
            "point 0, label 1.*NaN",
        ),
        (lambda: metrics.top_rows_from_csr(TRUE, 0), "whole number from 1"),
        (
            lambda: metrics.drop_filtered(TOP, TOP[:, :2] * 1.0, np.zeros((0, 2), int), 1),
            "integer and a float",
        ),
        (
            lambda: metrics.drop_filtered(TOP * 1.0, TOP, np.zeros((0, 2), int), 1),
            "pass the rows first",
        ),
        (
            lambda: metrics.drop_filtered(TOP, TOP * 1.0, np.array([[3, 0]]), 1),
            "points from 0 to 2",
        ),
        (
            lambda: metrics.drop_filtered(TOP, TOP * 1.0, np.array([[0, -1]]), 1),
            "label numbers from 0",
        ),
        (lambda: metrics.candidates_needed(1, np.array([1, 2, 3])), r"\[n, 2\]"),
    ],
)
def test_mistakes_are_told(call, message):
    with pytest.raises(InputError, match=message):
        call()
