"""Damage to a run's files: nothing is lost but what is damaged, what stands in is told of, and
nobody meets a traceback.
"""

import copy
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import flip, without_checksums
from train_runs import ROOT, Config, make_dataset, opened, run, tiny, weights

from xmlkernels import InputError
from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.predict.model import CheckpointWarning, Predictor
from xmlkernels.training.config import began_with
from xmlkernels.training.folder import read_json

V1 = ROOT / "tests" / "fixtures" / "v1"
TEXTS = ["w0 w1 w2", "w30 w31", ""]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that keeps one earlier checkpoint."""
    base = tmp_path_factory.mktemp("whole")
    run(tiny(make_dataset(base / "raw"), base / "run"))
    return base / "run"


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def settings_of(folder: Path) -> Config:
    found = began_with(json.loads((folder / "config.json").read_text()))
    return Config(**{key: tuple(v) if isinstance(v, list) else v for key, v in found.items()})


def harm(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / "checkpoint" / name / "tensors.safetensors"
        damaged = path.with_name("damaged")
        shutil.copy(path, damaged)  # best may be the same file as last
        flip(damaged, 8 * path.stat().st_size - 77)
        damaged.replace(path)


def step_of(folder: Path, which: str) -> int:
    return int(CheckpointFolder(folder / "checkpoint").load(which)[1]["steps"])


def test_a_damaged_last_checkpoint_is_replaced_by_the_one_before(
    whole: Path, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm(damaged, "last")
    assert step_of(damaged, "last.1") < step_of(whole, "last")
    run(replace(settings_of(whole), output=str(damaged), resume=True))
    told = capsys.readouterr().out
    assert "note: " in told
    assert "last/tensors.safetensors, tensor" in told
    assert "last.1, the newest one that is whole" in told
    for which in ("last", "best"):  # bit for bit as the run that met no damage
        assert weights(damaged, which) == weights(whole, which)
    assert (damaged / "predictions.npz").read_bytes() == (whole / "predictions.npz").read_bytes()
    assert step_of(damaged, "last.1") == step_of(whole, "last.1")


def test_the_best_checkpoint_stands_in_where_no_other_is_whole(
    whole: Path, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm(damaged, "last", "last.1")
    run(replace(settings_of(whole), output=str(damaged), resume=True))
    assert "best, the newest one that is whole" in capsys.readouterr().out
    assert weights(damaged, "last") == weights(whole, "last")


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(whole: Path, damaged: Path) -> None:
    harm(damaged, "last", "last.1", "best")
    before = {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="last/tensors.safetensors, tensor"):
        run(replace(settings_of(whole), output=str(damaged), resume=True))
    for name in ("last", "last.1", "best"):
        (damaged / "checkpoint" / name / "state.json").unlink()
    with pytest.raises(
        InputError, match="last/state.json: expected a checkpoint, got no such file"
    ):
        run(replace(settings_of(whole), output=str(damaged), resume=True))
    assert all(
        path.read_bytes() == content
        for path, content in before.items()
        if path.name != "state.json"
    )


def test_files_beside_the_checkpoints_are_written_again(
    whole: Path, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = damaged / "checkpoint" / "label_names.txt"
    names.write_text(names.read_text().replace("w3\n", "w3 ", 1))
    run(replace(settings_of(whole), output=str(damaged), resume=True))
    assert "label_names.txt: " in capsys.readouterr().out
    assert names.read_bytes() == (whole / "checkpoint" / "label_names.txt").read_bytes()
    Predictor.load(damaged)


def test_serving_falls_back_and_says_so(whole: Path, damaged: Path) -> None:
    harm(damaged, "best")
    with pytest.warns(
        CheckpointWarning,
        match="best/tensors.safetensors, tensor .*checkpoint/last is used in its place",
    ):
        found = Predictor.load(damaged)
    expected = Predictor.load(whole, which="last").predict_arrays(TEXTS, 4)
    assert all(
        np.array_equal(a, b) for a, b in zip(found.predict_arrays(TEXTS, 4), expected, strict=True)
    )
    with pytest.raises(InputError, match="best/tensors"):
        Predictor.load(damaged, which="best")
    harm(damaged, "last")
    with pytest.warns(CheckpointWarning, match="last.1 is used"):
        Predictor.load(damaged)
    harm(damaged, "last.1")
    with pytest.raises(InputError, match="best/tensors"):
        Predictor.load(damaged)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("label_names.txt", lambda text: text.replace(b"\n", b" ", 1)),
        ("label_names.txt", lambda text: text.replace(b"w3", b"w4", 1)),
        ("label_names.txt", lambda text: None),
        ("tokenizer/tokenizer.json", lambda text: text.replace(b'"w7"', b'"W7"', 1)),
        ("tokenizer/tokenizer_config.json", lambda text: text + b" "),
        ("tokenizer/tokenizer_config.json", lambda text: None),
    ],
)
def test_files_beside_a_checkpoint_are_under_checksums(
    damaged: Path, name: str, change: Any
) -> None:
    path = damaged / "checkpoint" / name
    content = change(path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=name):
        Predictor.load(damaged)


def test_names_are_counted_where_there_are_no_checksums(tmp_path: Path) -> None:
    shutil.copytree(V1 / "run", tmp_path / "run")
    path = tmp_path / "run" / "checkpoint" / "label_names.txt"
    whole = path.read_bytes()
    for content, match in (
        (whole.replace(b"\n", b" ", 1), "30 lines, a name for each label, got 29"),
        (whole + b"x\n", "got 31"),
        (whole[:-1], "30 lines"),
        (whole.replace(b"w3", b"\xff", 1), "UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=match):
            Predictor.load(tmp_path / "run")


# ---- values of another type ----

WRONG: list[Any] = [
    None,
    -1,
    2**70,
    1.5,
    "x",
    True,
    [],
    {},
    [[1]],
    {"a": None},
    "",
    {"__float__": "nan"},
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value may be exchanged: every key, and of a list its first item."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from places(inner, (*path, key))
    elif isinstance(value, list) and value:
        yield (*path, 0)
        yield from places(value[0], (*path, 0))


def exchange(head: dict[str, Any], chance: random.Random) -> tuple[dict[str, Any], str]:
    """A copy of a checkpoint's head with one value of its state changed, or gone; and which."""
    copied = copy.deepcopy(head)
    *way, last = chance.choice(list(places(head["state"])))
    inner = copied["state"]
    for step in way:
        inner = inner[step]
    if chance.random() < 0.2:
        del inner[last]
        return copied, f"{[*way, last]} gone"
    inner[last] = chance.choice(WRONG)
    return copied, f"{[*way, last]} = {inner[last]!r}"


