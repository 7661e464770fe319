"""Shards of a cascade's label level: whole clusters, and together the steps of the level."""

from functools import partial

import pytest
import torch
from torch import Tensor

from xmlkernels import InputError
from xmlkernels.nn.cascade_level import CascadeLevel, DenseLevel
from xmlkernels.nn.cluster_shard import cluster_shards, clusters_of
from xmlkernels.nn.mixed import MixedLevel
from xmlkernels.nn.plain import PlainLevel
from xmlkernels.nn.shard import Shard, whole
from xmlkernels.nn.table import RowOptimizer

ROWS = torch.tensor([0, 3, 4, 40, 41, 48, 57])  # of six clusters, one of them tile-sized
MOST, NODES, WIDTH, BATCH = 36, 57, 12, 9


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 6, 9])
@pytest.mark.parametrize("seed", range(4))
def test_cuts_are_borders_nearest_to_equal_shares(parts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 1 + 10 ** (1 + seed), (1 + 3 * seed,), generator=generator)
    row_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    shards, rows = cluster_shards(row_ptr, parts), int(row_ptr[-1])
    assert len(shards) == parts and shards[0].first == 0 and shards[-1].end == rows
    assert [s.end for s in shards[:-1]] == [s.first for s in shards[1:]]
    assert all(s.rows == rows and s.count >= 0 for s in shards)
    borders = row_ptr.tolist()
    for part, shard in enumerate(shards[1:], 1):
        share = rows * part // parts
        assert abs(shard.first - share) == min(abs(border - share) for border in borders)
    assert max(s.count for s in shards) <= -(-rows // parts) + int(sizes.max())
    for shard in shards:
        own = clusters_of(shard, row_ptr)
        assert own.row_ptr.tolist() == [b - shard.first for b in borders[own.first : own.end + 1]]


def test_shards_of_few_clusters_and_of_billions_of_rows() -> None:
    cuts = [(s.first, s.end) for s in cluster_shards(torch.tensor([0, 7]), 4)]
    assert cuts == [(0, 0), (0, 0), (0, 7), (7, 7)]
    far = torch.tensor([0, 3, 2**33, 2**33 + 5, 2**34])
    shards = cluster_shards(far, 2)
    assert [(s.first, s.end) for s in shards] == [(0, 2**33), (2**33, 2**34)]
    own = clusters_of(shards[1], far)
    assert (own.first, own.end, own.row_ptr.tolist()) == (2, 4, [0, 5, 2**33])
    with pytest.raises(InputError, match="shard of a level: expected whole clusters"):
        clusters_of(Shard(0, 2, NODES), ROWS)
    with pytest.raises(InputError, match="rows 4 to 40, which cut one"):
        clusters_of(Shard(4, 41, NODES), ROWS - (ROWS == 41).long())


def test_chosen_clusters_are_those_of_the_shard_in_order() -> None:
    own = clusters_of(Shard(4, 48, NODES), ROWS)  # clusters 2, 3 and 4
    given = torch.tensor([[0, 2, 4, 5], [1, 5, -1, -1], [2, 3, 4, -1], [-1, -1, -1, -1]])
    chosen, slot = own.chosen(given)
    assert chosen.tolist() == [[2, 4, -1], [-1] * 3, [2, 3, 4], [-1] * 3]
    assert slot.tolist() == [[1, 2, 0], [0] * 3, [0, 1, 2], [0] * 3]
    nobody, _ = own.chosen(given[1:2])
    assert nobody.tolist() == [[-1]]
    assert own.chosen(given[:0])[0].shape == (0, 1)


KINDS = {
    "adam": (CascadeLevel, RowOptimizer("adam", row_wise=True, state_dtype="bf16")),
    "sgd": (CascadeLevel, RowOptimizer("sgd", momentum=0.9)),
    "dense": (DenseLevel, RowOptimizer("adamw_dense", state_dtype="bf16")),
    "plain": (PlainLevel, RowOptimizer("adam")),
    "mixed": (partial(MixedLevel, compute="bf16"), RowOptimizer("adam", state_dtype="bf16")),
}
CASES = [(name, "fp32") for name in KINDS]
CASES += [("adam", "bf16"), ("adam", "fp8"), ("sgd", "bf16"), ("sgd", "fp8"), ("dense", "bf16")]


def batch(seed: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Vectors, clusters and positives; the last sample has no clusters."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, WIDTH, generator=generator) * 3
    drawn = torch.rand(BATCH, len(ROWS) - 1, generator=generator) < 0.5
    drawn[-1] = False
    clusters = torch.where(drawn, torch.arange(len(ROWS) - 1), 99).sort(1).values[:, :5]
    hit = (torch.rand(NODES, BATCH, generator=generator) < 0.1).nonzero()
    positives = hit[:, 0].contiguous(), hit[:, 1].to(torch.int32)
    return x, torch.where(clusters < 99, clusters, -1), positives


@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_shards_take_the_step_of_the_level(name: str, dtype: str, parts: int) -> None:
    """Rows, states, rounding and first values to the bit; dx and loss are sums.

    Plain tables of torch's own sums are the same within those: their order is that of a shape.
    """
    kind, optimizer = KINDS[name]
    how = {"dtype": dtype, "optimizer": optimizer, "seed": 3, "fill": True}
    shards = cluster_shards(ROWS, parts)
    assert parts < 8 or any(shard.count == 0 for shard in shards)
    levels = [kind(NODES, WIDTH, 20, shard=s, **how) for s in (whole(NODES), *shards)]
    for seed in range(4):
        x, clusters, positives = batch(seed)
        if seed == 3:
            x[2, 1] = torch.inf
        for level in levels:
            level.set_decay(0.1)
        (dx, scores, loss), *found = (
            level.step(
                x,
                clusters,
                ROWS,
                MOST,
                positives,
                lr=0.3,
                beta1=0.8,
                scale=torch.tensor([1 / 150]),
                dx_scale=4.0,
                need_loss=True,
            )
            for level in levels
        )
        near = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6, equal_nan=True)
        near(torch.stack([out[0] for out in found]).sum(0), dx)
        near(torch.stack([out[2] for out in found]).sum(0), loss)
        assert bool(dx.isnan().all()) == (seed == 3)
        for level, (_, own_scores, _) in zip(levels[1:], found, strict=True):
            chosen, slot = level.own(ROWS).chosen(clusters)
            there = chosen >= 0
            expected = scores.gather(1, slot[:, :, None].expand(-1, -1, MOST))
            near(own_scores[there], expected[there])
    for key, held in levels[0].row_buffers().items():
        joined = torch.cat([level.row_buffers()[key] for level in levels[1:]])
        if name in ("plain", "dense"):
            unit = 2**-7 if held.dtype == torch.bfloat16 else 0.0
            room = unit * held.abs() + 2**-20 * held.abs().max()  # a sum may cancel
            assert bool(((joined.float() - held.float()).abs() <= room).all()), key
        else:
            assert torch.equal(joined.view(torch.uint8), held.view(torch.uint8)), key
    assert {int(level.counter[1]) for level in levels} == {4}
    index = torch.tensor([[0, 5, -1], [56, 41, 3]])
    for level in levels[1:]:
        inside = (index >= level.shard.first) & (index < level.shard.end)
        own = level.scores(x[:2], torch.where(inside, index - level.shard.first, -1))
        expected = levels[0].scores(x[:2], index)
        assert torch.equal(own, torch.where(inside, expected, -torch.inf))
