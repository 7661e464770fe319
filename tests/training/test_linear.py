"""The recipe `linear`: a label tree and a ranker on it, in one command."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import load_npz
from train_runs import make_dataset

from xmlkernels import InputError
from xmlkernels.cli import ensemble, predict
from xmlkernels.cli import train as command
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.vectorizer import Vectorizer
from xmlkernels.predict.base import RANKER
from xmlkernels.predict.folders import load
from xmlkernels.predict.forest import Forest
from xmlkernels.predict.ranked import VECTORIZER, RankedPredictor
from xmlkernels.ranker.blend import Reranker
from xmlkernels.ranker.linear import Settings
from xmlkernels.training import forest, inputs, linear
from xmlkernels.training import tree as tree_module
from xmlkernels.training.clock import Deadline
from xmlkernels.training.linear import LinearConfig, train_linear, tree_depths
from xmlkernels.training.ranker import train_ranker
from xmlkernels.training.ranker_config import RankerConfig
from xmlkernels.training.recipes import RECIPES
from xmlkernels.training.tree import TreeConfig, build_tree
from xmlkernels.tree.label_tree import LabelTree


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("raw"), keep_texts=True)


def test_it_is_tree_and_rank_in_one(dataset: Path, tmp_path: Path) -> None:
    """The same predictions as the two commands; a second run takes the tree from the cache."""
    config = RECIPES["linear"].replace(
        dataset=str(dataset), output=str(tmp_path / "one"), cache=str(tmp_path / "cache"),
        depths=(2,), min_df=1, threads=1,
    )  # fmt: skip
    report = train_linear(config)
    tree = build_tree(
        TreeConfig(str(dataset), str(tmp_path / "tree"), depths=(2,), graph=False, plot=False)
    )
    two = RankerConfig(
        str(dataset), str(tmp_path / "two"), tree=str(tmp_path / "tree"), longest=1, min_df=1,
        threads=1, training=config.training,
    )  # fmt: skip
    other = train_ranker(two)
    assert report["test"] == other["test"] and report["test"]["both"]["P@1"] > 50
    assert (tmp_path / "one" / "clusters").is_dir()
    (kept,) = (tmp_path / "cache" / "trees").iterdir()
    assert report["options"]["tree"] == str(kept)
    assert json.loads((kept / "report.json").read_text()) and tree.sizes[0] == 4
    before = (kept / "tree.safetensors").stat().st_mtime_ns
    train_linear(replace(config, output=str(tmp_path / "again"), beam=2))
    assert (kept / "tree.safetensors").stat().st_mtime_ns == before


def test_the_command_trains_predicts_and_says_how(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Few labels have no tree; the last line is the command that asks the ranker."""
    output = tmp_path / "words"
    words = ["--dataset", str(dataset), "--output", str(output), "--min-df", "1"]
    monkeypatch.setattr(linear, "cached_tree", pytest.fail)
    command.main(["linear", *words, "--threads", "1", "--show", "all"])
    told = capsys.readouterr().out.splitlines()
    report = json.loads((output / "metrics.json").read_text())
    for metric in ("NDCG@10", "Recall (subj avg)"):  # as metrics.json has them, for --show all
        (line,) = [line for line in told if f" {metric} " in line]
        assert f" {report['annif'][metric]:.4f} " in line
    assert told[-1].startswith("ask it: ") and f"predict --ranker {output} --text" in told[-1]
    assert json.loads((output / "metrics.json").read_text())["options"]["one_vs_all"]
    assert (output / "report.html").exists()
    command.main(["linear", *words, "--threads", "1", "--no-report", "--overwrite"])
    assert not (output / "report.html").exists()  # nor one of the ranker before
    answers = tmp_path / "answers.jsonl"
    predict.main(
        ["--ranker", str(output), "--text", "w3 w4 w5", "--top-k", "1", "--output", str(answers)]
    )
    assert "w3" in answers.read_text()


