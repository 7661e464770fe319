"""The kind of model that docs/adding-a-model.md adds: its step, whole runs, refusals."""

import copy
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from cascade_common import make_batch
from kinds_under_test import LABELS, MODELS, TREE, LowRank
from runs_compared import assert_same_run, stopped_at_save
from torch import nn
from train_runs import Config, check, make_dataset, run, tiny

from xmlkernels import InputError
from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.cli.train import tell_of_batch
from xmlkernels.models.kinds import KINDS
from xmlkernels.options import of
from xmlkernels.predict.model import Predictor
from xmlkernels.training import build

RANK = 6


@dataclass(frozen=True)
class Settings(Config):
    """Those of a run, with a third kind and a setting of its own."""

    model: Literal["end_to_end", "cascade", "low_rank"] = "low_rank"
    rank: int = of("table", RANK, only="low_rank")


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third kind, where the page says that it goes."""

    def builder(plan: Any, encoder: nn.Module, labels: int, tree: None) -> LowRank:
        return LowRank(encoder, *build._full_table(plan, encoder, labels, RANK))

    monkeypatch.setitem(KINDS, "low_rank", LowRank)
    monkeypatch.setitem(build.BUILDERS, "low_rank", builder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("raw"))


def third_run(dataset: Path, output: Path) -> Settings:
    return Settings(**vars(tiny(dataset, output, table="fp32")) | {"model": "low_rank"})


def test_step_equals_plain_autograd() -> None:
    def sgd(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=1.0)

    model = MODELS["low_rank"].make(optimizer=sgd, encoder_decay=0.0, schedule=lambda step: 1.0)
    before = model.projection.weight.detach().clone()
    own = nn.Sequential(copy.deepcopy(model.projection), nn.Linear(5, LABELS, bias=False))
    own[1].weight.data.copy_(model.head.weight)
    encoder = copy.deepcopy(model.encoder)
    table = torch.optim.SGD(own[1].parameters(), lr=0.1, momentum=0.9)
    rest = torch.optim.SGD([*encoder.parameters(), *own[0].parameters()], lr=0.01)
    for number in range(3):
        batch = make_batch(TREE, 6, seed=number)
        loss = model.step(batch, need_loss=True)
        target = torch.zeros(6, LABELS)
        target[batch.pos_sample.long(), batch.pos_row] = 1
        logits = own(encoder(*batch.inputs))
        expected = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        table.zero_grad(), rest.zero_grad()
        expected.backward()
        table.step(), rest.step()
        torch.testing.assert_close(loss[0], expected.detach(), rtol=1e-5, atol=1e-4)
    assert not torch.equal(before, model.projection.weight)
    torch.testing.assert_close(model.projection.weight, own[0].weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.head.weight, own[1].weight.data, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(model.encoder.parameters(), encoder.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("third")
def test_a_stopped_run_goes_on_to_the_same_bits_and_is_served(
    dataset: Path, tmp_path: Path
) -> None:
    run(third_run(dataset, tmp_path / "whole"))
    config = third_run(dataset, tmp_path / "cut")
    stopped_at_save(config, 2)
    run(replace(config, resume=True))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    tensors, state = CheckpointFolder(tmp_path / "whole" / "checkpoint").load("last")
    assert state["model"]["kind"] == "low_rank" and state["model"]["head"]["width"] == RANK
    assert "optimizer.projection.weight/exp_avg" in tensors
    model = Predictor.load(tmp_path / "whole").model
    assert isinstance(model, LowRank)
    best, _ = CheckpointFolder(tmp_path / "whole" / "checkpoint").load("best")
    assert torch.equal(model.projection.weight, best["projection.weight"])


@pytest.mark.usefixtures("third")
@pytest.mark.parametrize("needed", [False, True])
def test_a_kind_that_needs_the_labels_frequencies_gets_them_once(
    needed: bool, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def start(model: LowRank, positives: torch.Tensor, documents: int) -> None:
        given.append((positives, documents))

    monkeypatch.setattr(LowRank, "needs_frequencies", needed)
    monkeypatch.setattr(LowRank, "start_at_frequencies", start)
    config = third_run(dataset, tmp_path / "run")
    stopped_at_save(config, 2)
    run(replace(config, resume=True))
    assert len(given) == needed
    for positives, documents in given:
        assert positives.shape == (30,) and documents == 160 and positives.sum() == 2 * documents


@pytest.mark.usefixtures("third")
@pytest.mark.parametrize(
    ("changes", "given", "expected"),
    [
        (
            {"table_optimizer": "adamw_dense"},
            (),
            "expected auto, sgd or adam with --model low_rank",
        ),
        ({"label_device": "cpu"}, (), "--label-device: expected auto with --model low_rank, whose"),
        ({}, ("topk",), "--topk: expected --model cascade, got --model low_rank"),
        ({"model": "end_to_end"}, ("rank",), "--rank: expected --model low_rank, got --model end_"),
        ({"model": "cascade"}, ("rank",), "--rank: expected --model low_rank, got --model cascade"),
    ],
)
def test_settings_of_other_kinds_are_refused(
    changes: dict[str, Any], given: tuple[str, ...], expected: str
) -> None:
    check(Settings(), ("rank", "bias"))
    with pytest.raises(InputError, match=re.escape(expected)):
        check(Settings(**changes), given)


@pytest.mark.usefixtures("third")
def test_a_batch_of_its_own_is_told_of_where_the_loss_is_a_sum(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    tell_of_batch(Settings(batch=64), Settings(batch=32), ())
    assert "batch 64 in place of the recipe's 32" in caplog.text
    caplog.clear()
    monkeypatch.setattr(LowRank, "sums_loss", False)
    tell_of_batch(Settings(batch=64), Settings(batch=32), ())
    assert not caplog.text
