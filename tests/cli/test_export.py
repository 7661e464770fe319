"""Arrays of a trained model: label vectors, embeddings of documents, shortlists."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from train_runs import (
    LABELS,
    cascade,
    make_dataset,
    make_tokenizer,
    make_tree,
    run,
    tiny,
    write_part,
)

import xmlkernels as xk
from xmlkernels import InputError
from xmlkernels.cli import export
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.data.tokens import load_tokenizer
from xmlkernels.evaluation import predict_split
from xmlkernels.nn import quantized
from xmlkernels.predict.model import Predictor


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def full(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "full"
    run(tiny(dataset, output, epochs=1))
    return output


@pytest.fixture(scope="module")
def tree_run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run(
        cascade(
            dataset, folder / "cascade", make_tree(dataset, folder / "tree.safetensors"), epochs=1
        )
    )
    return folder / "cascade"


def run_export(checkpoint: Path, output: Path, **options: Any) -> None:
    export.export(export.Options(str(checkpoint), str(output), **options))


def test_label_vectors(full: Path, tmp_path: Path) -> None:
    head = Predictor.load(full).model.head
    run_export(full, tmp_path / "trained", normalize=False)
    run_export(full, tmp_path / "unit")
    own, unit = (np.load(tmp_path / name / "label_vectors.npy") for name in ("trained", "unit"))
    assert np.array_equal(own, head.rows(0, LABELS).numpy()) and own.dtype == np.float32
    assert np.allclose(unit, own / np.linalg.norm(own, axis=1, keepdims=True), atol=1e-6)
    assert (tmp_path / "unit" / "label_names.txt").read_text() == "".join(
        f"w{3 * label}\n" for label in range(LABELS)
    )


@pytest.mark.parametrize("which", ["full", "tree_run"])
def test_embeddings_are_what_the_label_table_meets(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Times the rows of the table they are the scores of the same checkpoint, also of documents out
    of order.
    """
    folder = request.getfixturevalue(which)
    run_export(folder, tmp_path, what="embeddings", batch=7)
    run_export(folder, tmp_path, what="shortlists", batch=9, top_k=LABELS)
    predictor = Predictor.load(folder)
    model = predictor.model
    head, order = (
        (model.head, np.arange(LABELS))
        if which == "full"
        else (model.heads.levels[-1], model.tree.order)
    )
    table, bias = np.empty((LABELS, 32), np.float32), np.zeros(LABELS, np.float32)
    table[order] = head.weight.float().numpy()
    if head.bias is not None:
        bias[order] = head.bias.numpy()
    if which == "tree_run":
        model.heads.use_scheme("level")
    dataset = Dataset.open(request.getfixturevalue("dataset"))
    for name, split in dataset.splits.items():
        x = np.load(tmp_path / f"embeddings_{name}.npy")
        assert x.shape == (len(split), 32) and x.dtype == np.float32
        kept = scipy.sparse.load_npz(tmp_path / f"shortlist_{name}.npz")
        assert kept.shape == split.labels.shape
        assert kept.getnnz(1).tolist() == [LABELS if which == "full" else 12] * len(split)
        scores = x @ table.T + bias
        if which == "full":
            assert np.allclose(kept.toarray(), scores, atol=2e-2)
        else:  # all labels of the four clusters that were kept
            rows, columns = kept.nonzero()
            clusters = model.tree.ancestors(1)[model.tree.place[columns]]
            assert len(set(zip(rows.tolist(), clusters.tolist(), strict=True))) == 4 * len(split)
            values, labels = predict_split(model, split, 12, inputs=predictor.inputs)
            assert np.allclose(values, np.take_along_axis(scores, labels, 1), atol=2e-2)


