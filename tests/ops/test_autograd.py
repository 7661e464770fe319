"""Ops that train a table in place, and autograd."""

import pytest
import torch
from torch import Tensor

from good_arguments import B, D, N, call, good
from xmlkernels.errors import InputError
from xmlkernels.ops import bce_step_


@pytest.mark.parametrize("op", ["bce_step_", "bce_loss", "matmul_topk"])
def test_a_table_without_columns_is_refused_by_name(op: str) -> None:
    changed = {"weight": torch.zeros(N, 0), "x": torch.zeros(B, 0), "k": 2}
    with pytest.raises(InputError, match=f"{op}: argument weight"):
        call(op, {k: v for k, v in (good() | changed).items() if k != "k" or op == "matmul_topk"})


def test_a_table_in_autograd_is_refused() -> None:
    arguments = good()
    arguments["weight"].requires_grad_()
    with pytest.raises(
        InputError, match="argument weight: expected a tensor that requires no gradient"
    ):
        bce_step_(**arguments)


def test_the_step_leaves_autograd_alone() -> None:
    """dx is handed to `embedding.backward`; it must not look differentiable itself."""
    arguments = good()
    arguments["x"].requires_grad_()
    dx, _ = bce_step_(**arguments)
    assert not dx.requires_grad


def test_autograd_hears_of_every_tensor_that_is_written() -> None:
    arguments = good() | {"momentum": torch.zeros(N, D), "bias": torch.zeros(N)}
    written = ("weight", "momentum", "bias")
    before = {
        name: arguments[name]._version for name in arguments if isinstance(arguments[name], Tensor)
    }
    bce_step_(**arguments)
    assert {name for name, version in before.items() if arguments[name]._version > version} == set(
        written
    )
    with torch.inference_mode():  # such tensors have no versions
        bce_step_(
            **{name: t.clone() if isinstance(t, Tensor) else t for name, t in arguments.items()}
        )
