"""Labels that come and go without training: new ones are found, others keep their bits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from train_runs import LABELS, cascade, make_dataset, make_tree, run, tiny

import xmlkernels as xk
from xmlkernels import InputError, LinearConfig, RankedPredictor, train_linear
from xmlkernels.cli import labels as command
from xmlkernels.predict.source import Source
from xmlkernels.ranker.blend import Reranker
from xmlkernels.ranker.features import Features
from xmlkernels.ranker.linear import fit
from xmlkernels.training import relabel as module
from xmlkernels.training import relabel_model
from xmlkernels.training.relabel import LabelsConfig, relabel

TEXTS = ["w0 w1 w2", "w30 w31", "w3 w88 w30", "w7 w8 w9 w50 w51"]
NEW = "w2 w40 w77"  # words that go together nowhere in training


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("raw"), keep_texts=True)


@pytest.fixture(scope="module", params=["tokens", "bow", "fp8", "cascade"])
def made(request: Any, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / request.param
    if request.param == "cascade":
        tree = make_tree(dataset, folder.parent / "tree.safetensors")
        run(cascade(dataset, folder, tree))
        return folder
    more: dict[str, Any] = {"table": "fp8"} if request.param == "fp8" else {}
    if request.param == "bow":
        more = {"encoder": "bow", "bow_width": 32, "min_df": 1, "bias": True, "encoder_lr": 0.03}
    run(tiny(dataset, folder, **more))
    return folder


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    new = [{"name": "new", "text": NEW}, {"name": "other", "text": "w60 w61 w62"}]
    documents = [{"text": f"w2 w40 w77 w{n}", "labels": ["new", "w0"]} for n in (2, 40, 77)]
    for name, lines in (("new", new), ("few", documents)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (tmp_path / "drop.txt").write_text("w3\nw9\n")
    return {name: str(tmp_path / name) for name in ("new.jsonl", "few.jsonl", "drop.txt")}


def test_added_and_dropped(made: Path, files: dict[str, str], tmp_path: Path) -> None:
    words = ["--add", files["new.jsonl"], "--documents", files["few.jsonl"]]
    command.main([str(made), *words, "--output", str(tmp_path / "more")])
    before, after = xk.load(made), xk.load(tmp_path / "more")
    assert after.labels == LABELS + 2 and (after.label_names or [])[-2:] == ["new", "other"]
    old = {(n, x.name): x.score for n, xs in enumerate(before.predict(TEXTS, LABELS)) for x in xs}
    now = {(n, x.name): x.score for n, xs in enumerate(after.predict(TEXTS, 32)) for x in xs}
    assert all(now[key] == score for key, score in old.items())
    if made.name != "cascade":  # whose search comes to some clusters alone
        assert len(now) == len(old) + 8
    best = [x.name for x in next(after.predict([f"{NEW} w40"], 3))]
    assert "new" in best
    assert "new" not in [x.name for x in next(after.predict(["w10 w11"], 4))]
    assert (before.calibration is None) == (after.calibration is None)
    # Without documents the label's text alone decides: other rows.
    relabel(LabelsConfig(str(made), str(tmp_path / "text"), add=files["new.jsonl"]))
    alone = xk.load(tmp_path / "text")
    assert not np.array_equal(
        alone.predict_arrays([NEW], 32, allow=["new"])[0],
        after.predict_arrays([NEW], 32, allow=["new"])[0],
    )
    relabel(LabelsConfig(str(made), str(tmp_path / "less"), drop=files["drop.txt"]))
    less = xk.load(tmp_path / "less")
    assert less.labels == LABELS - 2 and not {"w3", "w9"} & set(less.label_names or [])
    left = {(n, x.name): x.score for n, xs in enumerate(less.predict(TEXTS, 28)) for x in xs}
    if made.name == "cascade":
        old = {key: score for key, score in old.items() if key in left}
    assert left == {key: score for key, score in old.items() if key[1] not in ("w3", "w9")}


def test_the_sample_and_its_batches(
    made: Path, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    whole = relabel_model._sampled

    def watched(*arguments: Any) -> np.ndarray:
        found.append(whole(*arguments))
        return found[-1]

    monkeypatch.setattr(relabel_model, "_sampled", watched)
    for sample, batch in ((50, 20), (1000, 64)):
        output = str(tmp_path / str(sample))
        relabel(LabelsConfig(str(made), output, files["new.jsonl"], sample=sample, batch=batch))
    assert [len(rows) for rows in found] == [50, 160]
    for name in ("sample", "batch"):
        with pytest.raises(InputError, match=f"--{name}: expected 1 or more"):
            relabel(LabelsConfig(str(made), "x", files["new.jsonl"], **{name: 0}))  # type: ignore[arg-type]


def test_mistakes_are_told(
    made: Path, dataset: Path, files: dict[str, str], tmp_path: Path
) -> None:
    known, wrong = tmp_path / "known.jsonl", tmp_path / "wrong.jsonl"
    known.write_text('{"name": "w3", "text": "w3"}\n')
    wrong.write_text('{"text": "w3", "labels": ["nobody"]}\n')
    (tmp_path / "none.txt").write_text("nobody\n")
    (tmp_path / "all.txt").write_text("".join(f"w{3 * n}\n" for n in range(LABELS)))
    new, output = files["new.jsonl"], str(tmp_path / "out")
    for how, told in (
        ({}, "labels to add or to --drop, or --epochs, got neither"),
        ({"drop": files["drop.txt"], "documents": new}, "--documents: expected --add or --epochs"),
        ({"add": new, "freeze": files["drop.txt"]}, "--freeze: expected --epochs of 1 or more"),
        ({"epochs": 1, "lr": 0.0}, "--lr: expected a finite number above 0"),
        ({"epochs": 1, "freeze": str(tmp_path / "none.txt")}, "expected the name of a label"),
        ({"add": str(known)}, r"known.jsonl:1: expected a new name, got 'w3'"),
        ({"add": new, "documents": str(wrong)}, "wrong.jsonl:1: expected names of labels"),
        ({"drop": str(tmp_path / "none.txt")}, "none.txt:1: expected the name of a label"),
        ({"drop": str(tmp_path / "all.txt")}, "some of the labels, got all of them"),
    ):
        with pytest.raises(InputError, match=told):
            relabel(LabelsConfig(str(made), output, **how))
    assert not Path(output).exists()


def label_rows(folder: Path) -> dict[str, list[np.ndarray]]:
    """What the label table has of each label, by its name: the bits of weight, bias and scale."""
    predictor = xk.load(folder)
    assert isinstance(predictor, xk.Predictor) and predictor.label_names
    *_, (name, _) = predictor.model.tables().items()
    state, tree = predictor.model.state_dict(), predictor.model.tree
    held = [state[f"{name}.{x}"] for x in ("weight", "bias", "row_scale") if f"{name}.{x}" in state]
    parts = [x.view(torch.uint8) if x.element_size() == 1 else x.float() for x in held]
    place = range(predictor.labels) if tree is None else tree.place.tolist()
    return {
        label: [part[row].numpy() for part in parts]
        for label, row in zip(predictor.label_names, place, strict=True)
    }


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_frozen_rows_keep_their_bits_while_others_are_trained(
    made: Path, files: dict[str, str], tmp_path: Path
) -> None:
    new, few, freeze = files["new.jsonl"], files["few.jsonl"], files["drop.txt"]
    how: dict[str, Any] = {"add": new, "documents": few, "sample": 50}
    outputs = {
        "none": {},
        "some": {"epochs": 2, "freeze": freeze, "lr": 0.5},
        "less": {"epochs": 1, "freeze": freeze, "lr": 0.5},
        "slow": {"epochs": 2, "freeze": freeze, "lr": 0.1},
    }
    for name, more in outputs.items():
        relabel(LabelsConfig(str(made), str(tmp_path / name), **how, **more))  # type: ignore[arg-type]
    rows = {name: label_rows(tmp_path / name) for name in outputs}
    for name in ("some", "less", "slow"):
        moved = {x for x in rows["none"] if not same(rows["none"][x], rows[name][x])}
        assert "new" in moved and len(moved) > LABELS // 2 and not moved & {"w3", "w9"}
    assert not same(rows["some"]["new"], rows["less"]["new"])
    assert not same(rows["some"]["new"], rows["slow"]["new"])
    # What the table is trained on, it has learnt.
    lines = [json.loads(line) for line in Path(few).read_text("utf-8").splitlines()]
    texts = [line["text"] for line in lines]
    score = {
        name: xk.load(tmp_path / name).predict_arrays(texts, 1, allow=["w0"])[0].mean()
        for name in ("none", "some")
    }
    assert score["some"] > score["none"]
    # Without --add, too.
    relabel(LabelsConfig(str(made), str(tmp_path / "alone"), documents="", epochs=1, sample=50))
    before, after = label_rows(made), label_rows(tmp_path / "alone")
    assert any(not same(before[name], after[name]) for name in before)


def test_a_new_label_has_its_place_in_the_tree(
    dataset: Path, files: dict[str, str], tmp_path: Path
) -> None:
    tree = make_tree(dataset, tmp_path / "tree.safetensors")
    run(cascade(dataset, tmp_path / "run", tree))
    before = xk.load(tmp_path / "run")
    assert isinstance(before, xk.Predictor) and before.model.tree and before.label_names
    old = before.model.tree
    cluster = old.ancestors(1)[old.place]
    whole = {before.label_names[label] for label in np.flatnonzero(cluster == cluster[0])}
    (tmp_path / "gone.txt").write_text("".join(f"{name}\n" for name in sorted(whole)))
    new = tmp_path / "near.jsonl"
    new.write_text(json.dumps({"name": "near", "text": "w30 w31 w32"}) + "\n")
    output = str(tmp_path / "more")
    relabel(LabelsConfig(str(tmp_path / "run"), output, str(new), drop=str(tmp_path / "gone.txt")))
    after = xk.load(output)
    assert isinstance(after, xk.Predictor) and after.model.tree and after.label_names
    now = after.model.tree
    assert now.sizes == (len(np.unique(old.children[0])) - 1, 9, LABELS + 1 - len(whole))
    here = {name: now.ancestors(1)[now.place[n]] for n, name in enumerate(after.label_names)}
    there = {name: cluster[n] for n, name in enumerate(before.label_names)}
    together = {
        (here[a] == here[b]) == (there[a] == there[b])
        for a in here
        for b in here
        if "near" not in (a, b)
    }
    assert together == {True}
    assert "near" in [x.name for x in next(after.predict(["w30 w31 w32"], 3))]
    assert xk.load(output).predict_arrays(TEXTS, 5)[1].min() >= 0


@pytest.mark.parametrize("kind", ["tree", "flat", "forest"])
def test_a_linear_ranker(kind: str, dataset: Path, files: dict[str, str], tmp_path: Path) -> None:
    more: dict[str, Any] = {"tree": {"depths": (2,)}, "forest": {"depths": (2,), "trees": 2}}
    train_linear(
        LinearConfig(
            str(dataset), output=str(tmp_path / "run"), cache=str(tmp_path / "cache"), min_df=1,
            threads=1, report=False, **more.get(kind, {}),
        )
    )  # fmt: skip
    how = {"add": files["new.jsonl"], "documents": files["few.jsonl"], "drop": files["drop.txt"]}
    relabel(LabelsConfig(str(tmp_path / "run"), str(tmp_path / "more"), **how))
    before, after = xk.load(tmp_path / "run"), xk.load(tmp_path / "more")
    assert after.labels == LABELS and (after.label_names or [])[-2:] == ["new", "other"]
    assert (before.calibration is None) == (after.calibration is None)
    assert after.calibration is not None
    found = next(after.predict([f"{NEW} w40"], 3))
    assert "new" in [x.name for x in found]
    assert "new" not in [x.name for x in next(after.predict(["w10 w11"], 3))]
    allowed = [name for name in before.label_names or [] if name not in ("w3", "w9")]
    old = {
        (n, x.name): x.score
        for n, xs in enumerate(before.predict(TEXTS, 28, allow=allowed))
        for x in xs
    }
    now = {
        (n, x.name): x.score
        for n, xs in enumerate(after.predict(TEXTS, 28, allow=allowed))
        for x in xs
    }
    assert old == now
    sampled = LabelsConfig(str(tmp_path / "run"), str(tmp_path / "few"), sample=5, add=how["add"])
    relabel(sampled)
    with pytest.raises(InputError, match="--epochs: expected the run of a model"):
        relabel(LabelsConfig(str(tmp_path / "run"), str(tmp_path / "x"), epochs=1))


def test_a_ranker_beside_a_run_is_refused(made: Path, dataset: Path, tmp_path: Path) -> None:
    predictor = RankedPredictor(
        Reranker(
            fit(Features.join(None, csr_matrix(np.eye(2, dtype=np.float32))), csr_matrix(np.eye(2)))
        ),
        Source("model", "same"),
    )
    with pytest.raises(InputError, match="expected a run or a linear ranker, got a ranker beside"):
        module._check_kind(LabelsConfig("run"), predictor)
    predictor.source = Source("tree", "own")
    with pytest.raises(InputError, match="expected a ranker of one text each, got one of pairs"):
        module._check_kind(LabelsConfig("run"), predictor)
