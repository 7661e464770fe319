"""Arguments that the ops take."""

from typing import Any

import torch
from torch import Tensor

from common import random_step
from xmlkernels.ops import bce_loss, bce_step_, matmul_topk

B, N, D = 4, 6, 3

INT, LONG = torch.int32, torch.int64


def ints(*values: int, dtype: torch.dtype = LONG) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def good() -> dict[str, Any]:
    step = random_step(B, N, D, torch.float32)
    t = step.tensors
    positives = {"pos_row": ints(1, 1, 4), "pos_sample": ints(0, 3, 2, dtype=INT)}
    return {k: t[k] for k in ("weight", "x", "hyper", "counter")} | positives


def call(op: str, a: dict[str, Any]) -> Any:
    rest = {
        k: v
        for k, v in a.items()
        if k not in ("weight", "x", "pos_row", "pos_sample", "hyper", "counter", "k")
    }
    if op == "bce_step_":
        return bce_step_(
            a["weight"], a["x"], a["pos_row"], a["pos_sample"], a["hyper"], a["counter"], **rest
        )
    bias = rest.pop("bias", None)
    if op == "bce_loss":
        return bce_loss(
            a["x"],
            a["weight"],
            bias,
            a["pos_row"],
            a["pos_sample"],
            rest.pop("pos_value", None),
            **rest,
        )
    return matmul_topk(a["x"], a["weight"], bias, a["k"], **rest)