@pytest.mark.parametrize("seed", range(15))
def test_resume_states_of_other_types_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """They are of a run from before there were checksums, and of all its checkpoints, so that none
    stands in.
    """
    shutil.copytree(V1, tmp_path / "v1")
    monkeypatch.chdir(tmp_path / "v1")
    config = replace(settings_of(Path("unfinished")), resume=True)
    states = [Path("unfinished/checkpoint") / name / "state.json" for name in ("last", "best")]
    head, what = exchange(json.loads(states[0].read_text()), random.Random(seed))
    states[0].write_text(json.dumps(head))
    shutil.rmtree(states[1].parent)
    try:
        opened(config)
    except InputError as error:
        assert str(error)
    except Exception as error:
        raise AssertionError(what) from error


def test_served_states_of_other_types_are_told(damaged: Path) -> None:
    """Either a sentence, or a state whose change nobody reads."""
    folder = damaged / "checkpoint" / "best"
    without_checksums(folder)
    state = folder / "state.json"
    whole, told = json.loads(state.read_text()), 0
    for key in ("rng", "environment", "commits", "other_rngs"):  # nothing that serving reads
        whole["state"].pop(key, None)
    expected = Predictor.load(damaged, which="best").predict_arrays(TEXTS, 4)
    for seed in range(60):
        head, what = exchange(whole, random.Random(seed))
        state.write_text(json.dumps(head))
        try:
            found = Predictor.load(damaged, which="best").predict_arrays(TEXTS, 4)
        except InputError:
            told += 1
            continue
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), what
    assert told > 10


def test_settings_that_no_memory_holds_are_refused(tmp_path: Path) -> None:
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match=r"config.json: expected at most 67,108,864 bytes"):
        read_json(tmp_path / "config.json")
