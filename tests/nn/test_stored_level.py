"""A cascade's level in files or on the host is the one in memory; what a batch asks for is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xmlkernels import InputError
from xmlkernels.nn import pieces, tiles
from xmlkernels.nn.cascade_level import CascadeLevel
from xmlkernels.nn.cluster_shard import cluster_shards
from xmlkernels.nn.pieces import Part, carry
from xmlkernels.nn.shard import Shard
from xmlkernels.nn.stored_level import StoredLevel
from xmlkernels.nn.table import RowOptimizer
from xmlkernels.nn.table_store import TableStore
from xmlkernels.rows import in_memory, stand_in

WIDTH, MOST = 24, 900
# One cluster reaches over the border of tiles at 4,096, two begin or end at that at 8,192.
SIZES = [600, 900, 900, 900, 700, 400, 3, 897, 900, 900, 900, 192, 900, 900, 900, 700, 100]
SIZES += SIZES  # six tiles, twice as many as there are sets of buffers
ROW_PTR = torch.tensor([0, *SIZES]).cumsum(0)
NODES = int(ROW_PTR[-1])
KINDS: dict[str, dict[str, Any]] = {
    "adam": {"dtype": "fp32", "optimizer": RowOptimizer("adam", row_wise=True)},
    "sgd": {"dtype": "bf16", "optimizer": RowOptimizer("sgd")},
    "states": {
        "dtype": "fp16",
        "optimizer": RowOptimizer("adam", state_dtype="bf16", decay=0.1, decoupled=True),
    },
    "kahan": {"dtype": "bf16", "optimizer": RowOptimizer("adam", row_wise=True, kahan=True)},
    "fp8": {"dtype": "fp8", "optimizer": RowOptimizer("adam", row_wise=True)},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_BYTES", 1)
    monkeypatch.setattr(pieces, "GAP", 0)


def batch(seed: int, clusters: Tensor, size: int = 24) -> dict[str, Any]:
    """Embeddings, clusters of each sample, and positives in and beside them."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(0, NODES, (200,), generator=generator).unique()
    sample = torch.randint(0, size, row.shape, generator=generator, dtype=torch.int32)
    return {
        "x": torch.randn(size, WIDTH, generator=generator),
        "clusters": clusters,
        "row_ptr": ROW_PTR,
        "most": MOST,
        "positives": (row, sample),
    }


def shortlist(seed: int, size: int = 24) -> Tensor:
    """Some clusters of each sample, ascending, pads last; many have those at a border."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(size, len(SIZES), generator=generator) < 0.4
    chosen[:20, 3:7] = True
    columns = torch.where(chosen, torch.arange(len(SIZES)), len(SIZES)).sort(1).values
    return torch.where(columns < len(SIZES), columns, -1)[
        :, : int(chosen.sum(1).max())
    ].contiguous()


def pair(
    kind: str, store: TableStore, shard: Shard | None = None
) -> tuple[CascadeLevel, StoredLevel]:
    made = {"seed": 3, "fill": True, "shard": shard} | KINDS[kind]
    stored = StoredLevel(NODES, WIDTH, 4 * MOST, store=store, most=MOST, **made)
    return CascadeLevel(NODES, WIDTH, 4 * MOST, **made), stored


def same(level: CascadeLevel, stored: StoredLevel) -> None:
    assert stored.stored().keys() == level.row_buffers().keys()
    for name, rows in stored.stored().items():
        ours, theirs = in_memory(stand_in(rows)), getattr(level, name)
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), name
    assert torch.equal(stored.counter, level.counter)
    assert level.rescaled is None or torch.equal(stored.rescaled, level.rescaled)


def steps(level: CascadeLevel, stored: StoredLevel, count: int, lr: float = 0.1) -> None:
    for number in range(count):
        asked = batch(number, shortlist(number))
        options = {"beta1": 0.8, "dx_scale": 2.0, "scale": torch.full((1,), 1e-4)}
        found = level.step(**asked, lr=lr, **options, need_loss=True)
        own = stored.step(**asked, lr=lr, **options, need_loss=True)
        for ours, theirs in zip(own, found, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()))
        assert torch.equal(own[1], found[1])
        same(level, stored)


@pytest.mark.parametrize("where", ["file", "host"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_give_the_same_bits(
    kind: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "host":  # as on a card, a tile reaches no further than memory
        monkeypatch.setattr(tiles, "REACH", 1)
    level, stored = pair(kind, TableStore(where, tmp_path / "t"))
    assert [first for first, _ in stored.tiles.ranges()] == list(range(0, 6 * 4096, 4096))
    same(level, stored)
    steps(level, stored, 3, 1.5 if kind == "fp8" else 0.1)
    if kind == "fp8":
        assert int(stored.rescaled) > 0
    index = torch.randint(-1, NODES, (5, 70))
    x = torch.randn(5, WIDTH)
    assert torch.equal(stored.scores(x, index), level.scores(x, index))
    assert torch.equal(stored.scores(x, index[0]), level.scores(x, index[0]))
    nothing = stored.scores(x, torch.full((5, 2), -1))
    assert torch.isneginf(nothing).all() and nothing.shape == (5, 2)


@pytest.mark.parametrize("part", range(3))
def test_a_shard_is_streamed_like_a_whole_table(part: int, tmp_path: Path) -> None:
    shard = cluster_shards(ROW_PTR, 3)[part]
    steps(*pair("kahan", TableStore("file", tmp_path / "t", part, 3), shard), 2)


def test_a_shard_without_rows_takes_the_step_of_nothing(tmp_path: Path) -> None:
    steps(*pair("sgd", TableStore("file", tmp_path / "t"), Shard(0, 0, NODES)), 1)


def test_values_that_are_not_finite_change_nothing(tmp_path: Path) -> None:
    level, stored = pair("adam", TableStore("host"))
    asked = batch(0, shortlist(0))
    asked["x"][1, 2] = torch.inf
    options: dict[str, Any] = {"lr": 1.0, "beta1": None, "scale": torch.ones(1), "dx_scale": 1.0}
    for found in (held.step(**asked, **options, need_loss=True) for held in (level, stored)):
        assert all(out.isnan().all() for out in found)
    same(level, stored)


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int, int]]:
    """What a level's rows read and write: (read or written, buffer, first row, end)."""
    found: list[tuple[str, str, int, int]] = []

    def told(parts: Sequence[Part], threads: Executor, *, writes: bool) -> None:
        kind = "write" if writes else "read"
        for part in parts:
            for start, values in part.views():
                found.append((kind, part.rows.path.stem, start, start + len(values)))
        carry(parts, threads, writes=writes)

    monkeypatch.setattr(tiles, "carry", told)
    return found


