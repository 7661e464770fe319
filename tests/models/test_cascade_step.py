"""The cascade's step: against a plain float64 cascade, by micro-batches, and when something is not
finite.
"""

from typing import ClassVar

import pytest
import torch
from cascade_common import (
    LABELS,
    Twin,
    best_of_levels,
    make_batch,
    make_model,
    make_tree,
    positives_of,
    relative,
)

from xmlkernels.models.running_mean import MeanSettings
from xmlkernels.nn import shortlist
from xmlkernels.ops.hyper import BETA1
from xmlkernels.reference import shortlist_select as reference


@pytest.mark.parametrize("levels", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "options",
    [{}, {"row_wise": False, "epsilon": 1e-3}, {"optimizer": "sgd", "momentum": 0.0}],
    ids=["row", "full", "sgd"],
)
def test_steps_equal_a_plain_cascade(levels: int, options: dict) -> None:
    """Three steps beside dense tables, autograd and Python loops: same loss, same tables, same
    encoder.
    """
    weights = [0.5 + r for r in range(levels)]
    model = make_model(
        levels, decay=0.1, warmup=2, rw_loss=weights, topk=[2] * (levels - 1), **options
    )
    start = [level.weight.clone() for level in model.heads.levels]
    twin = Twin(model, epsilon=options.get("epsilon", 1e-8))
    for number in range(3):
        batch = make_batch(model.tree, 7, seed=number)
        encoder_lr, lr, beta1 = model.training_settings.rates(number)
        expected = twin.step(batch, lr, encoder_lr, beta1)
        assert float(model.step(batch, need_loss=True)) == pytest.approx(expected, rel=1e-5)
    for level, before, table, bias in zip(
        model.heads.levels, start, twin.tables, twin.biases, strict=True
    ):
        assert relative(level.weight - before, table - before.double()) < 1e-3
        assert relative(level.bias, bias) < 1e-4
    for (name, ours), theirs in zip(
        model.encoder.named_parameters(), twin.encoder.parameters(), strict=True
    ):
        # A key's bias shifts all scores of a query alike: its gradient is rounding noise, which
        # Adam blows up.
        assert name.endswith("key.bias") or relative(ours, theirs) < 1e-4, name
    for ours, theirs in zip(
        model.heads.projections.parameters(), twin.heads.projections.parameters(), strict=True
    ):
        assert relative(ours, theirs) < 1e-4
    assert model.steps == 3 and int(model.lost_positives.sum()) == 0


def test_the_reference_loss_counts_pads() -> None:
    """CascadeXML's mean: over the matrix of the longest list, a pad adding ln 2; its gradient is
    the smaller one.
    """
    batch = make_batch(make_tree(3), 6)
    ours, theirs = (
        make_model(3, topk=[2, 2], optimizer="sgd", reference_loss=r) for r in (False, True)
    )
    plain, padded = float(ours.loss(batch)), float(theirs.loss(batch))
    expected = 0.0
    twin = Twin(ours)
    positives = [*batch.levels, (batch.pos_row, batch.pos_sample)]
    with torch.no_grad():
        x = [f.double() for f in ours._features(*batch.inputs)]
        logits = [f @ w.T for f, w in zip(x, twin.tables, strict=True)]
    lists = twin.shortlists(positives, logits)
    for z, nodes, (node, sample) in zip(logits, lists, positives, strict=True):
        longest = max(len(n) for n in nodes)
        y = torch.zeros_like(z)
        y[sample.long(), node] = 1
        rows = [
            torch.nn.functional.binary_cross_entropy_with_logits(z[s, n], y[s, n], reduction="sum")
            for s, n in enumerate(nodes)
        ]
        pads = sum(longest - len(n) for n in nodes)
        expected += float((sum(rows) + pads * 0.6931471805599453) / (longest * len(nodes)))
    assert padded == pytest.approx(expected, rel=1e-5)
    assert abs(padded - plain) > 1e-4 * plain
    assert float(theirs.step(batch, need_loss=True)) == pytest.approx(expected, rel=1e-5)
    before = Twin(make_model(3, topk=[2, 2])).tables[-1].detach()
    ours.step(batch)
    counts = torch.tensor([len(n) for n in lists[-1]])
    moved = [float((m.heads.levels[-1].weight - before.float()).norm()) for m in (ours, theirs)]
    assert moved[1] / moved[0] == pytest.approx(
        float(counts.sum() / (counts.max() * len(counts))), rel=1e-3
    )


