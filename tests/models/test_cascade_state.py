"""What survives a stop, and which checkpoints are refused."""

import pytest
import torch
from cascade_common import make_batch, make_model, make_tree

from xmlkernels import InputError
from xmlkernels.models.running_mean import MeanSettings

OPTIONS = {
    "plain": {},
    "bf16": {"dtype": "bf16", "state_dtype": "bf16", "row_wise": False},
    "fp8": {"dtype": "fp8"},
    "mean": {"mean": MeanSettings(0.9, tables=True), "drops": 0.1},
    "sgd": {"optimizer": "sgd", "betas": (0.9, 0.9)},
}


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
            InputError,
            match="checkpoint: expected a cascade on this label tree .*got one on another tree; "
            "pass",
        ):
            model.load_tensors(tensors)
    order = model.tensors()["order"].flip(0)
    with pytest.raises(InputError, match="another tree"):
        model.load_tensors(model.tensors() | {"order": order})


def test_tensors_of_another_model_are_refused() -> None:
    model = make_model(3)
    with pytest.raises(
        InputError,
        match=r"checkpoint: heads.levels.0.weight: expected torch.float32 .* got torch.bfloat16",
    ):
        model.load_tensors(make_model(3, dtype="bf16").tensors())
    with pytest.raises(InputError, match="left over .*heads.projections.0.bias"):
        make_model(3, layers=[(1,), (2,), (3,)]).load_tensors(model.tensors())
