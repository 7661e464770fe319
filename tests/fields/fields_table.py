"""How each setting of the label table is tested, by its values after one step and by its states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from config_runs import ONE_STEP, Case, Runs, Seen, recorded
from torch import Tensor

from xmlkernels.nn.mixed import MixedHead, MixedLevel
from xmlkernels.nn.plain import PlainHead, PlainLevel
from xmlkernels.nn.stored_head import StoredHead
from xmlkernels.nn.stored_level import StoredLevel
from xmlkernels.nn.table_store import FilePlace
from xmlkernels.ops.hyper import BETA1, EPSILON, LR

RATE = 0.02  # of the table in its only step
WEIGHT, MOMENTUM = "head.weight", "head.momentum"


def gradient(seen: Seen) -> Tensor:
    """Derive the gradient of a first step of plain SGD: (before - after) / rate."""
    return (seen.start[WEIGHT] - seen.steps[0].weights[WEIGHT]) / RATE


def decays(plain: Seen, changed: Seen) -> None:
    """The step is w - rate (gradient + decay w)."""
    assert torch.allclose(gradient(changed) - gradient(plain), 0.5 * plain.start[WEIGHT], atol=1e-5)
    assert float(changed.start[WEIGHT].abs().max()) > 0.05


def decays_apart(plain: Seen, changed: Seen) -> None:
    """L2 enters the first momentum, decoupled decay does not; both shrink the weights alike."""
    both = plain.tensors[MOMENTUM] - changed.tensors[MOMENTUM]
    assert torch.allclose(both, 0.5 * plain.start[WEIGHT], atol=1e-5)
    assert torch.allclose(gradient(plain), gradient(changed), atol=1e-4)


def momenta(plain: Seen, changed: Seen) -> None:
    assert MOMENTUM not in plain.tensors and float(changed.steps[0].hyper[-1][BETA1]) == 0.5
    # Of a second step, whose gradient is what is left of the momentum: m2 = 0.5 m1 + g2, and w
    # moves by rate m2.
    first, second = changed.steps[0], changed.steps[1]
    m2 = (first.weights[WEIGHT] - second.weights[WEIGHT]) / float(second.hyper[-1][LR])
    assert torch.allclose(m2, changed.tensors[MOMENTUM], atol=1e-4)


def momenta_of_levels(plain: Seen, changed: Seen) -> None:
    for seen, value in ((plain, 0.9), (changed, 0.5)):
        assert [float(hyper[BETA1]) for hyper in seen.steps[-1].hyper] == pytest.approx([value] * 3)


def formats(changed: dict[str, torch.dtype]) -> None:
    def holds(before: Seen, after: Seen) -> None:
        for name, dtype in changed.items():
            assert (
                before.tensors[name].dtype == torch.float32 and after.tensors[name].dtype == dtype
            ), name

    return holds


def adam(plain: Seen, changed: Seen) -> None:
    """The first step equals the rate, whatever the gradient."""
    assert "head.second" not in plain.tensors and changed.tensors["head.second"].shape == (30, 32)
    moved = (changed.start[WEIGHT] - changed.steps[0].weights[WEIGHT]).abs()
    assert float(moved.median()) == pytest.approx(RATE, rel=0.01)


def row_wise(plain: Seen, changed: Seen) -> None:
    """A cascade's Adam has one second moment per row, its SGD none.

    The dense AdamW moves every row in every step.
    """
    kind = changed.config.table_optimizer
    labels, second = "heads.levels.2.weight", "heads.levels.2.second"
    assert plain.tensors[second].shape == (30,)
    if kind == "sgd":
        assert second not in changed.tensors
    else:
        assert changed.tensors[second].shape == (30, 32)
        still = [
            n
            for n in range(30)
            if not (changed.steps[0].weights[labels][n] - changed.start[labels][n]).any()
        ]
        assert not still
    assert type(changed.model.heads.levels[2]).__name__ == (
        "CascadeLevel" if kind == "sgd" else "DenseLevel"
    )


def biases(plain: Seen, changed: Seen) -> None:
    assert "head.bias" not in plain.tensors
    assert not changed.start["head.bias"].any()
    assert changed.moved("head.bias").all()


def frequencies(plain: Seen, changed: Seen) -> None:
    """With a rate of 0, biases stay the logits of the labels' frequencies."""
    counts = torch.tensor(changed.dataset.splits["train"].labels.sum(0)).flatten()
    assert not plain.tensors["head.bias"].any()
    assert torch.allclose(
        changed.tensors["head.bias"], torch.logit((counts + 0.5) / 161).float(), atol=1e-5
    )


