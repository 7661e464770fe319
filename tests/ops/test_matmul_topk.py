"""`matmul_topk`: the best labels of each sample, exactly."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from common import DEVICES, DTYPES, assert_no_worse, name_of, needs_kernels
from xmlkernels.ops import matmul_topk
from xmlkernels.reference.matmul_topk import matmul_topk as reference

F32, BF16 = torch.float32, torch.bfloat16
INF = math.inf


def whole_numbers(
    b: int, n: int, d: int, dtype: torch.dtype, most: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, bias of small whole numbers: every score is exact in any order, and ties
    abound.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-most, most + 1, (b, d), generator=g).to(dtype)
    weight = torch.randint(-most, most + 1, (n, d), generator=g).to(dtype)
    return x, weight, torch.randint(-2, 3, (n,), generator=g).float()


def check_equal(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, device: str = "cpu", **options: Any
) -> None:
    def move(t: Any) -> Any:
        return t.to(device) if isinstance(t, Tensor) else t

    args = [move(t) for t in (x, weight, bias, k)]
    options = {key: move(v) for key, v in options.items()}
    values, rows = matmul_topk(*args, **options)
    expected_values, expected_rows = reference(*args, **options)
    assert values.dtype == F32
    assert rows.dtype == torch.int64
    assert values.shape == rows.shape == (x.shape[0], k)
    assert torch.equal(rows, expected_rows)
    assert torch.equal(values, expected_values)


# 1.
@pytest.mark.parametrize("device", DEVICES)
def test_by_hand(device: str) -> None:
    """Scores of sample 0: rows 0..3 have 3, -1, 3, 2; of sample 1: -1, 1, -1, 0."""
    x = torch.tensor([[1.0, 0], [0, 1]], device=device)
    weight = torch.tensor([[3.0, -1], [-1, 1], [3, -1], [2, 0]], device=device)
    values, rows = matmul_topk(x, weight, None, 3)
    assert values.tolist() == [[3, 3, 2], [1, 0, -1]]
    assert rows.tolist() == [[0, 2, 3], [1, 3, 0]]
    bias = torch.tensor([0, 0, 1.0, 0], device=device)
    exclude = torch.tensor([[103, -1], [101, 100]], device=device)
    values, rows = matmul_topk(x, weight, bias, 3, exclude=exclude, row_offset=100)
    assert values.tolist() == [[4, 3, -1], [0, 0, -INF]]
    assert rows.tolist() == [[102, 100, 101], [102, 103, -1]]


# 2.
def test_reference_is_torch_topk() -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, 20, generator=g).double(), torch.randn(500, 20, generator=g).double()
    values, rows = reference(x, weight, None, 30)
    expected = (x @ weight.T).topk(30)
    assert torch.equal(rows, expected.indices) and torch.equal(values, expected.values)


# 3.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1),
        (0, 37, 16),
        (5, 0, 7),
        (1, 5000, 1),
        (65, 2051, 100),
        (64, 1024, 64),
        (257, 1537, 384),
    ],
    ids=name_of,
)
def test_no_worse_than_torch(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    b, n, d = shape
    k = 17
    g = torch.Generator().manual_seed(0)
    x = torch.randn(b, d, generator=g).to(dtype).to(device)
    weight = torch.randn(n, d, generator=g).to(dtype).to(device)
    bias = torch.randn(n, generator=g).to(device)
    values, rows = matmul_topk(x, weight, bias, k)
    assert values.shape == rows.shape == (b, k)
    found = min(k, n)
    assert (rows[:, found:] == -1).all() and (values[:, found:] == -INF).all()
    values, rows = values[:, :found], rows[:, :found]
    if not rows.numel():
        return
    z = x.double() @ weight.double().T + bias.double()
    low = (x.float() @ weight.float().T + bias).to(dtype).double()
    mine, best = z.gather(1, rows), z.topk(found).values
    assert_no_worse(values, low.gather(1, rows), mine, dtype, what="scores")
    assert (values[:, :-1] >= values[:, 1:]).all()
    assert all(len(set(r)) == found for r in rows.tolist()), "a row came twice"
    # Two scores may change places only when they lie closer than the error of a score.
    slack = 2 * (values.double() - mine).abs().max() + 1e-6 * best.abs().max()
    assert (best - mine <= slack).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_equals_torch_topk_without_ties(dtype: torch.dtype, device: str) -> None:
    """Row r scores a permutation of 0..n-1: 64 * (p // 64) + p % 64, exact in every format."""
    n = 4999
    place = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    weight = torch.stack([place // 64, place % 64], 1).to(dtype).to(device)
    x = torch.tensor([[64.0, 1.0], [-64.0, -1.0]]).to(dtype).to(device)
    values, rows = matmul_topk(x, weight, None, 300)
    expected = (x.float() @ weight.float().T).topk(300)
    assert torch.equal(rows, expected.indices) and torch.equal(values, expected.values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_formats_of_x_and_table_mix(dtype: torch.dtype, x_dtype: torch.dtype, device: str) -> None:
    x, weight, bias = whole_numbers(9, 700, 24, F32)
    check_equal(x.to(x_dtype), weight.to(dtype), bias, 20, device)


# Ties and k.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_ties_take_the_lower_row(dtype: torch.dtype, device: str) -> None:
    for b, n, d in ((1, 3000, 1), (5, 4999, 2), (70, 1500, 7), (257, 2051, 16)):
        x, weight, bias = whole_numbers(b, n, d, dtype, most=1 if d < 4 else 3)
        for k in (1, 5, 100):
            check_equal(x, weight, None, k, device)
            check_equal(x, weight, bias, k, device)
    check_equal(
        torch.zeros(70, 8, dtype=dtype), whole_numbers(1, 2500, 8, dtype)[1], None, 50, device
    )


@pytest.mark.parametrize("device", DEVICES)
def test_scores_that_rise_and_fall_with_the_row(device: str) -> None:
    """The worst orders for a running threshold: every row is a new best, and none but the first k
    is.
    """
    weight = torch.arange(6000.0).reshape(-1, 1)
    check_equal(torch.tensor([[1.0], [-1.0], [0.0]]), weight, None, 40, device)


@pytest.mark.parametrize("device", DEVICES)
def test_zeros_of_both_signs_tie(device: str) -> None:
    weight = torch.tensor([[-0.0], [0.0], [-0.0], [0.0]], device=device)
    _, rows = matmul_topk(torch.tensor([[1.0], [-1.0]], device=device), weight, None, 3)
    assert rows.tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [0, 1, 5, 300])
def test_k_beyond_the_rows(n: int, device: str) -> None:
    x, weight, bias = whole_numbers(9, n, 6, F32)
    for k in (1, max(n, 1), n + 1, n + 40, 4 * n + 7):
        check_equal(x, weight, bias, k, device)
        values, rows = matmul_topk(x.to(device), weight.to(device), bias.to(device), k)
        assert (rows[:, n:] == -1).all() and (values[:, n:] == -INF).all()


@pytest.mark.parametrize("device", DEVICES)
def test_every_row_when_k_is_all(device: str) -> None:
    check_equal(*whole_numbers(33, 1500, 9, BF16), 1500, device)


@pytest.mark.parametrize("device", DEVICES)
def test_an_empty_batch(device: str) -> None:
    check_equal(
        torch.empty(0, 4),
        torch.ones(9, 4),
        None,
        3,
        device,
        exclude=torch.empty(0, 2, dtype=torch.int64),
    )


# 4. Boundary ids, exclusions, padding.
@pytest.mark.parametrize("device", DEVICES)
def test_first_and_last_row_win(device: str) -> None:
    for n in (1, 2, 255, 256, 1025, 4999):
        for best in {0, n - 1}:
            weight = torch.zeros(n, 3)
            weight[best] = 1
            values, rows = matmul_topk(torch.ones(66, 3, device=device), weight.to(device), None, 1)
            assert (rows == best).all() and (values == 3).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [0, 7, 2**33, 2**40])
def test_exclusions(offset: int, device: str) -> None:
    x, weight, bias = whole_numbers(33, 1500, 9, F32)
    g = torch.Generator().manual_seed(5)
    exclude = torch.randint(0, 1500, (33, 60), generator=g) + offset
    _, best = reference(x, weight, bias, 25, row_offset=offset)
    exclude[:, :25] = best  # what would win
    exclude[:, 25:27] = best[:, :2]  # twice
    exclude[:, 27] = -1
    exclude[:, 28] = offset + 1500  # another shard's
    exclude[:, 29] = offset - 1 if offset else -1
    check_equal(x, weight, bias, 30, device, exclude=exclude, row_offset=offset)
    _, rows = matmul_topk(
        *(t.to(device) for t in (x, weight, bias)),
        30,
        exclude=exclude.to(device),
        row_offset=offset,
    )
    assert not (rows[:, :, None] == exclude.to(device)[:, None, :]).any()


@pytest.mark.parametrize("device", DEVICES)
def test_exclusions_of_everything_and_of_nothing(device: str) -> None:
    x, weight, bias = whole_numbers(5, 40, 9, F32)
    every = torch.arange(40).repeat(5, 1)
    every[2, 11] = -1
    values, rows = matmul_topk(
        x.to(device), weight.to(device), bias.to(device), 4, exclude=every.to(device)
    )
    assert rows.tolist() == [[-1] * 4, [-1] * 4, [11, -1, -1, -1], [-1] * 4, [-1] * 4]
    assert (values == -INF).sum() == 19
    check_equal(x, weight, bias, 4, device, exclude=torch.empty(5, 0, dtype=torch.int64))
    check_equal(x, weight, bias, 4, device, exclude=torch.full((5, 3), -1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("poison", [math.nan, INF, 60000.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_padding_is_never_returned(dtype: torch.dtype, poison: float, device: str) -> None:
    x, weight, bias = whole_numbers(33, 1500, 17, dtype)
    for rows in (0, 1, 1027, 1499):
        weight[rows:], bias[rows:] = poison, poison
        check_equal(x, weight, bias, 20, device, rows=rows)
        _, got = matmul_topk(
            x.to(device), weight.to(device), bias.to(device), 20, rows=rows, row_offset=2**35
        )
        assert ((got < 2**35 + rows) & ((got >= 2**35) | (got == -1))).all()
        weight, bias = whole_numbers(33, 1500, 17, dtype)[1:]


# What is not finite.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nan_scores_are_never_returned(dtype: torch.dtype, device: str) -> None:
    x, weight, bias = whole_numbers(70, 700, 9, dtype)
    weight[3::7, 4] = math.nan
    bias[5::11] = math.nan
    x[66, 2] = math.nan
    x[0, 8] = math.nan
    check_equal(x, weight, bias, 30, device)
    values, rows = matmul_topk(x.to(device), weight.to(device), bias.to(device), 700)
    assert not values.isnan().any()
    assert (rows[0] == -1).all() and (rows[66] == -1).all()
    left = sum(r % 7 != 3 and r % 11 != 5 for r in range(700))
    assert ((rows >= 0).sum(1)[1:66] == left).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_infinite_scores(dtype: torch.dtype, device: str) -> None:
    """+inf is a score like others; a row at -inf is a place that no row fills."""
    x, weight, bias = whole_numbers(5, 90, 9, dtype)
    bias[[3, 50]], bias[[7, 80]] = INF, -INF
    check_equal(x, weight, bias, 90, device)
    values, rows = matmul_topk(x.to(device), weight.to(device), bias.to(device), 90)
    assert rows[:, :2].tolist() == [[3, 50]] * 5
    assert (rows[:, 88:] == -1).all()
    assert (values[:, 88:] == -INF).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_scores_at_the_edges_are_finite(dtype: torch.dtype, device: str) -> None:
    edge = 65280.0 if dtype == BF16 else 65504.0
    weight = torch.full((700, 40), -edge, device=device).to(dtype)
    weight[400] = edge
    values, rows = matmul_topk(torch.full((3, 40), edge, device=device).to(dtype), weight, None, 5)
    assert values.isfinite().all() and rows.tolist() == [[400, 0, 1, 2, 3]] * 3
    assert values[0, 0].item() == pytest.approx(40 * edge**2, rel=1e-6)


# 6. Threads, shards.
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_threads_and_repeats_change_nothing(dtype: torch.dtype, threads: None) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(70, 40, generator=g).to(dtype)
    weight = torch.randn(9001, 40, generator=g).to(dtype)
    weight[4000:8000] = weight[:4000]  # ties across tiles and workers
    torch.set_num_threads(1)
    first = matmul_topk(x, weight, None, 60)
    for count in (1, 2, 2, 2, 4, 3):
        torch.set_num_threads(count)
        got = matmul_topk(x, weight, None, 60)
        assert torch.equal(got[0], first[0]) and torch.equal(got[1], first[1])


@pytest.mark.parametrize("device", DEVICES)
def test_shards_merge_to_the_whole(device: str) -> None:
    x, weight, bias = (t.to(device) for t in whole_numbers(33, 3001, 9, BF16))
    values, rows = matmul_topk(x, weight, bias, 50, row_offset=2**34)
    parts = [
        matmul_topk(x, weight[a:b].contiguous(), bias[a:b].contiguous(), 50, row_offset=2**34 + a)
        for a, b in ((0, 20), (20, 1700), (1700, 3001))
    ]
    joined, their = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)
    # Parts stand in order of row.
    order = torch.sort(joined, dim=1, descending=True, stable=True).indices[:, :50]
    assert torch.equal(joined.gather(1, order), values)
    assert torch.equal(their.gather(1, order), rows)
