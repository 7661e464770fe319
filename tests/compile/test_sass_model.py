"""The model of launches: what it records, compiles and counts follows from the shapes."""

from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import nvcc
from benchmarks import modelled, sass, sass_launch, sass_model, sass_pages, sass_rows_bce
from benchmarks.sass_work import CARDS, Line, Row, Work, lines_of, of_triton

pytestmark = pytest.mark.compile
CARD = CARDS["H200"]


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


def lines(rows: int) -> list[Line]:
    x, out = torch.empty(1, dtype=torch.float32), torch.empty(1, dtype=torch.float32)
    works = of_triton(lambda: sum_rows[(32,)](x, out, rows, STEP=16, BLOCK=128))
    return lines_of(works(CARD), CARD)


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
        lines_of(of_triton(lambda: follow[(1,)](x, out))(CARD), CARD)
    works = of_triton(lambda: follow[(1,)](x, out), {"follow: while at > 0": 1000})
    (line,) = lines_of(works(CARD), CARD)
    assert line.times["issue"] > 1000 * 4 / 4 / CARD.hertz / CARD.multiprocessors * 1e3


@pytest.mark.parametrize("held", [1, 2])
def test_loads_that_run_ahead_are_uncovered_by_blocks_and_buffers(held: int) -> None:
    """2 ms of products and 3 of loads: nearly in turns with one buffer, side by side with many."""
    counts = sass.Counts()
    counts.multiplications = 2e-3 * CARD.multiprocessors * CARD.products * CARD.hertz
    shared = 3 * CARD.cache / 128 / CARD.multiprocessors / CARD.hertz

    def expected(ahead: int) -> float:
        moved = {"memory": 1e-3 * CARD.memory, "cache": 3e-3 * CARD.cache}
        (line,) = lines_of([Work("kernel", counts, 1, held, 1, **moved, ahead=ahead)], CARD)
        assert line.times["shared"] == pytest.approx(shared) and line.largest == pytest.approx(3)
        return line.expected

    block = 2 + shared / 2 / held
    assert expected(0) == pytest.approx(3 + (2 + shared) / 2 / held)
    assert [expected(n) for n in (1, 3)] == pytest.approx(
        [3 + block / 2 / held / n for n in (1, 3)]
    )


ROWS = sass_model.rows()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.op} {row.dtype} {row.shape}")
def test_the_committed_figures_are_of_these_kernels(row: Row) -> None:
    """Where not: python benchmarks/sass_model.py --write."""
    if row.op == "sparse_update":
        nvcc.need_nvcc()
    found = sass_model.figure(row, "H200", sass_model.lines(row, CARD))
    told = modelled.find(modelled.read(), row.op, row.shape, row.phase, row.dtype)
    assert told is not None
    assert (found.ms, found.floor) == pytest.approx((told.ms, told.floor), rel=0.02)
    assert found.ms > found.floor


def test_every_figure_is_of_a_row() -> None:
    """And of the cards, each row has one but for e4m3 on an A100."""
    told = [(f.op, f.shape, f.phase, f.dtype, f.card) for f in modelled.read()]
    expected = [(r.op, r.shape, r.phase, r.dtype, card) for card in CARDS for r in ROWS]
    missing = [key for key in expected if key not in told]
    assert all(key[3:] == ("fp8", "A100") for key in missing)
    assert [key for key in expected if key in told] == told


def test_the_documents_show_the_committed_figures() -> None:
    for path, render in sass_pages.PAGES.items():
        text = path.read_text("utf-8")
        assert render(text, modelled.read()) == text, path.name


def test_kernels_come_from_this_tree_whatever_the_cache_of_a_user_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with sass_launch.recorded() as launches:
        sass_rows_bce.bce_step(16, 4096, torch.bfloat16)()
    sass_launch.build(launches[0], "sm_90a")
    assert not list(tmp_path.iterdir()) and any(sass_launch.CACHE.iterdir())
