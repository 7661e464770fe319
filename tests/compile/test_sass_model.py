"""The model of launches: what it records, compiles and counts follows from the shapes."""

import pytest
import torch
import triton
import triton.language as tl

from benchmarks import sass_model

pytestmark = pytest.mark.compile
CARD = sass_model.CARDS["H200"]


@triton.jit
def sum_rows(x, out, width, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Columns of BLOCK threads, over rows of STEP loads."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(0, width, STEP):
        for i in tl.static_range(STEP):
            total = tl.exp(total * tl.load(x + (row + i) * 4096 + lane))
    tl.store(out + lane, total)


@triton.jit
def follow(x, out):
    """A loop whose trips stand in memory."""
    at = tl.load(x)
    while at > 0:
        at = tl.load(x + at)
    tl.store(out, at)


def lines(rows: int) -> list[sass_model.Line]:
    x, out = torch.empty(1, dtype=torch.float32), torch.empty(1, dtype=torch.float32)
    return sass_model.model(lambda: sum_rows[(32,)](x, out, rows, STEP=16, BLOCK=128), CARD)


@pytest.mark.parametrize("rows", [160, 320])
def test_loops_count_as_often_as_the_shape_says(rows: int) -> None:
    """All bytes go through L2 once: 4 per load and store, of 32 blocks of 128 threads."""
    (line,) = lines(rows)
    assert (line.kernel, line.launches) == ("sum_rows", 1)
    assert line.times["L2"] == pytest.approx(1e3 * 4 * 32 * 128 * (rows + 1) / CARD.cache)
    assert line.expected >= line.largest >= line.times["issue"] > 0 == line.times["tensor"]


def test_trips_that_no_argument_tells_must_be_given() -> None:
    x, out = torch.empty(1, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="follow: no trips for 'follow: while at > 0'"):
        sass_model.model(lambda: follow[(1,)](x, out), CARD)
    (line,) = sass_model.model(lambda: follow[(1,)](x, out), CARD, {"follow: while at > 0": 1000})
    assert line.times["issue"] > 1000 * 4 / 4 / CARD.hertz / CARD.multiprocessors * 1e3
