"""The cases of a card: those of `benchmarks/cases.py`, the 8-bit table and the peers of
`benchmarks/peers.py`.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import cases, peers
from benchmarks.cases import Case, Head, bce_work, make_head, topk_work
from benchmarks.shapes import Shape
from benchmarks.timing import Step
from xmlkernels import ops
from xmlkernels.ops import Hyper

FP8, SCALE = torch.float8_e4m3fn, 2.0**-8
SYNCING = frozenset(
    {
        ("shortlist_matmul", "xmlkernels", "step"),
        ("shortlist_matmul", "eager", "step"),
        ("cluster_step", "eager", "adam"),
        ("bag_step", "torch", "sgd"),
        ("bag_step", "torch", "adam"),
    }
)
"""(op, implementation, phase) whose step reads a size on the host: the number of distinct rows, or
torch's own sum of a sparse gradient. They are never captured in a graph."""
_ROWS = 1 << 19


@dataclass
class Fp8Head(Head):
    """As `Head`, with a table in e4m3 and row_scale fp32 [L, 2]: the power-of-two scale, the
    largest magnitude so far.
    """

    row_scale: Tensor


def make_fp8_head(shape: Shape, device: str) -> Fp8Head:
    """N(0, 0.02²) rows in e4m3 at the initial scale of 2⁻⁸; the x of every other format, positives
    of the same kind.

    The table is made a part at a time: in bf16 it might not fit the card.
    """
    weight = torch.empty(shape.L, shape.D, dtype=FP8, device=device)
    row_scale = torch.full((shape.L, 2), SCALE, device=device)
    g = torch.Generator(device).manual_seed(0)
    for start in range(0, shape.L, _ROWS):
        part = torch.empty(min(_ROWS, shape.L - start), shape.D, device=device).normal_(
            0, 0.02, generator=g
        )
        weight[start : start + _ROWS] = (part / SCALE).to(FP8)
        row_scale[start : start + _ROWS, 1] = (
            weight[start : start + _ROWS].float().abs().amax(1) * SCALE
        )
    batch = make_head(replace(shape, D=1), "fp32", device)
    x = torch.randn(shape.B, shape.D, generator=torch.Generator().manual_seed(1)).to(device)
    return Fp8Head(weight, x, batch.pos_row, batch.pos_sample, row_scale)


def own_fp8_step(head: Fp8Head) -> Step:
    """`bce_step_` on a table in e4m3, SGD."""
    device = head.weight.device
    hyper = Hyper(cases.LR).tensor(device)
    counter = torch.tensor([1, 0], device=device)

    def step() -> Tensor:
        positives = head.pos_row, head.pos_sample
        dx, _ = ops.bce_step_(
            head.weight, head.x, *positives, hyper, counter, row_scale=head.row_scale
        )
        counter[1] += 1
        return dx

    return step


def _bce_step(shape: Shape, device: str) -> list[Case]:
    made = partial(make_head, shape, "bf16", device)
    found = [
        Case(
            "xmlkernels",
            "sgd",
            "fp8",
            *bce_work(shape, 1),
            partial(make_fp8_head, shape, device),
            own_fp8_step,
        ),
        Case("elmo", "sgd", "bf16", *bce_work(shape, 2), made, peers.elmo_step),
    ]
    for impl in peers.SOFTMAX:
        if peers.installed(impl):
            start = partial(peers.softmax_step, impl=impl)
            found.append(
                Case(
                    impl,
                    "softmax of one label, no update",
                    "bf16",
                    *bce_work(shape, 2),
                    made,
                    start,
                )
            )
    return found


def _matmul_topk(shape: Shape, device: str) -> list[Case]:
    start = partial(peers.topk_step, k=shape.K or 1)
    made = partial(make_head, shape, "bf16", device)
    return [Case("eager", "topk", "bf16", *topk_work(shape, 2), made, start)]


BESIDE = {"bce_step": _bce_step, "matmul_topk": _matmul_topk}
"""What a card measures beside the cases that both devices share."""


def build(op: str, shape: Shape, device: str, compiled: bool = True) -> list[Case]:
    """The cases of one shape, each key once; where both lists hold a key, the one that both devices
    share stays.
    """
    found = {case.key: case for case in cases.build(op, shape, device, compiled)}
    for case in BESIDE[op](shape, device) if op in BESIDE else ():
        found.setdefault(case.key, case)
    return list(found.values())
