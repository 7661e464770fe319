"""Which groups of rows `bce_step_` skips, decided on the device once their logits are known."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmlkernels.triton import common
from xmlkernels.triton.hyper import LR, SCALE

GROUP = 128  # rows that are skipped together; the reference's number


@triton.jit
def choose_groups(
    peaks,
    starts,
    hyper,
    reach,
    flag,
    quiet,
    active,
    skipped,
    rows,
    first,
    tile,
    b_blocks,
    l_blocks,
    skip_below,
    GROUP: tl.constexpr,
    BLOCK_L: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Choose the groups of a tile that are skipped; one program.

    Writes quiet int32 [groups], 1 where a group is skipped, and active int32 [1 + groups]: how many
    are not, then those in ascending order. peaks fp32 [b-blocks, tile / BLOCK_L]: largest sigma of
    a block; reach fp32 [1]: max over d of the sum over b of |x_bd|.
    """
    BLOCKS: tl.constexpr = GROUP // BLOCK_L
    group = tl.arange(0, GROUPS)
    block = group[:, None] * BLOCKS + tl.arange(0, BLOCKS)[None, :]
    here = block < l_blocks
    peak = tl.zeros([GROUPS, BLOCKS], dtype=tl.float32)
    for b in range(0, b_blocks):
        peak = tl.maximum(
            peak, tl.load(peaks + b * (tile // BLOCK_L) + block, mask=here, other=0.0)
        )
    before = first // BLOCK_L
    begin = tl.load(starts + before + block, mask=here, other=0)
    end = tl.load(starts + before + block + 1, mask=here, other=0)
    positives = tl.sum(end - begin, 1)
    real = group * GROUP < tl.minimum(tile, rows - first)
    rate = tl.abs(tl.load(hyper + LR) * tl.load(hyper + SCALE)) * tl.load(reach)
    still = real & (positives == 0) & (rate * tl.max(peak, 1) < skip_below)
    tl.store(quiet + group, still.to(tl.int32), mask=real)
    busy = (real & (still == 0)).to(tl.int32)
    tl.store(active, tl.sum(busy, 0))
    tl.store(active + tl.cumsum(busy, 0), group, mask=busy == 1)
    if skipped is not None:
        good = tl.load(flag) == 0
        count = tl.sum(still.to(tl.int64), 0)
        tl.store(skipped, tl.load(skipped) + count, mask=good)
        tl.store(skipped + 1, tl.load(skipped + 1) + tl.sum(real.to(tl.int64), 0), mask=good)


class Groups:
    """The groups of a table's tiles; buffers for one tile."""

    def __init__(
        self,
        x: Tensor,
        bias: bool,
        hyper: Tensor,
        tile: int,
        skip_below: float,
        skipped: Tensor | None,
    ) -> None:
        self.hyper, self.skip_below, self.skipped = hyper, skip_below, skipped
        self.count = tile // GROUP
        self.quiet = torch.empty(self.count, dtype=torch.int32, device=x.device)
        self.active = torch.empty(1 + self.count, dtype=torch.int32, device=x.device)
        reach = torch.linalg.vector_norm(x, 1, dim=0, dtype=torch.float32).amax()
        # A bias is a weight of an x that is 1.
        self.reach = reach.clamp(min=x.shape[0]) if bias else reach

    def choose(
        self,
        peaks: Tensor | None,
        starts: Tensor,
        flag: Tensor,
        rows: int,
        first: int,
        tile: int,
        l_blocks: int,
        block_l: int,
    ) -> None:
        """Choose the groups of one tile."""
        assert peaks is not None
        choose_groups[(1,)](
            peaks,
            starts,
            self.hyper,
            self.reach,
            flag,
            self.quiet,
            self.active,
            self.skipped,
            rows,
            first,
            tile,
            peaks.shape[0],
            l_blocks,
            self.skip_below,
            GROUP,
            block_l,
            triton.next_power_of_2(self.count),
            **common.LAUNCH,
        )
