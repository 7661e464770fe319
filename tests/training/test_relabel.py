"""Labels that come and go without training: new ones are found, others keep their bits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from train_runs import LABELS, cascade, make_dataset, make_tree, run, tiny

import xmlkernels as xk
from xmlkernels import InputError
from xmlkernels.cli import labels as command
from xmlkernels.training import relabel as module
from xmlkernels.training.relabel import LabelsConfig, relabel

TEXTS = ["w0 w1 w2", "w30 w31", "w3 w88 w30", "w7 w8 w9 w50 w51"]
NEW = "w2 w40 w77"  # words that go together nowhere in training


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("raw"), keep_texts=True)


@pytest.fixture(scope="module", params=["tokens", "bow"])
def made(request: Any, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / request.param
    more: dict[str, Any] = {}
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
    assert all(now[key] == score for key, score in old.items()) and len(now) == len(old) + 8
    best = [x.name for x in next(after.predict([f"{NEW} w40"], 3))]
    assert "new" in best
    rank = [x.name for x in next(after.predict(["w10 w11"], 32))].index("new")
    assert rank > 3
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
    assert left == {key: score for key, score in old.items() if key[1] not in ("w3", "w9")}


def test_the_sample_and_its_batches(
    made: Path, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    whole = module._sampled

    def watched(*arguments: Any) -> np.ndarray:
        found.append(whole(*arguments))
        return found[-1]

    monkeypatch.setattr(module, "_sampled", watched)
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
        ({}, "labels to add or to --drop, got neither"),
        ({"drop": files["drop.txt"], "documents": new}, "--documents: expected --add with it"),
        ({"add": str(known)}, r"known.jsonl:1: expected a new name, got 'w3'"),
        ({"add": new, "documents": str(wrong)}, "wrong.jsonl:1: expected names of labels"),
        ({"drop": str(tmp_path / "none.txt")}, "none.txt:1: expected the name of a label"),
        ({"drop": str(tmp_path / "all.txt")}, "some of the labels, got all of them"),
    ):
        with pytest.raises(InputError, match=told):
            relabel(LabelsConfig(str(made), output, **how))
    assert not Path(output).exists()


def test_a_cascade_is_refused(dataset: Path, files: dict[str, str], tmp_path: Path) -> None:
    tree = make_tree(dataset, tmp_path / "tree.safetensors")
    run(cascade(dataset, tmp_path / "cascade", tree, epochs=1))
    with pytest.raises(InputError, match="a model end to end, got a cascade"):
        relabel(LabelsConfig(str(tmp_path / "cascade"), str(tmp_path / "x"), files["new.jsonl"]))
