"""`matmul_topk` in Triton: equal to the reference, value by value and row by row, over many tiles,
chunks and cuts.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.model import matmul_topk_accesses, matmul_topk_memory
from common import DTYPES, assert_no_worse, name_of
from counting import counted
from xmlkernels.reference.matmul_topk import matmul_topk as reference
from xmlkernels.triton import descriptors
from xmlkernels.triton import matmul_topk as kernel

INF = math.inf


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tables of a few dozen rows then span several chunks, and lists are cut in several blocks."""
    monkeypatch.setattr(kernel, "FIRST_CHUNK", 16)
    monkeypatch.setattr(kernel, "TILE", (16, 16, 16, 4))
    monkeypatch.setattr(kernel, "TILE_TMA", (16, 16, 16, 4))
    monkeypatch.setattr(kernel, "TILE_SMALL", (16, 16, 16, 4))
    monkeypatch.setattr(kernel, "CUT_BLOCK", 16)
    monkeypatch.setattr(kernel, "CUT_MOST", 64)
    monkeypatch.setattr(kernel, "LABELS_OF_CUT", 30)
    yield


def whole_numbers(b: int, n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, bias of small whole numbers: every score is exact in any order, and ties
    abound.
    """
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-2, 3, (size, d), generator=g).to(dtype) for size in (b, n))
    return x, weight, torch.randint(-2, 3, (n,), generator=g).float()


def check_equal(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    values, rows = kernel.matmul_topk(*args, **options)
    expected_values, expected_rows = reference(*args, **options)
    assert values.dtype == torch.float32 and rows.dtype == torch.int64
    assert torch.equal(rows, expected_rows) and torch.equal(values, expected_values)
    return values, rows


@pytest.mark.parametrize("k", [1, 7, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_equals_the_reference(dtype: torch.dtype, k: int) -> None:
    """Bias, exclusions (twice, of other shards, of padding), padding rows that would win, rows
    beyond 2^32, fewer than k.
    """
    x, weight, bias = whole_numbers(19, 110, 20, dtype)
    bias[101:] = math.nan
    weight[105:] = INF
    offset = 2**33
    best = reference(x, weight, bias, 6, row_offset=offset, rows=101)[1]
    other = torch.tensor([[-1, offset - 1, offset + 101, 5]]).expand(19, 4)
    exclude = torch.cat([best[:, :2], other, best[:, 1:2], best[:, 4:5]], 1).contiguous()
    values, rows = check_equal(x, weight, bias, k, exclude=exclude, row_offset=offset, rows=101)
    assert k < 130 or ((rows[:, 98:] == -1).all() and (values[:, 98:] == -INF).all())


@pytest.mark.parametrize(
    "x_dtype, dtype", [(torch.float32, torch.float16), (torch.bfloat16, torch.float16)], ids=name_of
)
def test_formats_of_x_and_table_mix(x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    x, weight, bias = whole_numbers(3, 40, 7, torch.float32)
    check_equal(x.to(x_dtype), weight.to(dtype), bias, 5)


def test_e4m3_tables() -> None:
    """Every finite code, scales from 2^-100 on, a bias, padding rows that would win."""
    g = torch.Generator().manual_seed(0)
    code = torch.arange(254).remainder(127) + 128 * (torch.arange(254) // 127)
    weight = torch.zeros(260, 5, dtype=torch.uint8)
    weight[:254, 3], weight[254:] = code, 0x7E
    scale = torch.exp2(torch.randint(-12, -4, (260,), generator=g).float())
    scale[::9], scale[254:] = 2.0**-100, 2.0**100
    row_scale = torch.stack([scale, torch.full((260,), math.nan)], 1)
    x = torch.zeros(3, 5)
    x[0, 3], x[1, 3], x[2, 2] = 1, -0.5, 1
    table, bias = weight.view(torch.float8_e4m3fn), torch.zeros(260)
    bias[17] = 3
    for given in (None, bias):
        check_equal(
            x,
            table,
            given,
            254,
            row_scale=row_scale,
            rows=254,
            exclude=torch.tensor([[3], [-1], [40]]),
        )
    x, weight, bias = whole_numbers(19, 60, 20, torch.float32)
    row_scale = torch.exp2(torch.arange(60).remainder(4)).float()[:, None].repeat(1, 2)
    check_equal(x.to(torch.float16), weight.to(torch.float8_e4m3fn), bias, 7, row_scale=row_scale)


def test_scores_that_rise_fall_and_tie() -> None:
    """The worst orders for a running threshold: every row is a new best, none but the first k is,
    all are equal.
    """
    weight = torch.arange(1500.0).reshape(-1, 1)
    check_equal(torch.tensor([[1.0], [-1.0], [0.0], [-0.0]]), weight, None, 5)


@pytest.mark.parametrize("excluded, tma", [(0, False), (2, True)], ids=str)
def test_lists_that_overflow(monkeypatch: pytest.MonkeyPatch, excluded: int, tma: bool) -> None:
    """Lists of 21 keys and a chunk of 174 labels: scores that rise, tie, are NaN and infinite,
    beside some that fit.
    """
    monkeypatch.setattr(descriptors, "card_has_tma", lambda device: tma)
    monkeypatch.setattr(kernel, "LIST_BYTES", 0)
    monkeypatch.setattr(kernel, "MARGIN", 0.01)
    monkeypatch.setattr(kernel, "MOST_CUTS", 2)
    n, k = 190, 5
    how = kernel.plan(7, n, k, excluded)
    assert how.samples == 1 and how.capacity == k + excluded + 16
    assert how.chunks == [(0, 16), (16, n)]
    monkeypatch.setattr(kernel, "plan", lambda *_: dataclasses.replace(how, samples=7))
    weight, row = torch.zeros(n, 8), torch.arange(n)
    # Rising; in steps; 90 equal ones above 100 equal ones; zeros.
    weight[:, 0], weight[:, 1], weight[:, 2] = row, row // 8, row // 100
    x = torch.zeros(7, 8)
    x[0, 0], x[1, 0], x[2, 1], x[3, 2], x[4, 2], x[5, 0] = 1, -1, 1, 1, -1, math.nan
    best = reference(x, weight, None, 2 * excluded + 1)[1][:, : 2 * excluded : 2].contiguous()
    exclude = best if excluded else None
    weight, x = weight.to(torch.bfloat16), x.to(torch.bfloat16)
    check_equal(x, weight, None, k, exclude=exclude)
    bias = torch.zeros(n)
    bias[:60], bias[[70, 90]], bias[100:110] = -INF, INF, math.nan
    check_equal(x, weight, bias, k, exclude=exclude)


def test_lists_that_just_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list at its capacity is no overflow; one key more is."""
    monkeypatch.setattr(kernel, "LIST_BYTES", 0)
    monkeypatch.setattr(kernel, "MARGIN", 0.01)
    monkeypatch.setattr(kernel, "MOST_CUTS", 2)
    assert kernel.plan(1, 60, 5).capacity == 21
    for passing in (16, 17):
        weight = torch.zeros(60, 1)
        weight[20 : 20 + passing, 0] = 1 + torch.arange(passing)
        check_equal(torch.ones(1, 1), weight, None, 5)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("samples", [32, 64, 128])
def test_tiles_of_many_samples(monkeypatch: pytest.MonkeyPatch, samples: int, tma: bool) -> None:
    """Every column of a tile's words, and rows of which several samples' lists take a key."""
    monkeypatch.setattr(descriptors, "card_has_tma", lambda device: tma)
    for name in ("TILE", "TILE_TMA"):
        monkeypatch.setattr(kernel, name, (16, samples, 16, 4))
    x, weight, bias = whole_numbers(samples + 3, 70, 24, torch.bfloat16)
    # The best row of each sample is of the last chunk, and each sample's is another.
    x[:, :7] = (torch.arange(samples + 3)[:, None] >> torch.arange(7)) % 2 * 2.0 - 1.0
    weight[-40:, :7] = (torch.arange(40)[:, None] * 3 >> torch.arange(7)) % 2 * 2.0 - 1.0
    check_equal(x, weight, bias if tma else None, 5)


def test_what_is_not_finite() -> None:
    """NaN is never returned; +inf is a score like others; a row at -inf is a place that no row
    fills.
    """
    x, weight, bias = whole_numbers(17, 60, 9, torch.float32)
    weight[3::7, 4], bias[5::11], x[16, 2] = math.nan, math.nan, math.nan
    bias[[4, 51]], bias[[7, 40]] = INF, -INF
    values, rows = check_equal(x, weight, bias, 60)
    assert not values.isnan().any() and (rows[16] == -1).all() and (rows[:16, 1] == 51).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
def test_no_worse_than_torch(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(17, 37, generator=g).to(dtype)
    weight = torch.randn(50, 37, generator=g).to(dtype)
    values, rows = kernel.matmul_topk(x, weight, None, 9)
    again = kernel.matmul_topk(x, weight, None, 9)
    assert torch.equal(values, again[0]) and torch.equal(rows, again[1])
    z = x.double() @ weight.double().T
    low = (x.float() @ weight.float().T).to(dtype)
    mine, best = z.gather(1, rows), z.topk(9).values
    assert_no_worse(values, low.double().gather(1, rows), mine, dtype, what="scores")
    assert (best - mine <= 2 * (values.double() - mine).abs().max() + 1e-6 * best.abs().max()).all()


@pytest.mark.parametrize("b, n", [(0, 9), (3, 0), (3, 1)])
def test_empty(b: int, n: int) -> None:
    check_equal(
        torch.ones(b, 4), torch.ones(n, 4), None, 3, exclude=torch.empty(b, 0, dtype=torch.int64)
    )


def test_batches_that_do_not_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "BATCH", 16)
    x, weight, bias = whole_numbers(35, 40, 5, torch.float32)
    check_equal(x, weight, bias, 4, exclude=torch.arange(70).reshape(35, 2))


@pytest.mark.parametrize(
    "b, n, k, excluded",
    [
        (512, 2_800_000, 100, 0),
        (1, 10**8, 1, 30),
        (4096, 670_000, 1000, 500),
        (3, 70, 5, 2),
        (1024, 10**6, 10**6, 0),
        (1024, 8_600_000, 1000, 10**5),
    ],
)
def test_workspace(monkeypatch: pytest.MonkeyPatch, b: int, n: int, k: int, excluded: int) -> None:
    """Chunks cover the table once; lists, their bins and the sort stay within 256 MB."""
    monkeypatch.undo()
    how = kernel.plan(b, n, k, excluded)
    chunks = how.chunks
    assert chunks[0][0] == 0 and chunks[-1][1] == n
    assert all(a[1] == b[0] for a, b in itertools.pairwise(chunks))
    assert all(begin < end for begin, end in chunks)
    assert chunks[0][1] <= how.capacity
    # Once all bits are known, a bound leaves at most so many keys.
    assert k + excluded <= how.capacity
    assert how.shifts[0] == 64 and how.shifts[-1] == 0
    steps = {a - b for a, b in itertools.pairwise(how.shifts)}
    assert min(steps) > 0 and 1 << max(steps) <= 2 * how.capacity
    assert 1 <= how.samples <= min(b, kernel.BATCH)
    # The lists, and keys, indices and buffers of the sort of the first k places.
    assert 8 * how.samples * (how.capacity + 5 * k) <= 256 << 20


@pytest.mark.parametrize("n", [1_000_000, 1_305_265, 2_000_000, 2_812_281, 8_600_000])
@pytest.mark.parametrize("k", [5, 100, 1000])
@pytest.mark.parametrize("b", [1, 64, 512, 1024])
def test_launches(monkeypatch: pytest.MonkeyPatch, b: int, k: int, n: int) -> None:
    """At most two cuts per million labels up to k = 100, and from 2M labels on up to k = 1000; and
    launches that the shape alone decides.
    """
    monkeypatch.undo()
    counts = launches_of(monkeypatch, b, n, k)
    most = 2 * n / 1e6 if k <= 100 or n >= 2_000_000 else 4
    assert 2 <= counts["score_labels"] <= min(most, 5)
    # The rest does nothing unless a list overflowed.
    assert counts["cut_lists"] == counts["score_labels"] + (counts["recount_labels"] > 0)
    assert counts["recount_labels"] in (0, 6) and counts["raise_bounds"] in (0, 5)


@pytest.mark.parametrize("b, k", [(1, 1), (512, 100), (1024, 100), (1024, 1000)])
def test_lists_have_room(monkeypatch: pytest.MonkeyPatch, b: int, k: int) -> None:
    """For three times the keys that pass where the best rows lie anywhere; cuts hold such lists."""
    monkeypatch.undo()
    for n in (100_000, 1_305_265, 2_812_281, 8_600_000):
        how = kernel.plan(b, n, k)
        for begin, end in how.chunks[1:]:
            passing = k * (end - begin) / begin
            assert k + 2.9 * passing <= how.capacity and k + passing <= kernel.CUT_MOST + k


def launches_of(monkeypatch: pytest.MonkeyPatch, b: int, n: int, k: int) -> Counter[str]:
    """Launches of one call by kernel; none of them runs."""
    counts: Counter[str] = Counter()

    def record(name: str) -> Any:
        class Launch:
            def __getitem__(self, grid: Any) -> Any:
                return lambda *_, **__: counts.update([name])

        return Launch()

    with monkeypatch.context() as inner:
        for name in ("score_labels", "cut_lists", "recount_labels", "raise_bounds"):
            inner.setattr(kernel, name, record(name))
        inner.setattr(torch, "sort", lambda best, **_: torch.return_types.sort((best, best)))
        x, weight = torch.zeros(b, 1), torch.zeros(1, 1).expand(n, 1)
        kernel.matmul_topk(x, weight, None, k)
    return counts


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_accesses_are_the_closed_form(monkeypatch: pytest.MonkeyPatch, tma: bool) -> None:
    """Each block of samples reads the table once, each block of labels the batch once."""
    b, n, d, k = 19, 70, 24, 4
    x, weight, bias = whole_numbers(b, n, d, torch.bfloat16)
    monkeypatch.setattr(descriptors, "card_has_tma", lambda device: tma)
    with counted(monkeypatch, {"x": x, "weight": weight, "bias": bias}) as traffic:
        kernel.matmul_topk(x, weight, bias, k)
    chunks = [end - begin for begin, end in kernel.plan(b, n, k).chunks]
    model = matmul_topk_accesses(b, n, d, chunks, block_b=16, block_l=16, bias=True)
    assert model["weight"] == (2 * n * d, 0) and len(chunks) > 1
    assert {name: (traffic.loads[name], traffic.stores[name]) for name in model} == model


def test_the_models_blocks_are_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    labels, samples, _, _ = kernel.TILE_TMA
    given = (1000, 70_000, 8, [4096, 4096])
    assert matmul_topk_accesses(*given) == matmul_topk_accesses(
        *given, block_b=samples, block_l=labels
    )
    assert matmul_topk_memory(2500, 70_000, 8, 10) == 3 * 70_000 * 8 * 2 + 2500 * (4 * 8 + 12 * 10)
    assert kernel.plan(2500, 70_000, 10).samples == 1024
