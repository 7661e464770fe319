"""`xmlkernels rank`: what a ranker is trained on, and what it gives."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranker_runs import SMALL, options
from scipy.sparse import csr_matrix
from train_runs import LABELS, make_tree, run, tiny

from xmlkernels import InputError
from xmlkernels.cli import ensemble
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.formats import read_npz, write_npz
from xmlkernels.data.vectorizer import Vectorizer
from xmlkernels.evaluation import predict_split, score_matrix
from xmlkernels.metrics import evaluate, inverse_propensity
from xmlkernels.predict.model import Predictor
from xmlkernels.ranker.blend import Reranker, best
from xmlkernels.training import ranker, ranker_inputs
from xmlkernels.tree.label_tree import LabelTree


@pytest.fixture(scope="module")
def trained(
    folder: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("ranker")
    return output, ranker.train_ranker(options(folder, output, checkpoint=str(finished)))


def test_ranker_beside_the_plain_model(
    trained: tuple[Path, dict[str, Any]], folder: Path, finished: Path
) -> None:
    output, report = trained
    dataset = Dataset.open(folder)
    model = Predictor.load(finished).model
    for split, name in (("val", "validation"), ("test", "test")):
        _, rows = predict_split(model, dataset.splits[split], 5)
        plain = evaluate(rows, dataset.splits[split].labels)
        assert {key: report[name]["plain model"][key] for key in plain} == pytest.approx(plain)
        # Words give labels away, and few epochs do not teach the tiny encoder all of them.
        assert report[name]["both"]["P@3"] > plain["P@3"] + 10
    by = ("P@1", "P@3", "P@5")
    both, model_alone = (
        sum(report["validation"][what][key] for key in by) for what in ("both", "plain model")
    )
    assert both >= model_alone and 0 < report["share"] <= 1
    told = json.loads((output / "metrics.json").read_text())
    assert told["test"] == report["test"] and told["dataset_hash"] == dataset.content_hash
    assert list(told["seconds"]) == ["TF-IDF", "embeddings and shortlists", "ranker", "evaluation"]


def test_predictions_are_what_the_saved_ranker_gives(
    trained: tuple[Path, dict[str, Any]], folder: Path, finished: Path
) -> None:
    output, report = trained
    test = Dataset.open(folder).splits["test"]
    shortlist = read_npz(output / "inputs" / "shortlist_test.npz")
    assert (
        shortlist != score_matrix(*predict_split(Predictor.load(finished).model, test, 12), LABELS)
    ).nnz == 0
    tfidf = Vectorizer.load(output / "vectorizer").transform(test.texts)
    scores = Reranker.load(output / "ranker.safetensors").rerank(
        shortlist, np.load(output / "inputs" / "embeddings_test.npy"), tfidf
    )
    rows = best(scores, test.filter_pairs, 8)[1]
    found = read_npz(output / "predictions.npz", rows=len(test), cols=LABELS)
    assert (np.diff(found.indptr) <= 8).all() and found[:3, :2].nnz == 0
    assert evaluate(rows, test.labels) == pytest.approx(
        {key: report["test"]["both"][key] for key in evaluate(rows, test.labels)}
    )
    assert np.array_equal(best(found, test.filter_pairs, 5)[1], rows[:, :5])


def test_inputs_are_taken_again_for_the_same_checkpoint_alone(
    trained: tuple[Path, dict[str, Any]],
    folder: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, report = trained
    monkeypatch.setattr(ranker_inputs, "Predictor", None)  # a second pass of the model would fail
    again = ranker.train_ranker(options(folder, output, checkpoint=str(finished)))
    assert again["test"] == report["test"]
    with pytest.raises(AttributeError):
        ranker.train_ranker(options(folder, output, checkpoint=str(finished), shortlist=5))


@pytest.mark.parametrize("name", ["embeddings_test.npy", "shortlist_val.npz", "inputs.json"])
def test_damaged_inputs_are_told_and_computed_anew(
    name: str,
    trained: tuple[Path, dict[str, Any]],
    folder: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(trained[0] / "inputs", tmp_path / "inputs")
    path = tmp_path / "inputs" / name
    whole = path.read_bytes()
    dataset = Dataset.open(folder)
    for damaged in (whole[: len(whole) // 2], whole[:5], b""):
        path.write_bytes(damaged)
        documents = {name: ranker_inputs.Documents(split) for name, split in dataset.splits.items()}
        ranker_inputs.model_inputs(
            str(finished), dataset, documents, 12, tmp_path / "inputs", "cpu"
        )
        notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        assert len(notes) == 1
        assert str(path) in notes[0]
        assert notes[0].endswith("embeddings and shortlists are computed anew")
        for split, part in documents.items():
            assert np.array_equal(
                part.embedding, np.load(trained[0] / "inputs" / f"embeddings_{split}.npy")
            )
            assert (
                part.shortlist
                != read_npz(trained[0] / "inputs" / f"shortlist_{split}.npz", keep_zeros=True)
            ).nnz == 0
    with pytest.raises(
        InputError, match=r"expected finite float32 embeddings of 3 documents, got float32 \[50, "
    ):
        ranker_inputs.read_embedding(tmp_path / "inputs" / "embeddings_test.npy", 3)


def test_wrong_texts_are_told_before_the_model_runs(
    folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranker, "model_inputs", None)  # a pass of the model would fail
    parts = {"train_text": "trn", "validation_text": "val", "test_text": "val"}
    texts = {name: str(folder.parent / f"{part}_X.txt") for name, part in parts.items()}
    with pytest.raises(InputError, match="expected 50 lines, the documents of test, got 40"):
        ranker.train_ranker(options(folder, tmp_path, checkpoint=str(finished), **texts))
    # And so would TF-IDF, which is not made for nothing.
    monkeypatch.setattr(ranker, "load_tfidf", None)
    with pytest.raises(InputError, match="nowhere"):
        ranker.train_ranker(options(folder, tmp_path, checkpoint=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(("words", "passes"), [(1, 2), (2, 5)])
def test_a_bag_of_words_takes_the_tfidf_of_the_same_vocabulary(
    words: int, passes: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranker's phrases are of one word: those of the first bag too. Validation and test are
    turned into TF-IDF, and for the second bag all three splits once more."""
    bow = {
        "encoder": "bow",
        "bow_width": 16,
        "min_df": 1,
        "ngrams": words,
        "encoder_lr": 0.1,
        "table_lr": 0.1,
    }
    run(tiny(folder, tmp_path / "bow", **bow, table_optimizer="adam", epochs=1))
    transform, calls = Vectorizer.transform, []

    def counted(self: Vectorizer, texts: Iterable[str]) -> csr_matrix:
        calls.append(self)
        return transform(self, texts)

    monkeypatch.setattr(Vectorizer, "transform", counted)
    wanted = options(folder, tmp_path / "ranker", checkpoint=str(tmp_path / "bow"), embedding=False)
    report = ranker.train_ranker(wanted)
    assert len(calls) == passes
    predictor, inputs = Predictor.load(tmp_path / "bow"), tmp_path / "ranker" / "inputs"
    for name, split in Dataset.open(folder).splits.items():
        values, rows = predict_split(
            predictor.model, split, SMALL["shortlist"], inputs=predictor.inputs
        )
        expected = score_matrix(values, rows, LABELS)
        found = read_npz(inputs / f"shortlist_{name}.npz", keep_zeros=True)
        assert np.array_equal(found.indices, expected.indices)
        assert np.allclose(found.data, expected.data, atol=1e-5)
    assert not list(inputs.glob("*.npy"))  # no embedding, no file of one
    monkeypatch.setattr(ranker_inputs, "Predictor", None)  # a second pass of the model would fail
    assert ranker.train_ranker(wanted)["test"] == report["test"]
    with pytest.raises(AttributeError):  # but an embedding is not there
        ranker.train_ranker(replace(wanted, embedding=True))


