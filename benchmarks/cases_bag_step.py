"""The cases of `bag_step_`: backward and update of an embedding-bag table.

The table is [L, D], a batch has B bags of S tokens each: T = B S tokens, which are expected to name
U = L (1 - (1 - 1/L)^T) rows. FLOP: 2 T D, and 2 U D (SGD) or 14 U D (Adam). Bytes: 2 U D (s + m),
the named rows and their states read and written once; 4 B D; 12 T; 8 B.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import DTYPES, LR, REFERENCE_ELEMENTS, Benchmark, Case
from benchmarks.head import make_table
from benchmarks.shapes import Shape
from benchmarks.timing import Step
from xmlkernels import ops
from xmlkernels.ops import Hyper
from xmlkernels.reference import bag_step as reference

RULES = {"sgd": (0, 2), "adam": (2, 14)}
"""By rule: the number of states, each of the table's format and size; operations per number."""


@dataclass
class Bags:
    """A table and a batch.

    Attributes:
        param: [L, D].
        grad: fp32 [B, D].
        token, token_weight: int64 and fp32 [B S].
        offset: int64 [B + 1].
    """

    param: Tensor
    grad: Tensor
    token: Tensor
    offset: Tensor
    token_weight: Tensor


def bag_work(shape: Shape, rule: str, s: int) -> tuple[int, int]:
    """Count FLOP and bytes of one step.

    s is the bytes of an element of the table and of its states.
    """
    states, each = RULES[rule]
    tokens = shape.B * (shape.S or 1)
    numbers = round(shape.L * (1 - (1 - 1 / shape.L) ** tokens)) * shape.D
    moved = 2 * numbers * s * (1 + states) + 4 * shape.B * shape.D + 12 * tokens + 8 * shape.B
    return 2 * tokens * shape.D + each * numbers, moved


def make_bags(shape: Shape, dtype: str, device: str) -> Bags:
    """Make tokens of equal chance, with weights as of a normalized tf-idf.

    The numbers are the same in every format and process.
    """
    g, size = torch.Generator().manual_seed(1), shape.S or 1
    grad = torch.randn(shape.B, shape.D, generator=g)
    token = torch.randint(shape.L, (shape.B * size,), generator=g)
    weight = torch.rand(shape.B, size, generator=g)
    weight = (weight / weight.norm(dim=1, keepdim=True)).reshape(-1)
    offset = torch.arange(shape.B + 1) * size
    batch = (t.to(device) for t in (grad, token, offset, weight))
    return Bags(make_table(shape, dtype, device), *batch)


def own_step(held: Bags, *, rule: str, op: Callable[..., Any]) -> Step:
    """Return `bag_step_`, or its reference, with states of the table's format."""
    h, device = held, held.param.device
    hyper = Hyper(LR, beta1=0.9).tensor(device)
    counter = torch.tensor([1, 0], device=device)
    names = ("momentum", "second")[: RULES[rule][0]]
    options = {name: torch.zeros_like(h.param) for name in names}
    options["token_weight"] = h.token_weight

    def step() -> Tensor:
        op(h.param, h.grad, h.token, h.offset, hyper, counter, **options)
        counter[1] += 1
        return h.param

    return step


def torch_step(held: Bags, *, make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Step:
    """Return what `nn.EmbeddingBag(sparse=True)` does after its forward.

    Each token's share of the gradient is an entry of a sparse tensor, which an optimizer of torch
    sums up and applies.
    """
    param = torch.nn.Parameter(held.param)
    optimizer = make([param])
    bags = torch.arange(len(held.grad), device=held.grad.device)
    bag = torch.repeat_interleave(bags, held.offset.diff())

    def step() -> Tensor:
        values = held.grad.index_select(0, bag) * held.token_weight[:, None]
        param.grad = torch.sparse_coo_tensor(
            held.token[None], values, param.shape, check_invariants=False
        )
        optimizer.step()
        return held.param

    return step


def bag_step_cases(shape: Shape, device: str, compiled: bool) -> list[Case]:
    """Build the cases; none is compiled, as torch compiles no optimizer on sparse gradients."""
    cases = []
    inputs = {name: partial(make_bags, shape, name, device) for name in ("fp32", "bf16")}

    def add(impl: str, rule: str, dtype: str, start: Callable[[Bags], Step]) -> None:
        work = bag_work(shape, rule, DTYPES[dtype].itemsize)
        cases.append(Case(impl, rule, dtype, *work, inputs[dtype], start))

    for name in inputs:
        for rule in RULES:
            add("xmlkernels", rule, name, partial(own_step, rule=rule, op=ops.bag_step_))
            if shape.L * shape.D <= REFERENCE_ELEMENTS:
                add("reference", rule, name, partial(own_step, rule=rule, op=reference.bag_step_))
    add("torch", "sgd", "fp32", partial(torch_step, make=partial(torch.optim.SGD, lr=LR)))
    add("torch", "adam", "fp32", partial(torch_step, make=partial(torch.optim.SparseAdam, lr=LR)))
    return cases


BENCHMARK = Benchmark(
    functions=("bag_step_",),
    cases=bag_step_cases,
    shapes=(  # S tokens of each document, rows of a vocabulary of L
        Shape("B64-S64-L50k", 64, 50_000, 256, S=64),
        Shape("B256-S128-L500k", 256, 500_000, 256, S=128),
    ),
    # Documents of Wikipedia in 1-2-grams.
    gpu_shapes=(Shape("B512-S256-L1M-D512", 512, 1_000_000, 512, S=256),),
    # torch's own sum of a sparse gradient.
    syncing=frozenset({("torch", "sgd"), ("torch", "adam")}),
)
