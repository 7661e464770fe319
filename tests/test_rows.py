"""Rows in files: any range is read exactly, past the cache or not; stand-ins hold no memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xmlkernels import InputError
from xmlkernels import rows as room
from xmlkernels.rows import PAGE, FileRows, in_memory, pages, row_blocks, rows_behind, stand_in


@pytest.fixture(params=["direct", "cached"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cached":
        monkeypatch.setattr(room, "_DIRECT", 0)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("offset", [0, 8, 4099])
def test_any_range_is_read_as_it_is(
    where: str, dtype: torch.dtype, offset: int, tmp_path: Path
) -> None:
    if offset % dtype.itemsize:
        offset -= offset % dtype.itemsize
    n, width = 3001, 7
    values = torch.randint(0, 100, (n, width * dtype.itemsize), dtype=torch.uint8)
    path = tmp_path / "rows"
    path.write_bytes(bytes(offset) + values.numpy().tobytes() + b"not a row")
    held = FileRows(path, (n, width), dtype, offset=offset)
    assert not (where == "cached" and held.direct)
    for start, end in ((0, n), (1, 2), (n - 1, n), (5, 5), (17, 2500)):
        out = torch.empty(end - start, width, dtype=dtype)
        held.read(start, out)
        assert torch.equal(out.view(torch.uint8), values[start:end])
    whole = in_memory(stand_in(held))
    assert torch.equal(whole.view(torch.uint8), values)
    parts = [part.clone().view(torch.uint8) for part in row_blocks(held, 300)]
    assert len(parts) > 2 and torch.equal(torch.cat(parts), values)


def test_writes_are_read_and_the_rest_is_zero(where: str, tmp_path: Path) -> None:
    n, width = 2 * PAGE + 100, 3
    held = FileRows(tmp_path / "rows", (n, width), torch.float32, writes=True)
    assert held.direct == (where == "direct") or where == "direct"  # not every system has it
    buffer = pages(PAGE * width * 4)
    values = room.as_rows(buffer, PAGE, held)
    values.copy_(torch.randn(PAGE, width))
    held.write(PAGE, values)
    tail = room.as_rows(pages(PAGE * width * 4), 100, held)
    tail.copy_(torch.randn(100, width))
    held.write(2 * PAGE, tail)
    got = in_memory(stand_in(held))
    assert torch.equal(got, torch.cat([torch.zeros(PAGE, width), values, tail]))
    with pytest.raises(ValueError, match="with a page"):
        held.write(1, values)


def test_a_file_that_is_cut_short_is_told(where: str, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(bytes(5000))
    held = FileRows(path, (2000, 1), torch.float32)
    with pytest.raises(InputError, match="rows to there"):
        in_memory(stand_in(held))
    del where


def test_a_stand_in_has_shape_and_format_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(bytes(4 * 12))
    held = FileRows(path, (4, 6), torch.bfloat16)
    tensor = stand_in(held)
    assert tensor.is_meta and tensor.shape == (4, 6) and tensor.dtype == torch.bfloat16
    assert rows_behind(tensor) is held and rows_behind(torch.zeros(1)) is None
    own = torch.ones(2)
    assert in_memory(own) is own