def centroids(plain: Seen, changed: Seen) -> None:
    """With rates of 0, each row stays where it started.

    It points from the mean of all documents to the mean of its label's.
    """
    train = changed.dataset.splits["train"]
    (batch,) = changed.inputs.batches(train, len(train), shuffle=False).epoch(0)
    x = changed.model.embed(batch)
    labels = torch.zeros(len(train), 30)
    labels[batch.pos_sample.long(), batch.pos_row] = 1
    away = labels.T @ x / labels.sum(0)[:, None] - x.mean(0)
    assert torch.allclose(
        changed.tensors[WEIGHT], 0.5 * torch.nn.functional.normalize(away), atol=1e-4
    )
    assert torch.equal(plain.tensors[WEIGHT], plain.start[WEIGHT])


def table_epsilons(plain: Seen, changed: Seen) -> None:
    """Adam's step is rate g / (|g| + epsilon): a large epsilon gives the scaled gradient."""
    assert float(plain.steps[0].hyper[-1][EPSILON]) == pytest.approx(1e-8)
    assert float(changed.steps[0].hyper[-1][EPSILON]) == pytest.approx(1e4)
    step = changed.start[WEIGHT] - changed.steps[0].weights[WEIGHT]
    g = changed.tensors[MOMENTUM] / 0.1
    assert torch.allclose(step, RATE * g / (g.abs() + 1e4), atol=1e-7) and step.any()


def epsilons_of_levels(plain: Seen, changed: Seen) -> None:
    """Each level multiplies epsilon by its gain, as it does its gradient."""
    gains = [level.gain for level in changed.model.heads.levels]
    for seen, value in ((plain, 1e-8), (changed, 3e-5)):
        found = [
            float(hyper[EPSILON]) / gain
            for hyper, gain in zip(seen.steps[0].hyper, gains, strict=True)
        ]
        assert found == pytest.approx([value] * 3)


def compensated(plain: Seen, changed: Seen) -> None:
    assert "head.kahan" not in plain.tensors and changed.tensors["head.kahan"].any()
    assert changed.tensors["head.kahan"].dtype == torch.bfloat16


def groups_are_skipped(runs: Runs, folder: object) -> None:
    """Labels from 128 on never occur: three of four groups of 128 stay as they are."""
    plain = runs.of("tiny", dataset=str(runs.other))
    changed = runs.of("tiny", dataset=str(runs.other), skip_tiles=1e12)
    assert "skipped_tiles" not in plain.report and changed.report["skipped_tiles"] == 0.75
    assert changed.model.head.skip_below == pytest.approx(
        1e12 * 2.0**-6 * torch.finfo(torch.float32).eps
    )
    assert plain.moved(WEIGHT).any(1).all()
    assert changed.moved(WEIGHT)[:128].any(1).all() and not changed.moved(WEIGHT)[128:].any()


def plain_tables(before: Seen, after: Seen) -> None:
    """The tables are those of plain PyTorch, and learn the same from the same batches."""
    for seen, plain in ((before, False), (after, True)):
        tables = seen.model.tables().values()
        assert all(isinstance(table, PlainHead | PlainLevel) == plain for table in tables)
    for name, weight in before.steps[1].weights.items():
        assert torch.allclose(after.steps[1].weights[name], weight, rtol=0, atol=1e-4), name


def mixed_tables(before: Seen, after: Seen) -> None:
    """The tables stay fp32, and move as those of fp32 products do, but for their rounding."""
    bf16 = after.config.table_compute == "bf16"
    for table in after.model.tables().values():
        assert isinstance(table, MixedHead | MixedLevel)
        assert table.compute == after.config.table_compute and table.weight.dtype == torch.float32
    for name in (WEIGHT, "heads.levels.2.weight"):
        if name in after.start:
            ours, theirs = after.moved(name), before.moved(name)
            apart = float((ours - theirs).norm() / theirs.norm())
            assert 1e-7 < apart < (0.05 if bf16 else 0.01)