def test_several_trees_are_one_result(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ranker on each tree, and the sum that `ensemble` makes of them; predict takes them all."""
    output = tmp_path / "forest"
    words = ["--dataset", str(dataset), "--output", str(output), "--cache", str(tmp_path / "c")]
    more = ["--depths", "2", "--min-df", "1", "--threads", "1", "--seed", "5", "--trees", "2"]
    command.main(["linear", *words, *more])
    rankers = [output / "tree0", output / "tree1"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"--ranker {rankers[0]} {rankers[1]} --text" in last
    heads = [json.loads((one / "metrics.json").read_text()) for one in rankers]
    assert [head["options"]["training"]["seed"] for head in heads] == [5, 6]
    assert heads[0]["options"]["tree"] != heads[1]["options"]["tree"]
    files = tuple(str(one / "predictions.npz") for one in rankers)
    summed = ensemble.run(ensemble.Options(files, str(dataset)))
    report = json.loads((output / "metrics.json").read_text())
    expected = summed["sum"]
    assert report["test"]["all trees"] == pytest.approx(expected)
    assert report["test"]["tree 1"] == heads[1]["test"]["both"]
    alone = ensemble.run(ensemble.Options((str(output / "predictions.npz"),), str(dataset)))
    assert next(iter(alone.values())) == pytest.approx(expected)
    # Fewer than it is to have are no forest: the training was stopped.
    (rankers[1] / "ranker.safetensors").rename(tmp_path / "away")
    with pytest.raises(InputError, match="forest: expected a forest of 2 trees, got 1 of them"):
        load(output)
    (rankers[1] / "mine.txt").touch()
    # A ranker in its place leaves nothing of it, nor the other way round.
    command.main(["linear", *words, *more, "--trees", "1", "--overwrite"])
    assert f"{output}/ holds an earlier ranker, which is replaced" in capsys.readouterr().out
    assert not rankers[0].exists() and list(rankers[1].iterdir()) == [rankers[1] / "mine.txt"]
    assert type(load(output)) is RankedPredictor
    command.main(["linear", *words, *more, "--overwrite"])
    assert not (output / "vectorizer").exists() and not (output / "label_names.txt").exists()
    assert type(load(output)) is Forest
    with pytest.raises(InputError, match="--trees: expected 1: 30 labels have no tree"):
        train_linear(LinearConfig(str(dataset), output=str(tmp_path / "x"), trees=2))
    with pytest.raises(InputError, match="--trees: expected 1 or more"):
        train_linear(LinearConfig(str(dataset), output=str(tmp_path / "x"), trees=0))


def test_the_time_ends_a_forest_that_is_whole_and_goes_on_later(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first tree is always made, another where there is time; --resume trains the rest."""
    caplog.set_level("INFO", "xmlkernels")
    now, trained = [0.0], []
    plain = forest.train_ranker

    def slow(options: RankerConfig, words: Any) -> dict[str, Any]:
        trained.append(options.output)
        now[0] += 30
        if trained[-1].endswith("tree2"):  # given up in the middle: its time is over
            now[0] += 300
        report = plain(options, words)
        report["seconds"] = {"ranker": {"wall": 25.0}, "evaluation": {"wall": 5.0}}
        return report

    monkeypatch.setattr(forest, "train_ranker", slow)
    config = LinearConfig(
        str(dataset), output=str(tmp_path / "forest"), cache=str(tmp_path / "c"), depths=(2,),
        min_df=1, threads=1, trees=3, top_k=5,
    )  # fmt: skip
    report = train_linear(config, Deadline(60, lambda: now[0]))
    assert len(trained) == 1, "30 s are left: another needs 39 s"
    assert report["time_over"] == {"minutes": 1.0, "trees": 1, "planned": 3}
    assert "the time is over (--minutes 1): 1 of 3 trees are trained" in caplog.text
    assert "--resume" in caplog.text
    whole = load(config.output)
    assert isinstance(whole, Forest) and len(whole.rankers) == 1
    assert "after 1 of 3 trees" in (tmp_path / "forest" / "report.html").read_text("utf-8")
    first = (tmp_path / "forest" / "tree0" / RANKER).stat().st_mtime_ns
    again = replace(config, resume=True)
    report = train_linear(again, Deadline(180, lambda: now[0]))
    assert [Path(path).name for path in trained] == ["tree0", "tree1", "tree2"]
    assert report["time_over"]["trees"] == 2 and not (tmp_path / "forest" / "tree2").exists()
    report = train_linear(again, Deadline(1e6, lambda: now[0]))
    assert "time_over" not in report and len(load(config.output).rankers) == 3
    assert (tmp_path / "forest" / "tree0" / RANKER).stat().st_mtime_ns == first
    alone = train_linear(replace(config, output=str(tmp_path / "alone")))
    assert report["test"]["all trees"] == alone["test"]["all trees"]
    with pytest.raises(InputError, match="--resume: min_df: expected 1, as .* was trained, got 2"):
        train_linear(replace(again, min_df=2))
    with pytest.raises(InputError, match="--resume: expected no --overwrite beside it"):
        train_linear(replace(again, overwrite=True))
    with pytest.raises(InputError, match=r"holds a ranker .*go on with it by --resume, replace"):
        train_linear(config)
    before = len(trained)
    one = replace(config, trees=1, output=str(tmp_path / "forest" / "tree1"), resume=True)
    train_linear(replace(one, training=replace(one.training, seed=1)))
    assert len(trained) == before and "is trained already" in caplog.text


def test_trees_of_one_command_share_their_features(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features are computed once, and each ranker is, bit for bit, the one of its tree alone."""
    made: list[str] = []
    count(monkeypatch, tree_module, "_features", made)
    count(monkeypatch, Vectorizer, "fit", made)
    count(monkeypatch, Vectorizer, "load", made)
    config = LinearConfig(
        str(dataset), output=str(tmp_path / "forest"), cache=str(tmp_path / "c"), depths=(2,),
        min_df=1, threads=1, label_text=True, trees=3,
    )  # fmt: skip
    train_linear(config)
    # Each ranker is loaded once more, for the forest's answers to validation.
    assert sorted(made) == ["_features", "fit", *["load"] * 4]
    last = replace(config, trees=1, training=replace(config.training, seed=2))
    train_linear(replace(last, output=str(tmp_path / "alone"), cache=str(tmp_path / "other")))
    assert sorted(made) == ["_features", "_features", "fit", "fit", *["load"] * 5]
    forest, alone = tmp_path / "forest" / "tree2", tmp_path / "alone"
    for name in ("vocabulary.json", "idf.safetensors"):
        path = Path(VECTORIZER) / name
        assert (forest / path).read_bytes() == (alone / path).read_bytes()
    (tree,) = (tmp_path / "other" / "trees").iterdir()
    same = tmp_path / "c" / "trees" / tree.name
    assert LabelTree.load(same).content_hash == LabelTree.load(tree).content_hash
    one, other = (Reranker.load(path / RANKER).ranker for path in (forest, alone))
    scores = tuple(load_npz(path / "predictions.npz").tocsr() for path in (forest, alone))
    for a, b in ((one.sparse, other.sparse), scores):
        assert np.array_equal(a.indptr, b.indptr) and np.array_equal(a.indices, b.indices)
        assert np.array_equal(a.data, b.data)
    assert np.array_equal(one.bias, other.bias)
    made.clear()
    config = replace(config, output=str(tmp_path / "graph"), graph=True, trees=2)
    train_linear(config)
    assert made.count("_features") == 2, "a graph's walks are each tree's own"


def count(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, made: list[str]) -> None:
    """Note in `made` each call of a function."""
    plain = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *a, **k: made.append(name) or plain(*a, **k))


def test_without_validation_the_share_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = make_dataset(tmp_path, splits=("train", "test"), keep_texts=True, label_text=None)
    found: list[RankerConfig] = []
    monkeypatch.setattr(linear, "train_ranker", lambda options, *_: found.append(options) or {})
    caplog.set_level("INFO", "xmlkernels")
    cache = str(tmp_path / "cache")
    config = LinearConfig(str(own), output=str(tmp_path / "x"), cache=cache, depths=(2,))
    train_linear(config)
    assert (found[-1].share, found[-1].blend) == (0.7, "product")
    assert "no validation split: --share 0.7 --blend product" in caplog.text
    train_linear(replace(config, share=0.2))
    assert (found[-1].share, found[-1].blend) == (0.2, "log_odds")


def test_every_option_reaches_tree_and_ranker(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Any] = {}
    monkeypatch.setattr(
        linear, "train_ranker", lambda options, *_: found.update(ranker=options) or {}
    )
    monkeypatch.setattr(inputs, "build_tree", lambda options, **_: found.update(tree=options))
    changes: dict[str, Any] = {
        "dataset": str(dataset), "output": "o", "cache": str(tmp_path), "depths": (1, 3),
        "beam": 3, "longest": 4, "min_df": 5, "max_features": 6,
        "training": Settings(cost=2.0, seed=7), "threads": 1, "share": 0.5, "blend": "product",
        "top_k": 8, "graph": True, "label_text": True, "show": "all",
        "report": False,
    }  # fmt: skip
    left = {"documents", "trees", "resume", "overwrite"}
    assert changes.keys() == {field.name for field in fields(LinearConfig)} - left
    train_linear(LinearConfig(**changes))
    tree, ranker = found["tree"], found["ranker"]
    assert (tree.depths, tree.seed, tree.threads) == ((1, 3), 7, 1)
    assert tree.output.startswith(str(tmp_path)) and ranker.tree == tree.output
    for name in changes.keys() - {"cache", "depths", "graph"}:
        assert getattr(ranker, name) == changes[name], name
    assert tree.graph
    train_linear(LinearConfig(**changes | {"graph": False}))
    assert not found["tree"].graph and found["tree"].output != tree.output


def test_mistakes(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--documents: expected the built-in corpus"):
        train_linear(LinearConfig(str(dataset), documents=5))
    with pytest.raises(InputError, match="--output: expected a folder of its own"):
        train_linear(LinearConfig(str(dataset), output=str(dataset)))
    monkeypatch.setattr("xmlkernels.dist.launched", lambda: (0, 2))
    with pytest.raises(InputError, match="torchrun: expected one process for this recipe"):
        command.main(["linear", "--dataset", str(dataset)])


def test_depths_fit_the_labels() -> None:
    """Data sets have the depths that were measured on them; none beyond what a tree can have."""
    assert tree_depths(11_862) == (7,) and tree_depths(670_091) == (9, 13)
    assert tree_depths(29_222) == (8,) and tree_depths(105_913) == (10,)
    assert tree_depths(200) == () and tree_depths(201) == (1,)
    for labels in np.geomspace(201, 1e8, 60).astype(int):
        depths = tree_depths(int(labels))
        assert 1 <= len(depths) <= 4 and depths[0] >= 1 and list(depths) == sorted(set(depths))
        assert 50 <= labels / 2 ** depths[-1] <= 160


def test_the_built_in_corpus_is_the_default(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def opened(config: Any) -> Dataset:
        asked.append(config)
        return Dataset.open(dataset)

    monkeypatch.setattr(linear, "open_dataset", opened)
    monkeypatch.setattr(linear, "train_ranker", lambda *_: {})
    train_linear(LinearConfig(output=str(tmp_path / "x"), documents=500, cache="c"))
    assert (asked[0].dataset, asked[0].documents, asked[0].cache) == ("docstrings", 500, "c")


def test_a_forest_stopped_before_its_calibration_has_no_metrics(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who finds metrics.json finds a run with all that belongs to it."""
    config = LinearConfig(
        str(dataset), output=str(tmp_path / "forest"), cache=str(tmp_path / "cache"), depths=(2,),
        min_df=1, trees=2, threads=1, report=False,
    )  # fmt: skip

    def stopped(_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(linear, "calibrate_held", stopped)
        with pytest.raises(KeyboardInterrupt):
            train_linear(config)
    assert not (tmp_path / "forest" / "metrics.json").exists()
    report = train_linear(replace(config, resume=True))
    kept = json.loads((tmp_path / "forest" / "metrics.json").read_text())
    assert kept["calibration"]["validation"] and "calibration" in report
    assert load(tmp_path / "forest").calibration is not None
