"""The commands and programs of the guide's pages, as they stand there, on small data."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from test_docs import BLOCK, ROOT
from train_runs import RECIPES, make_dataset, run, threads_kept, tiny

import xmlkernels as xk
from xmlkernels.cli import main as command
from xmlkernels.cli import waiting
from xmlkernels.training.linear import train_linear

PAGES = ("results", "calibration", "labels", "export", "metrics", "python")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset and the runs that the pages name."""
    folder = tmp_path_factory.mktemp("world")
    made = make_dataset(folder / "raw", keep_texts=True)
    (folder / "cache").mkdir()
    data = made.rename(folder / "cache" / "mydata")
    with threads_kept():
        run(tiny(data, folder / "runs" / "mine", epochs=1))
        bow = {"output": str(folder / "runs" / "bow"), "min_df": 1, "bow_width": 16, "epochs": 2}
        run(RECIPES["bow"].replace(dataset=str(data), threads=1, report=False, **bow))
        words = {"output": str(folder / "runs" / "words"), "min_df": 1, "threads": 1}
        train_linear(RECIPES["linear"].replace(dataset=str(data), report=False, **words))
    (folder / "keep.txt").write_text("w0\nw3\n")
    (folder / "names.txt").write_text("w6\n")
    return folder


def commands(body: str) -> list[list[str]]:
    """The commands of a block; what installs is left out."""
    lines = re.sub(r" *\\\n *", " ", body).splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words and words[:2] != ["pip", "install"]]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_does_what_it_shows(
    page: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setattr(waiting, "choose", lambda words: None)  # torch has been loaded

    def pushed(predictor: object, name: str, **settings: object) -> None:
        shutil.copytree("shared/words", name, dirs_exist_ok=True)  # the hub is elsewhere

    monkeypatch.setattr(xk, "push_to_hub", pushed)
    monkeypatch.setattr(xk.HubModel, "push_to_hub", pushed)
    done = 0
    text = (ROOT / "docs" / "guide" / f"{page}.md").read_text("utf-8")
    assert not re.search(r"^```\n[^`]*xk\.", text, re.MULTILINE), "say that a block is Python"
    blocks = BLOCK.findall(text)
    for _, title, body in blocks:  # a page may show a file behind the command that reads it
        if title:
            Path(title).write_text(body, "utf-8")
    with threads_kept():
        for kind, _, body in blocks:
            if kind == "python":
                exec(compile(body, page, "exec"), {})
                promised = re.findall(r"print\(.*#  → (.*)$", body, re.MULTILINE)
                told = capsys.readouterr().out.splitlines()
                assert [line for line in promised if line not in told] == [], told
                done += 1
            for program, *words in commands(body) if kind == "bash" else ():
                assert program == "xmlkernels"
                done += 1
                if words[0] == "train":  # what the world has of that name
                    shutil.rmtree(words[words.index("--output") + 1])
                if words[0] == "serve":  # it does not end: what it would serve is asked
                    next(xk.load(words[1]).predict(["w3 w4"], 2))
                    continue
                with pytest.raises(SystemExit) as ended:
                    command.main(words)
                    sys.exit(0)
                told = " ".join(words), capsys.readouterr().err
                assert ended.value.code in (0, None), told
    assert done
