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
    with pytest.raises(InputError, match="expected no mean weights, got some"):
        model.load_tensors(make_model(3, ema=0.5).tensors())
    with pytest.raises(InputError, match="expected mean weights, got none"):
        make_model(3, ema=0.5).load_tensors(model.tensors())


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


def test_an_encoder_with_its_own_table_has_no_mean() -> None:
    model = make_model(3)
    model.encoder.update = lambda lr: None
    with pytest.raises(InputError, match="ema: expected 0 for an encoder with a table of its own"):
        type(model)(model.encoder, model.heads, model.tree, type(model.training_settings)(encoder_lr=1e-3, total=9, ema=0.9))
