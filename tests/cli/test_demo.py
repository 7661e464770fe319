"""The demo's second call: what stands is used again, what was stopped goes on, anything else is
replaced.
"""

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from train_runs import Config, make_dataset, run, tiny

from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.cli import demo
from xmlkernels.data import corpus
from xmlkernels.data.dataset import Dataset
from xmlkernels.errors import InputError
from xmlkernels.training import inputs


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("raw"), keep_texts=True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """What the demo asked `train` for; the commit is a clean one."""
    found: list[Config] = []
    monkeypatch.setattr(demo, "train", lambda config: found.append(config) or {"test": {}})
    monkeypatch.setattr(demo, "commit", lambda: "aaa")
    return found


def plant(
    config: Config, dataset: Dataset, *, finished: bool, commit: str = "aaa", data: str = ""
) -> None:
    """A run as it lies on the disk."""
    output = Path(config.output)
    output.mkdir(parents=True)
    (output / "config.json").write_text(json.dumps(asdict(config)))
    data = data or dataset.content_hash
    if finished:
        report = {"commit": commit, "dataset_hash": data, "test": {"P@1": 1.0}}
        (output / "metrics.json").write_text(json.dumps(report))
    else:
        CheckpointFolder(output / "checkpoint").save_last(
            {}, {"dataset": data, "commits": ["zzz", commit]}
        )


def asked(calls: list[Config]) -> list[str]:
    return ["resume" if c.resume else "overwrite" if c.overwrite else "new" for c in calls]


@pytest.mark.parametrize(
    ("finished", "planted", "expected"),
    [
        (True, {}, []),
        (True, {"commit": "bbb"}, ["overwrite"]),
        (True, {"data": "other"}, ["overwrite"]),
        (False, {}, ["resume"]),
        (False, {"commit": "bbb"}, ["overwrite"]),
        (False, {"data": "other"}, ["overwrite"]),
    ],
)
def test_what_lies_there_decides(
    finished: bool,
    planted: dict[str, str],
    expected: list[str],
    dataset: Path,
    tmp_path: Path,
    calls: list[Config],
) -> None:
    config, data = tiny(dataset, tmp_path / "demo"), Dataset.open(dataset)
    plant(config, data, finished=finished, **planted)
    report, stands = demo.trained(config, data)
    assert asked(calls) == expected and stands == (not expected)
    assert report["test"] == ({} if expected else {"P@1": 1.0})


def test_settings_that_shape_nothing_do_not_matter(
    dataset: Path, tmp_path: Path, calls: list[Config]
) -> None:
    config, data = tiny(dataset, tmp_path / "demo"), Dataset.open(dataset)
    plant(config, data, finished=True)
    changed = replace(config, overwrite=True, resume=True, log_every=7)
    assert demo.trained(changed, data)[1] and not calls
    assert not demo.trained(replace(config, seed=4), data)[1] and asked(calls) == ["overwrite"]


