"""Where label trees are kept, and who else may write there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from tree_runs import LABELS

from xmlkernels.errors import InputError
from xmlkernels.locks import own_folder
from xmlkernels.training import tree as command
from xmlkernels.training.tree import TreeConfig, build_tree
from xmlkernels.tree.label_tree import FILE, LabelTree


def test_one_cache_for_two_at_once(options: TreeConfig, tmp_path: Path) -> None:
    """The second waits, says so, and uses what the first has made; where none is to wait it is
    refused.
    """
    told: list[str] = []
    with own_folder(options.folder):
        with pytest.raises(InputError, match="--cache: .*held by process"):
            build_tree(options, flag="--cache")
        go = threading.Event()

        def tell(line: str) -> None:
            told.append(line)
            go.set()

        waiting = threading.Thread(target=build_tree, args=(options,), kwargs={"wait": tell})
        waiting.start()
        assert go.wait(60)
        made = build_tree(replace(options, output=str(tmp_path / "other")))
        shutil.copy(tmp_path / "other" / FILE, options.folder)
    before = (options.folder / FILE).stat().st_mtime_ns
    waiting.join(60)
    assert "waiting for it" in told[0] and (options.folder / FILE).stat().st_mtime_ns == before
    assert LabelTree.load(options.folder).content_hash == made.content_hash
    (options.folder / FILE).unlink()
    (options.folder / "mine").touch()
    with pytest.raises(InputError, match="got other files; choose another --cache"):
        build_tree(options, flag="--cache")


def test_other_peoples_files_stay(options: TreeConfig, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "mine").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(
            InputError, match="expected a free place or the folder of a label tree, got other files"
        ):
            build_tree(replace(options, overwrite=overwrite))
    with pytest.raises(InputError, match="got a file; choose another --output"):
        build_tree(replace(options, output=str(tmp_path / "tree" / "mine")))
    (tmp_path / "tree" / "mine").unlink()
    (tmp_path / "tree" / FILE).write_text("damaged")
    with pytest.raises(InputError, match="make it again with --overwrite"):
        build_tree(options)
    assert build_tree(replace(options, overwrite=True)).sizes == (4, 8, LABELS)


def test_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "xmlkernels",
        "tree",
        str(folder / "texts"),
        "--output",
        str(tmp_path / "t"),
    ]
    done = subprocess.run(
        [*words, "--clusters", "3", "7", "--no-plot", "--no-graph"],
        timeout=300,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0 and "3 → 7 → 24, content" in done.stdout, done.stderr
    done = subprocess.run(
        [*words, "--depths", "1"], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_the_folder_stands_beside_the_dataset() -> None:
    assert command.TreeConfig("a/b/").folder == Path("a/b.tree")
