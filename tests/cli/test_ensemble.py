"""Sums of score files: against dense arithmetic, filters before the cut, and one sentence for every
mistake.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from train_runs import LABELS, make_dataset

from xmlkernels import InputError
from xmlkernels.cli import ensemble, score_files
from xmlkernels.data.dataset import Dataset, Split
from xmlkernels.data.formats import read_npz, write_npz, write_sparse
from xmlkernels.metrics import evaluate, inverse_propensity
from xmlkernels.metrics.ranking import NAMES
from xmlkernels.metrics.words import CUT
from xmlkernels.ranker.blend import combine
from xmlkernels.ranker.stacking import Stack, candidates_of

TEST_DOCUMENTS = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset whose test split filters pairs out, the first four documents' labels 0 to 3 among
    them.
    """
    raw = tmp_path_factory.mktemp("raw")
    pairs = [(row, label) for row in range(4) for label in range(4)] + [
        (TEST_DOCUMENTS - 1, LABELS - 1)
    ]
    (raw / "filter.txt").write_text("".join(f"{row} {label}\n" for row, label in pairs))
    return make_dataset(raw, test_filter=raw / "filter.txt")


@pytest.fixture(scope="module")
def test_split(folder: Path) -> Split:
    return Dataset.open(folder).splits["test"]


def logits(seed: int, density: float = 0.6) -> scipy.sparse.csr_matrix:
    """Logits of about 60% of the pairs; the last document has none."""
    random = np.random.default_rng(seed)
    dense = random.normal(size=(TEST_DOCUMENTS, LABELS)).astype(np.float32) * 3
    dense[random.random(dense.shape) > density] = 0
    dense[-1] = 0
    dense[:4, :4] = np.where(dense[:4, :4] == 0, 0, 50)  # the filtered ones would come first
    return scipy.sparse.csr_matrix(dense)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    at = tmp_path_factory.mktemp("scores")
    write_npz(at / "a.npz", logits(1))
    write_sparse(at / "b.txt", logits(2))
    return str(at / "a.npz"), str(at / "b.txt")


def run(files: tuple[str, ...], dataset: Path, **changes: Any) -> dict[str, dict[str, float]]:
    return ensemble.run(ensemble.Options(files, str(dataset), **changes))


def sigmoid(matrix: scipy.sparse.csr_matrix) -> np.ndarray:
    """Probabilities, 0 where nothing is stored; float64 [N, L]."""
    dense = matrix.toarray().astype(np.float64)
    return np.where(dense == 0, 0, 1 / (1 + np.exp(-dense)))


def lifted(matrix: scipy.sparse.csr_matrix) -> np.ndarray:
    """Log-odds, the lowest of the document where nothing is stored; float64 [N, L]."""
    dense = matrix.toarray().astype(np.float64)
    lowest = np.where(dense == 0, np.inf, dense).min(1, keepdims=True)
    return np.where(dense == 0, np.where(np.isinf(lowest), 0, lowest), dense)


def dense_best(total: np.ndarray, stored: np.ndarray, split: Split, k: int) -> np.ndarray:
    """The k best stored pairs that are not filtered, -1 where there are fewer; equal: the lower
    label.
    """
    total = np.where(stored, total, -np.inf)
    total[tuple(split.filter_pairs.T)] = -np.inf
    order = np.argsort(-total, axis=1, kind="stable")[:, :k]
    return np.where(np.isinf(np.take_along_axis(total, order, 1)), -1, order)


@pytest.mark.parametrize("how", ["probability", "log_odds"])
@pytest.mark.parametrize("weights", [(), (3.0, 1.0), (0.0, 2.0)])
def test_sum_is_that_of_dense_matrices(
    files: tuple[str, str], folder: Path, test_split: Split, how: Any, weights: tuple[float, ...]
) -> None:
    a, b = logits(1), logits(2)
    first, second = weights or (1.0, 1.0)
    of = sigmoid if how == "probability" else lifted
    stored = (a.toarray() != 0) & (first > 0) | (b.toarray() != 0) & (second > 0)
    rows = dense_best(first * of(a) + second * of(b), stored, test_split, 5)
    train = Dataset.open(folder).splits["train"].labels
    expected = evaluate(
        rows, test_split.labels, inverse_propensity(train, *Dataset.open(folder).propensity)
    )
    got = run(files, folder, sum=how, weights=weights)
    assert list(got) == [*files, "sum"]
    assert got["sum"] == pytest.approx(expected)
    assert {f"{kind}@{k}" for kind in NAMES for k in range(1, 6)} == set(got["sum"])


