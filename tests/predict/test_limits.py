"""Allow-lists and exclusions per text, batches, embeddings and threads: of every kind of predictor.

What is right is computed from a prediction of all labels.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from prediction_inputs import RUN, ask
from scipy.sparse import csr_matrix
from train_runs import LABELS, cascade, finished_run, make_dataset, make_tree, run

import xmlkernels as xk
from xmlkernels import InputError
from xmlkernels.data.dataset import Dataset
from xmlkernels.metrics import evaluate
from xmlkernels.models import among
from xmlkernels.predict import model as model_module
from xmlkernels.predict import ranked as ranked_module
from xmlkernels.predict.base import TextPredictor
from xmlkernels.predict.forest import Forest
from xmlkernels.predict.model import Predictor
from xmlkernels.predict.ranked import RankedPredictor
from xmlkernels.ranker.knn import KNNBaseline

V1 = RUN.parent
TEXTS = ["w0 w1 w2", "w30 w31", "w60", "w3 w4 w80 w81", ""]
KINDS = ("run", "bow", "cascade", "ranker", "tree", "forest", "stored")


def load(kind: str) -> TextPredictor:
    if kind in ("ranker", "forest"):
        beside = RankedPredictor.load(V1 / "ranker_model", V1 / "run")
        return beside if kind == "ranker" else Forest([beside, xk.load(V1 / "ranker_tree")])  # type: ignore[list-item]
    if kind == "stored":
        return xk.load(V1 / "run", table_store="file")
    return xk.load(V1 / {"tree": "ranker_tree"}.get(kind, kind))


@pytest.fixture(scope="module", params=KINDS)
def predictor(request: pytest.FixtureRequest) -> TextPredictor:
    return load(request.param)


def everything(predictor: TextPredictor) -> np.ndarray:
    """The score of every label of each text, also of those that a beam drops: [N, L]."""
    out = np.full((len(TEXTS), LABELS), -np.inf)
    values, rows = predictor.predict_arrays(TEXTS, LABELS, allow=range(LABELS))
    np.put_along_axis(out, rows, values, 1)
    return out


def best_of(scores: np.ndarray, allowed: list[int], k: int) -> list[int]:
    return sorted(allowed, key=lambda label: (-scores[label], label))[:k]


def ids(answers: Iterator[list[xk.Label]]) -> list[list[int]]:
    return [[label.id for label in labels] for labels in answers]


# ---- allow-lists ----


def test_all_labels_are_scored_as_without_a_list(predictor: TextPredictor) -> None:
    """What a beam or a shortlist keeps has the same score with a list of all labels.

    Of a forest it has not: with a list, labels that one shortlist lacks are scored there, too.
    """
    whole = everything(predictor)
    assert np.isfinite(whole).all()
    plain = list(predictor.predict(TEXTS, 6))
    assert all(plain)
    for row, labels in zip(whole, plain, strict=True):
        for label in labels if not isinstance(predictor, Forest) else ():
            assert row[label.id] == pytest.approx(label.score, abs=2e-4)


def test_the_best_of_an_allow_list_are_exact_and_never_short(predictor: TextPredictor) -> None:
    """The list holds the labels that come last, which no shortlist would keep."""
    whole = everything(predictor)
    lists = [np.argsort(row)[:7].tolist() for row in whole]
    found = ids(predictor.predict(TEXTS, 5, allow=lists))
    assert found == [best_of(row, own, 5) for row, own in zip(whole, lists, strict=True)]
    common = [0, 29, 7, 13]
    expected = [best_of(row, common, 9) for row in whole]
    for given in (common, set(common), np.array(common), [f"w{3 * x}" for x in common]):
        assert ids(predictor.predict(TEXTS, 9, allow=given)) == expected
    assert ids(predictor.predict(TEXTS, 9, allow=iter([common] * len(TEXTS)))) == expected


def test_a_list_or_none_for_each_text(predictor: TextPredictor) -> None:
    plain = ids(predictor.predict(TEXTS, 3))
    found = ids(predictor.predict(TEXTS, 3, allow=[None, [4], None, ["w6", 4], None]))
    assert [found[0], found[2], found[4]] == [plain[0], plain[2], plain[4]]
    assert found[1] == [4] and set(found[3]) == {2, 4}


def test_exclusions_leave_the_next_best(predictor: TextPredictor) -> None:
    """Also where they are all that a shortlist holds: other labels then fill the places."""
    whole = everything(predictor)
    barred = [[label.id for label in labels] for labels in predictor.predict(TEXTS, LABELS - 4)]
    found = ids(predictor.predict(TEXTS, 3, exclude=barred))
    for row, own, out in zip(whole, barred, found, strict=True):
        if isinstance(predictor, Predictor):
            assert out == best_of(row, [x for x in range(LABELS) if x not in own], 3)
        assert len(out) == 3 and not set(out) & set(own)
    plain = ids(predictor.predict(TEXTS, 3))
    first = [labels[0] for labels in plain]
    common = ids(predictor.predict(TEXTS, 2, exclude=[f"w{3 * x}" for x in first]))
    assert all(not set(labels) & set(first) and len(labels) == 2 for labels in common)


def test_an_exclusion_is_taken_out_of_an_allow_list(predictor: TextPredictor) -> None:
    given: dict[str, Any] = {"allow": [1, 2, 3], "exclude": [[2], [1, 2, 3], [], [9], None]}
    found = ids(predictor.predict(TEXTS, 5, **given))
    assert [sorted(labels) for labels in found] == [[1, 3], [], *[[1, 2, 3]] * 3]
    values, rows = predictor.predict_arrays(TEXTS, 2, **given)
    assert rows[1].tolist() == [-1, -1] and np.isneginf(values[1]).all()


def test_parts_of_a_list_are_merged(
    predictor: TextPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long list is scored a part at a time."""
    expected = predictor.predict_arrays(TEXTS, 6, allow=range(1, LABELS))
    monkeypatch.setattr(among, "_PAIRS", 35)
    monkeypatch.setattr(ranked_module, "_PAIRS", 35)
    found = predictor.predict_arrays(TEXTS, 6, allow=range(1, LABELS))
    assert np.array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], atol=1e-4)


