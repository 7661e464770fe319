"""Every option of the other commands has a test: here, or one that options_held.py names."""

from __future__ import annotations

import ast
import io
import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from options_held import HELD
from ranker_runs import options as ranker_options
from train_runs import LABELS, ROOT, make_dataset, make_tokenizer, make_tree

from xmlkernels.cli import ensemble, export, predict
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.formats import write_npz
from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.data.text_parts import TextParts
from xmlkernels.metrics import evaluate
from xmlkernels.ranker.linear import Settings
from xmlkernels.training import ranker, tree


def source_of(test: str) -> str:
    """Return the code of a test and of the functions and fixtures nearby that it uses."""
    name, _, function = test.partition("::")
    path = ROOT / "tests" / name
    helpers = [other for other in path.parent.glob("*.py") if not other.name.startswith("test_")]
    made: dict[str, str] = {}
    for file in (*helpers, path):
        text = file.read_text()
        made |= {
            node.name: ast.get_source_segment(text, node) or ""
            for node in ast.parse(text).body
            if isinstance(node, ast.FunctionDef)
        }
    wanted, out = [function], ""
    while wanted:
        code = made.pop(wanted.pop())
        out += code
        wanted += [
            other for other in made if re.search(rf"\b{other}\b", code) and other not in wanted
        ]
    return out


@pytest.mark.parametrize("kind", HELD, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_option_is_held(kind: type) -> None:
    needed = {
        field.name
        for field in fields(kind)
        if field.default is MISSING and field.default_factory is MISSING
    }  # type: ignore[arg-type]
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    assert names == set(HELD[kind]), "a new option needs a test: name it in this table"
    for name, test in HELD[kind].items():
        assert name in needed or name in source_of(test).replace("-", "_"), (
            f"{test} does not speak of {name}"
        )


class Asked(Exception):
    """Ends a command once the test has seen what it looks for."""


def stop(*_: Any, **__: Any) -> None:
    raise Asked


def keeping(into: dict[str, Any], name: str, result: Any = None) -> Callable[..., Any]:
    """Make a function that stores its arguments as into[name] = (arguments, options)."""

    def kept(*arguments: Any, **options: Any) -> Any:
        into[name] = (arguments, options)
        return result

    return kept


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("raw"), keep_texts=True)


def test_what_predict_asks_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(torch, "set_num_threads", keeping(seen, "threads"))
    monkeypatch.setattr(predict, "find_device", lambda name: f"device {name}")
    model = SimpleNamespace(
        predict=keeping(seen, "predict", iter([])), parts=TextParts(), labels=LABELS
    )
    monkeypatch.setattr(predict.Predictor, "load", keeping(seen, "load", model))
    predict.run(
        predict.Options(
            checkpoint="run", text="a b", top_k=3, batch=5, which="last", device="cuda:1", threads=2
        )
    )
    assert seen["load"] == (("run",), {"which": "last", "device": "device cuda:1", "threads": 2})
    (texts, k), how = seen["predict"]
    assert list(texts) == ["a b"]
    assert k == 3
    assert how == {"batch_size": 5, "threshold": None, "propensity": 0.0}
    assert seen["threads"] == ((2,), {})
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"c\n")))
    predict.run(predict.Options("run", input="-", batch=4))
    expected = {"batch_size": 4, "window": 1, "prefetch": 0, "threshold": None, "propensity": 0.0}
    assert seen["predict"][1] == expected


