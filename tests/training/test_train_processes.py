"""Runs of two processes: one writes, both read; how they stop and go on, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from processes import together
from runs_compared import log_of, stopped_at_save
from train_runs import (
    LABELS,
    TRAIN_DOCUMENTS,
    cascade,
    check,
    make_dataset,
    make_tree,
    run,
    tiny,
    weights,
)

from xmlkernels import InputError, dist
from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.data.batches.tokens import Batches
from xmlkernels.data.dataset import Dataset
from xmlkernels.devices import find_device
from xmlkernels.evaluation import evaluate_split, score_matrix
from xmlkernels.nn import table_store
from xmlkernels.predict.model import Predictor

ON: dict[str, Any] = {"device": "cpu"}  # auto would want a card for each process
OPTIONS = ON | {"epochs": 2, "micro_batch": 3, "table": "bf16", "save_every": 4, "loss_every": 1}
BOW = ON | {
    "encoder": "bow",
    "epochs": 1,
    "loss_every": 2,
    "min_df": 1,
    "centroid_norm": 0.5,
    "bias": True,
}
STEPS = 2 * (TRAIN_DOCUMENTS // 16)


def differing(dataset: Path, folder: Path) -> None:
    """One process reads other data than its dataset says, or draws another order."""
    collate, plan = Batches.collate, Batches.plan

    def other_tokens(self: Any, documents: np.ndarray) -> Any:
        batch = collate(self, documents)
        batch.input_ids[0, 0] += dist.rank()
        return batch

    def other_labels(self: Any, documents: np.ndarray) -> Any:
        batch = collate(self, documents)
        batch.pos_row[0] += dist.rank()
        return batch

    def other_order(self: Any, epoch: int) -> Any:
        return plan(self, epoch)[:: 1 - 2 * dist.rank()]

    for name, changed, what in (
        ("collate", other_tokens, "content"),
        ("collate", other_labels, "labels"),
        ("plan", other_order, "documents"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Batches, name, changed)
            told = f"{what} of batch 1 of epoch 1: .*another on process 1 than on process 0"
            with pytest.raises(InputError, match=told):
                run(tiny(dataset, folder / f"differing-{what}", **OPTIONS))


def all_runs(dataset: Path, tree: Path, folder: Path) -> None:
    with dist.counted() as all_sent:
        whole = run(tiny(dataset, folder / "whole", **OPTIONS))
    assert all_sent["scattered"] > 0, "the label table is shared"
    assert whole["steps"] == STEPS and whole["environment"]["processes"] == 2
    # The last checkpoint is of step 12, within the second epoch.
    stored = OPTIONS | {"table_store": f"file:{folder / 'tables'}"}
    with pytest.MonkeyPatch.context() as patch:
        made, place = list[str](), table_store.FilePlace
        patch.setattr(
            table_store, "FilePlace", lambda at, *told: made.append(at.name) or place(at, *told)
        )
        stopped_at_save(tiny(dataset, folder / "parts", **stored), 5)
    assert made == [f"table-0000{dist.rank()}-of-00002"], "files of its own rows"
    run(tiny(dataset, folder / "parts", **OPTIONS, resume=True))
    # Encoders in parts: saved in parts and loaded whole by one process, below; and the other way.
    parted = OPTIONS | {"shard_encoder": "on"}
    stopped_at_save(tiny(dataset, folder / "fewer", **parted), 3)
    stopped_at_save(tiny(dataset, folder / "encoder", **OPTIONS), 3)
    with dist.counted() as sent:
        run(tiny(dataset, folder / "encoder", **parted, resume=True))
    assert sent["summed"] < all_sent["summed"] / 10, "gradients are scattered, not summed"
    assert sent["gathered"] > all_sent["gathered"], "layers are gathered"
    run(cascade(dataset, folder / "cascade", tree, epochs=2, ema=0.9, ema_tables=True, **ON))
    run(
        tiny(
            dataset,
            folder / "bow",
            encoder="bow",
            epochs=1,
            loss_every=2,
            min_df=1,
            centroid_norm=0.5,
            bias=True,
            frequency_bias=True,
        )
    )
    with dist.counted() as sent:
        run(tiny(dataset, folder / "copies", **OPTIONS, shard_labels="off"))
    assert sent["scattered"] == 0, "each has a copy"
    differing(dataset, folder)
    with pytest.raises(InputError, match="settings: .*another on process 1"):
        run(tiny(dataset, folder / "differing", seed=dist.rank(), **ON))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("raw"), keep_texts=True)


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    together(2, all_runs, folder, dataset, make_tree(dataset, folder / "tree.safetensors"), folder)
    return folder


def test_a_stopped_run_goes_on_bit_for_bit(runs: Path) -> None:
    for which in ("last", "best"):
        assert weights(runs / "parts", which) == weights(runs / "whole", which)
    assert log_of(runs / "parts") == log_of(runs / "whole")
    assert (runs / "parts" / "predictions.npz").read_bytes() == (
        runs / "whole" / "predictions.npz"
    ).read_bytes()
    _, state = CheckpointFolder(runs / "whole" / "checkpoint").load("last")
    assert len(state["other_rngs"]) == 1
    assert state["other_rngs"][0]["torch"] != state["rng"]["torch"]


@pytest.mark.parametrize("name", ["copies", "encoder"])
def test_what_is_shared_is_trained_as_a_copy(runs: Path, name: str) -> None:
    """The same losses within rounding: stochastic, for the table is in bf16."""
    shared, copies = log_of(runs / "whole"), log_of(runs / name)
    assert len(shared) == len(copies) > 4
    for one, other in zip(shared, copies, strict=True):
        if one.get("loss") is not None:
            assert one["loss"] == pytest.approx(other["loss"], rel=0.02)


@pytest.mark.parametrize("name", ["whole", "encoder", "cascade", "bow"])
def test_its_metrics_and_predictions_are_those_of_its_model(
    runs: Path, dataset: Path, name: str
) -> None:
    """What two processes measured is what one measures of the model that they saved.

    To the bit, but for the loss of a shared table, which is summed in another order.
    """
    told = json.loads((runs / name / "metrics.json").read_text())
    predictor, split = Predictor.load(runs / name), Dataset.open(dataset).splits["test"]
    found = evaluate_split(
        predictor.model, split, 20 if name == "cascade" else 100, inputs=predictor.inputs
    )
    assert told["test"]["loss"] == pytest.approx(found.loss, rel=1e-5)
    assert told["test"].get("levels", []) == found.levels
    expected = score_matrix(found.values, found.labels, LABELS)
    saved = scipy.sparse.load_npz(runs / name / "predictions.npz")
    assert np.array_equal(saved.indices, expected.indices)
    assert np.array_equal(saved.data, expected.data)
    first, *_, last = [
        line["loss"]
        for line in log_of(runs / name)
        if "split" not in line and line["loss"] is not None
    ]
    assert last < first and told["skipped_steps"] == told["skipped_encoder_steps"] == 0
    assert {"PSP@5", "nDCG@3", "R@1"} <= told["test"].keys()
    assert "macro" in told
    assert "deciles" in told


def test_another_number_of_processes_goes_on_with_a_note(
    runs: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The global batches are the same ones, so a run may go on with fewer; it says that the bits
    will not be. Its encoder was saved in parts.
    """
    assert run(tiny(dataset, runs / "fewer", **OPTIONS, resume=True))["steps"] == STEPS
    steps = [line["step"] for line in log_of(runs / "fewer") if "split" not in line]
    assert steps == list(range(2, STEPS + 1, 2))
    assert (
        "processes 1 instead of 2; the run goes on, but not bit for bit" in capsys.readouterr().out
    )


def test_a_batch_has_a_document_for_each_process(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    check(tiny(dataset, tmp_path, batch=4, accumulate=2, **ON))
    with pytest.raises(
        InputError, match="--batch: expected 8 or more, a document for each process, got 7"
    ):
        check(tiny(dataset, tmp_path, batch=7, **ON))


def test_each_process_has_a_card_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("auto") == torch.device("cuda")
    assert find_device("cuda:1") == torch.device("cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device("auto") == find_device("cuda") == torch.device("cuda:1")
    assert find_device("cpu") == torch.device("cpu")
    with pytest.raises(
        InputError, match="--device: expected cuda, cpu or auto for several processes, got 'cuda:1'"
    ):
        find_device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        InputError, match="a GPU for each process, got 2 GPUs for process 3 .*--nproc-per-node 2"
    ):
        find_device("auto")