def test_many_exclusions_are_no_list_to_compare_with(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Predictor.load(RUN)
    expected = ids(one.predict(TEXTS, 4, exclude=range(9)))
    monkeypatch.setattr(model_module, "_FEW", 3)
    seen: list[Any] = []
    whole = one.model.score
    monkeypatch.setattr(
        one.model, "score", lambda *a, **more: seen.append(more["exclude"]) or whole(*a, **more)
    )
    assert ids(one.predict(TEXTS, 4, exclude=range(9))) == expected and seen == [None]


@pytest.mark.parametrize("scheme", ["path", "parent", "level"])
def test_a_cascade_scores_a_list_by_its_scheme(scheme: str) -> None:
    one: Any = xk.load(V1 / "cascade")
    if scheme not in one.model.schemes:
        scheme = next(name for name in one.model.schemes if name not in ("path", "level"))
    one.model.use_scheme(scheme)
    whole = everything(one)
    for row, labels in zip(whole, one.predict(TEXTS, 6), strict=True):
        assert [row[x.id] for x in labels] == pytest.approx([x.score for x in labels], abs=2e-4)


def test_lists_that_cannot_be_used() -> None:
    one = Predictor.load(RUN)
    for given, told in (
        ({"allow": []}, "allow: expected at least one label, got none"),
        ({"allow": [[1], []]}, "allow, text 1: expected at least one label"),
        ({"allow": ["w1"]}, r"allow: expected names that the model has, got 'w1'; did you mean"),
        ({"exclude": [30]}, "exclude: expected labels from 0 to 29, got 30"),
        ({"exclude": np.array([-1])}, "exclude: expected labels from 0 to 29, got -1"),
        ({"allow": "w3"}, "allow: expected a list of labels, got 'w3'"),
        ({"allow": 3}, "allow: expected a list of labels, got 3"),
        ({"exclude": [True]}, "exclude: expected a label's number or name, got True"),
        ({"exclude": [1.5]}, "exclude"),
        ({"allow": [[1]]}, "allow: expected one list per text, got 1 lists and more texts"),
        ({"allow": [[1]] * 9}, "allow: expected one list per text, got more than the 5 texts"),
    ):
        with pytest.raises(InputError, match=told):
            list(one.predict(TEXTS, 2, **given))
    with pytest.raises(InputError, match="k: expected a whole number from 1, got 0"):
        one.predict(TEXTS, 0)
    for question in (one.predict, one.predict_arrays, one.embed):
        with pytest.raises(InputError, match=r"texts: expected a list of texts, got 'w1 w2'"):
            question("w1 w2")  # its letters would be eight answers
    one.label_names = None
    del one.__dict__["numbers"]
    with pytest.raises(InputError, match="expected numbers, as this model has no names, got 'w3'"):
        one.predict(TEXTS, 2, allow=["w3"])


def test_a_name_of_two_labels_means_both() -> None:
    one = Predictor.load(RUN)
    one.label_names = ["twice", *map(str, range(28)), "twice"]
    assert {x.id for x in next(one.predict(["w0"], 5, allow=["twice"]))} == {0, 29}


def test_neighbours_have_lists_too() -> None:
    texts = ["red apple", "green apple", "red car"]
    labels = csr_matrix(np.array([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]]))
    baseline = KNNBaseline(texts, labels)
    asked = ["red apple", "car"]
    assert baseline.predict(asked, 2, allow=np.array([1, 2]))[1].tolist() == [[1, 2], [2, -1]]
    assert baseline.predict(asked, 2, exclude=np.array([0, 3]))[1].tolist() == [[1, 2], [2, -1]]
    each = [np.array([3]), None]
    assert baseline.predict(asked, 1, allow=each)[1].tolist() == [[3], [2]]
    assert baseline.predict(asked, 1, exclude=each)[1].tolist() == [[0], [2]]


