"""A saved ranker asked for new texts: what it says of the test split's own texts is what it said of
the split.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranker_runs import options
from train_runs import LABELS, finished_run, make_dataset, make_tree, run, tiny

from xmlkernels import InputError
from xmlkernels.cli import ensemble, predict
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.formats import read_npz, write_npz
from xmlkernels.data.vectorizer import Vectorizer
from xmlkernels.predict.forest import Forest
from xmlkernels.predict.model import Predictor, checkpoint_identity
from xmlkernels.predict.ranked import RankedPredictor
from xmlkernels.ranker.blend import Reranker
from xmlkernels.training import ranker

PARTS = {"train": "trn", "validation": "val", "test": "tst"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("raw"), keep_texts=True)


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(folder, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def made(folder: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rankers of every kind, each in the folder of its name."""
    at = tmp_path_factory.mktemp("rankers")
    tree = make_tree(folder, at / "tree.safetensors")
    own = {f"{name}_text": str(own_texts(folder, at, part)) for name, part in PARTS.items()}
    for name, changes in {
        "model": {"checkpoint": str(finished), "embedding_weight": 0.5},
        "tree": {"tree": str(tree), "beam": 3},
        "all": {"one_vs_all": True},
        "own": {"checkpoint": str(finished), **own},
        "shortlist": {
            "checkpoint": str(finished),
            "embedding": False,
            "blend": "product",
            "share": 0.7,
        },
        "embedding": {"checkpoint": str(finished), "tfidf": False, "share": 0.5},
    }.items():
        ranker.train_ranker(options(folder, at / name, **changes))
    return at


def own_texts(folder: Path, at: Path, part: str) -> Path:
    """Texts that say more than the model's: other words, which tell the labels too."""
    lines = (folder.parent / f"{part}_X.txt").read_text().splitlines()
    (at / f"{part}.txt").write_text(
        "".join(f"{line.replace('w', 'other')} {line}\n" for line in lines)
    )
    return at / f"{part}.txt"


