"""Runs whose label table stands in files: trained, saved, resumed and asked like any other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_runs import Config, make_dataset, run, tiny

from xmlkernels import InputError, load
from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.models.end_to_end import EndToEnd
from xmlkernels.nn.stored_head import StoredHead
from xmlkernels.predict import model as predict_model
from xmlkernels.rows import as_rows, pages
from xmlkernels.training import session
from xmlkernels.training.checks import check

OPTIONS: dict[str, Any] = {
    "epochs": 2,
    "table": "bf16",
    "momentum": 0.9,
    "bias": True,
    "frequency_bias": True,
    "save_every": 3,
    "top_k": 20,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("raw"), keep_texts=True)


def config(dataset: Path, folder: Path, name: str, **changes: Any) -> Config:
    return replace(tiny(dataset, folder / name), **OPTIONS | changes)


def saved(settings: Config) -> dict[str, torch.Tensor]:
    return CheckpointFolder(Path(settings.output) / "checkpoint").load("last")[0]


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """The same run with its table in memory, in files and on the host."""
    folder = tmp_path_factory.mktemp("runs")
    places = {"ram": "ram", "file": f"file:{folder / 'tables'}", "host": "host"}
    made = {name: config(dataset, folder, name, table_store=text) for name, text in places.items()}
    for settings in made.values():
        run(settings)
    assert not (folder / "tables").exists()  # what is left of a table is its checkpoint
    return made


@pytest.mark.parametrize("where", ["file", "host"])
def test_a_run_is_that_of_a_table_in_memory(where: str, runs: dict[str, Config]) -> None:
    """One tile holds 30 labels: sums are in the same order, and all bits the same."""
    ours, theirs = saved(runs[where]), saved(runs["ram"])
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    read = [
        json.loads((Path(runs[name].output) / "metrics.json").read_text())
        for name in (where, "ram")
    ]
    for split in ("validation", "test"):
        assert read[0][split] == read[1][split]
    assert read[0]["environment"]["table_store"] == where


def test_it_goes_on_from_the_checkpoint_in_any_place(
    runs: dict[str, Config], dataset: Path, tmp_path: Path
) -> None:
    """A run is killed in the middle of a step, with half of its table written."""
    place = tmp_path / "tables"
    settings = config(dataset, tmp_path, "cut", table_store=f"file:{place}")
    step, made = EndToEnd.step, list[Any]()

    def dies(self: EndToEnd, *args: Any, **options: Any) -> Any:
        made.append(self.head)
        if self.steps == 7:
            self.head.place.begin()
            weight = self.head.place.rows["weight"]
            weight.write(0, as_rows(pages(30 * 64), 30, weight).fill_(9))
            raise RuntimeError("killed")
        return step(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EndToEnd, "step", dies)
        with pytest.raises(RuntimeError, match="killed"):
            run(settings)
    assert isinstance(made[-1], StoredHead)
    whole = saved(runs["ram"])
    for name, text in (("file", f"file:{place}"), ("ram", "ram")):
        again = replace(settings, resume=True, table_store=text)
        run(again)
        ours = saved(again)
        assert all(torch.equal(ours[key], whole[key]) for key in whole), name


def test_predictions_leave_the_table_in_its_file(
    runs: dict[str, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["one two", "three", "four five six"] * 5
    inside = load(runs["file"].output, table_store="ram")
    outside: Any = load(runs["file"].output, table_store="file")
    assert isinstance(outside.model.head, StoredHead)
    assert not isinstance(load(runs["file"].output).model.head, StoredHead)  # type: ignore
    monkeypatch.setattr(predict_model, "free_memory", lambda: 100)
    assert isinstance(load(runs["ram"].output).model.head, StoredHead)  # type: ignore
    for ours, theirs in zip(
        outside.predict_arrays(texts, 7), inside.predict_arrays(texts, 7), strict=True
    ):
        assert np.array_equal(ours, theirs)
    with pytest.raises(InputError, match="table_store: expected auto, ram or file"):
        load(runs["file"].output, table_store="disk")


def test_a_diverged_table_is_found_in_its_file(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(dataset, tmp_path, "bad", epochs=1, table="fp32", table_store="host")
    build = session.build_model

    def built(*args: Any) -> Any:
        model = build(*args)
        model.head.place.rows["bias"].values[3] = torch.nan
        monkeypatch.setattr(type(model.head), "start_at_frequencies", lambda *_: None)
        return model

    monkeypatch.setattr(session, "build_model", built)
    run(settings)
    with pytest.raises(InputError, match=r"finite numbers.*head.weight"):
        load(settings.output, table_store="file")


def test_what_it_cannot_do_is_refused(dataset: Path, tmp_path: Path) -> None:
    def refused(told: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=told):
            check(config(dataset, tmp_path, "no", **{"table_store": "host"} | changes))

    refused("--model: expected end_to_end with --table-store host", model="cascade")
    refused("--impl: expected fused with --table-store host", impl="reference", table="fp32")
    refused("--table-compute: expected auto", table_compute="fp16", table="fp32")
    refused("--ema-tables: expected no mean of tables", ema=0.9, ema_tables=True)
    refused("--table-store: expected ram, host, or file:", table_store="disk")
    missing = tmp_path / "a file"
    missing.write_text("")
    with pytest.raises(InputError, match="--table-store"):
        run(config(dataset, tmp_path, "no", table_store=f"file:{missing}"))