def test_the_files_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.txt").write_text("".join(f"{text}\n" for text in TEXTS[:3]))
    (tmp_path / "allow.txt").write_text("w30\n4\n\nw9\n")  # 10, 4, 3
    (tmp_path / "exclude.txt").write_text("w9\n")
    one = Predictor.load(RUN)
    for flags in ({"allow"}, {"exclude"}, {"allow", "exclude"}):
        given = {"allow": [10, 4, 3], "exclude": [3]}
        expected = ids(one.predict(TEXTS[:3], 4, **{name: given[name] for name in flags}))  # type: ignore[arg-type]
        files: dict[str, Any] = {name: str(tmp_path / f"{name}.txt") for name in flags}
        ask(**files, input=str(tmp_path / "x.txt"), top_k=4, output=str(tmp_path / "a.npz"))
        matrix = scipy.sparse.load_npz(tmp_path / "a.npz")
        assert [sorted(matrix[row].indices.tolist()) for row in range(3)] == [
            sorted(row) for row in expected
        ]
        for more in ({}, {"latency": True}):
            ask(**files, **more, input=str(tmp_path / "x.txt"), top_k=4)
            lines = capsys.readouterr().out.splitlines()
            assert [[x["id"] for x in json.loads(line)["labels"]] for line in lines] == expected
    for wrong, told in (
        ("w9\nnone\n", "x.txt:2: expected a label's name, or a number from 0 to 29, got 'none'"),
        ("30\n", "x.txt:1: expected a label's name, or a number"),
        ("\n", "x.txt: expected one label per line, got no label"),
    ):
        (tmp_path / "x.txt").write_text(wrong)
        with pytest.raises(InputError, match=told):
            ask(text="w0", allow=str(tmp_path / "x.txt"))


# ---- the same numbers as evaluation ----


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("raw"), keep_texts=True)


@pytest.mark.parametrize("kind", ["end to end", "cascade"])
def test_predictions_are_those_of_the_evaluation(kind: str, dataset: Path, tmp_path: Path) -> None:
    """Metrics of metrics.json, with pairs that are filtered, from texts."""
    split = Dataset.open(dataset).splits["test"]
    folder = finished_run(dataset, tmp_path) if kind == "end to end" else tmp_path / "cascade"
    if kind == "cascade":
        run(cascade(dataset, folder, make_tree(dataset, tmp_path / "tree.safetensors")))
    one: Any = xk.load(folder)
    _, rows = one.predict_arrays(list(split.texts), 5)
    told = json.loads((folder / "metrics.json").read_text())["test"]
    found = evaluate(rows, split.labels)
    assert found == pytest.approx({name: told[name] for name in found}, abs=1e-6)
    from xmlkernels.evaluation import predict_split

    pairs = np.array([(n, label) for n in range(len(split)) for label in rows[n, :2]])
    barred = replace(split, filter_pairs=pairs)
    values, expected = predict_split(one.model, barred, 3)
    own = one.predict_arrays(list(split.texts), 3, exclude=rows[:, :2])
    filled = (expected >= 0).all(1)  # a cascade's evaluation leaves places empty, a prediction not
    assert filled.sum() > 40 and (own[1] >= 0).all()
    assert np.array_equal(own[1][filled], expected[filled])
    np.testing.assert_allclose(own[0][filled], values[filled], atol=1e-4)


# ---- batches and embeddings ----


