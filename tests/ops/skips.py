"""Steps whose groups of rows are clearly skipped or clearly not, for the tests of every device."""

import torch
from torch import Tensor

from common import Step, dyadic_step, random_step
from xmlkernels.ops.hyper import LR, SCALE
from xmlkernels.reference.bce_step import GROUP


def reach(step: Step) -> float:
    """max over d of the sum over b of |x_bd|; a bias has an x of 1."""
    x = step.tensors["x"].double()
    return max(float(x.abs().sum(0).max()), float(len(x)) if "bias" in step.tensors else 0.0)


def rate(step: Step) -> float:
    """lr |scale| times the reach: what multiplies sigma in the bound."""
    hyper = step.tensors["hyper"].double()
    return float(hyper[LR] * hyper[SCALE].abs()) * reach(step)


def clear_step(b: int, n: int, d: int, dtype: torch.dtype, **more: object) -> tuple[Step, Tensor]:
    """Every second group is settled: sigma about 1e-5 there, about 1/2 elsewhere. Positives lie in
    the last row of each fourth settled group, and in the group after it.

    Returns:
        The step, and the rows to skip, bool [n]: settled, without positives.
    """
    step = random_step(b, n, d, dtype, **{"share": 0.0} | more)  # type: ignore[arg-type]
    t = step.tensors
    group = torch.arange(n) // GROUP
    settled = group % 2 == 1
    t["x"][:, 0] = 1
    t["weight"][:, 0] = torch.where(settled, -12.0, 0.0).to(dtype)
    t["weight"][:, 1:] *= 0.1  # so that no other column lifts a settled logit
    ends = torch.arange(n)[
        (group % 8 == 3) & ((torch.arange(n) % GROUP == GROUP - 1) | (torch.arange(n) == n - 1))
    ]
    rows = torch.cat([torch.stack([e, e + 1]) for e in ends]) if len(ends) else ends
    rows = rows[rows < n]
    t |= {
        "pos_row": rows.repeat_interleave(2),
        "pos_sample": torch.tensor([0, b - 1], dtype=torch.int32).repeat(len(rows)),
    }
    idle = settled & ~torch.isin(group, rows // GROUP)
    t["skipped"] = torch.tensor([5, 7])  # counts go on from what stands there
    return step.replace(skip_below=rate(step) * 1e-3), idle


def exact_step(b: int, n: int, d: int, dtype: torch.dtype, **more: object) -> Step:
    """A step with exact sums: every sigma is 1/2, so that groups without positives are skipped, all
    others not.
    """
    step = dyadic_step(b, n, d, dtype, **{"share": 0.0} | more)  # type: ignore[arg-type]
    rows = torch.tensor(range(GROUP // 2, n, 3 * GROUP), dtype=torch.int64)
    positives = {"pos_row": rows, "pos_sample": (torch.arange(len(rows)) % b).to(torch.int32)}
    step = step.replace(**positives, skipped=torch.zeros(2, dtype=torch.int64))
    return step.replace(skip_below=rate(step) * 0.6)


def groups_of(idle: Tensor) -> list[int]:
    """Groups skipped and seen."""
    starts = idle[::GROUP]
    return [int(starts.sum()), len(starts)]
