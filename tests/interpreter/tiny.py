"""Block sizes and ops for the interpreter: small shapes that still have two tiles in every
dimension.
"""

from typing import Any

from torch import Tensor

from common import Step
from xmlkernels.triton.bce_plan import Plan
from xmlkernels.triton.bce_step import bce_step_

PLAN = Plan(chunk=64, block_b=16, block_l=32, block_r=32, block_d=16, step=16, splits=2)
# (B, L, D): two blocks of samples, two chunks of three blocks of labels, two blocks of columns, all
# ragged.
SHAPE = (18, 75, 20)


def step_op(*args: Any, plan: Plan = PLAN, **options: Any) -> tuple[Tensor, Tensor]:
    """The Triton `bce_step_` with tiny blocks."""
    return bce_step_(*args, plan=plan, **options)


def run(step: Step) -> dict[str, Tensor]:
    return step.run(step_op)