def test_a_step_carries_the_pages_of_its_clusters_alone(
    traffic: list[tuple[str, str, int, int]], tmp_path: Path
) -> None:
    _, stored = pair("sgd", TableStore("file", tmp_path / "t"))
    seen = traffic
    seen.clear()
    # Rows 5,300 to 6,199, in the second tile: bf16 of width 24 has 256 rows in 3 pages.
    clusters = torch.tensor([[8, -1], [8, -1]])
    assert ROW_PTR[8:10].tolist() == [5300, 6200]
    options: dict[str, Any] = {"lr": 0.1, "beta1": None, "scale": torch.ones(1), "dx_scale": 1.0}
    stored.step(**batch(0, clusters, 2), **options, need_loss=False)
    carried = [("bias", 5120, 7168), ("weight", 5120, 6400)]
    assert sorted(seen) == [(kind, *part) for kind in ("read", "write") for part in carried]
    seen.clear()
    stored.scores(torch.ones(1, WIDTH), torch.tensor([[5300, -1, 6199]]))
    assert sorted(seen) == [
        ("read", "bias", 5120, 7168),
        ("read", "weight", 5120, 5376),
        ("read", "weight", 6144, 6400),
    ]


def test_a_step_that_breaks_off_is_the_last(tmp_path: Path) -> None:
    _, stored = pair("sgd", TableStore("file", tmp_path / "t"))
    rows: Any = stored.place.rows["weight"]
    options: dict[str, Any] = {"lr": 0.1, "beta1": None, "scale": torch.ones(1), "dx_scale": 1.0}
    rows.file, whole = os.open(rows.path, os.O_RDONLY | os.O_DIRECT), rows.file
    with pytest.raises(OSError, match=r"Bad file descriptor.*weight\.bin"):
        stored.step(**batch(0, shortlist(0)), **options, need_loss=False)
    os.close(rows.file)
    rows.file = whole
    with pytest.raises(InputError, match="--resume"):
        stored.step(**batch(0, shortlist(0)), **options, need_loss=False)
    with pytest.raises(InputError, match="--resume"):
        stored.scores(torch.ones(1, WIDTH), torch.tensor([[1]]))


def test_a_planner_asks_without_making_anything(tmp_path: Path) -> None:
    store, options = TableStore("file", tmp_path / "t"), {"seed": 3, "fill": True}
    with torch.device("meta"):
        asked = StoredLevel(1 << 40, 64, 99, store=store, most=5000, **options | KINDS["sgd"])
    assert not (tmp_path / "t").exists()
    assert asked.stored_bytes() == {"weight": 1 << 47, "bias": 1 << 42}
    # A tile has as many rows as the largest cluster, and room for the end of one.
    assert asked.bytes()["tiles"] == 3 * (8192 + 8192) * 132
