"""Dense AdamW on a cascade's tables: against AdamW by hand in float64, against the row-sparse rule,
stopped, served.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from cascade_common import Twin, best, make_batch, make_model, relative
from torch import Tensor
from train_runs import Config, cascade, check, make_dataset, make_tree, run, weights

from xmlkernels import InputError
from xmlkernels.nn.bow import BowEncoder
from xmlkernels.nn.cascade_heads import CascadeHeads
from xmlkernels.nn.cascade_level import CascadeLevel, DenseLevel
from xmlkernels.nn.table import RowOptimizer
from xmlkernels.planner import plan, planned
from xmlkernels.predict.model import Predictor

BETA2, EPSILON = 0.999, 1e-8


class DenseTwin(Twin):
    """The twin of a cascade with every row of every table, and every bias, moved by AdamW."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.moments = [
            [torch.zeros_like(p) for p in (t, t, b, b)]
            for t, b in zip(self.tables, self.biases, strict=True)
        ]

    @torch.no_grad()
    def move(self, r: int, hit: Tensor, lr: float, beta1: float) -> None:
        tables, decay, t = self.moments[r], self.settings.decay / 10, self.step_number
        for p, m, v, shrink in (
            (self.tables[r], *tables[:2], decay),
            (self.biases[r], *tables[2:], 0.0),
        ):
            m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
            v.mul_(BETA2).add_(p.grad.square(), alpha=1 - BETA2)
            p.mul_(1 - lr * shrink)
            p.sub_(lr * (m / (1 - beta1**t)) / ((v / (1 - BETA2**t)).sqrt() + EPSILON))


@pytest.mark.parametrize("levels", [2, 4])
def test_steps_equal_adamw_by_hand(levels: int) -> None:
    """Four steps beside dense float64 tables, autograd and Python loops; the cycle of beta1 and a
    decay that shows.
    """
    model = make_model(
        levels,
        optimizer="adamw_dense",
        topk=[1] * (levels - 1),
        decay=20.0,
        warmup=2,
        total=9,
        cooldown=3,
    )
    start, twin = [level.weight.clone() for level in model.heads.levels], DenseTwin(model)
    rates = [model.training_settings.rates(number) for number in range(4)]
    assert len({beta1 for _, _, beta1 in rates}) > 1
    for number, (encoder_lr, lr, beta1) in enumerate(rates):
        batch = make_batch(model.tree, 2, seed=number, most=1)
        before = model.heads.levels[-1].weight.clone()
        expected = twin.step(batch, lr, encoder_lr, beta1)
        assert float(model.step(batch, need_loss=True)) == pytest.approx(expected, rel=1e-5)
        still = twin.tables[-1].grad.abs().sum(1) == 0
        # A row that no document has as a candidate moves: at least by its decay.
        assert still.any() and not (model.heads.levels[-1].weight == before).all(1)[still].any()
    for level, first, table, bias in zip(
        model.heads.levels, start, twin.tables, twin.biases, strict=True
    ):
        # Adam divides by the gradient's own size: what rounds in a tiny gradient shows whole in the
        # step.
        assert relative(level.weight - first, table - first.double()) < 1e-3
        assert relative(level.bias, bias) < 1e-3
        assert torch.equal(level.counter, torch.tensor([int(level.counter[0]), 4]))
    for (name, ours), theirs in zip(
        model.encoder.named_parameters(), twin.encoder.parameters(), strict=True
    ):
        assert name.endswith("key.bias") or relative(ours, theirs) < 1e-4, name


def test_it_equals_the_row_sparse_rule_where_every_row_is_a_candidate() -> None:
    """One cluster of all rows; biases, which follow another rule, are put back after every step."""
    sparse, dense = (
        level(30, 12, 30, dtype="fp32", optimizer=RowOptimizer(kind), seed=5, fill=True)
        for level, kind in ((CascadeLevel, "adam"), (DenseLevel, "adamw_dense"))
    )
    first = sparse.weight.clone()
    assert torch.equal(dense.weight, first) and dense.gain == 1
    clusters, row_ptr = torch.zeros(8, 1, dtype=torch.int64), torch.tensor([0, 30])
    generator = torch.Generator().manual_seed(0)
    for number in range(5):
        x = torch.randn(8, 12, generator=generator)
        node = torch.sort(torch.randint(30, (8,), generator=generator)).values
        sample = torch.arange(8, dtype=torch.int32)
        scale = torch.full((1,), 1 / 240)
        more = {"lr": 1e-2, "beta1": 0.85 + 0.01 * number, "need_loss": True}
        out = []
        for level in (sparse, dense):
            level.set_decay(0.5)
            out.append(
                level.step(
                    x, clusters, row_ptr, 30, (node, sample), scale=scale, dx_scale=4.0, **more
                )
            )
            level.bias.zero_()
        for ours, theirs in zip(*out, strict=True):
            assert ours.shape == theirs.shape and relative(theirs, ours) < 1e-5
    assert relative(dense.weight - first, sparse.weight - first) < 1e-4
    assert relative(dense.momentum * sparse.gain, sparse.momentum) < 1e-4


