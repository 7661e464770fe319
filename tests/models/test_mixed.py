"""Mixed precision of the tables: products of rounded operands, updates of an fp32 master.

What a step must do is told by the fused fp32 step: on operands that the narrow format holds, the
two are one.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import cascade_common
import end_to_end_common
import pytest
import torch
from torch import Tensor

from xmlkernels import InputError
from xmlkernels.models.restore import restored
from xmlkernels.nn import mixed
from xmlkernels.nn.cascade_level import CascadeLevel
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.mixed import MixedHead, MixedLevel
from xmlkernels.nn.plain import PlainHead, PlainLevel
from xmlkernels.nn.table import RowOptimizer
from xmlkernels.precision import DTYPES

L, D, B = 43, 12, 6
# The CPU multiplies fp16 in fp32; of bf16 the gradient of the logits is rounded, too.
CLOSE = {"fp16": 1e-5, "bf16": 2e-2}


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings and positives, among them rows beyond the table, which are fill."""
    g = torch.Generator().manual_seed(seed)
    target = torch.rand(L, B, generator=g) < 0.1
    row, sample = target.nonzero().unbind(1)
    fill = torch.full((3,), L)
    return (
        torch.randn(B, D, generator=g),
        torch.cat([row, fill]),
        torch.cat([sample, torch.zeros(3, dtype=torch.int64)]).to(torch.int32),
    )


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