def test_what_export_asks_of_a_model(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    model = SimpleNamespace(
        model="a model", labels=LABELS, inputs=SimpleNamespace(check=lambda dataset: None)
    )
    monkeypatch.setattr(export, "find_device", lambda name: f"device {name}")
    monkeypatch.setattr(export.Predictor, "load", keeping(seen, "load", model))
    monkeypatch.setattr(
        export, "embed_split", keeping(seen, "embeddings", np.zeros((2, 3), np.float32))
    )
    empty = np.zeros((50, 1), np.float32), np.zeros((50, 1), np.int64)
    monkeypatch.setattr(export, "predict_split", keeping(seen, "shortlists", empty))
    for what in ("embeddings", "shortlists"):
        more = {
            "which": "last",
            "device": "cuda:1",
            "batch": 7,
            "dataset": str(dataset),
            "top_k": 9,
        }
        export.export(export.Options("run", str(tmp_path / what), what=what, **more))
        assert seen["load"] == (("run",), {"which": "last", "device": "device cuda:1"})
        assert seen[what][1]["batch_size"] == 7 and seen[what][0][0] == "a model"
    assert seen["shortlists"][0][2] == 9
    assert (
        len(list((tmp_path / "embeddings").iterdir()))
        == len(list((tmp_path / "shortlists").iterdir()))
        == 3
    )


def test_what_a_tree_is_made_with(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    vectors = np.eye(LABELS, 4, dtype=np.float32)
    np.save(tmp_path / "vectors.npy", vectors)
    graph = scipy.sparse.eye_array(LABELS, format="csr")
    centroids = scipy.sparse.csr_matrix(np.eye(LABELS, 6, dtype=np.float32))
    words, threads = tree.TextFeatures, []
    monkeypatch.setattr(
        tree, "TextFeatures", lambda *a, **o: seen.update(words=o) or words(*a, **o)
    )
    monkeypatch.setattr(tree, "label_centroids", keeping(seen, "centroids", centroids))
    monkeypatch.setattr(tree, "fill_empty", keeping(seen, "names", centroids))
    monkeypatch.setattr(tree, "label_graph", keeping(seen, "graph", graph))
    monkeypatch.setattr(tree, "prune", keeping(seen, "prune", graph))
    monkeypatch.setattr(tree, "smooth", keeping(seen, "smooth", centroids))
    monkeypatch.setattr(
        tree,
        "cluster",
        lambda _, counts, means, tell: seen.update(means=means, counts=counts) or stop(),
    )
    monkeypatch.setattr(tree, "most_threads", lambda: 3)
    monkeypatch.setattr(tree, "use_threads", threads.append)
    with pytest.raises(Asked):
        tree.build_tree(
            tree.TreeConfig(
                str(dataset),
                output=str(tmp_path / "tree"),
                depths=(1, 3),
                ngrams=2,
                terms=50,
                common=0.9,
                keep=17,
                visits=33,
                restart=0.7,
                top=4,
                most_documents=21,
                prune=0.25,
                label_vectors=str(tmp_path / "vectors.npy"),
                starts=5,
                tolerance=0.02,
                seed=6,
                threads=2,
            )
        )
    assert seen["words"] == {"ngrams": 2, "most_terms": 50, "common": 0.9}
    assert [seen[name][0][2] for name in ("centroids", "names", "smooth")] == [17] * 3
    assert seen["graph"][1] == {
        "visits": 33,
        "restart": 0.7,
        "top": 4,
        "most_documents": 21,
        "seed": 6,
    }
    assert np.array_equal(seen["prune"][0][1], vectors) and seen["prune"][0][2] == 0.25
    assert seen["means"] == tree.Means(starts=5, tolerance=0.02, seed=6)
    assert seen["counts"] == [2, 8]
    assert threads == [2]
    del seen["graph"]
    with pytest.raises(Asked):
        tree.build_tree(
            tree.TreeConfig(str(dataset), str(tmp_path / "tree"), depths=(1, 3), graph=False)
        )
    assert "graph" not in seen


def told_to_a_ranker(
    monkeypatch: pytest.MonkeyPatch, options: ranker.RankerConfig, labels: int
) -> dict[str, Any]:
    """Return what each part of a ranker's training is given, up to the training itself."""
    seen: dict[str, Any] = {}

    def inputs(
        checkpoint: str, dataset: Dataset, documents: dict[str, Any], *rest: Any, **more: Any
    ) -> str:
        seen["inputs"] = (checkpoint, *rest, more)
        for part in documents.values():
            part.embedding = np.ones((len(part.split), 3), np.float32)
            part.shortlist = scipy.sparse.csr_matrix((len(part.split), labels), dtype=np.float32)
        return "a checkpoint"

    kept = scipy.sparse.identity(len(Dataset.open(options.dataset).splits["train"]), format="csr")
    vectorize, join = ranker.vectorize, ranker.Features.join
    monkeypatch.setattr(ranker, "checkpoint_identity", lambda path: "a checkpoint")
    monkeypatch.setattr(ranker, "model_inputs", inputs)
    monkeypatch.setattr(ranker, "vectorize", lambda *a: seen.update(words=a[2]) or vectorize(*a))
    monkeypatch.setattr(
        ranker.Features, "join", lambda *a, **o: seen.update(weights=o) or join(*a, **o)
    )
    matcher = SimpleNamespace(
        save=lambda folder: None,
        kept=keeping(seen, "kept", kept),
        clusters=["coarse", "fine"],
    )
    monkeypatch.setattr(ranker.ClusterMatcher, "fit", keeping(seen, "clusters", matcher))
    for name in ("fit", "fit_groups"):
        monkeypatch.setattr(
            ranker, name, lambda *a, name=name, **o: seen.update({name: (a, o)}) or stop()
        )
    with pytest.raises(Asked):
        ranker.train_ranker(options)
    return seen


TRAINED = {
    "loss": "logistic",
    "cost": 2.0,
    "positive_weight": 3.0,
    "bias": 0.5,
    "tolerance": 0.3,
    "epochs": 4,
    "prune": 0.05,
    "seed": 9,
}


def test_what_a_ranker_of_a_model_is_told(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {
        "longest": 3,
        "min_df": 2,
        "max_features": 40,
        "shortlist": 11,
        "embedding_weight": 0.5,
        "tfidf_weight": 2.0,
        "threads": 2,
        "share": 0.25,
        "blend": "product",
        "device": "cuda:1",
        "top_k": 6,
    }
    made = ranker_options(
        dataset, tmp_path / "out", checkpoint="run", negatives=7, **own, **TRAINED
    )
    seen = told_to_a_ranker(monkeypatch, made, LABELS)
    assert seen["words"] == {"longest": 3, "min_df": 2, "max_features": 40}
    checkpoint, shortlist, folder, device, more = seen["inputs"]
    assert (checkpoint, shortlist, device, more["embedding"]) == ("run", 11, "cuda:1", True)
    assert folder == tmp_path / "out" / "inputs"
    assert seen["weights"] == {"embedding_weight": 0.5, "tfidf_weight": 2.0}
    (_, _, _, settings), how = seen["fit"]
    assert settings == Settings(negatives=7, **TRAINED) and how["threads"] == 2  # type: ignore[arg-type]
    assert (tmp_path / "out" / "vectorizer").is_dir()
    # The result: the share and the blend that were given, and so many labels of each document.
    mixed: list[tuple[float, str]] = []
    shown = scipy.sparse.csr_matrix(np.tile(np.arange(1, 10, dtype=np.float32), (50, 1)))
    part = SimpleNamespace(
        split=Dataset.open(dataset).splits["test"],
        shortlist=shown,
        features=SimpleNamespace(rows=lambda *a: None),
    )
    part.shortlist.resize(50, LABELS)
    sized: list[int] = []
    scorer = SimpleNamespace(score=lambda *a, **o: part.shortlist)
    mixer = ranker.Reranker(scorer, made.share, made.blend)
    monkeypatch.setattr(
        ranker.Reranker,
        "mix",
        lambda self, *a: mixed.append((self.share, self.how)) or part.shortlist,
    )
    monkeypatch.setattr(
        ranker, "write_npz", lambda path, matrix, **_: sized.append(matrix.getnnz(1).max())
    )
    ranker.measure(made, Dataset.open(dataset), {"test": part}, mixer, None)
    assert mixed == [(0.25, "product")] and sized == [6]


def test_what_a_ranker_of_a_tree_is_told(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tree(dataset, tmp_path / "tree.safetensors")
    made = ranker_options(
        dataset, tmp_path / "out", tree=str(path), beam=3, negatives=7, threads=2, **TRAINED
    )
    seen = told_to_a_ranker(monkeypatch, made, LABELS)
    _, how = seen["clusters"]
    assert how == {"beam": 3, "settings": Settings(negatives=0, **TRAINED), "threads": 2}  # type: ignore[arg-type]
    clusters = seen["clusters"][0][2]
    assert [len(set(level.tolist())) for level in clusters] == [4, 10]
    assert seen["kept"][1] == {"threads": 2}
    (_, _, group, listed, settings), how = seen["fit_groups"]
    assert group == "fine"
    documents = len(Dataset.open(dataset).splits["train"])
    assert (listed != scipy.sparse.identity(documents)).nnz == 0  # what `kept` gave
    assert settings == Settings(negatives=7, **TRAINED) and how["threads"] == 2  # type: ignore[arg-type]


def test_scores_of_another_split_and_few_labels(dataset: Path, tmp_path: Path) -> None:
    split = Dataset.open(dataset).splits["val"]
    dense = np.random.default_rng(0).normal(size=(40, LABELS)).astype(np.float32)
    write_npz(tmp_path / "a.npz", scipy.sparse.csr_matrix(dense))
    name, output = str(tmp_path / "a.npz"), str(tmp_path / "sum.npz")
    found = ensemble.run(
        ensemble.Options((name, name), str(dataset), split="val", output=output, top_k=7)
    )
    rows = np.argsort(-dense, axis=1, kind="stable")[:, :5]
    expected = evaluate(rows, split.labels)
    assert {key: found[name][key] for key in expected} == pytest.approx(expected)
    assert scipy.sparse.load_npz(output).getnnz(1).tolist() == [7] * 40


def test_what_prepare_reads_beside_the_texts(tmp_path: Path) -> None:
    """Test the options about other files.

    A validation split with filter pairs, labels of an ambiguous format, and A instead of the
    preset's.
    """
    files = {
        "x": "w1\nw2\n",
        "y": "2 5\n1 1\n",
        "vx": "w3\nw4\nw5\n",
        "vy": "7\n8\n1\n",
        "pairs": "0 3\n2 1\n",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.txt").write_text(text)
    tokenizer = str(make_tokenizer(tmp_path / "tokenizer"))
    # "2 5": two labels of one document, or the header `documents labels`; "1 1": a label twice.
    found = prepare(
        PrepareConfig(
            tmp_path / "dataset",
            tokenizer,
            8,
            train_text=tmp_path / "x.txt",
            train_labels=tmp_path / "y.txt",
            validation_text=tmp_path / "vx.txt",
            validation_labels=tmp_path / "vy.txt",
            validation_filter=tmp_path / "pairs.txt",
            num_labels=12,
            label_format="lines",
            merge_duplicates=True,
            propensity="amazon",
            propensity_a=0.7,
        )
    )
    train, held = found.splits["train"], found.splits["val"]
    assert train.labels.toarray().nonzero()[1].tolist() == [2, 5, 1]
    assert train.labels.shape == (
        2,
        12,
    )
    assert held.labels.indices.tolist() == [7, 8, 1]
    assert held.filter_pairs.tolist() == [
        [0, 3],
        [2, 1],
    ]
    assert found.propensity == (0.7, 2.6) and not len(train.filter_pairs)
