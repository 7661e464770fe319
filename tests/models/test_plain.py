"""The tables' steps in plain PyTorch: the numbers of the fused steps, without any op of ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import cascade_common
import end_to_end_common
import pytest
import torch

from xmlkernels import InputError
from xmlkernels.nn import cascade_level, full_head, table
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.plain import PlainHead, PlainLevel
from xmlkernels.nn.table import RowOptimizer

STEPS = 6
L2 = {"decay": 0.1}
AdamW = {"decay": 0.1, "decoupled": True, "epsilon": 1e-3}


def no_ops(patch: pytest.MonkeyPatch) -> None:
    """Forbid the ops of the fused steps: a plain step that called one would fail."""

    def called(*_: Any, **__: Any) -> None:
        pytest.fail("a plain step called an op of this package")

    for module, name in (
        (full_head, "bce_step_"),
        (cascade_level, "cluster_step_"),
        (cascade_level, "sparse_adam_"),
        (cascade_level, "shortlist_matmul"),
        (table, "bce_loss"),
    ):
        patch.setattr(module, name, called)


def steps(model: Any, batches: list[Any]) -> list[float]:
    return [float(model.step(batch, need_loss=True)) for batch in batches]


def assert_equal(fused: Any, plain: Any, first: dict[str, torch.Tensor]) -> None:
    """Whatever a model holds is the other's within 1e-5 of its norm; its tables have moved."""
    ours, theirs = fused.tensors(), plain.tensors()
    assert ours.keys() == theirs.keys()
    # A key's bias shifts all scores of a query alike: its gradient is rounding noise, which Adam
    # blows up.
    for name, value in ((k, v) for k, v in ours.items() if "key.bias" not in k):
        apart = (theirs[name].double() - value.double()).norm()
        assert float(apart) <= 1e-5 * max(1e-4, float(value.double().norm())), name
    tables = [f"{name}.{part}" for name in fused.tables() for part in ("weight", "bias")]
    for name in (name for name in tables if name in first):
        assert float((ours[name] - first[name]).abs().max()) > 1e-3, name


def end_to_end(kind: Callable[..., FullHead], options: dict[str, Any], bias: bool) -> Any:
    model = end_to_end_common.make_model(head_lr=0.05, encoder_lr=1e-4)
    name = options.get("kind", "sgd")
    rule = RowOptimizer(name, **{k: v for k, v in options.items() if k != "kind"})
    width = model.encoder.width
    model.head = kind(end_to_end_common.LABELS, width, bias=bias, optimizer=rule, seed=2)
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9} | L2,
        {"momentum": 0.9, "decay": 0.1, "decoupled": True},
        {"kind": "adam", "decay": 0.1, "epsilon": 1e-3},
        {"kind": "adam"} | AdamW,
    ],
    ids=str,
)
def test_end_to_end_equals_the_fused_step(
    options: dict[str, Any], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, plain = (end_to_end(kind, options, bias) for kind in (FullHead, PlainHead))
    first = {name: value.clone() for name, value in fused.tensors().items()}
    batches = [end_to_end_common.make_batch(6, seed) for seed in range(STEPS)]
    expected = steps(fused, batches)
    no_ops(monkeypatch)
    assert steps(plain, batches) == pytest.approx(expected, rel=1e-5)
    assert_equal(fused, plain, first)


@pytest.mark.parametrize(
    "options",
    [
        {"epsilon": 1e-5},
        {"epsilon": 1e-5, "row_wise": False},
        {"optimizer": "sgd", "head_lr": 3.0},
        {"optimizer": "sgd", "head_lr": 3.0, "momentum": 0.9},
        {"optimizer": "adamw_dense", "epsilon": 1e-5},
    ],
    ids=str,
)
def test_a_cascade_equals_the_fused_step(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shortlists, scores, the cycle of beta1, decay and biases included."""
    given = {"topk": [2, 2], "decay": 0.5, "encoder_lr": 1e-4, "head_lr": 0.01, "warmup": 2}
    fused, plain = (
        cascade_common.make_model(3, level=level, **given | options) for level in (None, PlainLevel)
    )
    first = {name: value.clone() for name, value in fused.tensors().items()}
    batches = [cascade_common.make_batch(fused.tree, 7, seed=n) for n in range(STEPS)]
    expected = steps(fused, batches)
    no_ops(monkeypatch)
    assert steps(plain, batches) == pytest.approx(expected, rel=1e-5)
    assert_equal(fused, plain, first)


def test_what_is_not_finite_leaves_the_tables_as_they_were() -> None:
    for model, batch in (
        (end_to_end(PlainHead, {"momentum": 0.9}, True), end_to_end_common.make_batch(4)),
        (
            cascade := cascade_common.make_model(3, level=PlainLevel),
            cascade_common.make_batch(cascade.tree, 4),
        ),
    ):
        model.step(batch)
        with torch.no_grad():
            next(p for p in model.encoder.parameters() if p.dim() == 2).fill_(torch.inf)
        before = copy.deepcopy(
            {name: dict(t.named_buffers()) for name, t in model.tables().items()}
        )
        assert torch.isnan(model.step(batch, need_loss=True)) and int(model.skipped_steps) == 1
        for name, held in model.tables().items():
            for part, value in held.named_buffers():
                same = torch.equal(value, before[name][part])
                assert same or part in ("counter", "hyper"), (name, part)


def test_fill_of_a_fixed_capacity_is_no_positive() -> None:
    """Rows from n on are fill, as the ops have it."""
    fused, plain = FullHead(9, 4, seed=1), PlainHead(9, 4, seed=1)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    row, sample = torch.tensor([3, 9, 9]), torch.tensor([1, 0, 0], dtype=torch.int32)
    ours, theirs = (head.step(x, row, sample, lr=0.1, dx_scale=4.0) for head in (fused, plain))
    torch.testing.assert_close(theirs[0], ours[0])
    torch.testing.assert_close(plain.weight, fused.weight)
    assert theirs[1].shape == ours[1].shape == (0,)


def test_it_takes_fp32_alone() -> None:
    with pytest.raises(InputError, match="label table: dtype: expected fp32 for plain PyTorch"):
        PlainHead(4, 4, dtype="bf16")
    with pytest.raises(InputError, match="state_dtype: expected fp32 for plain PyTorch, got bf16"):
        PlainHead(4, 4, optimizer=RowOptimizer("adam", state_dtype="bf16"))
    with pytest.raises(InputError, match="cascade table: dtype: expected fp32 for plain PyTorch"):
        cascade_common.make_model(3, level=PlainLevel, dtype="fp16")
    with pytest.raises(InputError, match="label table: skip_units: expected 0, got 0.5"):
        PlainHead(4, 4, skip_units=0.5)