@pytest.mark.parametrize("pieces", [1, 5])
@pytest.mark.parametrize("compute", ["fp16", "bf16"])
@pytest.mark.parametrize(
    "rule",
    [
        RowOptimizer("sgd"),
        RowOptimizer("sgd", momentum=0.9),
        RowOptimizer("adam", epsilon=0.1, state_dtype="fp32"),
    ],
    ids=str,
)
def test_a_full_head_steps_as_fp32_does_on_rounded_operands(
    rule: RowOptimizer, compute: str, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both move by the same; the master moves from where it was, not from its rounded copy."""
    monkeypatch.setattr(mixed, "_PIECE", D * -(-L // pieces))
    options: dict[str, Any] = {"bias": True, "optimizer": rule, "seed": 3, "std": 0.3}
    ours, theirs = MixedHead(L, D, compute=compute, **options), FullHead(L, D, **options)
    tolerance = CLOSE[compute]
    for number in range(3):
        x, row, sample = batch(number)
        before = ours.weight.clone()
        theirs.weight.copy_(before.to(DTYPES[compute]))
        start = theirs.weight.clone()
        assert 1e-5 < relative(start, before) < 5e-3
        more = {"lr": 0.05, "dx_scale": 4.0, "need_loss": True}
        dx, loss = ours.step(x, row, sample, **more)
        expected, total = theirs.step(x.to(DTYPES[compute]).float(), row, sample, **more)
        assert relative(dx, expected) < tolerance
        torch.testing.assert_close(loss, total, rtol=tolerance, atol=0)
        assert relative(ours.weight - before, theirs.weight - start) < 2 * tolerance
        assert relative(ours.bias, theirs.bias) < tolerance
    assert ours.weight.dtype == torch.float32 and int(ours.counter[1]) == 3
    assert (ours.weight.to(DTYPES[compute]).float() != ours.weight).any()


@pytest.mark.parametrize("decoupled", [False, True])
def test_decay_is_that_of_the_master(decoupled: bool) -> None:
    """Where the batch is empty, nothing but decay moves a row."""
    rule = RowOptimizer("sgd", decay=0.5, decoupled=decoupled)
    head = MixedHead(L, D, compute="fp16", optimizer=rule, seed=3)
    before = head.weight.clone()
    head.step(torch.zeros(0, D), *(t[:0] for t in batch()[1:]), lr=0.1)
    torch.testing.assert_close(head.weight, before * 0.95, rtol=1e-6, atol=0)


def test_small_steps_add_up() -> None:
    """A hundred steps of a two-hundredth of fp16's spacing: rounded each time, none would count."""
    head = MixedHead(1, 1, compute="fp16", std=0)
    head.weight.fill_(1.0)
    x, none = torch.ones(1, 1), torch.zeros(0, dtype=torch.int64)
    for _ in range(100):
        head.step(x, none, none.to(torch.int32), lr=2.0**-10 / 200)
    assert 0.2 < float((1 - head.weight) / 2.0**-10) < 0.4  # sigma(1) is 0.73


@pytest.mark.parametrize("compute", ["fp16", "bf16"])
@pytest.mark.parametrize(
    "rule",
    [
        RowOptimizer("sgd"),
        RowOptimizer("sgd", momentum=0.9),
        RowOptimizer("adam", row_wise=True, epsilon=1e-3),
        RowOptimizer("adam", epsilon=1e-3),
    ],
    ids=str,
)
def test_a_level_steps_as_fp32_does_on_rounded_operands(rule: RowOptimizer, compute: str) -> None:
    """The same with shortlists, pads among them; rows outside stay bit for bit."""
    options: dict[str, Any] = {"dtype": "fp32", "optimizer": rule, "seed": 5, "fill": True}
    ours = MixedLevel(L, D, 9, compute=compute, **options)
    theirs = CascadeLevel(L, D, 9, **options)
    row_ptr, tolerance = torch.tensor([0, 4, 9, 15, 22, 30, 31, L]), CLOSE[compute]
    clusters = torch.tensor([[0, 2], [2, 3], [5, -1], [0, 3], [3, 5], [-1, -1]])
    for number in range(3):
        x, row, sample = batch(number)
        before = ours.weight.clone()
        theirs.weight.copy_(before.to(DTYPES[compute]))
        start = theirs.weight.clone()
        for level in (ours, theirs):
            level.set_decay(0.0)
        more: dict[str, Any] = {"lr": 0.05, "beta1": 0.85, "dx_scale": 4.0, "need_loss": True}
        more["scale"] = torch.full((1,), 0.02)
        given = clusters, row_ptr, 12, (row, sample)
        dx, scores, loss = ours.step(x, *given, **more)
        expected = theirs.step(x.to(DTYPES[compute]).float(), *given, **more)
        assert relative(dx, expected[0]) < tolerance
        torch.testing.assert_close(scores, expected[1], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(loss, expected[2], rtol=tolerance, atol=0)
        assert relative(ours.weight - before, theirs.weight - start) < 2 * tolerance
        assert relative(ours.bias, theirs.bias) < 2 * tolerance
        touched = torch.cat([torch.arange(0, 4), torch.arange(9, 22), torch.tensor([30])])
        still = torch.ones(L, dtype=torch.bool)
        still[touched] = False
        assert torch.equal(ours.weight[still], before[still])
        assert not torch.equal(ours.weight[touched], before[touched])
    for name in ("momentum", "second"):
        if (held := getattr(ours, name)) is not None:
            assert relative(held, getattr(theirs, name)) < 2 * tolerance


def test_decay_of_a_level_touches_its_candidates_alone() -> None:
    rule = RowOptimizer("adam", row_wise=True, epsilon=1e9)  # nothing moves but by decay
    level = MixedLevel(9, D, 4, compute="fp16", dtype="fp32", optimizer=rule, seed=1, fill=True)
    level.set_decay(0.5)
    before, none = level.weight.clone(), torch.zeros(0, dtype=torch.int64)
    level.step(
        torch.ones(1, D),
        torch.tensor([[1]]),
        torch.tensor([0, 3, 7, 9]),
        4,
        (none, none.to(torch.int32)),
        lr=0.1,
        beta1=None,
        scale=torch.ones(1),
        dx_scale=1.0,
        need_loss=False,
    )
    torch.testing.assert_close(level.weight[3:7], before[3:7] * 0.95, rtol=1e-5, atol=0)
    assert torch.equal(level.weight[[0, 1, 2, 7, 8]], before[[0, 1, 2, 7, 8]])


def full_model() -> Any:
    model = end_to_end_common.make_model()
    rule = RowOptimizer("sgd", momentum=0.9, decay=1e-3)
    options: dict[str, Any] = {"bias": True, "optimizer": rule, "seed": 2}
    model.head = MixedHead(end_to_end_common.LABELS, model.encoder.width, compute="fp16", **options)
    return model


def cascade_model() -> Any:
    def level(*sizes: int, **options: Any) -> MixedLevel:
        return MixedLevel(*sizes, compute="fp16", **options)

    return cascade_common.make_model(3, level=level, decay=0.1)


def a_batch(model: Any, seed: int) -> Any:
    if model.tree is None:
        return end_to_end_common.make_batch(6, seed)
    return cascade_common.make_batch(model.tree, 6, seed)


@pytest.mark.parametrize("make", [full_model, cascade_model])
def test_an_embedding_beyond_fp16_skips_both_sides(make: Any) -> None:
    """Finite in fp32, infinite in fp16: neither the tables nor the encoder move."""
    model = make()
    model.step(a_batch(model, 0))
    norms = [m for m in model.encoder.modules() if isinstance(m, torch.nn.LayerNorm)]
    with torch.no_grad():
        norms[-1].weight.fill_(1e6)
    before = {
        name: value.clone()
        for name, value in model.tensors().items()
        if not name.endswith(("counter", "skipped_steps", "growth_tracker"))
    }
    features = model._features(*a_batch(model, 1).inputs)[-1]
    assert features.isfinite().all() and features.abs().max() > 65_504
    assert model.step(a_batch(model, 1), need_loss=True).isnan()
    after = model.tensors()
    assert int(model.skipped_steps) == 1 and len(before) > 10
    lost = [name for name, value in before.items() if not torch.equal(after[name], value)]
    assert lost in ([], ["lost_positives"])


@pytest.mark.parametrize("make", [full_model, cascade_model])
def test_a_checkpoint_goes_on_in_bits_and_is_read_as_an_fp32_table(make: Any) -> None:
    stopped, whole = make(), make()
    for number in range(4):
        whole.step(a_batch(whole, number))
        if number < 2:
            stopped.step(a_batch(stopped, number))
    held = {name: value.clone() for name, value in stopped.tensors().items()}
    again = make()
    again.load_tensors(held)
    for number in range(2, 4):
        again.step(a_batch(again, number))
    tensors = whole.tensors()
    assert all(torch.equal(value, tensors[name]) for name, value in again.tensors().items())
    served = restored(whole.config(), tensors).eval()
    served.load_tensors(tensors)
    for table in served.tables().values():
        assert type(table) in (FullHead, CascadeLevel) and table.weight.dtype == torch.float32
    ours, theirs = (model.eval().score(a_batch(whole, 9), 5) for model in (whole, served))
    assert torch.equal(ours.values, theirs.values) and torch.equal(ours.labels, theirs.labels)


def test_it_takes_fp32_tables_alone() -> None:
    with pytest.raises(InputError, match="dtype: expected fp32 for mixed precision, got bf16"):
        MixedHead(4, 4, compute="fp16", dtype="bf16")
    with pytest.raises(InputError, match="compute: expected one of fp16, bf16, got 'fp8'"):
        MixedHead(4, 4, compute="fp8")
    with pytest.raises(InputError, match="skip_units: expected 0, got 0.5"):
        MixedHead(4, 4, compute="fp16", skip_units=0.5)
    dense: dict[str, Any] = {"optimizer": RowOptimizer("adamw_dense"), "seed": 0, "fill": True}
    with pytest.raises(InputError, match="optimizer: expected one of adam, sgd"):
        MixedLevel(4, 4, 2, compute="fp16", dtype="fp32", **dense)


@pytest.mark.parametrize(
    "kind", [FullHead, MixedHead, PlainHead, CascadeLevel, MixedLevel, PlainLevel]
)
def test_a_table_knows_whether_its_step_reads_the_device(kind: Any) -> None:
    """On torch's meta device, which has no values, reading one raises."""
    options: dict[str, Any] = {"compute": "fp16"} if kind in (MixedHead, MixedLevel) else {}
    rule = RowOptimizer("adam")
    level = issubclass(kind, CascadeLevel)
    with torch.device("meta"):
        if level:
            table = kind(L, D, 9, dtype="fp32", optimizer=rule, seed=0, fill=False, **options)
        else:
            table = kind(L, D, bias=True, optimizer=rule, **options)
    x, row, sample = (t.to("meta") for t in batch())
    expected = pytest.raises((RuntimeError, NotImplementedError)) if kind.WAITS else nullcontext()
    with expected:
        if level:
            clusters, row_ptr = torch.tensor([[0]] * B), torch.tensor([0, L])
            more: dict[str, Any] = {"beta1": None, "scale": x.new_ones(1), "dx_scale": 1.0}
            given = clusters.to("meta"), row_ptr.to("meta"), L, (row, sample)
            table.step(x, *given, lr=0.1, need_loss=True, **more)
        else:
            table.step(x, row, sample, lr=0.1, need_loss=True)


def test_what_a_step_holds_is_planned() -> None:
    head = MixedHead(L, D, compute="fp16")
    assert head.step_bytes(8) == L * D * 6
    level = MixedLevel(
        L, D, 9, compute="fp16", dtype="fp32", optimizer=RowOptimizer(), seed=0, fill=True
    )
    assert level.step_bytes(2) == 18 * D * 6 and level.step_bytes(99) == L * D * 6