def test_labels_that_reach_a_threshold(
    files: tuple[str, str],
    folder: Path,
    test_split: Split,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    probability = (sigmoid(logits(1)) + sigmoid(logits(2))) / 2
    probability[tuple(test_split.filter_pairs.T)] = 0
    true = test_split.labels.toarray() > 0

    def measured(least: float) -> dict[str, float]:
        kept = probability >= least
        right = (kept & true).sum()
        both = kept.sum(1) + true.sum(1)
        own = 2 * (kept & true).sum(1) / np.maximum(both, 1)
        return {
            "microP": 100 * right / kept.sum(),
            "microR": 100 * right / true.sum(),
            "microF1": 200 * right / (kept.sum() + true.sum()),
            "sampleF1": 100 * own.mean(),
            "labels": kept.sum() / TEST_DOCUMENTS,
        }

    got = run(files, folder, threshold="0.6")["sum"]
    assert got["threshold"] == 0.6
    assert {name: got[name] for name in CUT} == pytest.approx(measured(0.6))
    best = run(files, folder, threshold="f1")["sum"]
    assert {name: best[name] for name in CUT} == pytest.approx(measured(best["threshold"]))
    tried = np.unique(probability[probability > 0])
    assert best["microF1"] == pytest.approx(max(measured(x)["microF1"] for x in tried))
    one = run(files[:1], folder, threshold="0.6")
    assert list(one) == [files[0]] and one[files[0]]["labels"] > 0
    plain = run(files, folder)["sum"]
    assert not set(CUT) & set(plain) and {key: best[key] for key in plain} == plain
    words = [*files, "--dataset", str(folder), "--threshold", "0.6"]
    ensemble.main([*words, "--metrics", str(tmp_path / "m.json")])
    out = capsys.readouterr().out
    assert "labels of a probability of 0.6 or more" in out and "Labels given per document." in out
    assert json.loads((tmp_path / "m.json").read_text())["metrics"]["sum"] == got
    with pytest.raises(InputError, match="--threshold: expected a probability from 0 to 1, or f1"):
        run(files, folder, threshold="calibrated")


def test_a_sum_that_is_learned(
    folder: Path, test_split: Split, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the files of the split that is named, of the dataset that is named."""
    dataset = Dataset.open(folder)
    random = np.random.default_rng(5)
    paths: dict[str, list[str]] = {}
    for name, split in dataset.splits.items():
        signal = 2.0 * (split.labels.toarray() > 0)
        for number in range(2):
            path = tmp_path / f"{name}{number}.npz"
            dense = signal + random.normal(-2, 1 + number, signal.shape)
            write_npz(path, scipy.sparse.csr_matrix(dense.astype(np.float32)))
            paths.setdefault(name, []).append(str(path))
    files, learn = tuple(paths["test"]), tuple(paths["train"])
    output = tmp_path / "sum.npz"
    how = {"learn": learn, "learn_split": "train"}
    found = run(files, folder, **how, output=str(output))
    assert list(found) == [*files, "sum", "learned"]
    sides = []
    counts = np.bincount(dataset.splits["train"].labels.indices, minlength=LABELS)
    for name in ("train", "test"):
        models = [read_npz(path) for path in paths[name]]
        total = combine(models, [m.data for m in models], [1.0, 1.0], "probability")
        sides.append(candidates_of(models, total, dataset.splits[name].filter_pairs, counts))
    values, rows = Stack(sides[0], dataset.splits["train"].labels).rank(sides[1])
    assert found["learned"] == pytest.approx(evaluate(rows, test_split.labels, inverse_propensity(
        dataset.splits["train"].labels, *dataset.propensity)))  # fmt: skip
    written = read_npz(output).toarray()
    kept = np.nonzero(rows >= 0)
    assert np.allclose(written[kept[0], rows[kept]], values[kept], atol=1e-4)
    other = make_dataset(tmp_path / "raw", splits=("train", "test"))
    elsewhere = run(files, folder, learn=learn, learn_split="train", learn_dataset=str(other))
    assert elsewhere["learned"] == found["learned"]  # the same documents
    cut = run(files, folder, **how, threshold="f1")["learned"]
    assert cut["microF1"] > 0
    words = [*files, "--dataset", str(folder), "--learn", *learn, "--learn-split", "train"]
    ensemble.main(words)
    assert "learned" in capsys.readouterr().out
    for wrong, told in (
        ({"learn": learn[:1], "learn_split": "train"}, "--learn: expected 2 files, one for each"),
        ({"learn": learn, "learn_split": "test"}, "--learn-split: expected another split"),
        (
            {"learn": learn, "learn_dataset": str(other)},
            "--learn-split: expected one of train, test, got val",
        ),
        ({**how, "calibrated": True}, "--calibrated: expected no --learn beside it"),
        ({"learn_dataset": str(folder)}, "--learn-dataset: expected --learn with it"),
    ):
        with pytest.raises(InputError, match=told):
            run(files, folder, **wrong)


@pytest.mark.parametrize("power", [0.3, 2.0])
def test_propensity_multiplies_the_probabilities_of_the_sum(
    files: tuple[str, str], folder: Path, test_split: Split, tmp_path: Path, power: float
) -> None:
    a, b = logits(1), logits(2)
    dataset = Dataset.open(folder)
    weight = inverse_propensity(dataset.splits["train"].labels, *dataset.propensity)
    stored = (a.toarray() != 0) | (b.toarray() != 0)
    total = (sigmoid(a) + sigmoid(b)) * weight**power
    rows = dense_best(total, stored, test_split, 5)
    assert not np.array_equal(rows, dense_best(sigmoid(a) + sigmoid(b), stored, test_split, 5))
    expected = evaluate(rows, test_split.labels, weight)
    output = str(tmp_path / "sum.npz")
    got = run(files, folder, propensity=power, output=output)
    plain = run(files, folder)
    assert got["sum"] == pytest.approx(expected)
    assert [got[name] for name in files] == [plain[name] for name in files]
    # What is written is the product, as a probability: it measures the same by itself.
    assert run((output,), folder)[output] == pytest.approx(expected)
    one = run(files[:1], folder, propensity=power)
    alone = dense_best(sigmoid(a) * weight**power, a.toarray() != 0, test_split, 5)
    assert one["sum"] == pytest.approx(evaluate(alone, test_split.labels, weight))


def test_one_file_is_measured_as_it_is(
    files: tuple[str, str], folder: Path, test_split: Split
) -> None:
    rows = dense_best(logits(1).toarray(), logits(1).toarray() != 0, test_split, 5)
    got = run(files[:1], folder)
    assert list(got) == [files[0]]
    assert {key: got[files[0]][key] for key in ("P@1", "R@5")} == pytest.approx(
        {key: evaluate(rows, test_split.labels)[key] for key in ("P@1", "R@5")}
    )


def test_every_metric_is_shown_with_its_sentence(
    files: tuple[str, str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [files[0], "--dataset", str(folder)]
    ensemble.main(words)
    assert "RP@5" not in capsys.readouterr().out
    ensemble.main([*words, "--show", "all"])
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    found = ensemble.run(ensemble.Options((files[0],), str(folder), show="all"))[files[0]]
    assert f"RP@5 {found['RP@5']:.2f} " in told and f"macroF1@5 {found['macroF1@5']:.2f} " in told
    assert f"F1 score (microavg) {found['F1 score (microavg)']:.4f} " in told
    assert "Hits among the 5 best, over 5 or, if fewer, the true labels" in told


@pytest.mark.parametrize("name", ["sum.npz", "sum.txt"])
def test_output_holds_logits_that_measure_the_same(
    files: tuple[str, str], folder: Path, tmp_path: Path, name: str
) -> None:
    whole = run(files, folder, output=str(tmp_path / name), metrics=str(tmp_path / "m.json"))
    assert run((str(tmp_path / name),), folder)[str(tmp_path / name)] == pytest.approx(whole["sum"])
    told = json.loads((tmp_path / "m.json").read_text())
    assert told["metrics"] == whole and told["split"] == "test" and told["sum"] == "probability"


def test_probabilities_and_logits_of_the_same_scores_agree(
    files: tuple[str, str], folder: Path, tmp_path: Path
) -> None:
    probability = scipy.sparse.csr_matrix(sigmoid(logits(1)))
    write_npz(tmp_path / "p.npz", probability)
    got = run((str(tmp_path / "p.npz"), files[1]), folder, scores=("probability", "logit"))
    assert got["sum"] == pytest.approx(run(files, folder)["sum"])


def test_certain_and_impossible_labels(folder: Path, tmp_path: Path) -> None:
    """Log-odds of 0 and 1 are finite, and the sum keeps pairs that add up to 0."""
    z = score_files.to_log_odds(np.array([0.0, 0.5, 1.0]))
    assert np.isfinite(z).all() and z[0] < -700 and z[1] == 0 and z[2] > 30
    one = scipy.sparse.csr_matrix(np.array([[2.0, 0, 0], [0, 0, 0]]))
    other = scipy.sparse.csr_matrix(np.array([[-2.0, 0, 1.0], [0, 0, 0]]))
    total = ensemble.combine([one, other], [one.data, other.data], [1, 1], "log_odds")
    assert total.toarray()[0].tolist() == [0, 0, 1.5] and total.nnz == 2


@pytest.mark.parametrize("name", ["again.npz", "again.txt"])
def test_stored_zero_is_a_score(folder: Path, tmp_path: Path, name: str) -> None:
    """A label whose logit is 0 stands before one below 0, alone and in what --output writes."""
    pairs = (np.array([0, -1] * TEST_DOCUMENTS, np.float32), np.tile([7, 8], TEST_DOCUMENTS))
    scores = scipy.sparse.csr_matrix(
        (*pairs, np.arange(TEST_DOCUMENTS + 1) * 2), (TEST_DOCUMENTS, LABELS)
    )
    path, again = str(tmp_path / "z.npz"), str(tmp_path / name)
    write_npz(path, scores, keep_zeros=True)
    run((path,), folder, output=again)
    found = score_files.read_scores(again, TEST_DOCUMENTS, LABELS)
    assert found[10].indices.tolist() == [7, 8]
    assert found[10].data.tolist() == pytest.approx([0, -1], abs=1e-37)


def test_large_logits_stay_apart() -> None:
    """Probabilities that all round to 1 still have an order, in one file and in a sum."""
    z = np.array([[40.0, 60, 50]])
    one = scipy.sparse.csr_matrix(z)
    assert ensemble.combine([one], [one.data], [1], "probability").toarray().tolist() == z.tolist()
    assert (
        ensemble.combine([one] * 2, [one.data, -one.data], [1, 0], "probability").toarray().tolist()
        == z.tolist()
    )
    np.testing.assert_allclose(
        ensemble.combine([one] * 3, [one.data] * 3, [1, 2, 4], "probability").toarray(), z
    )


def test_labels_beyond_the_range_of_probabilities_do_not_tie() -> None:
    """float64 has no probability below 1e-308: log-odds beyond ±708 are added as logarithms, in
    their order.
    """
    z = scipy.sparse.csr_matrix([[-2000.0, -1000, -800, -708, 3, 708, 800, 1000, 2000]])
    near = scipy.sparse.csr_matrix([[-2001.0, -1001, -801, -709, 2, 709, 801, 1001, 2001]])
    mean = ensemble.combine([z, near], [z.data, near.data], [1, 1], "probability").toarray()[0]
    assert (np.diff(mean) > 0).all()
    p = 0.5 / (1 + np.exp(-3)) + 0.5 / (1 + np.exp(-2))
    assert mean[4] == pytest.approx(np.log(p / (1 - p)))
    # The mean of e^-1000 and e^-1001; of 1 - e^-800 and 1 - e^-801.
    low, high = -1000 + np.log((1 + np.exp(-1)) / 2), 800 - np.log((1 + np.exp(-1)) / 2)
    assert mean[1] == pytest.approx(low) and mean[6] == pytest.approx(high)
    alone = scipy.sparse.csr_matrix((z.data[:1], z.indices[:1], [0, 1]), z.shape)
    values = [near.data, alone.data]
    half = ensemble.combine([near, alone], values, [1, 1], "probability").toarray()[0]
    assert half[8] == pytest.approx(0, abs=1e-9)  # p = 1 in one file, absent in the other
    nothing = scipy.sparse.csr_matrix(z.shape)
    assert ensemble.combine([nothing, nothing], [nothing.data] * 2, [1, 1], "probability").nnz == 0


def test_log_odds_of_a_document_that_one_file_lacks() -> None:
    one = scipy.sparse.csr_matrix([[2.0, -4.0], [6.0, 0]])
    other = scipy.sparse.csr_matrix([[0, 0], [2.0, 0]])
    total = ensemble.combine([one, other], [one.data, other.data], [1, 3], "log_odds")
    assert total.toarray().tolist() == [[2, -4], [3, 0]]


def test_padding_column_of_cascadexml(folder: Path, tmp_path: Path) -> None:
    wide = scipy.sparse.csr_matrix(
        (logits(1).data, logits(1).indices, logits(1).indptr), (TEST_DOCUMENTS, LABELS + 1)
    )
    write_npz(tmp_path / "wide.npz", wide)
    write_npz(tmp_path / "plain.npz", logits(1))
    path, plain = str(tmp_path / "wide.npz"), str(tmp_path / "plain.npz")
    assert run((path,), folder)[path] == run((plain,), folder)[plain]
    wide = wide.tolil()
    wide[0, LABELS] = 1
    write_npz(tmp_path / "used.npz", wide)
    with pytest.raises(InputError, match="expected 30 columns, the labels of the dataset, got 31"):
        run((str(tmp_path / "used.npz"),), folder)


def test_the_same_file_twice_has_two_rows(files: tuple[str, str], folder: Path) -> None:
    got = run((files[0], files[0]), folder)
    assert list(got) == [files[0], f"{files[0]} (2)", "sum"] and got["sum"] == got[files[0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": ()}, "one score file or more"),
        ({"dataset": ""}, "--dataset: expected a dataset folder"),
        ({"weights": (1.0,)}, "--weights: expected 2 numbers"),
        ({"weights": (1.0, -1.0)}, "--weights: expected finite numbers from 0"),
        ({"weights": (0.0, 0.0)}, "not all of them 0"),
        ({"weights": (1.0, float("nan"))}, "finite numbers"),
        ({"scores": ("logit",) * 3}, "--scores: expected logit or probability, once or 2 times"),
        ({"top_k": 4}, "--top-k: expected 5 or more, got 4"),
        ({"output": "sum.pkl"}, r"--output: expected a name that ends in \.npz"),
        ({"metrics": "m.txt"}, r"--metrics: expected a name that ends in \.json"),
        ({"split": "dev"}, "--split: expected one of train, val, test, got dev"),
    ],
)
def test_settings_that_cannot_be_used(
    files: tuple[str, str], folder: Path, changes: dict[str, Any], message: str
) -> None:
    settings = {"files": files, "dataset": str(folder)} | changes
    with pytest.raises(InputError, match=message):
        ensemble.run(ensemble.Options(**settings))


def test_files_that_cannot_be_used(files: tuple[str, str], folder: Path, tmp_path: Path) -> None:
    def refused(name: str, message: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=message) as told:
            run((files[0], str(tmp_path / name)), folder, **changes)
        assert name in str(told.value) and "\n" not in str(told.value)

    refused("none.npz", "no file of that name")
    (tmp_path / "scores.csv").write_text("1 2\n")
    refused("scores.csv", r"ends in \.npz, \.txt or \.txt\.gz")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 nothing")
    refused("broken.npz", "cannot be read")
    (tmp_path / "broken.txt").write_text(
        f"{TEST_DOCUMENTS} {LABELS}\n" + "0:1\n" * (TEST_DOCUMENTS - 1) + "zero:1\n"
    )
    refused("broken.txt", f"broken.txt:{TEST_DOCUMENTS + 1}")
    write_npz(tmp_path / "short.npz", logits(1)[:40])
    refused("short.npz", "expected 50 rows, got 40")
    write_sparse(tmp_path / "short.txt", logits(1)[:40])
    refused("short.txt", "expected 50 rows, got 40")
    write_npz(tmp_path / "narrow.npz", logits(1)[:, :20])
    refused("narrow.npz", "expected 30 columns, the labels of the dataset, got 20")
    write_npz(tmp_path / "logit.npz", logits(1))
    refused("logit.npz", "expected a probability from 0 to 1", scores=("logit", "probability"))


def test_the_command(files: tuple[str, str], folder: Path) -> None:
    words = [sys.executable, "-m", "xmlkernels", "ensemble", *files, "--dataset", str(folder)]
    good = subprocess.run(
        [*words, "--weights", "2", "1"], capture_output=True, text=True, timeout=120
    )
    assert good.returncode == 0, good.stderr
    assert "PSnDCG@5" in good.stdout and "sum" in good.stdout
    bad = subprocess.run([*words, "--weights", "2"], capture_output=True, text=True, timeout=120)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: --weights: expected 2 numbers")
    assert bad.stderr.count("\n") == 1
