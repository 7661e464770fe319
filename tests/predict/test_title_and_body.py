"""A model joins title and body as its dataset did."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from prediction_inputs import LF, RUN
from train_runs import make_dataset, run, tiny

from xmlkernels.cli import predict
from xmlkernels.data.text_parts import TextParts
from xmlkernels.predict.model import Predictor

# ---- texts as in training ----


def test_a_model_joins_title_and_body_as_its_dataset_did(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, documents in (("trn", 160), ("val", 40)):
        random = np.random.default_rng(documents)
        lines = [
            {
                "uid": f"u{n}",
                "title": f"w{3 * (n % 30)}",
                "content": f"w{int(random.integers(90))}",
                "target_ind": [n % 30],
            }
            for n in range(documents)
        ]
        (raw / f"{name}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    labels = "".join(json.dumps({"uid": f"l{n}", "title": f"w{3 * n}"}) + "\n" for n in range(30))
    (raw / "lbl.json").write_text(labels)
    dataset = make_dataset(
        raw,
        splits=("train",),
        source="lf",
        train_text=raw / "trn.json",
        train_labels=None,
        label_text=raw / "lbl.json",
        validation_text=raw / "val.json",
        keep_texts=True,
    )
    run(tiny(dataset, tmp_path / "run", epochs=1))
    predictor = Predictor.load(tmp_path / "run")
    assert predictor.parts == LF
    (tmp_path / "x.jsonl").write_text('{"title": "w3", "content": "w9"}\n')
    predict.run(
        predict.Options(
            str(tmp_path / "run"),
            input=str(tmp_path / "x.jsonl"),
            output=str(tmp_path / "out.jsonl"),
        )
    )
    (found,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    (own,) = predictor.predict(["w3 [SEP] w9"], 10)
    assert [x["id"] for x in found["labels"]] == [x.id for x in own]
    assert [x["score"] for x in found["labels"]] == pytest.approx([x.score for x in own], abs=1e-3)
    (plain,) = predictor.predict(["w3 w9"], 10)
    assert [x.score for x in plain] != pytest.approx([x.score for x in own], abs=1e-3)


def test_older_checkpoints_join_by_a_space() -> None:
    assert Predictor.load(RUN).parts == TextParts()
