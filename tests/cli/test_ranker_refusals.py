"""What `xmlkernels rank` refuses, and the command itself."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranker_runs import options
from train_runs import make_dataset

from xmlkernels import InputError
from xmlkernels.cli import export
from xmlkernels.training import ranker


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            "arguments: expected one of --checkpoint, --tree and --one-vs-all, for the "
            "shortlists, got none",
        ),
        ({"tree": "t", "one_vs_all": True}, "got --tree, --one-vs-all"),
        (
            {"one_vs_all": True, "tfidf": False},
            "--no-tfidf: expected --checkpoint with its embedding",
        ),
        (
            {"one_vs_all": True, "features": "f", "train_text": "t"},
            "--features: expected no text files beside it",
        ),
        ({"one_vs_all": True, "test_text": "t"}, "--train-text: expected a file"),
        ({"checkpoint": "c", "tfidf": False, "features": "f"}, "--no-tfidf: expected no texts"),
        ({"one_vs_all": True, "top_k": 0}, "--top-k: expected 1 or more, got 0"),
        ({"one_vs_all": True, "max_features": -1}, "--max-features: expected 0 or more"),
        ({"one_vs_all": True, "share": 2.0}, "--share: expected a number from 0 to 1, got 2.0"),
        ({"one_vs_all": True, "cost": -1.0}, "cost: expected a finite number above 0"),
        ({"one_vs_all": True, "train_text": "nowhere.txt"}, r"nowhere\.txt: expected a file"),
        ({"one_vs_all": True, "share": 0.5}, "--share: expected no such flag with --one-vs-all"),
        (
            {"one_vs_all": True, "negatives": 5},
            "--negatives: expected no such flag with --one-vs-all",
        ),
        ({"checkpoint": "c", "blend": "product"}, "--blend: expected no such flag without --share"),
        ({"checkpoint": "c", "beam": 5}, "--beam: expected no such flag without --tree"),
        (
            {"one_vs_all": True, "shortlist": 5},
            "--shortlist: expected no such flag without --checkpoint",
        ),
        ({"tree": "t", "device": "cuda"}, "--device: expected no such flag without --checkpoint"),
        (
            {"tree": "t", "embedding": False},
            "--no-embedding: expected no such flag without --checkpoint",
        ),
        (
            {"tree": "t", "features": "f", "min_df": 3},
            "--min-df: expected no such flag with --features",
        ),
        (
            {"checkpoint": "c", "tfidf": False, "longest": 3},
            "--longest: expected no such flag with --no-tfidf",
        ),
        (
            {"checkpoint": "c", "label_text": True},
            "--label-text: expected a ranker of words alone, got a checkpoint's embedding",
        ),
        (
            {"tree": "t", "label_text": True, "features": "f"},
            "--label-text: expected a ranker of words alone, got ready features",
        ),
        ({"checkpoint": "nowhere"}, "nowhere"),
        ({"tree": "nowhere"}, "nowhere: expected a label tree"),
    ],
)
def test_options_that_cannot_be_used(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        ranker.train_ranker(options(folder, tmp_path, **changes))


def test_outputs_that_cannot_be_used(folder: Path, finished: Path, tmp_path: Path) -> None:
    kept = (finished / "metrics.json").read_bytes()
    with pytest.raises(
        InputError,
        match=r"--output: expected a folder of its own, got .* which holds a run \(config\.json\)",
    ):
        ranker.train_ranker(options(folder, finished, checkpoint=str(finished)))
    assert (finished / "metrics.json").read_bytes() == kept
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            InputError, match="--output: expected a folder, or a name for a new one"
        ):
            ranker.train_ranker(options(folder, output, one_vs_all=True))
        with pytest.raises(InputError, match="--output: expected a folder"):
            export.export(export.Options(str(finished), str(output), what="embeddings"))


def test_an_interrupted_ranker_leaves_no_old_figures(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.json").write_text('{"dataset_hash": "", "seconds": {}}')
    monkeypatch.setattr(ranker, "fit", None)
    with pytest.raises(TypeError):
        ranker.train_ranker(options(folder, tmp_path, one_vs_all=True))
    assert not (tmp_path / "metrics.json").exists()


def test_datasets_that_do_not_fit(finished: Path, tmp_path: Path) -> None:
    lone = make_dataset(tmp_path / "lone", splits=("train", "test"))
    with pytest.raises(
        InputError, match="expected a validation split, to choose the ranker's share on"
    ):
        ranker.train_ranker(options(lone, tmp_path / "a", checkpoint=str(finished)))
    with pytest.raises(InputError, match="keep-texts"):
        ranker.train_ranker(options(lone, tmp_path / "a", one_vs_all=True))


def test_the_command(folder: Path, tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "xmlkernels",
        "rank",
        "--dataset",
        str(folder),
        "--output",
        str(tmp_path),
        "--min-df",
        "1",
    ]
    # Compiling would take longer than these few documents.
    env = {
        **os.environ,
        "NUMBA_DISABLE_JIT": "1",
    }
    good = subprocess.run(
        [*words, "--one-vs-all"], capture_output=True, text=True, timeout=200, env=env
    )
    assert good.returncode == 0, good.stderr
    assert "test, ranker" in good.stdout and (tmp_path / "ranker.safetensors").exists()
    bad = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: arguments: expected one of")
    assert bad.stderr.count("\n") == 1
