"""Blends of a model's and a ranker's scores, and files of both."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranker_data import LABELS, equal, made
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy.sparse import csr_matrix

from xmlkernels import InputError
from xmlkernels.ranker.blend import SHARES, Reranker, best, choose_share, log_odds
from xmlkernels.ranker.features import Features
from xmlkernels.ranker.linear import LinearRanker, Settings, fit


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
