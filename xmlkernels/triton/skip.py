"""Which groups of rows `bce_step_` skips, decided on the device once their logits are known."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmlkernels.triton import common
from xmlkernels.triton.bce_plan import GROUP
from xmlkernels.triton.hyper import LR, SCALE


@triton.jit
def choose_groups(
    peaks,
    starts,
    hyper,
    reach,
    flag,
    quiet,
    order,
    skipped,
    rows,
    first,
    chunk,
    b_blocks,
    skip_below,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Choose the groups of a chunk that are skipped; one program.

    Writes quiet int32 [groups], 1 where a group is skipped, and order int32 [1 + groups]: how many
    are not, those in ascending order, then the others. peaks fp32 [b-blocks, groups]: largest sigma
    of a group; reach fp32 [1]: max over d of the sum over b of |x_bd|.
    """
    group = tl.arange(0, GROUPS)
    real = group * GROUP < tl.minimum(chunk, rows - first)
    peak = tl.zeros([GROUPS], dtype=tl.float32)
    for b in range(0, b_blocks):
        peak = tl.maximum(peak, tl.load(peaks + b * (chunk // GROUP) + group, mask=real, other=0.0))
    before = first // GROUP
    begin = tl.load(starts + before + group, mask=real, other=0)
    end = tl.load(starts + before + group + 1, mask=real, other=0)
    rate = tl.abs(tl.load(hyper + LR) * tl.load(hyper + SCALE)) * tl.load(reach)
    still = real & (begin == end) & (rate * peak < skip_below)
    tl.store(quiet + group, still.to(tl.int32), mask=real)
    busy, idle = (real & (still == 0)).to(tl.int32), still.to(tl.int32)
    count = tl.sum(busy, 0)
    tl.store(order, count)
    place = tl.where(busy == 1, tl.cumsum(busy, 0), count + tl.cumsum(idle, 0))
    tl.store(order + place, group, mask=real)
    if skipped is not None:
        good = tl.load(flag) == 0
        tl.store(skipped, tl.load(skipped) + tl.sum(idle.to(tl.int64), 0), mask=good)
        tl.store(skipped + 1, tl.load(skipped + 1) + tl.sum(real.to(tl.int64), 0), mask=good)


class Groups:
    """The groups of a table's chunks; buffers for one chunk."""

    def __init__(
        self,
        x: Tensor,
        bias: bool,
        hyper: Tensor,
        chunk: int,
        skip_below: float,
        skipped: Tensor | None,
    ) -> None:
        self.hyper, self.skip_below, self.skipped = hyper, skip_below, skipped
        self.count = chunk // GROUP
        self.quiet = torch.empty(self.count, dtype=torch.int32, device=x.device)
        self.order = torch.empty(1 + self.count, dtype=torch.int32, device=x.device)
        reach = torch.linalg.vector_norm(x, 1, dim=0, dtype=torch.float32).amax()
        # A bias is a weight of an x that is 1.
        self.reach = reach.clamp(min=x.shape[0]) if bias else reach

    def choose(
        self, peaks: Tensor | None, starts: Tensor, flag: Tensor, rows: int, first: int
    ) -> None:
        """Choose the groups of one chunk."""
        assert peaks is not None
        choose_groups[(1,)](
            peaks,
            starts,
            self.hyper,
            self.reach,
            flag,
            self.quiet,
            self.order,
            self.skipped,
            rows,
            first,
            self.count * GROUP,
            peaks.shape[0],
            self.skip_below,
            GROUP,
            triton.next_power_of_2(self.count),
            num_warps=8,
            **common.LAUNCH,
        )