def test_given_share_and_no_embedding(
    trained: tuple[Path, dict[str, Any]],
    folder: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, _ = trained
    # Kept inputs with an embedding serve those who want none.
    monkeypatch.setattr(ranker_inputs, "Predictor", None)
    changed = options(folder, output, checkpoint=str(finished), share=0.0, embedding=False)
    report = ranker.train_ranker(changed)
    assert report["test"]["both"] == report["test"]["plain model"] and report["share"] == 0
    assert Reranker.load(output / "ranker.safetensors").ranker.dense.shape == (LABELS, 0)
    report = ranker.train_ranker(
        replace(changed, embedding=True, tfidf=False, share=1.0, min_df=2, longest=2)
    )
    assert report["test"]["both"] == report["test"]["ranker"] and report["weights_per_label"] == 0


def test_tfidf_alone_one_vs_all_and_by_clusters(folder: Path, tmp_path: Path) -> None:
    whole = ranker.train_ranker(options(folder, tmp_path, one_vs_all=True))
    assert list(whole["test"]) == ["ranker"] and whole["test"]["ranker"]["P@1"] > 80
    dataset = Dataset.open(folder)
    tree = LabelTree.from_partitions(
        [np.arange(LABELS) // 10, np.arange(LABELS) // 5], {"dataset": dataset.content_hash}
    )
    tree.save(tmp_path / "tree.safetensors")
    report = ranker.train_ranker(
        options(folder, tmp_path / "by_tree", tree=str(tmp_path / "tree.safetensors"), beam=3)
    )
    assert report["test"]["both"]["P@1"] > 80 > report["test"]["clusters alone"]["P@1"]
    assert sorted(p.name for p in (tmp_path / "by_tree" / "clusters").iterdir()) == [
        "level0.safetensors",
        "level1.safetensors",
    ]
    (tmp_path / "other").mkdir()
    LabelTree.from_partitions([np.arange(LABELS) // 10], {"dataset": "another"}).save(
        tmp_path / "other"
    )
    with pytest.raises(InputError, match="a tree of the dataset"):
        ranker.train_ranker(options(folder, tmp_path / "x", tree=str(tmp_path / "other")))


def test_a_forest_is_the_sum_of_rankers_on_trees_of_their_own(folder: Path, tmp_path: Path) -> None:
    """xmlkernels ensemble sums their predictions: every file and the sum with every metric,
    filtered pairs in none of them.
    """
    files, alone = [], []
    for seed in range(3):
        tree = make_tree(folder, tmp_path / f"tree{seed}.safetensors", seed)
        report = ranker.train_ranker(options(folder, tmp_path / str(seed), tree=str(tree), beam=2))
        files.append(str(tmp_path / str(seed) / "predictions.npz"))
        alone.append(report["test"]["both"])
    measured = ensemble.run(
        ensemble.Options(tuple(files), str(folder), output=str(tmp_path / "sum.npz"))
    )
    assert [measured[name] for name in files] == [pytest.approx(metrics) for metrics in alone]
    test, train = (Dataset.open(folder).splits[name] for name in ("test", "train"))
    total = np.zeros(test.labels.shape)
    for matrix in (read_npz(name, keep_zeros=True).tocoo() for name in files):
        total[matrix.row, matrix.col] += 1 / (1 + np.exp(-matrix.data.astype(np.float64)))
    assert not total[tuple(test.filter_pairs.T)].any()
    rows = np.argsort(-total, axis=1, kind="stable")[:, :5]
    weight = inverse_propensity(train.labels, *Dataset.open(folder).propensity)
    assert measured["sum"] == pytest.approx(evaluate(rows, test.labels, weight))
    assert "PSnDCG@5" in measured["sum"]


def test_texts_and_features_from_files(folder: Path, tmp_path: Path) -> None:
    """The dataset's own texts give the same figures from its files, and as ready features."""
    whole = ranker.train_ranker(options(folder, tmp_path / "a", one_vs_all=True))
    raw = folder.parent
    names = {"train": "trn", "validation": "val", "test": "tst"}
    texts = {f"{name}_text": str(raw / f"{part}_X.txt") for name, part in names.items()}
    assert (
        ranker.train_ranker(options(folder, tmp_path / "b", one_vs_all=True, **texts))["test"]
        == whole["test"]
    )
    vectorizer = Vectorizer.load(tmp_path / "a" / "vectorizer")
    for name, split in Dataset.open(folder).splits.items():
        write_npz(tmp_path / f"{name}.npz", vectorizer.transform(split.texts))
    ready = options(folder, tmp_path / "c", one_vs_all=True, features=str(tmp_path))
    assert ranker.train_ranker(ready)["test"] == whole["test"]
    write_npz(tmp_path / "val.npz", csr_matrix((3, len(vectorizer)), dtype=np.float32))
    with pytest.raises(InputError, match=r"val\.npz: expected 40 rows, got 3"):
        ranker.train_ranker(ready)
    with pytest.raises(InputError, match="expected 50 lines, the documents of test, got 40"):
        ranker.train_ranker(
            options(
                folder,
                tmp_path / "d",
                one_vs_all=True,
                **(texts | {"test_text": texts["validation_text"]}),
            )
        )
    with pytest.raises(InputError, match="--test-text: expected a file"):
        ranker.train_ranker(
            options(folder, tmp_path / "d", one_vs_all=True, **(texts | {"test_text": ""}))
        )


def test_label_texts_are_documents_of_their_labels(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is one more document of its label, without a shortlist, and raises that label for it."""
    dataset = Dataset.open(folder)
    train = dataset.splits["train"]
    tree = str(make_tree(folder, tmp_path / "tree.safetensors"))
    seen: list[tuple[Any, ...]] = []
    fit = ranker.fit_groups

    def kept(features: Any, labels: Any, group: Any, listed: Any, *rest: Any, **more: Any) -> Any:
        seen.append((features, labels, listed))
        return fit(features, labels, group, listed, *rest, **more)

    monkeypatch.setattr(ranker, "fit_groups", kept)
    for name, wanted in (("plain", False), ("own", True)):
        ranker.train_ranker(options(folder, tmp_path / name, tree=tree, label_text=wanted))
    (_, documents, _), (features, labels, listed) = seen
    assert len(features) == labels.shape[0] == listed.shape[0] == len(train) + LABELS
    assert (labels[: len(train)] != documents).nnz == 0
    assert np.array_equal(labels[len(train) :].toarray(), np.eye(LABELS))
    assert listed[len(train) :].nnz == 0 and listed[: len(train)].nnz > 0
    words = Vectorizer.load(tmp_path / "own" / "vectorizer")
    texts = words.transform(dataset.label_names or [])
    assert abs(features.sparse[len(train) :] - texts).max() < 1e-6
    plain, own = (
        Reranker.load(tmp_path / name / "ranker.safetensors").ranker for name in ("plain", "own")
    )
    each = csr_matrix(np.eye(LABELS))
    before, after = (
        r.score(features.rows(len(train), len(features)), each).data for r in (plain, own)
    )
    assert (after > before).mean() > 0.7 and after.mean() > before.mean() + 0.05


def test_without_pairs() -> None:
    matrix = csr_matrix(np.array([[1.0, 2, 0], [3, 0, 4], [0, 0, 5]]))
    left = ranker_inputs.without_pairs(matrix, np.array([[0, 1], [2, 2], [2, 0], [0, 2]]))
    assert left.toarray().tolist() == [[1, 0, 0], [3, 0, 4], [0, 0, 0]] and left.nnz == 3
    assert ranker_inputs.without_pairs(matrix, np.zeros((0, 2), np.int64)) is matrix
