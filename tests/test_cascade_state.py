"""What survives a stop, and which checkpoints are refused."""

import pytest
import torch
from cascade_common import make_batch, make_model, make_tree

from xmlkernels import InputError

OPTIONS = {
    "plain": {}, "bf16": {"dtype": "bf16", "state_dtype": "bf16", "row_wise": False}, "fp8": {"dtype": "fp8"},
    "ema": {"ema": 0.9, "drops": 0.1}, "sgd": {"optimizer": "sgd", "betas": (0.9, 0.9)},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_tensors_restore_a_model_bit_for_bit(options: dict) -> None:
    model = make_model(3, **options)
    torch.manual_seed(0)
    for number in range(3):
        model.step(make_batch(model.tree, 6, seed=number))
    twin = make_model(3, **options)
    twin.load_tensors({k: v.clone() for k, v in model.tensors().items()})
    for each in (model, twin):
        torch.manual_seed(1)
        for number in range(3, 5):
            each.step(make_batch(model.tree, 6, seed=number))
    ours, theirs = model.tensors(), twin.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert model.steps == twin.steps == 5


def test_a_checkpoint_of_another_tree_is_refused() -> None:
    model = make_model(3)
    for other in (make_tree(3, seed=1), make_tree(2)):
        tensors = make_model(other.levels, tree=other).tensors()
        with pytest.raises(
            InputError, match="checkpoint: expected a cascade on this label tree .*got one on another tree; pass"
        ):
            model.load_tensors(tensors)
    order = model.tensors()["order"].flip(0)
    with pytest.raises(InputError, match="another tree"):
        model.load_tensors(model.tensors() | {"order": order})


def test_tensors_of_another_model_are_refused() -> None:
    model = make_model(3)
    with pytest.raises(InputError, match=r"checkpoint: heads.levels.0.weight: expected torch.float32 .* got torch.bfloat16"):
        model.load_tensors(make_model(3, dtype="bf16").tensors())
    with pytest.raises(InputError, match="left over .*heads.projections.0.bias"):
        make_model(3, layers=[(1,), (2,), (3,)]).load_tensors(model.tensors())
    with pytest.raises(InputError, match="expected running means of 0 weights, got of"):
        model.load_tensors(make_model(3, ema=0.5).tensors())
    with pytest.raises(InputError, match="expected running means of [0-9]+ weights, got of 0"):
        make_model(3, ema=0.5).load_tensors(model.tensors())
    with pytest.raises(InputError, match="--ema-tables"):
        make_model(3, ema=0.5).load_tensors(make_model(3, ema=0.5, ema_tables=True).tensors())


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_prediction_uses_the_mean_weights_and_training_does_not(decay: float) -> None:
    model = make_model(3, ema=decay, ema_start=1, encoder_lr=0.05)
    parameter = next(model.encoder.parameters())
    seen = []
    for number in range(4):
        model.step(make_batch(model.tree, 6, seed=number))
        seen.append(parameter.detach().clone())
    first = torch.stack(seen[1:3]).mean(0)
    # The first two by 1/n; the third by 1/3, or by 1/2 where the decay is 1/2.
    mean = first + (seen[3] - first) * max(1 - decay, 1 / 3)
    torch.testing.assert_close(model.average.means[0], mean)
    batch = make_batch(model.tree, 5)
    values, labels = model.predict(batch, 5)
    assert torch.equal(parameter, seen[-1]), "training goes on from its own weights"
    swapped = make_model(3, training=False)
    swapped.load_tensors({k: v.clone() for k, v in model.tensors().items()})
    torch.testing.assert_close(next(swapped.encoder.parameters()), mean)
    assert all(torch.equal(a, b) for a, b in zip(swapped.predict(batch, 5), (values, labels), strict=True))
    model.average = None
    assert not torch.equal(model.predict(batch, 5)[0], values)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tables_have_a_mean_where_they_are_asked_to(dtype: str) -> None:
    """Of every second update here, of the linear layer as of the rest; everything that evaluates goes by it."""
    model = make_model(3, ema=1.0, ema_start=1, ema_every=2, ema_tables=True, encoder_lr=0.05, head_lr=0.5, dtype=dtype)
    seen = []
    for number in range(5):
        model.step(make_batch(model.tree, 6, seed=number))
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
    assert model.average.count == 2
    names = {k for k in seen[0] if k.startswith(("encoder.", "heads.projections.")) or k.endswith((".weight", ".bias"))}
    assert set(model.average.names) == names and "heads.levels.2.bias" in names and "heads.projections.0.weight" in names
    for name, mean in zip(model.average.names, model.average.means, strict=True):
        torch.testing.assert_close(mean, (seen[1][name].float() + seen[3][name].float()) / 2, atol=1e-6, rtol=1e-6)
    batch, expected = make_batch(model.tree, 5), make_model(3, training=False, dtype=dtype)
    means = {k: (seen[1][k].float() + seen[3][k].float()) / 2 for k in names}
    expected.load_state_dict({k: means.get(k, v) for k, v in model.state_dict().items() if k in expected.state_dict()})
    asked = [lambda m: m.predict(batch, 5), lambda m: m.predict_and_embed(batch, 5), lambda m: m.predict_and_loss(batch, 5)]
    asked += [lambda m: (m.loss(batch), m.embed(batch)), lambda m: [x.values for x in m.predict_levels(batch, 5, None)]]
    asked += [lambda m: (m.levels_and_loss(batch, 5, None, ["path"])[0]["path"][2].values,)]
    for ask in asked:
        for a, b in zip(ask(model), ask(expected), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for name, now in model.state_dict().items():
        assert torch.equal(now, seen[-1][name]), f"training goes on from its own {name}"
    loaded = make_model(3, training=False, dtype=dtype)
    loaded.load_tensors({k: v.clone() for k, v in model.tensors().items()})
    assert all(map(torch.equal, loaded.predict(batch, 5), model.predict(batch, 5)))


def test_settings_of_the_mean_are_checked() -> None:
    with pytest.raises(InputError, match="ema_every: expected 1 or more, got 0"):
        make_model(3, ema=0.5, ema_every=0)
    with pytest.raises(InputError, match="weight average: expected tables in fp32, bf16 or fp16, got an fp8 one"):
        make_model(3, ema=0.5, ema_tables=True, dtype="fp8")


def test_an_encoder_with_its_own_table_has_no_mean() -> None:
    model = make_model(3)
    model.encoder.update = lambda lr: None
    with pytest.raises(InputError, match="ema: expected 0 for an encoder with a table of its own"):
        type(model)(model.encoder, model.heads, model.tree, type(model.training_settings)(encoder_lr=1e-3, total=9, ema=0.9))