def test_a_non_finite_feature_changes_nothing() -> None:
    model = make_model(3, optimizer="adamw_dense", decay=0.1)
    model.step(make_batch(model.tree, 4))
    before = {k: v.clone() for k, v in model.heads.state_dict().items()}
    level = model.heads.levels[1]
    clusters, row_ptr = torch.tensor([[0, 1], [2, -1], [-1, -1]]), model.children_0
    x = torch.randn(3, 16)
    for sample in (0, 2):  # the last one has no candidates
        spoilt = x.clone()
        spoilt[sample, 3] = torch.inf
        none = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)
        out = level.step(
            spoilt,
            clusters,
            row_ptr,
            model.heads.most[0],
            none,
            lr=1e-2,
            beta1=0.9,
            scale=torch.ones(1),
            dx_scale=1.0,
            need_loss=True,
        )
        assert all(part.isnan().all() for part in out)
    after = model.heads.state_dict()
    assert [k for k in before if not torch.equal(before[k], after[k])] == ["levels.1.counter"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_stopped_model_goes_on_bit_for_bit_and_is_served(dtype: str) -> None:
    options = {
        "optimizer": "adamw_dense",
        "dtype": dtype,
        "state_dtype": "bf16" if dtype == "bf16" else "fp32",
    }
    model = make_model(3, **options)
    for number in range(3):
        model.step(make_batch(model.tree, 6, seed=number))
    twin, saved = make_model(3, **options), {k: v.clone() for k, v in model.tensors().items()}
    twin.load_tensors(saved)
    for number in range(3, 5):
        model.step(make_batch(model.tree, 6, seed=number))
        twin.step(make_batch(model.tree, 6, seed=number))
    assert all(torch.equal(value, twin.tensors()[name]) for name, value in model.tensors().items())
    names = {name.rsplit(".", 1)[-1] for name in saved if name.startswith("heads.levels")}
    assert names == {
        "weight",
        "bias",
        "counter",
        "momentum",
        "second",
        "bias_momentum",
        "bias_second",
    }
    served = make_model(3, training=False, dtype=dtype, optimizer="sgd")
    served.load_tensors({k: v.clone() for k, v in model.tensors().items()})
    batch = make_batch(model.tree, 4, seed=8)
    assert all(
        torch.equal(a, b)
        for a, b in zip(best(served, batch, 5), best(model, batch, 5), strict=True)
    )


def test_its_step_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        names: ClassVar[set[str]] = set()

        def __torch_dispatch__(
            self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            self.names.add(str(func))
            return func(*args, **(kwargs or {}))

    model, nothing = make_model(3, optimizer="adamw_dense"), lambda *a, **k: None
    level, clusters = model.heads.levels[1], torch.tensor([[0, 1], [1, 2]])
    positives = torch.tensor([0, 3]), torch.tensor([0, 1], dtype=torch.int32)
    x, one = torch.randn(2, 16), torch.ones(1)
    # The ops' own checks of values run on the CPU alone.
    monkeypatch.setattr("xmlkernels.ops.sparse_update._check_touched_rows", nothing)
    monkeypatch.setattr(
        "xmlkernels.nn.cascade_level.shortlist_matmul", torch.ops.xmlkernels.shortlist_matmul
    )
    options = {"lr": 1e-2, "beta1": 0.9, "scale": one, "dx_scale": one, "need_loss": True}
    with Seen() as seen:
        level.step(x, clusters, model.children_0, model.heads.most[0], positives, **options)
    waits = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "is_nonzero",
        "equal.default",
        "repeat_interleave",
    )
    assert any("sparse_adam_" in name for name in seen.names)
    assert [name for name in seen.names if any(wait in name for wait in waits)] == []


def test_it_takes_the_memory_that_was_planned() -> None:
    """The gradients of a step: [n, D] and, of the documents of an update, [B, n]; the larger table
    decides."""

    def gradients(kind: str) -> int:
        options = {"layers": ((1,), (2,)), "topk": (2,), "optimizer": kind}
        heads = planned(lambda: CascadeHeads((5, 40), (9,), 16, **options))
        parts = plan(BowEncoder(2, 2), heads.tables(), documents=3, tokens=0, update=12)
        return parts["gradients of one table"]

    assert gradients("adamw_dense") == 4 * 40 * (16 + 12)
    assert gradients("adam") == 0


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(
        InputError,
        match="cascade table: dtype: expected fp32, bf16 or fp16 for optimizer adamw_dense, got "
        "fp8",
    ):
        make_model(2, optimizer="adamw_dense", dtype="fp8")
    with pytest.raises(
        InputError,
        match="cascade table: optimizer: expected one of adam, sgd, adamw_dense, got 'adagrad'",
    ):
        make_model(2, optimizer="adagrad")


@pytest.mark.parametrize(
    ("changes", "given", "expected"),
    [
        (
            {"table": "fp8"},
            (),
            "--table-optimizer: expected auto, sgd or adam with --table fp8, got 'adamw_dense'; ",
        ),
        (
            {"model": "end_to_end"},
            (),
            "--table-optimizer: expected auto, sgd or adam with --model end_to_end, got ",
        ),
        (
            {},
            ("momentum",),
            "--momentum: expected --table-optimizer sgd, got adamw_dense; leave it out",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    changes: dict[str, Any], given: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(InputError) as told:
        check(
            replace(
                Config(),
                **{"model": "cascade", "tree_depths": (3, 6), "table_optimizer": "adamw_dense"}
                | changes,
            ),
            given,
        )
    assert expected in str(told.value)


def test_a_run_is_trained_and_served(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "raw")
    tree = make_tree(dataset, tmp_path / "tree.safetensors")
    settings = {"table_optimizer": "adamw_dense", "save_every": 5}
    report = run(cascade(dataset, tmp_path / "whole", tree, epochs=6, **settings))
    assert report["environment"]["table"] == "fp32" and report["test"]["P@1"] > 50  # 7 by chance
    names = weights(tmp_path / "whole", "last").keys()
    assert {f"heads.levels.{r}.bias_second" for r in range(3)} <= names
    model = Predictor.load(tmp_path / "whole").model
    assert not any(isinstance(level, DenseLevel) for level in model.heads.levels)
