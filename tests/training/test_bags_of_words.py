"""The recipe `linear` on a dataset of bags of words: its features are the classifiers'."""

from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix, random

from xmlkernels import Dataset, InputError
from xmlkernels.cli import train as command
from xmlkernels.data.formats import read_npz
from xmlkernels.predict.ranked import RankedPredictor
from xmlkernels.ranker.blend import best
from xmlkernels.training.linear import LinearConfig, train_linear

LABELS, DOCUMENTS = 24, 200


def planted() -> tuple[csr_matrix, csr_matrix]:
    """Label l goes with the columns 2l and 2l + 1; values may be negative."""
    draw = np.random.default_rng(0)
    labels = np.zeros((DOCUMENTS, LABELS), np.float32)
    for row in labels:
        row[draw.choice(LABELS, 2, replace=False)] = 1
    words = np.repeat(labels, 2, axis=1) * np.tile([1, -1], LABELS)
    noise = random(DOCUMENTS, 2 * LABELS, 0.05, random_state=1, dtype=np.float32)
    return csr_matrix(csr_matrix(words) + noise), csr_matrix(labels)


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    words, labels = planted()
    return Dataset.from_texts(
        tmp_path_factory.mktemp("bags") / "set",
        (words[:150], labels[:150]),
        test=(words[150:], labels[150:]),
    )


def test_words_are_the_features(
    bags: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "linear"
    words = ["--dataset", str(bags.folder), "--output", str(output), "--depths", "2"]
    command.main(["linear", *words, "--cache", str(tmp_path / "cache"), "--threads", "1"])
    told = capsys.readouterr().out
    assert "no TF-IDF is computed" in told and "predictions.npz" in told.splitlines()[-1]
    assert not (output / "vectorizer").exists()
    with pytest.raises(InputError, match="expected a ranker of texts, got one of ready features"):
        RankedPredictor.load(output)
    found = RankedPredictor.load(output, threads=1, features=True)
    test = bags.splits["test"]
    values, rows = best(found.score_features(test.features, 5), test.filter_pairs, 5)
    kept = read_npz(output / "predictions.npz", keep_zeros=True)
    assert np.allclose(np.take_along_axis(kept.toarray(), rows, 1), values)
    assert (np.take_along_axis(test.labels.toarray(), rows, 1)[:, :2].mean()) > 0.9


def test_label_texts_need_bags_of_their_own(bags: Dataset, tmp_path: Path) -> None:
    output = str(tmp_path / "linear")
    config = LinearConfig(str(bags.folder), output=output, label_text=True, threads=1)
    with pytest.raises(InputError, match="bags of words of the label texts, too"):
        train_linear(config)
