"""Shards of a table: together they are the table."""

from itertools import pairwise

import pytest
import torch

from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.shard import Shard, own_positives, whole
from xmlkernels.nn.table import RowOptimizer

LABELS, WIDTH, BATCH = 37, 8, 5
CUTS = (0, 10, 10, 31, LABELS)  # one of them is empty


def heads(dtype: str, optimizer: RowOptimizer) -> tuple[FullHead, list[FullHead]]:
    how = {"dtype": dtype, "bias": True, "optimizer": optimizer, "seed": 3}
    shards = [Shard(a, b, LABELS) for a, b in pairwise(CUTS)]
    return FullHead(LABELS, WIDTH, **how), [
        FullHead(LABELS, WIDTH, shard=shard, **how) for shard in shards
    ]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_shards_take_the_step_of_the_whole(dtype, kind):
    """Also rounding, re-encoded rows and first values; dx and loss are sums over the shards."""
    alone, parts = heads(dtype, RowOptimizer(kind, momentum=0.9))
    generator = torch.Generator().manual_seed(0)
    row, sample = torch.tensor([0, 9, 10, 31, 36]), torch.tensor([0, 1, 1, 4, 2]).int()
    for _ in range(3):
        x = torch.randn(BATCH, WIDTH, generator=generator) * 9
        dx, loss = alone.step(x, row, sample, lr=0.5, need_loss=True)
        steps = [part.step(x, row, sample, lr=0.5, need_loss=True) for part in parts]
        torch.testing.assert_close(sum(d for d, _ in steps), dx, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sum(v for _, v in steps), loss, rtol=1e-5, atol=1e-5)
    for name, held in alone.row_buffers().items():
        joined = torch.cat([part.row_buffers()[name] for part in parts])
        assert torch.equal(joined.view(torch.uint8), held.view(torch.uint8)), name
    x = torch.randn(BATCH, WIDTH, generator=generator)
    values, rows = zip(*(part.topk(x, 4) for part in parts), strict=True)
    best = torch.cat(values, 1).topk(4, 1)
    assert torch.equal(torch.cat(rows, 1).gather(1, best.indices), alone.topk(x, 4)[1])
    sums = sum(part.loss(x, row, sample) for part in parts)
    torch.testing.assert_close(sums, alone.loss(x, row, sample), rtol=1e-5, atol=1e-5)


def test_own_positives():
    row, sample = torch.tensor([0, 4, 4, 5, 9]), torch.arange(5)
    assert [t.tolist() for t in own_positives(row, sample, Shard(4, 9, 10))] == [
        [0, 0, 1],
        [1, 2, 3],
    ]
    assert own_positives(row, sample, Shard(6, 6, 10))[0].tolist() == []
    assert own_positives(row, sample, whole(10))[0] is row