@pytest.mark.parametrize("size", [1, 3, 8, 20])
def test_micro_batches_equal_the_whole_batch(size: int) -> None:
    """One update, one step of the schedule, whatever the pieces."""
    whole, parts = (make_model(3, micro_batch=m, warmup=10) for m in (0, size))
    before = {k: v.clone() for k, v in whole.state_dict().items()}
    batch = make_batch(whole.tree, 16)
    a, b = whole.step(batch, need_loss=True), parts.step(batch, need_loss=True)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    assert whole.steps == parts.steps == 1
    for name, mine in whole.state_dict().items():
        if name.startswith("heads.levels") and name.endswith("weight"):
            assert relative(parts.state_dict()[name] - before[name], mine - before[name]) < 1e-3
    grads = [
        torch.cat([p.grad.flatten() for p in m.encoder.parameters() if p.grad is not None])
        for m in (parts, whole)
    ]
    assert relative(*grads) < 1e-5
    assert relative(*(m.heads.projections["0"].weight.grad for m in (parts, whole))) < 1e-5


def test_both_passes_of_a_micro_batch_drop_the_same_units(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(3, drops=[0.5, 0.4, 0.3], micro_batch=4)
    seen: list[list[torch.Tensor]] = []
    original = model.heads.features

    def kept(vectors: list[torch.Tensor]) -> list[torch.Tensor]:
        out = original(vectors)
        seen.append([f.detach().clone() for f in out])
        return out

    monkeypatch.setattr(model.heads, "features", kept)
    model.step(make_batch(model.tree, 12))
    assert len(seen) == 6
    for first, second in zip(seen[:3], seen[3:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all((a == 0).any() for a in first)  # dropout was on, so equality is no accident


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_non_finite_feature_at_any_level_skips_every_update(
    level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(3)
    model.step(make_batch(model.tree, 5))
    original = model.heads.features

    def broken(vectors: list[torch.Tensor]) -> list[torch.Tensor]:
        out = original(vectors)
        out[level] = out[level] + torch.tensor([0.0, torch.inf] + [0.0] * 14)
        return out

    before = {k: v.clone() for k, v in model.tensors().items()}
    with monkeypatch.context() as patch:
        patch.setattr(model.heads, "features", broken)
        loss = model.step(make_batch(model.tree, 5, seed=1), need_loss=True)
    assert loss.isnan().all()
    changed = {k for k, v in model.tensors().items() if not torch.equal(v, before[k])}
    counters = {f"heads.levels.{r}.counter" for r in range(3)}
    assert changed == {"skipped_steps", "scaler.growth_tracker", *counters}
    assert int(model.skipped_steps) == 1 and int(model.skipped_encoder_steps) == 0
    model.step(make_batch(model.tree, 5, seed=2))
    assert int(model.skipped_steps) == 1
    assert not torch.equal(model.heads.levels[0].weight, before["heads.levels.0.weight"])


def test_an_overflow_in_the_encoders_backward_skips_the_encoder_alone() -> None:
    model = make_model(3)
    next(p for p in model.encoder.parameters() if p.requires_grad).register_hook(
        lambda grad: torch.full_like(grad, torch.inf)
    )
    before = {k: v.clone() for k, v in model.tensors().items()}
    model.step(make_batch(model.tree, 5))
    after = model.tensors()
    for r in range(3):
        assert not torch.equal(
            after[f"heads.levels.{r}.weight"], before[f"heads.levels.{r}.weight"]
        )
    assert all(
        torch.equal(after[k], before[k])
        for k in before
        if k.startswith(("encoder.", "heads.projections"))
    )
    assert int(model.skipped_steps) == 0 and int(model.skipped_encoder_steps) == 1


def test_fp16_autocast_overflow_lowers_the_scale_and_the_tables_move() -> None:
    model = make_model(3, autocast=torch.float16)
    model.scaler.scale.fill_(2.0**24)
    for level in model.heads.levels:
        level.weight.mul_(100)  # gradients large enough to leave fp16's range under that scale
    before = {k: v.clone() for k, v in model.tensors().items()}
    model.step(make_batch(model.tree, 8))
    assert int(model.skipped_encoder_steps) == 1 and int(model.skipped_steps) == 0
    assert float(model.scaler.scale) == 2.0**23
    assert not torch.equal(
        model.tensors()["heads.levels.2.weight"], before["heads.levels.2.weight"]
    )
    assert all(
        torch.equal(v, before[k]) for k, v in model.tensors().items() if k.startswith("encoder.")
    )


def test_positives_beyond_the_bound_are_counted() -> None:
    """Document 0 has 5 positive clusters; k is 2 and the bound lets it have one more: two are lost,
    the other has room.
    """
    tree = make_tree(2)
    assert tree.sizes[0] == 4
    rows = [[int(s) for s in tree.children[0][:4]], [0]]
    (node, sample), (row, of) = positives_of(tree, rows)
    batch = make_batch(tree, 2)
    batch = type(batch)(batch.inputs, row, of, ((node, sample),))
    for bound, lost in ((0, 2), (1, 1), (2, 0), (9, 0)):
        model = make_model(2, tree=tree, topk=[2], positives_bound=bound)
        model.step(batch)
        assert model.lost_positives.tolist() == [lost]
        model.step(batch)
        assert model.lost_positives.tolist() == [2 * lost]


def test_a_frozen_encoder_leaves_the_tables_to_train() -> None:
    model = make_model(4)  # its recipe has one layer per level, so no linear layer either
    frozen = make_model(4)
    frozen.encoder.requires_grad_(False)
    frozen = type(frozen)(
        frozen.encoder, frozen.heads, frozen.tree, frozen.training_settings
    ).eval()
    assert frozen.optimizer is None
    batch = make_batch(model.tree, 5)
    model.step(batch)
    frozen.step(batch)
    assert torch.equal(model.heads.levels[3].weight, frozen.heads.levels[3].weight)
    assert int(frozen.skipped_encoder_steps) == 0


def test_one_vector_may_serve_every_level() -> None:
    """As a bag of words does; the gradients of all levels arrive in it, and its own table is told
    to move.
    """

    class Bag(torch.nn.Module):
        width, autocast = 16, None

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.told = torch.nn.Parameter(torch.randn(60, 16)), []

        def layer_vectors(
            self, recipe: tuple, ids: torch.Tensor, mask: torch.Tensor
        ) -> list[torch.Tensor]:
            vector = (self.table[ids] * mask[:, :, None]).sum(1)
            return [vector] * len(recipe)

        def update(self, lr: float) -> None:
            self.told.append(lr)

        def encoder_config(self) -> dict[str, object]:
            return {"kind": "bag"}

    like = make_model(3)
    heads = type(like.heads)(
        like.tree.sizes, like.heads.most, 16, layers=[(1,)] * 3, topk=[3, 3], seed=1
    )
    model = type(like)(Bag(), heads, like.tree, like.training_settings)
    batch = make_batch(like.tree, 5)
    vector = model.encoder.layer_vectors(heads.layers, *batch.inputs)[0].detach()
    seen = []
    for level in heads.levels:
        original = level.update
        level.update = lambda *a, original=original, **k: seen.append(original(*a, **k)) or seen[-1]
    model.step(batch)
    total = sum(dx for dx, _, _ in seen)
    expected = torch.zeros(60, 16).index_put_(
        (batch.inputs[0],), total[:, None] * batch.inputs[1][:, :, None], accumulate=True
    )
    torch.testing.assert_close(model.encoder.table.grad, expected)
    assert model.encoder.told == [1e-3] and vector.shape == (5, 16)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp8"])
def test_a_toy_hierarchy_is_learnt(dtype: str) -> None:
    """Documents made of their labels' words: the loss falls and the shortlists come to hold the
    true clusters.
    """
    tree = make_tree(3)
    words = torch.arange(LABELS) % 50 + 5
    g = torch.Generator().manual_seed(0)
    model = make_model(
        3, dtype=dtype, topk=[2, 4], encoder_lr=2e-3, head_lr=2e-2, total=60, tree=tree
    )

    def documents() -> object:
        rows = torch.randint(LABELS, (32, 1), generator=g)
        *levels, (row, sample) = positives_of(tree, rows.tolist())
        ids = words[rows].expand(32, 4).clone()
        return type(make_batch(tree, 1))((ids, torch.ones_like(ids)), row, sample, tuple(levels))

    def recall(batch: object) -> list[float]:
        out = []
        for (node, sample), level in zip(
            batch.levels, best_of_levels(model, batch, 1), strict=False
        ):
            out.append(float((level.kept[sample.long()] == node[:, None]).any(1).float().mean()))
        return out

    test = documents()
    before, loss = recall(test), float(model.loss(test))
    assert min(before) < 0.9
    for _ in range(60):
        model.step(documents())
    assert float(model.loss(test)) < 0.6 * loss
    assert min(recall(test)) > 0.95
    assert model.heads.levels[2].weight.dtype == {
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
    }.get(dtype, torch.float8_e4m3fn)
    assert int(model.skipped_steps) == 0


def test_a_step_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """No operation whose result's size or value the host must know; the op's own checks of values
    run on the CPU alone.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        names: ClassVar[set[str]] = set()

        def __torch_dispatch__(
            self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            self.names.add(str(func))
            return func(*args, **(kwargs or {}))

    # Without dropout, which on a CPU draws its seed on the host, and not in fp8, whose scales are
    # checked there too.
    model = make_model(3, dtype="bf16", mean=MeanSettings(0.9, tables=True), clip=1.0)
    batch = make_batch(model.tree, 5)
    vectors = [
        torch.randn(5, 32, requires_grad=True),
        *(torch.randn(5, 16, requires_grad=True) for _ in range(2)),
    ]
    # The transformers library may look at a mask itself.
    monkeypatch.setattr(model.encoder, "layer_vectors", lambda *a: vectors)
    for name in ("check_clusters", "check_largest", "_check_unique", "check_positives"):
        monkeypatch.setattr(f"xmlkernels.ops.cluster_step.{name}", lambda *a: None)
    # On a card their reference is the kernel.
    for name in ("shortlist_select", "shortlist_merge"):
        monkeypatch.setattr(shortlist, name, getattr(reference, name))
    with Seen() as seen:
        model.step(batch, need_loss=True)
    assert any("cluster_step_" in name for name in seen.names)
    assert any("topk" in name for name in seen.names)
    waits = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "is_nonzero",
        "equal.default",
        "repeat_interleave.Tensor",
    )
    assert [name for name in seen.names if any(w in name for w in waits)] == []


def test_the_cycle_of_beta1_is_adams_alone() -> None:
    """SGD keeps the momentum it was given."""
    for optimizer, expected in (
        ({"optimizer": "sgd", "momentum": 0.3}, 0.3),
        ({"optimizer": "adam", "betas": (0.3, 0.99)}, 0.95),
    ):
        model = make_model(2, topk=[2], schedule="three_phase", warmup=10, **optimizer)
        model.step(make_batch(model.tree, 4))
        assert [float(level.hyper[BETA1]) for level in model.heads.levels] == pytest.approx(
            [expected] * 2
        )
