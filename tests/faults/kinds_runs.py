"""Checkpoints and runs that go on, and the files that commands are given."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from harness import Kind
from kinds_data import assert_canonical, draw
from scipy.sparse import csr_matrix

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checkpoint_groups import cuts, of_process, save_by, tables
from checkpoint_groups import same as same_bits

from xmlkernels.checkpoint import CheckpointFolder, load, writing
from xmlkernels.cli.filters import Barred
from xmlkernels.cli.score_files import log_odds, read_scores
from xmlkernels.data import formats
from xmlkernels.data.tokens import load_tokenizer
from xmlkernels.training.config import Config, began_with
from xmlkernels.training.folder import RunFolder, read_json
from xmlkernels.training.label_vectors import read_features, read_vectors
from xmlkernels.training.ranker_inputs import read_embedding
from xmlkernels.training.saved_state import newest

UNFINISHED = Path(__file__).resolve().parents[1] / "fixtures" / "v1" / "unfinished"
TOKENIZER = UNFINISHED / "checkpoint" / "tokenizer"
DOCUMENTS, LABELS, WIDTH = 6, 12, 4
LINES = [f"text {number} ä" for number in range(40)]
_began = began_with(read_json(UNFINISHED / "config.json"))
SETTINGS = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in _began.items()})
_TENSORS: dict[str, dict[str, torch.Tensor]] = {}


def make_parts(folder: Path) -> None:
    with patch.object(writing, "BLOCK", 32):  # so that each part has several blocks of rows
        save_by(3, folder / "c", 5)


def consume_parts(folder: Path) -> None:
    whole, state = load(folder / "c")
    _assert_bits(whole, tables(5))
    assert state == {"number": 5}
    for shard in cuts(2):
        held, rows = of_process(shard, 5)
        _assert_bits(load(folder / "c", rows=rows)[0], held)


def make_run(folder: Path) -> None:
    """Write a run of before anew by today's writers, with an earlier checkpoint."""
    shutil.copytree(UNFINISHED, folder, dirs_exist_ok=True)
    old, new = (CheckpointFolder(path / "checkpoint") for path in (UNFINISHED, folder))
    shutil.rmtree(new.folder / "best")
    for number, which in enumerate(("best", "last")):
        tensors, state = old.load(which)
        new.save_last(tensors | {"which": torch.tensor(number)}, state)
    new.save_best()


def consume_run(folder: Path) -> None:
    """Go on from it: whichever checkpoint is taken is one of those that were saved."""
    config = replace(SETTINGS, output=str(folder), resume=True)
    run = RunFolder(config)
    assert run.resumable
    tensors, state, _ = newest(run.checkpoints, config, batches=1000)
    run.rewind_log(state["log_bytes"])
    assert run.log_file.stat().st_size <= state["log_bytes"]  # later lines are written again
    _assert_bits(tensors, _TENSORS.setdefault(str(tensors["which"].item()), tensors))
    assert len(_TENSORS) <= 2 and state["epoch"] <= config.epochs


def _assert_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(same_bits(tensor, expected[name]) for name, tensor in found.items()), "other bits"


def make_predictions(folder: Path) -> None:
    scores = _scores()
    formats.write_npz(folder / "scores.npz", scores, keep_zeros=True)
    for name in ("scores.txt", "scores.txt.gz"):
        formats.write_sparse(folder / name, scores)


def _scores() -> csr_matrix:
    scores = draw(DOCUMENTS, LABELS, 4, 6)
    scores.data = np.linspace(0.01, 0.99, scores.nnz, dtype=np.float32)
    return scores


def consume_predictions(folder: Path) -> None:
    for name in ("scores.npz", "scores.txt", "scores.txt.gz"):
        path = str(folder / name)
        matrix = read_scores(path, DOCUMENTS, LABELS)
        assert_canonical(matrix)
        assert matrix.shape == (DOCUMENTS, LABELS)
        assert np.isfinite(log_odds(matrix, "probability", path)).all()


def make_tokenizer(folder: Path) -> None:
    shutil.copytree(TOKENIZER, folder / "tokenizer")


def consume_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer")
    rows = tokenizer.encode_batch(["w0 w1 w2", "w30", "", "other"], 8)
    assert all(0 < len(row) <= 8 and row.min() >= 0 for row in rows)
    assert max(int(row.max()) for row in rows) < tokenizer.vocab_size


def make_packed(folder: Path) -> None:
    text = "".join(f"{line}\n" for line in LINES).encode()
    # Two streams behind each other, as packing in parts leaves them.
    for name, pack in (("a.gz", gzip.compress), ("b.bz2", bz2.compress), ("c.xz", lzma.compress)):
        (folder / name).write_bytes(pack(text[:200]) + pack(text[200:]))


def consume_packed(folder: Path) -> None:
    for name in ("a.gz", "b.bz2", "c.xz"):
        lines = formats.read_lines(folder / name, documents=True)
        assert all(isinstance(line, str) and "\n" not in line for line in lines)


def make_given(folder: Path) -> None:
    random = np.random.default_rng(0)
    pairs = np.array([[0, 1], [2, 3], [5, 11]])
    formats.write_filter_pairs(folder / "filter.txt", pairs)
    formats.write_npz(folder / "features.npz", draw(DOCUMENTS, 9, 3, 7))
    for name, rows in (("labels.npy", LABELS), ("documents.npy", DOCUMENTS)):
        np.save(folder / name, random.standard_normal((rows, WIDTH), np.float32))


def consume_given(folder: Path) -> None:
    """Read what --filter, --features and --label-vectors name, and what a ranker keeps."""
    barred = Barred.read(str(folder / "filter.txt"), LABELS)
    values = np.tile(np.arange(4, 0, -1, dtype=np.float32), (10**4, 1))
    rows = np.tile(np.arange(4), (10**4, 1))
    _, kept = barred.kept_arrays(values, rows, 2)
    assert kept.shape == (10**4, 2) and kept.max() < LABELS
    assert_canonical(read_features(str(folder / "features.npz"), DOCUMENTS))
    vectors: list[tuple[Any, int]] = [
        (read_vectors(str(folder / "labels.npy"), LABELS), LABELS),
        (read_embedding(folder / "documents.npy", DOCUMENTS), DOCUMENTS),
    ]
    assert all(len(array) == count and np.isfinite(array).all() for array, count in vectors)


KINDS = [
    Kind("checkpoint in parts", make_parts, consume_parts),
    Kind("run that goes on", make_run, consume_run),
    Kind("predictions", make_predictions, consume_predictions),
    Kind("tokenizer", make_tokenizer, consume_tokenizer),
    Kind("packed texts", make_packed, consume_packed),
    Kind("files given to commands", make_given, consume_given),
]