def test_changed_files_are_never_the_same_code(
    dataset: Path, tmp_path: Path, calls: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data = tiny(dataset, tmp_path / "demo"), Dataset.open(dataset)
    plant(config, data, finished=True, commit="aaa-dirty")
    monkeypatch.setattr(demo, "commit", lambda: "aaa-dirty")
    demo.trained(config, data)
    assert asked(calls) == ["overwrite"]


@pytest.mark.parametrize("left", ["nothing", "no checkpoint", "broken settings"])
def test_little_or_broken_remains(
    left: str, dataset: Path, tmp_path: Path, calls: list[Config]
) -> None:
    config, data = tiny(dataset, tmp_path / "demo"), Dataset.open(dataset)
    if left != "nothing":
        (tmp_path / "demo").mkdir()
        (tmp_path / "demo" / "config.json").write_text(
            json.dumps(asdict(config)) if left == "no checkpoint" else "{"
        )
    demo.trained(config, data)
    assert asked(calls) == (["resume"] if left == "no checkpoint" else ["overwrite"])


def test_the_whole_demo_twice(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first call trains, the second one only reads; a folder left by Ctrl-C does not stop
    it.
    """
    config, trained = tiny(dataset, tmp_path / "demo", epochs=1), []
    monkeypatch.setattr(demo, "RECIPES", {"demo": replace(demo.RECIPES["demo"], config=config)})
    monkeypatch.setattr(demo, "commit", lambda: "aaa")
    monkeypatch.setattr("xmlkernels.training.session.commit", lambda: "aaa")

    def train(config: Config) -> dict[str, Any]:
        trained.append(config)
        return run(config)

    monkeypatch.setattr(demo, "train", train)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.json").write_text(json.dumps(asdict(config)))
    demo.run()
    first = capsys.readouterr().out
    assert "TF-IDF baseline: measured now" in first and "holds this run unfinished" in first
    assert "a linear ranker of" in first
    assert f"--checkpoint {config.output} --ranker {config.output}-ranker" in first
    monkeypatch.setattr(
        demo, "KNNBaseline", lambda *_: pytest.fail("the baseline was measured again")
    )
    monkeypatch.setattr(demo, "train_ranker", lambda _: pytest.fail("the ranker was trained again"))
    demo.run()
    second = capsys.readouterr().out
    assert len(trained) == 1
    assert "nothing to train" in second
    assert "TF-IDF baseline: measured beside this run" in second
    tables = [
        [
            line
            for line in text.splitlines()
            if any(name in line for name in ("│ TF-IDF", "│ model"))
        ]
        for text in (first, second)
    ]
    assert tables[0] == tables[1] and len(tables[0]) == 3
    assert all(query in second for query in demo.QUERIES)


def test_a_ranker_of_another_run_is_trained_again(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = demo.RankerConfig(
        str(dataset), str(tmp_path), checkpoint="runs/demo", **demo.DEMO_RANKER
    )
    data, trained = Dataset.open(dataset), []
    monkeypatch.setattr(
        demo,
        "train_ranker",
        lambda options: trained.append(options) or {"test": {"both": {"P@1": 2.0}}},
    )
    kept = {
        "dataset_hash": data.content_hash,
        "options": demo.plain(options),
        "test": {"both": {"P@1": 1.0}},
    }
    (tmp_path / "metrics.json").write_text(json.dumps(kept))
    opened: list[Any] = []
    monkeypatch.setattr(demo.RankedPredictor, "load", lambda *folders: opened.append(folders))
    assert demo.with_ranker(options, data, stands=True) == {"P@1": 1.0} and not trained
    assert opened == [(str(tmp_path), "runs/demo")]
    for stands, changed in (
        (False, kept),
        (True, kept | {"dataset_hash": "other"}),
        (True, kept | {"options": {}}),
    ):
        (tmp_path / "metrics.json").write_text(json.dumps(changed))
        assert demo.with_ranker(options, data, stands=stands) == {"P@1": 2.0}
    assert len(trained) == 3
    (tmp_path / "metrics.json").write_text(json.dumps(kept))

    def refuse(*folders: str) -> None:
        raise InputError(
            "ranker", "the checkpoint that it was made with", "another", "train it again"
        )

    monkeypatch.setattr(demo.RankedPredictor, "load", refuse)  # damaged, or beside another run
    assert demo.with_ranker(options, data, stands=True) == {"P@1": 2.0} and len(trained) == 4


def test_a_corpus_made_now_is_not_told_as_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run opens what the demo has just made; the next process says that it stood already."""
    config = replace(demo.RECIPES["demo"].config, documents=40, cache=str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "PACKAGES", ("rich",))
    monkeypatch.setattr(inputs, "_opened", set())
    made = inputs.open_dataset(config)
    assert inputs.open_dataset(config).content_hash == made.content_hash
    first = capsys.readouterr().out
    assert "made on first use" in first and "used again" not in first
    monkeypatch.setattr(inputs, "_opened", set())
    inputs.open_dataset(config)
    again = capsys.readouterr().out
    assert again.count("used again") == 1 and "made on first use" not in again


def test_the_hint_names_the_interpreter_in_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert (
        demo.typed("predict") == os.path.join(".venv", "bin", "python") + " -m xmlkernels predict"
    )
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "xmlkernels").touch()
    assert demo.typed("predict") == os.path.join(".venv", "bin", "xmlkernels") + " predict"
    monkeypatch.setattr(sys, "executable", "/nowhere/bin/python3")
    assert demo.typed("predict") == "/nowhere/bin/python3 -m xmlkernels predict"
