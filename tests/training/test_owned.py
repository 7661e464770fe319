"""--overwrite deletes what a run wrote and nothing else, told by content."""

import json
import shutil
from pathlib import Path

import pytest
from train_runs import finished_run, make_dataset, run, tiny

from xmlkernels import InputError
from xmlkernels.training import owned

MINE = "ten years of work"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(dataset, tmp_path_factory.mktemp("runs"))


FOREIGN = {
    "checkpoint/thesis.tex": MINE,
    "checkpoint/last/thesis.tex": MINE,
    "checkpoint/last/state.json": '{"mine": 1}',
    "checkpoint": MINE,
    "config.json": '{"model_type": "bert"}',
    "metrics.json": "[1]",
    "log.jsonl": '{"level": "info"}\n',
    "predictions.npz": MINE,
    "metrics.json~": MINE,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_refused_and_stay(name: str, dataset: Path, tmp_path: Path) -> None:
    path = tmp_path / name.rstrip("~")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FOREIGN[name])
    with pytest.raises(InputError, match="--overwrite: .*nothing was deleted"):
        run(tiny(dataset, tmp_path, epochs=1, overwrite=True))
    assert path.read_text() == FOREIGN[name] and sum(p.is_file() for p in tmp_path.rglob("*")) == 1


def test_one_foreign_file_beside_a_run_is_refused(
    dataset: Path, finished: Path, tmp_path: Path
) -> None:
    for name, content in (
        ("metrics.json", "[1]"),
        ("checkpoint/thesis.tex", MINE),
        ("checkpoint/last/x.txt", MINE),
    ):
        output = tmp_path / name.replace("/", "-")
        shutil.copytree(finished, output)
        (output / name).write_text(content)
        before = sorted(output.rglob("*"))
        with pytest.raises(InputError, match=f"--overwrite: .*{Path(name).name}"):
            run(tiny(dataset, output, overwrite=True))
        assert sorted(output.rglob("*")) == before


@pytest.mark.parametrize("linked", [False, True])
def test_damaged_and_killed_runs_are_replaced(
    linked: bool, dataset: Path, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    (output / "config.json").write_text('{"model": "end_')
    (output / "metrics.json").write_text("")
    for left in ("checkpoint/.last.new-0123abcd", "checkpoint/.best.old"):
        (output / left).mkdir()
        (output / left / "state.json").write_text("{")
    (output / "notes.txt").write_text(MINE)
    # A checkpoint folder on another disk: the link stays, and so does what lies beside it there.
    if linked:
        elsewhere = tmp_path / "disk" / "checkpoint"
        elsewhere.parent.mkdir()
        (output / "checkpoint").rename(elsewhere)
        (elsewhere.parent / "beside").write_text(MINE)
        (output / "checkpoint").symlink_to(elsewhere)
    run(tiny(dataset, output, epochs=1, save_every=0, overwrite=True))
    assert json.loads((output / "metrics.json").read_text())["steps"] == 10
    assert (output / "notes.txt").read_text() == MINE
    assert not list((output / "checkpoint").glob(".*"))
    assert (output / "checkpoint").is_symlink() == linked
    assert (output / "checkpoint" / "last" / "state.json").exists()
    assert not linked or (tmp_path / "disk" / "beside").read_text() == MINE


def test_folders_of_others_are_no_output(tmp_path: Path) -> None:
    for name, whole in (
        ("manifest.json", False),
        ("last", False),
        ("config.json", True),
        ("metrics.json", True),
    ):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(InputError, match="--output: expected a folder of its own"):
            owned.refuse_others(str(folder), run=whole)
    owned.refuse_others(str(tmp_path / "none"))
