"""What `train auto` times and tries before it trains a forest."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from train_runs import make_dataset

from xmlkernels.data.dataset import Dataset
from xmlkernels.metrics.resampling import Difference
from xmlkernels.predict.folders import load
from xmlkernels.predict.ranked import RankedPredictor
from xmlkernels.training import timing
from xmlkernels.training.clock import Deadline
from xmlkernels.training.linear import LinearConfig, train_linear
from xmlkernels.training.timing import has_names, time_linear
from xmlkernels.training.trying import NAMES, PAIRS, WORDS, _ahead, choose_kind, finish


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> LinearConfig:
    base = tmp_path_factory.mktemp("trying")
    dataset = make_dataset(base / "raw", keep_texts=True)
    return LinearConfig(
        str(dataset), output=str(base / "run"), cache=str(base / "cache"), depths=(2,), min_df=1,
        threads=1, trees=2, top_k=5,
    )  # fmt: skip


def test_what_is_tried_is_the_first_tree(
    config: LinearConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "xmlkernels")
    said: list[str] = []
    found = choose_kind(config, (WORDS, PAIRS, NAMES), Deadline(1e6), said.append)
    assert said == ["trying words and pairs of words", "trying the labels' names as texts, too"]
    assert len(found.told) == 3 and found.told[0].endswith("with words alone")
    assert found.options.longest == 1, "each text is a heap of words: pairs say no more"
    assert [path.name for path in Path(config.output).iterdir()] == ["tree0"]
    forest = replace(found.options, resume=True)
    report = train_linear(forest, words=found.words)
    assert "1 of 2 trees are trained already" in caplog.text
    other = train_linear(replace(found.options, output=str(tmp_path / "other")))
    assert report["test"] == other["test"]
    assert report["rankers"] == [f"{config.output}/tree0", f"{config.output}/tree1"]
    # One tree alone is no forest, and nothing of the forest before stays.
    one = choose_kind(replace(config, overwrite=True), (WORDS, PAIRS), Deadline(1e6), said.append)
    report = finish(replace(one.options, trees=1))
    assert report["options"]["output"] == config.output and report["options"]["report"]
    names = {path.name for path in Path(config.output).iterdir()}
    assert {"ranker.safetensors", "report.html"} <= names and not names & {"tree0", "tree1"}
    assert type(load(config.output)) is RankedPredictor


def test_what_there_is_no_time_for_is_given_up(config: LinearConfig, tmp_path: Path) -> None:
    now = [0.0]
    options, deadline = replace(config, output=str(tmp_path / "run")), Deadline(100, lambda: now[0])
    found = choose_kind(options, (WORDS, PAIRS), deadline, lambda line: now.__setitem__(0, 95.0))
    assert found.options.longest == 1 and found.told[-1] == "no time for words and pairs of words"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tree0"]


def test_chance_chooses_nothing() -> None:
    """By (low, high) of P@1 and of P@5: one is ahead beyond chance, and P@1 is not behind so."""

    def ahead(first: tuple[float, float], five: tuple[float, float]) -> bool:
        ends = {"P@1": first, "P@5": five}
        return _ahead({name: Difference(sum(e) / 2, *e, 0.5) for name, e in ends.items()})

    assert ahead((0.1, 2.0), (-2.0, -0.1)) and ahead((-0.5, 0.4), (0.1, 2.0))
    assert not ahead((-0.1, 2.0), (-0.1, 2.0)) and not ahead((-0.5, -0.1), (0.1, 2.0))


def seconds() -> Callable[[], float]:
    """A clock that a second passes on at each look."""
    ticks = itertools.count()
    return lambda: float(next(ticks))


def test_a_sample_foretells_the_whole(
    config: LinearConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which TF-IDF and each training take a second."""
    dataset = Dataset.open(config.dataset)
    for sample in (1000, 40):  # of 160 training documents and 90 others
        monkeypatch.setattr(timing, "_SAMPLE", sample)
        cost = time_linear(dataset, 1, seconds())[1]
        read = min(160, sample)
        assert cost.features == pytest.approx(1.2 * 250 / read)
        least, most = 1.2 * 0.5 * 160 / read, 1.2 * 160 / read
        assert least < cost.tree < most * 1.05 + 0.01
        assert cost.of(3) == cost.features + 3 * cost.tree
    two = time_linear(dataset, 2, seconds())[1]
    assert two.tree == pytest.approx(cost.tree / 2, rel=0.02) and two.features == cost.features


def test_labels_with_names_are_told_from_codes(config: LinearConfig) -> None:
    dataset = Dataset.open(config.dataset)
    assert not has_names(dataset)  # w0, w3, …
    dataset.label_names = ["eggs", "fried eggs", "12"]
    assert has_names(dataset)
