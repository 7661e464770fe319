"""A table in files or on the host is the table in memory, tile by tile."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xmlkernels import InputError
from xmlkernels.nn import tiles
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.pieces import Part, carry
from xmlkernels.nn.shard import Shard
from xmlkernels.nn.stored_head import StoredHead
from xmlkernels.nn.table import RowOptimizer
from xmlkernels.nn.table_store import TableStore, parse_store
from xmlkernels.rows import FileRows, in_memory, stand_in

LABELS, WIDTH = 2 * 4096 + 333, 16  # three tiles, the last one not full
KINDS: dict[str, dict[str, Any]] = {
    "sgd": {"dtype": "bf16", "optimizer": RowOptimizer("sgd", decay=1e-3)},
    "momentum": {"dtype": "fp32", "optimizer": RowOptimizer("sgd", momentum=0.9), "bias": True},
    "adam": {"dtype": "fp16", "optimizer": RowOptimizer("adam", state_dtype="bf16"), "bias": True},
    "kahan": {"dtype": "bf16", "optimizer": RowOptimizer("sgd", kahan=True)},
    "fp8": {"dtype": "fp8", "optimizer": "sgd", "bias": True},
    "skips": {"dtype": "bf16", "optimizer": "sgd", "skip_units": 0.5},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_BYTES", 1)


def batch(seed: int, size: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, and positives in every tile."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, WIDTH, generator=generator)
    row = torch.randint(0, LABELS, (40,), generator=generator).unique()
    sample = torch.randint(0, size, row.shape, generator=generator, dtype=torch.int32)
    return x, row, sample


def pair(kind: str, store: TableStore, shard: Shard | None = None) -> tuple[FullHead, StoredHead]:
    made = {"seed": 3, "shard": shard} | KINDS[kind]
    return FullHead(LABELS, WIDTH, **made), StoredHead(LABELS, WIDTH, store=store, **made)


def same(head: FullHead, stored: StoredHead) -> None:
    for name, rows in stored.stored().items():
        ours, theirs = in_memory(stand_in(rows)), getattr(head, name)
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), name
    assert stored.stored().keys() == head.row_buffers().keys()
    for name in ("counter", "rescaled", "skipped"):
        ours, theirs = getattr(stored, name), getattr(head, name)
        assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))


@pytest.mark.parametrize("where", ["file", "host"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_give_the_same_bits(kind: str, where: str, tmp_path: Path) -> None:
    head, stored = pair(kind, TableStore(where, tmp_path / "t"))
    assert stored.tiles.ranges() == [(0, 4096), (4096, 8192), (8192, LABELS)]
    same(head, stored)
    for number in range(3):
        x, row, sample = batch(number)
        x *= 30 if kind == "fp8" else 1
        dx, loss = head.step(x, row, sample, lr=0.3, need_loss=True)
        own, its = stored.step(x, row, sample, lr=0.3, need_loss=True)
        assert torch.allclose(own, dx, rtol=1e-4, atol=1e-4 * float(dx.abs().max()))
        assert torch.allclose(its, loss, rtol=1e-5)
        assert stored.step(x, row, sample, lr=0.0)[1].shape == (0,)
        head.step(x, row, sample, lr=0.0)
        same(head, stored)
    if kind == "fp8":
        assert int(stored.rescaled) > 0
    if kind == "skips":
        assert int(stored.skipped[0]) > 0
    x, row, sample = batch(9)
    assert torch.allclose(stored.loss(x, row, sample), head.loss(x, row, sample), rtol=1e-5)
    assert torch.equal(stored.rows(4000, 4200), head.rows(4000, 4200))


@pytest.mark.parametrize("kind", ["sgd", "fp8", "momentum"])
def test_topk_and_scores_are_those_of_memory(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, stored = pair(kind, TableStore("file", tmp_path / "t"))
    x = torch.randn(6, WIDTH)
    barred = head.topk(x, 3)[1]
    for k, exclude in ((1, None), (10, None), (7, barred), (5000, None), (LABELS + 3, None)):
        for ours, theirs in zip(stored.topk(x, k, exclude), head.topk(x, k, exclude), strict=True):
            assert torch.equal(ours, theirs)
    _, row, sample = batch(1, 6)
    (values, rows), loss = stored.topk_and_loss(x, 7, barred, row, sample)
    assert torch.equal(values, stored.topk(x, 7, barred)[0])
    assert torch.equal(rows, stored.topk(x, 7, barred)[1])
    assert torch.equal(loss, stored.loss(x, row, sample))
    index = torch.randint(-1, LABELS, (6, 50))
    assert torch.equal(stored.scores(x, index), head.scores(x, index))
    assert torch.equal(stored.scores(x, index[0]), head.scores(x, index[0]))
    read = list[int]()

    def told(parts: Sequence[Part], threads: Executor, *, writes: bool) -> None:
        read.extend(int(start) for part in parts[:1] for start in part.pieces.start)
        carry(parts, threads, writes=writes)

    monkeypatch.setattr(tiles, "carry", told)
    stored.scores(x, torch.full((6, 2), 5000))
    page = 4096 // stored.place.rows["weight"].dtype.itemsize
    assert len(read) == 1 and 5000 - page < read[0] <= 5000
    read.clear()
    stored.topk_and_loss(x, 7, None, row, sample)
    assert read == [0, 4096, 8192]


def test_equal_scores_come_in_order_of_row(tmp_path: Path) -> None:
    stored = StoredHead(LABELS, WIDTH, store=TableStore("file", tmp_path), std=0, dtype="fp32")
    values, rows = stored.topk(torch.ones(2, WIDTH), 9000)
    assert rows[0, :LABELS].tolist() == list(range(LABELS)) and (rows[:, LABELS:] == -1).all()
    assert not values[:, :LABELS].any() and torch.isneginf(values[:, LABELS:]).all()


def test_first_values_may_come_from_the_data(tmp_path: Path) -> None:
    head, stored = pair("momentum", TableStore("file", tmp_path / "t"))
    counts = torch.randint(0, 9, (LABELS,))
    head.start_at_frequencies(counts, 100)
    stored.start_at_frequencies(counts, 100)
    batches = [batch(seed) for seed in range(4)]
    head.start_at_centroids(batches, 0.5)
    stored.start_at_centroids(batches, 0.5)
    same(head, stored)
    with pytest.raises(InputError, match="one for each label"):
        stored.start_at_frequencies(counts[:5], 100)
    with pytest.raises(InputError, match="training documents"):
        stored.start_at_centroids([], 0.5)


@pytest.mark.parametrize("bounds", [(0, 4100), (4100, LABELS), (70, 70)])
def test_a_shard_is_streamed_like_a_whole_table(bounds: tuple[int, int], tmp_path: Path) -> None:
    shard = Shard(*bounds, LABELS)
    head, stored = pair("momentum", TableStore("file", tmp_path / "t", 1, 2), shard)
    for number in range(2):
        x, row, sample = batch(number)
        dx, loss = head.step(x, row, sample, lr=0.3, need_loss=True)
        own, its = stored.step(x, row, sample, lr=0.3, need_loss=True)
        assert torch.allclose(own, dx, rtol=1e-4, atol=1e-5) and torch.allclose(its, loss)
    same(head, stored)
    for ours, theirs in zip(stored.topk(x, 8), head.topk(x, 8), strict=True):
        assert torch.equal(ours, theirs)
    header = json.loads((tmp_path / "t" / "table-00001-of-00002" / "header.json").read_text())
    assert header["shard"] == [*bounds, LABELS] and header["step"] == 2


def test_rows_of_a_checkpoint_go_in_block_by_block(tmp_path: Path) -> None:
    head, stored = pair("adam", TableStore("file", tmp_path / "t"))
    other = StoredHead(LABELS, WIDTH, store=TableStore("host"), std=0, **KINDS["adam"])
    head.step(*batch(0), lr=0.1)
    stored.step(*batch(0), lr=0.1)
    other.load_rows({name: stand_in(rows) for name, rows in stored.stored().items()})
    other.counter.copy_(stored.counter)
    same(head, other)
    other.load_rows({name: held * 0 for name, held in head.row_buffers().items()})
    assert not in_memory(stand_in(other.stored()["momentum"])).any()


def test_a_table_that_is_read_alone_cannot_be_trained(tmp_path: Path) -> None:
    head = FullHead(LABELS, WIDTH, dtype="bf16")
    path = tmp_path / "weights"
    path.write_bytes(b"12345678" + head.weight.view(torch.uint8).numpy().tobytes())
    rows = FileRows(path, head.weight.shape, head.weight.dtype, offset=8)
    stored = StoredHead(LABELS, WIDTH, dtype="bf16", store={"weight": rows})
    x = torch.randn(3, WIDTH)
    assert torch.equal(stored.topk(x, 5)[1], head.topk(x, 5)[1])
    with pytest.raises(InputError, match="only read"):
        stored.step(*batch(0), lr=0.1)


def test_a_step_that_breaks_off_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, stored = pair("sgd", TableStore("file", tmp_path / "t"))
    folder = tmp_path / "t" / "table-00000-of-00001"

    def step_of() -> object:
        return json.loads((folder / "header.json").read_text())["step"]

    x, row, sample = batch(0)
    with pytest.raises(InputError, match="sorted"):  # before anything is changed
        stored.step(x, row.flip(0), sample, lr=0.1)
    assert step_of() == 0
    stored.step(x, row, sample, lr=0.1)
    assert step_of() == 1
    seen = []

    def full(parts: Sequence[Part], threads: Executor, *, writes: bool) -> None:
        if writes:
            seen.append(step_of())
            if parts[0].first:
                raise OSError(28, "No space left on device")
        carry(parts, threads, writes=writes)

    monkeypatch.setattr(tiles, "carry", full)
    with pytest.raises(OSError, match="No space"):
        stored.step(x, row, sample, lr=0.1)
    monkeypatch.setattr(tiles, "carry", carry)
    assert seen[0] is None and step_of() is None and int(stored.counter[1]) == 1
    for use in (
        lambda: stored.step(x, row, sample, lr=0.1),
        lambda: stored.topk(x, 3),
        lambda: in_memory(stand_in(stored.stored()["weight"])),
    ):
        with pytest.raises(InputError, match="--resume"):
            use()


def test_the_folder_is_held_and_left_empty(tmp_path: Path) -> None:
    where = TableStore("file", tmp_path / "t")
    stored = StoredHead(100, WIDTH, store=where)
    folder = tmp_path / "t" / "table-00000-of-00001"
    assert {path.name for path in folder.iterdir()} == {".lock", "header.json", "weight.bin"}
    with pytest.raises(InputError, match="for this command alone"):
        StoredHead(100, WIDTH, store=where)
    del stored
    assert not folder.exists()
    # What a kill left is taken over, of another number of processes too; other files are not.
    for name in ("table-00000-of-00001", "table-00001-of-00004"):
        (tmp_path / "t" / name).mkdir(parents=True)
        (tmp_path / "t" / name / "header.json").write_text("{}")
        (tmp_path / "t" / name / "weight.bin").write_bytes(b"old")
    stored = StoredHead(100, WIDTH, store=where)
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["table-00000-of-00001"]
    del stored
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"thesis\.tex.*nothing was removed"):
        StoredHead(100, WIDTH, store=where)
    assert (folder / "thesis.tex").read_text() == "mine"


def test_a_planner_asks_without_making_anything(tmp_path: Path) -> None:
    with torch.device("meta"):
        asked = StoredHead(1 << 40, 64, dtype="bf16", store=TableStore("file", tmp_path / "t"))
    assert not (tmp_path / "t").exists()
    assert asked.stored_bytes() == {"weight": 1 << 47}
    assert sum(asked.bytes().values()) < 1 << 28


def test_words_for_a_store() -> None:
    assert parse_store("ram") is None and parse_store("host") == TableStore("host")
    assert parse_store("file:/a/b", 1, 2) == TableStore("file", Path("/a/b"), 1, 2)
    for bad in ("disk", "file:", "file", "ram:", ""):
        with pytest.raises(InputError, match="ram, host, or file:"):
            parse_store(bad)
