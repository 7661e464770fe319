"""Pieces of rows: whole pages, near ones joined, the same by native code and by Python."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from xmlkernels import InputError
from xmlkernels.nn import pieces, tiles
from xmlkernels.nn.pieces import AT_ONCE, Part, Pieces, carried_bytes, carry, in_pages
from xmlkernels.nn.table_store import Place
from xmlkernels.nn.tiles import Tiles
from xmlkernels.rows import PAGE, FileRows, Rows, as_rows, pages, row_bytes

ROWS, WIDTH = 40_000, 24  # fp32: 128 rows in 3 pages


class Shaped:
    """Rows of which only shape and format are asked for."""

    def __init__(self, count: int, width: int) -> None:
        self.shape, self.dtype = torch.Size((count, width)), torch.float32

    def read(self, start: int, out: torch.Tensor) -> None:
        raise NotImplementedError


@pytest.fixture(params=["native", "Python"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ThreadPoolExecutor:
    if request.param == "Python":
        monkeypatch.setattr(pieces, "_native", lambda: None)
    return ThreadPoolExecutor(AT_ONCE)


@pytest.fixture
def rows(tmp_path: Path) -> FileRows:
    return FileRows(tmp_path / "rows", (ROWS, WIDTH), torch.float32, writes=True)


def test_pieces_come_and_go_as_they_are(threads: ThreadPoolExecutor, rows: FileRows) -> None:
    start = np.array([130, 400, 20_000, ROWS - 1])
    own = in_pages(rows, start, np.array([140, 1100, 36_000, ROWS]))
    assert own.start.tolist() == [128, 19968, 39936] and own.stop.tolist() == [1152, 36096, ROWS]
    first, held = 128, pages(ROWS * row_bytes(rows))
    part = Part(rows, own, as_rows(held, ROWS, rows), first)
    for begin, values in part.views():
        values.copy_(torch.arange(begin, begin + len(values))[:, None])
    carry([part], threads, writes=True)
    whole = torch.empty(ROWS, WIDTH)
    rows.read(0, whole)
    carried = torch.zeros(ROWS)
    for begin, values in part.views():
        carried[begin : begin + len(values)] = torch.arange(begin, begin + len(values))
    assert torch.equal(whole, carried[:, None].expand(ROWS, WIDTH))
    there = Part(rows, own, as_rows(pages(ROWS * row_bytes(rows)), ROWS, rows), first)
    carry([there], threads, writes=False)
    for (_, ours), (_, theirs) in zip(there.views(), part.views(), strict=True):
        assert torch.equal(ours, theirs)
    assert not there.held[1152 - first : 19968 - first].any()


def test_what_cannot_be_carried_is_told(threads: ThreadPoolExecutor, rows: FileRows) -> None:
    other = FileRows(rows.path.with_name("other"), rows.shape, rows.dtype, writes=True)
    held = as_rows(pages(ROWS * row_bytes(rows)), ROWS, rows)
    whole = Pieces(np.array([0, 20_480]), np.array([4096, 24_576]))
    parts = [Part(each, whole, held, 0) for each in (other, rows)]
    os.truncate(rows.path, 20_480 * row_bytes(rows) + 5 * PAGE)
    with pytest.raises(InputError, match=r"rows: expected .* bytes, and rows to there, got 1,986,"):
        carry(parts, threads, writes=False)
    plain = os.open(rows.path, os.O_RDONLY)
    rows.file, kept = plain, rows.file
    with pytest.raises(OSError, match=r"Bad file descriptor: '.*rows'"):
        carry(parts, threads, writes=True)
    rows.file = kept
    os.close(plain)


def test_rows_in_memory_and_within_pages_go_piece_by_piece(tmp_path: Path) -> None:
    values = torch.randn(3000, 5)
    (tmp_path / "rows").write_bytes(bytes(8) + values.numpy().tobytes())
    rows = FileRows(tmp_path / "rows", values.shape, values.dtype, offset=8)
    own = in_pages(rows, np.arange(100, 3000, 500), np.arange(101, 3001, 500))
    held = as_rows(pages(values.nbytes), 3000, rows)
    part = Part(rows, own, held, 0)
    carry([part], ThreadPoolExecutor(AT_ONCE), writes=False)
    for start, found in part.views():
        assert torch.equal(found, values[start : start + len(found)])


@pytest.mark.parametrize("reach", [1, 1 << 40])
@pytest.mark.parametrize("limit", [1, 1 << 20, 1 << 30])
def test_tiles_of_some_rows(limit: int, reach: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_BYTES", limit)
    monkeypatch.setattr(tiles, "LEAST", 1)
    monkeypatch.setattr(tiles, "REACH", reach)
    count, generator = 400_000, torch.Generator().manual_seed(1)
    border = torch.randint(0, count, (3000,), generator=generator).unique()
    chosen = torch.rand(len(border) - 1, generator=generator) < 0.3
    start, end = border[:-1][chosen], border[1:][chosen]
    held: dict[str, Rows] = {"weight": Shaped(count, 64), "bias": Shaped(count, 1)}
    streamed = Tiles(Place(held), torch.device("cpu"), int((end - start).max()))
    found = streamed.windows(start, end)
    assert (
        np.concatenate([w.start for w in found if w.start is not None]).tolist() == start.tolist()
    )
    assert np.concatenate([w.stop for w in found if w.stop is not None]).tolist() == end.tolist()
    most = max(streamed.per_tile, PAGE + int((end - start).max())) * 260
    for window in found:
        assert window.start is not None and window.stop is not None
        assert window.first % PAGE == 0 and window.end - window.first <= streamed.reach
        bytes_ = 0
        for rows in held.values():
            its = in_pages(rows, window.start, window.stop)
            bytes_ += int((its.stop - its.start).sum()) * row_bytes(rows)
            added = carried_bytes(rows, window.start, window.stop)
            assert int(added.sum()) == int((its.stop - its.start).sum()) * row_bytes(rows)
        assert bytes_ <= most + 2 * PAGE
    for early, late in zip(found, found[2:], strict=False):
        assert early.end <= late.first  # no page is of both
    assert len(found) >= (tiles.PARTS if reach > count else count // streamed.reach)


def test_memory_of_a_tile_is_given_back(rows: FileRows) -> None:
    streamed = Tiles(Place({"weight": rows}), torch.device("cpu"))
    for at in range(4):  # once more than there are sets of buffers
        start = torch.tensor([at * 8192 + 130])
        windows = streamed.windows(start, start + 5)
        for tile in streamed.stream(windows, reads=["weight"], writes=["weight"]):
            assert tile.first == at * 8192 and not tile.buffers["weight"].any()
            tile.buffers["weight"][:] = 1  # also of rows that are not carried
    whole = torch.empty(rows.shape)
    rows.read(0, whole)
    expected = torch.zeros(rows.shape)
    for at in range(4):
        expected[at * 8192 + 128 : at * 8192 + 135] = 1
    assert torch.equal(whole, expected)