def stored(runs: Runs, folder: Path) -> None:
    """The table is on the host, or in a folder that is empty afterwards; its values are the same.

    tests/training/test_train_stored.py has the rest.
    """
    plain = runs.of("tiny")
    kept, label_level = runs.of("cascade"), "heads.levels.2"
    for base, text, before, name, kind in (
        ("tiny", "host", plain, "head", StoredHead),
        ("tiny", f"file:{folder / 'tables'}", plain, "head", StoredHead),
        ("cascade", f"file:{folder / 'tables'}", kept, label_level, StoredLevel),
    ):
        output = str(folder / f"{base} {text[:4]}")
        changed = recorded(runs.config(base, table_store=text, output=output))
        table = changed.model.get_submodule(name)
        assert isinstance(table, kind) and table.weight.is_meta
        assert isinstance(table.place, FilePlace) == text.startswith("file")
        weight = f"{name}.weight"
        assert torch.equal(changed.tensors[weight], before.tensors[weight])
        if isinstance(table.place, FilePlace):
            held = table.place.folder
            assert held.parent == folder / "tables" and not held.exists()


FP8 = torch.float8_e4m3fn
STILL = {"table_lr": 0.0, "encoder_lr": 0.0, "epochs": 1}
FIELDS = {
    "table": (
        Case("tiny", {"table": "bf16"}, formats({WEIGHT: torch.bfloat16})),
        Case("tiny", {"table": "fp8"}, formats({WEIGHT: FP8})),
        Case(
            "cascade",
            {"table": "fp8"},
            formats({"heads.levels.2.weight": FP8, "heads.levels.0.weight": torch.bfloat16}),
        ),
    ),
    "bias": (Case("tiny", {"bias": True}, biases),),
    "frequency_bias": (Case("bow", {"frequency_bias": True}, frequencies, STILL),),
    "centroid_norm": (Case("tiny", {"centroid_norm": 0.5}, centroids, STILL),),
    "table_optimizer": (
        Case("tiny", {"table_optimizer": "adam"}, adam, ONE_STEP),
        Case("cascade", {"table_optimizer": "sgd"}, row_wise),
        Case("cascade", {"table_optimizer": "adamw_dense"}, row_wise),
    ),
    "momentum": (
        Case("tiny", {"momentum": 0.5}, momenta, {"batch": 80, "epochs": 1, "warmup": 0}),
        Case("cascade", {"momentum": 0.5}, momenta_of_levels, {"table_optimizer": "sgd"}),
    ),
    "state": (
        Case("tiny", {"state": "bf16"}, formats({MOMENTUM: torch.bfloat16}), {"momentum": 0.9}),
        Case("cascade", {"state": "fp16"}, formats({"heads.levels.2.momentum": torch.float16})),
    ),
    "table_decay": (Case("tiny", {"table_decay": 0.5}, decays, ONE_STEP),),
    "table_epsilon": (
        Case(
            "tiny", {"table_epsilon": 1e4}, table_epsilons, ONE_STEP | {"table_optimizer": "adam"}
        ),
        Case("cascade", {"table_epsilon": 3e-5}, epsilons_of_levels),
    ),
    "decoupled": (
        Case(
            "tiny",
            {"decoupled": True},
            decays_apart,
            ONE_STEP | {"momentum": 0.9, "table_decay": 0.5},
        ),
    ),
    "kahan": (Case("tiny", {"kahan": True}, compensated, {"table": "bf16"}),),
    "table_compute": (
        Case("tiny", {"table_compute": "fp16"}, mixed_tables),
        Case("cascade", {"table_compute": "bf16"}, mixed_tables),
    ),
    "impl": (
        Case("tiny", {"impl": "reference"}, plain_tables),
        Case("cascade", {"impl": "reference"}, plain_tables),
    ),
    "skip_tiles": (groups_are_skipped,),
    "table_store": (stored,),
}