@pytest.fixture(scope="module")
def asked(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test split's texts as .jsonl."""
    path = tmp_path_factory.mktemp("asked") / "texts.jsonl"
    path.write_text(
        "".join(f"{json.dumps(text)}\n" for text in Dataset.open(folder).splits["test"].texts)
    )
    return path


def ask(ranker: Path, asked: Path, output: Path, **changes: Any) -> None:
    predict.run(
        predict.Options(
            ranker=(str(ranker),), input=str(asked), output=str(output), **({"top_k": 8} | changes)
        )
    )


@pytest.mark.parametrize("name", ["model", "tree", "all", "own", "shortlist", "embedding"])
def test_texts_of_the_test_split_are_answered_as_the_split_was(
    name: str, made: Path, finished: Path, asked: Path, tmp_path: Path
) -> None:
    more = {} if name in ("tree", "all") else {"checkpoint": str(finished)}
    ask(
        made / name,
        asked,
        tmp_path / "a.npz",
        **more,
        **({"ranker_input": str(made / "tst.txt")} if name == "own" else {}),
    )
    found = read_npz(tmp_path / "a.npz", keep_zeros=True)
    expected = read_npz(made / name / "predictions.npz", keep_zeros=True)
    assert found.shape == expected.shape and expected.nnz > 5 * found.shape[0]
    assert np.array_equal(found.indptr, expected.indptr)
    assert np.array_equal(found.indices, expected.indices)
    assert np.allclose(found.data, expected.data, atol=1e-5)


def test_lines_name_the_labels(made: Path, finished: Path, asked: Path, tmp_path: Path) -> None:
    for name, more in (("model", {"checkpoint": str(finished)}), ("tree", {})):
        ask(made / name, asked, tmp_path / "a.jsonl", batch=7, **more)
        expected = read_npz(made / name / "predictions.npz", keep_zeros=True)
        lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
        assert [line["text"] for line in lines] == list(range(expected.shape[0]))
        for row, line in enumerate(lines):
            assert {x["id"]: x["score"] for x in line["labels"]} == pytest.approx(
                dict(zip(expected[row].indices.tolist(), expected[row].data.tolist(), strict=True)),
                abs=1e-3,
            )
            assert all(x["name"] == f"w{3 * x['id']}" for x in line["labels"])
            scores = [x["score"] for x in line["labels"]]
            assert scores == sorted(scores, reverse=True)


def test_one_text(made: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict.run(
        predict.Options(
            str(finished), (str(made / "model"),), text="w9 w10 w11", top_k=1, latency=True
        )
    )
    out, err = capsys.readouterr()
    assert json.loads(out)["labels"][0]["id"] == 3 and "1 texts one by one: median" in err
    predict.run(
        predict.Options(
            str(finished),
            (str(made / "own"),),
            text="w9",
            ranker_text="other9 other10 w10",
            top_k=1,
        )
    )
    assert json.loads(capsys.readouterr().out)["labels"][0]["id"] == 3
    predictor = RankedPredictor.load(made / "tree")
    assert predictor.labels == LABELS
    assert [x.id for x in next(predictor.predict(["w9 w10 w11"], 1))] == [3]
    assert [a.shape for a in predictor.predict_arrays([], 4)] == [(0, 4), (0, 4)]
    with pytest.raises(InputError, match="text 0: expected one text, got a pair"):
        predictor.predict_arrays([("w9", "w9")], 4)


def test_a_forest_is_the_mean_of_its_rankers(
    folder: Path, made: Path, asked: Path, tmp_path: Path
) -> None:
    """What xmlkernels ensemble makes of the rankers' predictions of the split, where these are not
    cut.
    """
    for seed in range(3):
        tree = make_tree(folder, tmp_path / f"tree{seed}.safetensors", seed)
        ranker.train_ranker(
            options(folder, tmp_path / str(seed), tree=str(tree), beam=2 + seed, top_k=LABELS)
        )
    forest = tuple(str(tmp_path / str(seed)) for seed in range(3))
    summed = str(tmp_path / "sum.npz")
    ensemble.run(
        ensemble.Options(
            tuple(f"{name}/predictions.npz" for name in forest), str(folder), output=summed
        )
    )
    predict.run(
        predict.Options(
            ranker=forest, input=str(asked), top_k=LABELS, output=str(tmp_path / "a.npz")
        )
    )
    found = read_npz(tmp_path / "a.npz", keep_zeros=True)
    expected = read_npz(summed, keep_zeros=True)
    assert np.array_equal(found.indptr, expected.indptr)
    assert np.array_equal(found.indices, expected.indices)
    assert np.allclose(found.data, expected.data, atol=1e-4)
    one, pairs = RankedPredictor.load(made / "tree"), RankedPredictor.load(made / "all")
    pairs.takes_pairs = True
    for rankers, message in (
        ([], "got none"),
        ([one, pairs], "got 30 labels of texts and 30 labels of pairs"),
    ):
        with pytest.raises(InputError, match=message):
            Forest(rankers)


def test_identity_of_a_checkpoint(folder: Path, finished: Path, tmp_path: Path) -> None:
    """The best and the last one differ where the last is not the best; a copy is the same one."""
    shutil.copytree(finished / "checkpoint", tmp_path / "copy")
    assert (
        checkpoint_identity(tmp_path / "copy")
        == checkpoint_identity(finished)
        == Predictor.load(finished).identity
    )
    run(tiny(folder, tmp_path / "more", epochs=1))
    same = {checkpoint_identity(tmp_path / "more", which) for which in ("best", "last")}
    assert checkpoint_identity(finished) not in same


def test_rankers_that_cannot_be_used(
    folder: Path, finished: Path, made: Path, asked: Path, tmp_path: Path
) -> None:
    run(tiny(folder, tmp_path / "other", epochs=1))

    def refused(name: str, message: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=message) as told:
            ask(made / name, asked, tmp_path / "a.npz", **changes)
        assert "\n" not in str(told.value) and not (tmp_path / "a.npz").exists()

    other, whole = {"checkpoint": str(tmp_path / "other")}, {"checkpoint": str(finished)}
    refused(
        "model",
        r"other: expected the checkpoint [0-9a-f]{12}, with which .*model was made, got "
        r"[0-9a-f]{12}",
        **other,
    )
    refused("model", "model: expected the checkpoint that it was made with, got none")
    refused("tree", "tree: expected no checkpoint: it was made without one", **whole)
    refused(
        "own",
        "--ranker-input: expected the texts of its TF-IDF, which was not made of the model's, got "
        "none",
        **whole,
    )
    refused(
        "model",
        "--ranker-input: expected no texts, got some",
        **whole,
        ranker_input=str(made / "tst.txt"),
    )
    refused(
        "own",
        r"val\.txt: expected as many texts as --input has, got fewer",
        **whole,
        ranker_input=str(made / "val.txt"),
    )
    refused(
        "own",
        r"trn\.txt: expected as many texts as --input has, got more",
        **whole,
        ranker_input=str(made / "trn.txt"),
    )
    refused("nowhere", "nowhere: expected the output folder of a run or of a ranker")


def test_rankers_that_are_not_whole(folder: Path, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "tree", tmp_path / "mixed")
    Vectorizer.load(made / "own" / "vectorizer").save(tmp_path / "mixed" / "vectorizer")
    with pytest.raises(InputError, match="vectorizer/.*; copy the whole folder again"):
        RankedPredictor.load(tmp_path / "mixed")
    # As from before it had checksums of the files beside it.
    aged = Reranker.load(made / "tree" / "ranker.safetensors")
    facts = {key: value for key, value in aged.ranker.facts.items() if key != "beside"}
    replace(aged, ranker=replace(aged.ranker, facts=facts)).save(
        tmp_path / "mixed" / "ranker.safetensors"
    )
    with pytest.raises(InputError, match="expected the vocabulary [0-9a-f]{12} of this ranker"):
        RankedPredictor.load(tmp_path / "mixed")
    old = Reranker.load(made / "all" / "ranker.safetensors")
    for number, facts in enumerate(
        ({}, {"source": {}}, {"source": {"shortlist": "some", "words": "same"}})
    ):
        path = tmp_path / f"old{number}"
        path.mkdir()
        replace(old, ranker=replace(old.ranker, facts=facts)).save(path / "ranker.safetensors")
        with pytest.raises(InputError, match="train the ranker again"):
            RankedPredictor.load(path)
    vectorizer = Vectorizer.load(made / "all" / "vectorizer")
    for name, split in Dataset.open(folder).splits.items():
        write_npz(tmp_path / f"{name}.npz", vectorizer.transform(split.texts))
    ranker.train_ranker(
        options(folder, tmp_path / "ready", one_vs_all=True, features=str(tmp_path))
    )
    with pytest.raises(InputError, match="expected a ranker of texts, got one of ready features"):
        RankedPredictor.load(tmp_path / "ready")


@pytest.mark.parametrize(
    "name",
    [
        "ranker.safetensors",
        "clusters/level0.safetensors",
        "label_names.txt",
        "vectorizer/idf.safetensors",
    ],
)
def test_damage_to_a_ranker_is_found(made: Path, tmp_path: Path, name: str) -> None:
    """Flipped bits anywhere, a file of another ranker, none at all."""
    shutil.copytree(made / "tree", tmp_path / "damaged")
    path = tmp_path / "damaged" / name
    whole = path.read_bytes()
    cases: list[bytes | None] = [whole[:-1], whole + b"\0", b"\0" * len(whole), None]
    for bit in np.random.default_rng(0).integers(8 * len(whole), size=50):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        cases.append(bytes(flipped))
    for content in cases:
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(InputError):
            RankedPredictor.load(tmp_path / "damaged")
    path.write_bytes(whole)
    RankedPredictor.load(tmp_path / "damaged")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"text": "a"},
            "RUN: expected the output folder of a run or of a ranker, got none; name it: xm",
        ),
        (
            {"checkpoint": "c", "text": "a", "ranker_text": "b"},
            "--ranker-text: expected --ranker and --text with it",
        ),
        (
            {"ranker": ("r",), "text": "a", "ranker_input": "b"},
            "--ranker-input: expected --ranker and --input with it",
        ),
        (
            {"ranker": ("r",), "input": "a", "ranker_input": "-"},
            "--ranker-input: expected a file, got standard input",
        ),
        (
            {"ranker": ("r",), "text": "a", "which": "last"},
            "--which: expected --checkpoint with it",
        ),
    ],
)
def test_options_that_cannot_be_used(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        predict.run(predict.Options(**changes))