def test_batches_are_answered_one_by_one_and_no_more_is_read_than_needed() -> None:
    one = xk.load(V1 / "bow")
    sizes, read = [3, 0, 1, 0, 0, 5, 2], []

    def batches() -> Iterator[list[str]]:
        for number in count():
            read.append(number)
            yield [f"w{number} w{(7 * number + j) % 90}" for j in range(sizes[number % 7])]

    how = {"batch_size": 2, "window": 2, "prefetch": 1}
    endless = one.predict_batches(batches(), 3, **how)
    assert not read
    for number, found in zip(range(60), endless, strict=False):
        texts = [f"w{number} w{(7 * number + j) % 90}" for j in range(sizes[number % 7])]
        assert len(found) == len(texts)
        expected = list(one.predict(texts, 3)) if texts else []
        for ours, theirs in zip(found, expected, strict=True):
            assert [x.id for x in ours] == [x.id for x in theirs]
        # 4 texts of the window, 4 more on the thread's way; batches have 11/7 texts on average.
        assert len(read) <= number + 14, "it reads ahead without a bound"


def test_batches_at_the_end_and_with_lists() -> None:
    one = xk.load(V1 / "bow")
    assert list(one.predict_batches([[], []])) == [[], []] and not list(one.predict_batches([]))
    found = list(one.predict_batches([["w3"], [], ["w6", "w9"], []], 2, allow=[[1], [2], None]))
    assert [len(batch) for batch in found] == [1, 0, 2, 0]
    assert [x.id for x in found[0][0]] == [1] and [x.id for x in found[2][0]] == [2]
    with pytest.raises(InputError, match="batch 1: expected a list of texts, got 'w6 w9'"):
        list(one.predict_batches([["w3"], "w6 w9"]))


def test_embeddings() -> None:
    one: Any = xk.load(V1 / "run")
    *_, expected = one.predict_and_embed(TEXTS, 2)
    found = one.embed(iter(TEXTS))
    assert found.dtype == np.float32 and found.shape == (len(TEXTS), one.model.width)
    assert np.array_equal(found, expected) and one.embed([]).shape == (0, one.model.width)
    beside = RankedPredictor.load(V1 / "ranker_model", V1 / "run")
    assert np.array_equal(beside.embed(TEXTS), expected)
    assert np.array_equal(Forest([beside, beside]).embed(TEXTS), expected)
    alone = xk.load(V1 / "ranker_tree")
    for ranker in (alone, Forest([alone])):  # type: ignore[list-item]
        with pytest.raises(InputError, match="embed: expected a model, got a linear ranker"):
            ranker.embed(TEXTS)
    with pytest.raises(InputError, match="embed: expected rankers of one model"):
        Forest([beside, alone]).embed(TEXTS)  # type: ignore[list-item]


# ---- threads ----


def test_several_threads_get_the_bits_of_one(predictor: TextPredictor) -> None:
    asked = [" ".join(f"w{(11 * i + 5 * j) % 90}" for j in range(1 + i % 7)) for i in range(40)]
    some: list[tuple[int, dict[str, Any]]] = [
        (5, {}), (3, {"allow": [1, 5, 20, 21]}), (4, {"exclude": [[i % 30] for i in range(40)]}),
    ]  # fmt: skip

    def answers(which: int) -> list[np.ndarray]:
        k, limits = some[which]
        return [*predictor.predict_arrays(asked, k, batch_size=8, **limits)]

    expected = [answers(which) for which in range(3)]
    wrong: list[object] = []
    start = threading.Barrier(4)

    def work(number: int) -> None:
        try:
            start.wait(60)
            for turn in range(4):
                which = (number + turn) % 3
                for ours, theirs in zip(answers(which), expected[which], strict=True):
                    if not np.array_equal(ours, theirs):
                        wrong.append((number, turn))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not wrong


def test_a_table_in_files_is_read_by_one_thread_at_a_time() -> None:
    stored, plain = load("stored"), load("run")
    held: Callable[[Any], bool] = lambda one: hasattr(one._alone, "locked")  # noqa: E731
    assert held(stored) and not held(plain)
    assert list(islice(stored.predict(TEXTS, 3), 2))
    assert not stored._alone.locked()  # type: ignore[attr-defined]
    assert torch.is_tensor(plain.model.head.weight)  # type: ignore[attr-defined]


def test_the_example_of_the_page_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (V1.parents[2] / "docs" / "serving.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if "predict_batches" in block]
    monkeypatch.setattr(xk, "load", lambda folder: Predictor.load(RUN))
    exec(compile(code, "serving.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and lines[4:6] == ["2", "1"] and lines[6].startswith("(2, ")
