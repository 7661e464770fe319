"""The cases of `bag_step_`: backward and update of an embedding-bag table [L, D] from B bags of S
tokens each; see cases.py for the closed forms, in which U = L (1 - (1 - 1/L)^(B S)) is the number
of rows that B S random tokens are expected to name."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import DTYPES, LR, REFERENCE_ELEMENTS, Case
from benchmarks.shapes import Shape
from benchmarks.timing import Step
from xmlkernels import ops
from xmlkernels.ops import Hyper
from xmlkernels.reference import bag_step as reference

RULES = {"sgd": (0, 2), "adam": (2, 14)}
"""Of each rule the number of states, each of the table's format and size, and the operations per
number.
"""


@dataclass
class Bags:
    """param [L, D]; grad fp32 [B, D]; token int64 [B S]; offset int64 [B + 1]; token_weight fp32 [B
    S].
    """

    param: Tensor
    grad: Tensor
    token: Tensor
    offset: Tensor
    token_weight: Tensor


def bag_work(shape: Shape, rule: str, s: int) -> tuple[int, int]:
    """FLOP and bytes of one step; s is the bytes of an element of the table and of its states."""
    states, each = RULES[rule]
    tokens = shape.B * (shape.S or 1)
    numbers = round(shape.L * (1 - (1 - 1 / shape.L) ** tokens)) * shape.D
    moved = 2 * numbers * s * (1 + states) + 4 * shape.B * shape.D + 12 * tokens + 8 * shape.B
    return 2 * tokens * shape.D + each * numbers, moved


def make_bags(shape: Shape, dtype: str, device: str) -> Bags:
    """The same numbers in every format and process; tokens of equal chance, weights as of a
    normalised tf-idf.
    """
    g = torch.Generator(device).manual_seed(0)
    param = torch.empty(shape.L, shape.D, dtype=DTYPES[dtype], device=device).normal_(
        0, 0.02, generator=g
    )
    g, size = torch.Generator().manual_seed(1), shape.S or 1
    grad = torch.randn(shape.B, shape.D, generator=g)
    token = torch.randint(shape.L, (shape.B * size,), generator=g)
    weight = torch.rand(shape.B, size, generator=g)
    weight = (weight / weight.norm(dim=1, keepdim=True)).reshape(-1)
    offset = torch.arange(shape.B + 1) * size
    return Bags(param, *(t.to(device) for t in (grad, token, offset, weight)))


def own_step(held: Bags, *, rule: str, op: Callable[..., Any]) -> Step:
    """`bag_step_`, or its reference, with states of the table's format."""
    device = held.param.device
    hyper = Hyper(LR, beta1=0.9).tensor(device)
    counter = torch.tensor([1, 0], device=device)
    states = {
        name: torch.zeros_like(held.param) for name in ("momentum", "second")[: RULES[rule][0]]
    }

    def step() -> Tensor:
        op(
            held.param,
            held.grad,
            held.token,
            held.offset,
            hyper,
            counter,
            token_weight=held.token_weight,
            **states,
        )
        counter[1] += 1
        return held.param

    return step


def torch_step(held: Bags, *, make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Step:
    """What `nn.EmbeddingBag(sparse=True)` does after its forward: each token's share of the
    gradient as an entry of a sparse tensor, which an optimizer of torch sums up and applies."""
    param = torch.nn.Parameter(held.param)
    optimizer = make([param])
    bag = torch.repeat_interleave(
        torch.arange(len(held.grad), device=held.grad.device), held.offset.diff()
    )

    def step() -> Tensor:
        values = held.grad.index_select(0, bag) * held.token_weight[:, None]
        param.grad = torch.sparse_coo_tensor(
            held.token[None], values, param.shape, check_invariants=False
        )
        optimizer.step()
        return held.param

    return step


def bag_step_cases(shape: Shape, device: str, compiled: bool) -> list[Case]:
    """`compiled` changes nothing: torch compiles no optimizer on sparse gradients."""
    cases = []
    inputs = {name: partial(make_bags, shape, name, device) for name in ("fp32", "bf16")}

    def add(impl: str, rule: str, dtype: str, start: Callable[[Bags], Step]) -> None:
        cases.append(
            Case(
                impl,
                rule,
                dtype,
                *bag_work(shape, rule, DTYPES[dtype].itemsize),
                inputs[dtype],
                start,
            )
        )

    for name in inputs:
        for rule in RULES:
            add("xmlkernels", rule, name, partial(own_step, rule=rule, op=ops.bag_step_))
            if shape.L * shape.D <= REFERENCE_ELEMENTS:
                add("reference", rule, name, partial(own_step, rule=rule, op=reference.bag_step_))
    add("torch", "sgd", "fp32", partial(torch_step, make=partial(torch.optim.SGD, lr=LR)))
    add("torch", "adam", "fp32", partial(torch_step, make=partial(torch.optim.SparseAdam, lr=LR)))
    return cases
