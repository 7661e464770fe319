"""The cases of `sparse_update`: an optimizer's step on N touched rows of a table [L, D].

FLOP: 2, 7 or 14 N D for SGD, Adagrad and Adam. Bytes: 2 N D (s + m), the rows and their states read
and written once; 4 N D, the gradient; 8 N.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import DTYPES, LR, REFERENCE_ELEMENTS, Benchmark, Case
from benchmarks.head import make_table
from benchmarks.shapes import Shape
from benchmarks.timing import Step
from xmlkernels import ops
from xmlkernels.ops import Hyper
from xmlkernels.reference import sparse_update as reference

RULES = {"sgd": (0, 2), "adagrad": (1, 7), "adam": (2, 14)}
"""By rule: the number of states, each of the table's format and size; operations per number."""


@dataclass
class Touched:
    """A table and a gradient.

    Attributes:
        param: [L, D].
        rows: int64 [N], ascending, spread over the table.
        grad: fp32 [N, D].
    """

    param: Tensor
    rows: Tensor
    grad: Tensor


def touched_rows(shape: Shape) -> int:
    """Return N."""
    return min(shape.S or 1, shape.L)


def sparse_work(shape: Shape, rule: str, s: int) -> tuple[int, int]:
    """Count FLOP and bytes of one step.

    s is the bytes of an element of the table and of its states.
    """
    states, each = RULES[rule]
    numbers = touched_rows(shape) * shape.D
    return each * numbers, 2 * numbers * s * (1 + states) + 4 * numbers + 8 * touched_rows(shape)


def make_touched(shape: Shape, dtype: str, device: str) -> Touched:
    """Make the same numbers in every format and process."""
    g, count = torch.Generator().manual_seed(1), touched_rows(shape)
    rows = torch.randperm(shape.L, generator=g)[:count].sort().values
    grad = torch.randn(count, shape.D, generator=g)
    return Touched(make_table(shape, dtype, device), rows.to(device), grad.to(device))


def own_step(held: Touched, *, rule: str, room: ModuleType) -> Step:
    """Return `sparse_sgd_`, `sparse_adagrad_` or `sparse_adam_`, or the reference.

    The states have the table's format.
    """
    device, op = held.param.device, getattr(room, f"sparse_{rule}_")
    hyper = Hyper(LR, beta1=0.9).tensor(device)
    counter = torch.tensor([1, 0], device=device)
    states: list[Tensor | None] = [torch.zeros_like(held.param) for _ in range(RULES[rule][0])]
    if rule == "sgd":
        states = [None]  # no momentum

    def step() -> Tensor:
        op(held.param, *states, held.rows, held.grad, hyper, counter)
        counter[1] += 1
        return held.param

    return step


def torch_step(held: Touched, *, make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Step:
    """Return what a user writes: a coalesced sparse gradient and an optimizer of torch.

    Such a gradient is what `nn.Embedding(sparse=True)` gives.
    """
    param = torch.nn.Parameter(held.param)
    optimizer = make([param])

    def step() -> Tensor:
        sparse: Any = torch.sparse_coo_tensor(
            held.rows[None], held.grad, param.shape, check_invariants=False
        )
        param.grad = sparse._coalesced_(True)  # rows are unique and sorted already
        optimizer.step()
        return held.param

    return step


def sparse_update_cases(shape: Shape, device: str, compiled: bool) -> list[Case]:
    """Build the cases; none is compiled, as torch compiles no optimizer on sparse gradients."""
    cases = []
    inputs = {name: partial(make_touched, shape, name, device) for name in ("fp32", "bf16")}

    def add(impl: str, rule: str, dtype: str, start: Callable[[Touched], Step]) -> None:
        work = sparse_work(shape, rule, DTYPES[dtype].itemsize)
        cases.append(Case(impl, rule, dtype, *work, inputs[dtype], start))

    for name in inputs:
        for rule in RULES:
            add("xmlkernels", rule, name, partial(own_step, rule=rule, room=ops))
            if shape.L * shape.D <= REFERENCE_ELEMENTS:
                add("reference", rule, name, partial(own_step, rule=rule, room=reference))
    peers: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
        "sgd": partial(torch.optim.SGD, lr=LR),
        "adagrad": partial(torch.optim.Adagrad, lr=LR, eps=1e-8),
        "adam": partial(torch.optim.SparseAdam, lr=LR),
    }
    for rule, make in peers.items():
        add("torch", rule, "fp32", partial(torch_step, make=make))
    return cases


BENCHMARK = Benchmark(
    functions=("sparse_sgd_", "sparse_adagrad_", "sparse_adam_"),
    cases=sparse_update_cases,
    shapes=(  # S is N, the touched rows; there is no batch, so B is 1
        Shape("N2k-L16k", 1, 16_384, 384, S=2_048),
        Shape("N100k-L670k", 1, 670_000, 384, S=100_000),
    ),
    gpu_shapes=(Shape("N100k-L670k-D768", 1, 670_091, 768, S=100_000),),
)