def test_the_data_of_a_run_is_found_from_any_folder(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config.json may name the dataset as it was typed; metrics.json has the whole path."""
    run = shutil.copytree(full, tmp_path / "run")
    settings = json.loads((run / "config.json").read_text()) | {"dataset": "data"}
    (run / "config.json").write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path)
    run_export(run, tmp_path, what="embeddings")
    assert (tmp_path / "embeddings_test.npy").is_file()


def test_shortlists_are_cut(tree_run: Path, dataset: Path, tmp_path: Path) -> None:
    run_export(tree_run, tmp_path, what="shortlists", top_k=2, dataset=str(dataset))
    assert set(scipy.sparse.load_npz(tmp_path / "shortlist_test.npz").getnnz(1)) == {2}


def test_the_encoder_as_onnx(full: Path, tree_run: Path, tmp_path: Path) -> None:
    """onnxruntime answers other batches than those of the export, from the folder alone."""
    import onnxruntime

    run_export(full, tmp_path / "out", what="onnx")
    facts = json.loads((tmp_path / "out" / "encoder.json").read_text())
    assert facts["largest_difference"] < 1e-4 and facts["width"] == 32
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "encoder.onnx"))
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    predictor = Predictor.load(full)
    rows = tokenizer.encode_batch(["w1 w2 w3", "w5"], facts["max_length"])
    ids = np.full((2, max(map(len, rows))), tokenizer.pad_id, np.int64)
    mask = np.zeros_like(ids)
    for at, row in enumerate(rows):
        ids[at, : len(row)], mask[at, : len(row)] = row, 1
    (vector,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
    assert np.allclose(vector, predictor.embed(["w1 w2 w3", "w5"]), atol=2e-2)  # which is bf16
    with pytest.raises(InputError, match="a cascade, whose levels read several layers"):
        run_export(tree_run, tmp_path / "other", what="onnx")
    assert not (tmp_path / "other").exists()


def test_an_index_of_the_labels(
    full: Path, tree_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exact one finds the model's own answers; each kind says how much it finds of them."""
    import faiss

    predictor = Predictor.load(full)
    texts = ["w1 w2 w3", "w5 w30"]
    for kind in ("flat", "hnsw", "ivf"):
        run_export(full, tmp_path / kind, what="index", index=kind)
        facts = json.loads((tmp_path / kind / "index.json").read_text())
        assert facts["kind"] == kind and f"recall@10 {facts['recall@10']:.4f}" in (
            capsys.readouterr().out
        )
        assert facts["recall@10"] == 1 if kind == "flat" else facts["recall@10"] > 0.9
        index = faiss.read_index(str(tmp_path / kind / "labels.faiss"))
        assert index.ntotal == LABELS and index.d == facts["width"]
    exact = faiss.read_index(str(tmp_path / "flat" / "labels.faiss"))
    query = predictor.embed(texts)
    if facts["bias"]:
        query = np.concatenate([query, np.ones((2, 1), np.float32)], 1)
    scores, _ = exact.search(query, 5)
    assert np.allclose(scores, predictor.predict_arrays(texts, 5)[0], atol=2e-2)
    with pytest.raises(InputError, match="a cascade, whose scores are no inner products"):
        run_export(tree_run, tmp_path / "other", what="index")


def test_mistakes_are_told(full: Path, tree_run: Path, tmp_path: Path) -> None:
    for options, expected in (
        ({"top_k": 0}, "--top-k: expected 1 or more"),
        ({"batch": 0}, "--batch: expected 1 or more"),
        ({"device": "gpu"}, "--device"),
        ({"what": "embeddings", "dataset": str(tmp_path / "nowhere")}, "nowhere"),
    ):
        with pytest.raises(InputError, match=expected):
            run_export(full, tmp_path / "out", **options)
    with pytest.raises(InputError, match="a cascade, which has a bias for each label"):
        run_export(tree_run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dataset_of_another_tokenizer_or_other_labels_is_refused(
    full: Path, tmp_path: Path
) -> None:
    (tmp_path / "Y.txt").write_text("a\nb\n")
    text, labels = tmp_path / "X.txt", tmp_path / "X_Y.txt"
    text.write_text("w0 w1\nw2\n")
    labels.write_text("2 2\n0:1\n1:1\n")
    other = {"splits": (), "train_text": text, "train_labels": labels, "label_text": None}
    with pytest.raises(InputError, match="expected 30 labels, as the model has, got 2"):
        run_export(
            full,
            tmp_path / "out",
            what="embeddings",
            dataset=str(make_dataset(tmp_path / "raw", **other)),
        )
    write_part(tmp_path, "foreign", 20, 0)
    files = {"train_text": tmp_path / "foreign_X.txt", "train_labels": tmp_path / "foreign_X_Y.txt"}
    prepare(
        PrepareConfig(
            tmp_path / "set", str(make_tokenizer(tmp_path / "tokenizer", lower=False)), **files
        )
    )
    with pytest.raises(
        InputError, match="expected tokens of the model's tokenizer, got those of another"
    ):
        run_export(full, tmp_path / "out", what="shortlists", dataset=str(tmp_path / "set"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("which", ["full", "tree_run"])
@pytest.mark.parametrize("format", ["int8", "e4m3"])
def test_a_quantized_run_is_loaded_and_measured(
    which: str,
    format: Any,
    dataset: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = request.getfixturevalue(which)
    run_export(folder, tmp_path / "small", what="quantized", format=format)
    before, after = xk.load(folder), xk.load(tmp_path / "small")
    assert isinstance(before, Predictor) and isinstance(after, Predictor)
    (*_, large), (*_, small) = before.model.tables().values(), after.model.tables().values()
    kinds = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}
    assert small.weight.dtype == kinds[format]
    rows, own = large.rows(0, LABELS), small.rows(0, LABELS)
    error = (own - rows).abs().amax(1) / rows.abs().amax(1)
    assert float(error.max()) <= {"int8": 0.5 / 127, "e4m3": 1 / 16}[format] * 1.001
    facts = json.loads((tmp_path / "small" / "quantized.json").read_text())
    assert facts["largest_error"] == pytest.approx(float(error.max()), rel=1e-3)
    scale, bias = {"int8": 4, "e4m3": 8}[format], 0 if large.bias is None else 4
    assert facts["bytes_after"] == LABELS * (32 + scale + bias) < facts["bytes_before"]
    assert facts["split"] == "test" and set(facts["before"]) == {"P@1", "P@3", "P@5"}
    said = capsys.readouterr().out
    assert f"P@1 {facts['before']['P@1']:.2f} → {facts['after']['P@1']:.2f}" in said
    # What it answers are products with the rows that it holds; of all labels and of a list.
    texts = ["w0 w1 w2", "w30 w31", "w7 w8 w9"]
    exact = xk.load(folder)
    assert isinstance(exact, Predictor)
    (*_, table) = exact.model.tables().values()
    table.weight = own.clone()
    near = {"int8": 1e-5, "e4m3": 5e-3}[format]  # products of bf16
    for limit in (None, ["w0", "w30", "w87"]):
        values, labels = after.predict_arrays(texts, 3, allow=limit)
        expected, best = exact.predict_arrays(texts, 3, allow=limit)
        assert np.array_equal(labels, best) and np.allclose(values, expected, atol=near)
    with pytest.raises(InputError, match="a folder without a run"):
        run_export(folder, tmp_path / "small", what="quantized")
    with pytest.raises(
        InputError, match=f"a label table of fp32, bf16 or fp16, got one of {format}"
    ):
        run_export(tmp_path / "small", tmp_path / "again", what="quantized", dataset=str(dataset))


def test_a_table_of_several_tiles(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_export(full, tmp_path, what="quantized")
    found = Predictor.load(tmp_path)
    texts = ["w0 w1 w2", "w30 w31", "w7 w8 w9"]
    whole = found.predict_arrays(texts, LABELS, exclude=["w3"])
    monkeypatch.setattr(quantized, "_TILE", 7 * 32)
    again = found.predict_arrays(texts, LABELS, exclude=["w3"])
    assert all(np.array_equal(one, other) for one, other in zip(whole, again, strict=True))
    assert (whole[1] >= 0).sum() == 3 * (LABELS - 1)
    with pytest.raises(InputError, match="ram for a table of int8, got file"):
        Predictor.load(tmp_path, table_store="file")


def test_a_quantized_run_without_its_dataset(
    full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = tmp_path / "alone"
    shutil.copytree(full / "checkpoint", inner)
    run_export(inner, tmp_path / "small", what="quantized")
    assert "P@k is not measured: --dataset: expected a dataset folder" in capsys.readouterr().out
    assert "before" not in json.loads((tmp_path / "small" / "quantized.json").read_text())
