"""Label trees of a dataset: features, files, reports, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from tree_runs import LABELS, SUBJECTS

from tiny_tokenizer import make_tokenizer
from xmlkernels.data.manifest import content_hash
from xmlkernels.errors import InputError
from xmlkernels.nn.encoder import Encoder
from xmlkernels.training.label_vectors import LabelEncoder
from xmlkernels.training.tree import TreeConfig, build_tree
from xmlkernels.tree.label_tree import FILE, LabelTree
from xmlkernels.tree.report import plot


def by_subject(tree: LabelTree) -> bool:
    """Whether the four clusters of the first level are the four subjects."""
    subject = tree.order % SUBJECTS
    return tree.sizes[0] == SUBJECTS and all(
        len(set(subject[tree.ancestors(0) == c])) == 1 for c in range(SUBJECTS)
    )


@pytest.mark.parametrize("source", ["texts", "tokens", "bags"])
@pytest.mark.parametrize("graph", [True, False])
def test_subjects_become_clusters(
    options: TreeConfig, folder: Path, source: str, graph: bool
) -> None:
    """Labels without documents too, by their names."""
    tree = build_tree(replace(options, dataset=str(folder / source), graph=graph))
    assert by_subject(tree) and tree.sizes == (4, 8, LABELS)
    manifest = json.loads((folder / source / "manifest.json").read_text())
    tree.check_dataset(manifest["content_hash"], LABELS)
    assert tree.settings["features"] == ("text" if source == "texts" else source)
    assert tree.settings["clusters"] == [4, 8]


def test_what_the_folder_gets(options: TreeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    tree = build_tree(replace(options, plot=True))
    folder = Path(options.output)
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "tree.png", FILE]
    assert (folder / "tree.png").read_bytes()[:4] == b"\x89PNG"
    facts = json.loads((folder / "report.json").read_text())
    assert [level["clusters"] for level in facts["levels"]] == [4, 8]
    assert facts["levels"][0]["recall"]["1"] > 0.9
    assert set(facts["seconds"]) == {"features", "graph", "smoothing", "clusters", "report"}
    assert LabelTree.load(folder).content_hash == tree.content_hash
    out = capsys.readouterr().out
    assert "level 0: 4 clusters of 6 to 6 labels" in out
    assert "true children kept by the nearest 1: " in out


def test_made_once_for_each_content(
    options: TreeConfig, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = build_tree(options)
    stamp = (Path(options.output) / FILE).stat().st_mtime_ns
    capsys.readouterr()
    # neither threads nor another way to say the same levels make another tree
    assert (
        build_tree(replace(options, threads=1, depths=(9,), clusters=(4, 8))).content_hash
        == first.content_hash
    )
    assert "used again" in capsys.readouterr().out
    assert (Path(options.output) / FILE).stat().st_mtime_ns == stamp
    for other in (
        replace(options, seed=1),
        replace(options, depths=(1, 3)),
        replace(options, dataset=str(folder / "tokens")),
        replace(options, label_vectors=str(folder / "vectors.npy")),
        replace(options, graph=False),
    ):
        with pytest.raises(
            InputError,
            match="expected a tree made from these inputs and settings, got one made from others",
        ):
            build_tree(other)
    assert build_tree(replace(options, depths=(1, 3), overwrite=True)).sizes == (2, 8, LABELS)


def test_files_count_by_content(options: TreeConfig, folder: Path, tmp_path: Path) -> None:
    vectors = tmp_path / "v.npy"
    vectors.write_bytes((folder / "vectors.npy").read_bytes())
    build_tree(replace(options, label_vectors=str(folder / "vectors.npy")))
    assert build_tree(replace(options, label_vectors=str(vectors))) is not None
    np.save(vectors, np.random.default_rng(0).normal(size=(LABELS, 3)))
    with pytest.raises(InputError, match="got one made from others"):
        build_tree(replace(options, label_vectors=str(vectors)))


def test_given_features_and_label_vectors(
    options: TreeConfig, folder: Path, tmp_path: Path
) -> None:
    given = scipy.sparse.csr_matrix(np.random.default_rng(0).random((200, 30), np.float32))
    scipy.sparse.save_npz(tmp_path / "features.npz", given)
    tree = build_tree(replace(options, features=str(tmp_path / "features.npz"), clusters=(3, 5)))
    assert tree.sizes == (3, 5, LABELS)
    vectors = str(folder / "vectors.npy")
    for number, more in enumerate(({"features": "none"}, {"features": "text"}, {"prune": 0.5})):
        assert by_subject(
            build_tree(
                replace(options, output=f"{options.output}{number}", label_vectors=vectors, **more)
            )
        )  # type: ignore[arg-type]


def test_label_texts_by_an_encoder(options: TreeConfig, folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "encoder"
    make_tokenizer(source)
    Encoder.tiny(204).model.save_pretrained(source)
    encoder = LabelEncoder(str(source))
    names = (folder / "names.txt").read_text().splitlines()
    alone = np.concatenate([encoder.embed([name]) for name in names])
    assert np.allclose(encoder.embed(names, batch=5), alone, atol=1e-5)
    assert encoder.hash == LabelEncoder(str(source)).hash
    tree = build_tree(replace(options, features="none", label_text=str(source), clusters=(4,)))
    assert by_subject(tree) and tree.settings["label_text"] == encoder.hash
    Encoder.tiny(204, seed=1).model.save_pretrained(source)
    assert LabelEncoder(str(source)).hash != encoder.hash


def test_without_matplotlib(
    options: TreeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    build_tree(replace(options, plot=True))
    assert "no tree.png" in capsys.readouterr().out
    assert not (Path(options.output) / "tree.png").exists()
    assert plot({"levels": []}, Path(options.output) / "x.png") is False


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"depths": ()}, "--depths: expected 1 to 4 levels"),
        ({"depths": (1, 2, 3, 4, 5)}, "--depths: expected 1 to 4 levels"),
        ({"depths": (3, 2)}, "--depths: expected levels from coarse to fine"),
        ({"depths": (70,)}, "--depths: expected exponents from 0 to 62"),
        ({"clusters": (0,)}, "--depths: expected levels from coarse to fine"),
        (
            {"label_text": "a", "label_vectors": "b"},
            "--label-vectors: expected one of label-text and label-vectors, got both",
        ),
        (
            {"features": "none"},
            "--features none: expected label-text or label-vectors, got neither",
        ),
        ({"prune": 0.1}, "--prune: expected label-text or label-vectors, got neither"),
        ({"keep": 0}, "--keep: expected 1 or more, got 0"),
        ({"threads": -1}, "--threads: expected 0"),
        ({"dataset": "missing"}, "missing: expected a dataset folder"),
        ({"features": "missing.npz"}, "missing.npz: expected a file, got no file of that name"),
        ({"label_vectors": "missing.npy"}, "missing.npy: expected a file"),
        ({"restart": 2.0}, "restart: expected a probability"),
    ],
)
def test_what_is_refused(options: TreeConfig, change: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        build_tree(replace(options, **change))
    assert not Path(options.output).exists()


def test_files_that_are_refused(options: TreeConfig, folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_bytes(b"nothing")
    with pytest.raises(
        InputError, match="expected a scipy sparse .npz file, got one that cannot be read"
    ):
        build_tree(replace(options, features=str(bad)))
    with pytest.raises(
        InputError, match="expected an array that NumPy wrote, got a header that cannot be read"
    ):
        build_tree(replace(options, label_vectors=str(bad)))
    # A header that asks for 86 GiB, before anything is read.
    huge = (
        (folder / "vectors.npy")
        .read_bytes()
        .replace(f"({LABELS}, ".encode(), f"({LABELS}, 99999999".encode())
    )
    bad.write_bytes(huge)
    with pytest.raises(InputError, match="bytes of values, as its header says, got"):
        build_tree(replace(options, label_vectors=str(bad)))
    vectors = np.zeros((LABELS, 2), np.float32)
    vectors[3, 1] = np.nan
    np.save(tmp_path / "nan.npy", vectors)
    with pytest.raises(InputError, match=r"place \[3, 1\]: expected a finite number, got nan"):
        build_tree(replace(options, label_vectors=str(tmp_path / "nan.npy")))
    np.save(tmp_path / "short.npy", np.zeros((3, 2), np.float32))
    with pytest.raises(
        InputError, match=r"expected finite floats \[24, width\], got float32 \[3, 2\]"
    ):
        build_tree(replace(options, label_vectors=str(tmp_path / "short.npy")))
    scipy.sparse.save_npz(tmp_path / "short.npz", scipy.sparse.csr_matrix((3, 2)))
    with pytest.raises(InputError, match="expected 200 rows, got 3"):
        build_tree(replace(options, features=str(tmp_path / "short.npz")))
    with pytest.raises(
        InputError,
        match="expected the documents' texts, got no such file; prepare the data with --keep-texts",
    ):
        build_tree(replace(options, dataset=str(folder / "tokens"), features="text"))


def test_a_changed_label_id_is_told_before_the_tree_is_made(
    options: TreeConfig, folder: Path, tmp_path: Path
) -> None:
    """One id beyond the labels made the tree a segfault, a negative one gave a tree."""
    for wrong in (LABELS, 2**31 - 1, -5):
        shutil.rmtree(tmp_path / "changed", ignore_errors=True)
        shutil.copytree(folder / "texts", tmp_path / "changed")
        path = tmp_path / "changed" / "train" / "labels.npz"
        with np.load(path) as found:
            parts = dict(found)
        parts["indices"][7] = wrong
        np.savez(path, **parts)
        manifest = json.loads((tmp_path / "changed" / "manifest.json").read_text())
        manifest["files"]["train/labels.npz"] = {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        manifest["content_hash"] = content_hash(manifest)
        del manifest["checksums"]  # as a dataset from before there were any
        (tmp_path / "changed" / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(
            InputError,
            match=rf"labels.npz, indices, entry 7: expected indices from 0 to 23, got {wrong}",
        ):
            build_tree(replace(options, dataset=str(tmp_path / "changed")))
