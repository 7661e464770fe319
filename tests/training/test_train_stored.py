"""Runs whose label table stands in files: trained, saved, resumed and asked like any other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_runs import Config, cascade, make_dataset, make_tree, run, tiny

from xmlkernels import InputError, load
from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.models.base import Model
from xmlkernels.models.cascade import Cascade
from xmlkernels.models.end_to_end import EndToEnd
from xmlkernels.nn.stored import StoredTable
from xmlkernels.predict import model as predict_model
from xmlkernels.rows import as_rows, pages
from xmlkernels.training import session
from xmlkernels.training.checks import check

SHARED: dict[str, Any] = {"epochs": 2, "table": "bf16", "save_every": 3, "top_k": 20}
OPTIONS: dict[str, dict[str, Any]] = {
    "end_to_end": SHARED | {"momentum": 0.9, "bias": True, "frequency_bias": True},
    "cascade": SHARED | {"state": "bf16"},
}
KINDS: dict[str, type[Model]] = {"end_to_end": EndToEnd, "cascade": Cascade}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("raw"), keep_texts=True)


@pytest.fixture(scope="module")
def tree(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(dataset, tmp_path_factory.mktemp("tree") / "tree.safetensors")


def config(dataset: Path, folder: Path, name: str, **changes: Any) -> Config:
    return replace(tiny(dataset, folder / name), **OPTIONS["end_to_end"] | changes)


def saved(settings: Config) -> dict[str, torch.Tensor]:
    return CheckpointFolder(Path(settings.output) / "checkpoint").load("last")[0]


def label_table(model: Any) -> Any:
    return list(model.tables().values())[-1]


@pytest.fixture(scope="module", params=["end_to_end", "cascade"])
def runs(
    request: pytest.FixtureRequest,
    dataset: Path,
    tree: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Config]:
    """The same run with its table in memory, in files and on the host."""
    folder = tmp_path_factory.mktemp("runs")
    places = {"ram": "ram", "file": f"file:{folder / 'tables'}", "host": "host"}
    made = dict[str, Config]()
    for name, text in places.items():
        base = tiny(dataset, folder / name)
        if request.param == "cascade":
            base = cascade(dataset, folder / name, tree)
        made[name] = replace(base, **OPTIONS[request.param], table_store=text)
        run(made[name])
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
    runs: dict[str, Config], tmp_path: Path
) -> None:
    """A run is killed in the middle of a step, with half of its table written."""
    place = tmp_path / "tables"
    settings = replace(runs["ram"], output=str(tmp_path / "cut"), table_store=f"file:{place}")
    kind, made = KINDS[settings.model], list[Any]()
    step = kind.step

    def dies(self: Any, *args: Any, **options: Any) -> Any:
        made.append(label_table(self))
        if self.steps == 7:
            made[-1].place.begin()
            weight = made[-1].place.rows["weight"]
            weight.write(0, as_rows(pages(30 * 64), 30, weight).fill_(9))
            raise RuntimeError("killed")
        return step(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "step", dies)
        with pytest.raises(RuntimeError, match="killed"):
            run(settings)
    assert isinstance(made[-1], StoredTable)
    whole = saved(runs["ram"])
    for name, text in (("file", f"file:{place}"), ("ram", "ram")):
        again = replace(settings, resume=True, table_store=text)
        run(again)
        ours = saved(again)
        assert all(torch.equal(ours[key], whole[key]) for key in whole), name


def test_predictions_leave_the_table_in_its_file(
    runs: dict[str, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_file(**options: Any) -> bool:
        found: Any = load(runs["file"].output, **options)
        return isinstance(label_table(found.model), StoredTable)

    texts = ["one two", "three", "four five six"] * 5
    inside = load(runs["file"].output, table_store="ram")
    outside: Any = load(runs["file"].output, table_store="file")
    assert isinstance(label_table(outside.model), StoredTable) and not in_file()
    monkeypatch.setattr(predict_model, "free_memory", lambda: 100)
    assert in_file()
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

    dense = {"model": "cascade", "tree": "t", "table_optimizer": "adamw_dense"}
    refused("--table-optimizer: expected auto, sgd or adam with --table-store host", **dense)
    refused("--impl: expected fused with --table-store host", impl="reference", table="fp32")
    refused("--table-compute: expected auto", table_compute="fp16", table="fp32")
    refused("--ema-tables: expected no mean of tables", ema=0.9, ema_tables=True)
    refused("--table-store: expected ram, host, or file:", table_store="disk")
    missing = tmp_path / "a file"
    missing.write_text("")
    with pytest.raises(InputError, match="--table-store"):
        run(config(dataset, tmp_path, "no", table_store=f"file:{missing}"))
