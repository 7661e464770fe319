"""What the first format wrote is read for ever: the same weights bit for bit, the same answers, and
old runs go on.

tests/fixtures/v1/README.md says what lies there.
"""

import hashlib
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_runs import Config, run, weights

from xmlkernels.data.dataset import Dataset
from xmlkernels.predict.model import Predictor
from xmlkernels.predict.ranked import RankedPredictor
from xmlkernels.training.config import began_with
from xmlkernels.tree.label_tree import LabelTree

V1 = Path(__file__).parent / "fixtures" / "v1"
EXPECTED: dict[str, Any] = json.loads((V1 / "expected.json").read_text())


@pytest.fixture(autouse=True)
def in_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs name their dataset and encoder from here, and one of them is written to."""
    shutil.copytree(V1, tmp_path / "v1")
    monkeypatch.chdir(tmp_path / "v1")


def sha256(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(
            tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def assert_same_answers(predictor: Any, name: str) -> None:
    """On another processor the encoder may round otherwise: labels are the same, logits but for
    that.
    """
    values, rows = predictor.predict_arrays(EXPECTED["texts"], 5)
    expected = EXPECTED[name]
    assert rows.tolist() == expected["labels"]
    logits = np.array([[-np.inf if x is None else x for x in row] for row in expected["logits"]])
    np.testing.assert_allclose(values, logits, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["run", "cascade", "bow", "unfinished"])
def test_old_checkpoints_hold_the_same_bits_and_give_the_same_answers(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor = Predictor.load(name, which="last" if name == "unfinished" else None)
    assert sha256(predictor.model.tensors()) == EXPECTED[name]["tensors"]
    assert predictor.identity == EXPECTED[name]["identity"]
    assert_same_answers(predictor, name)


def test_old_rankers_give_the_same_answers() -> None:
    assert_same_answers(RankedPredictor.load("ranker_tree"), "ranker_tree")
    assert_same_answers(RankedPredictor.load("ranker_model", "run"), "ranker_model")


def test_old_datasets_and_trees_keep_their_hashes() -> None:
    dataset = Dataset.open("dataset", verify=True)
    assert {"content_hash": dataset.content_hash, "key": dataset.key} == EXPECTED["dataset"]
    assert dataset.label_names == [f"w{3 * label}" for label in range(30)]
    LabelTree.load("tree.safetensors").check_dataset(dataset.content_hash, 30)


def test_an_old_run_goes_on_as_it_would_have() -> None:
    settings = began_with(json.loads(Path("unfinished/config.json").read_text()))
    config = Config(**{key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()})
    metrics = run(replace(config, resume=True))
    assert metrics["steps"] == 18
    assert {k: metrics["best"][k] for k in ("epoch", "step")} == {
        k: EXPECTED["run"]["best"][k] for k in ("epoch", "step")
    }
    assert metrics["test"]["loss"] == pytest.approx(EXPECTED["run"]["test"]["loss"], rel=1e-4)
    ours, theirs = weights(Path("unfinished"), "last"), weights(Path("run"), "last")
    assert ours.keys() == theirs.keys()
    for name in ours:
        kind = np.int64 if name.endswith("counter") else np.float32
        a, b = np.frombuffer(ours[name], kind), np.frombuffer(theirs[name], kind)
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5, err_msg=name)
