"""The sparse updates: what is stored. Bits equal to the reference's where fp32 results are,
threads, shards, the mean.
"""

from typing import Any

import pytest
import torch

from common import (
    DEVICES,
    DTYPES,
    LOW,
    assert_same_bits,
    make_counter,
    make_hyper,
    name_of,
    needs_kernels,
    unit,
)
from sparse_common import RULES, RowStep, dyadic_rows, multiples, random_bags, random_rows

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIZES = [(1, 1, 1), (3, 37, 7), (130, 300, 64), (65, 100, 100), (40, 90, 257)]


def check_bits(step: RowStep, device: str) -> None:
    step = step.to(device)
    assert_same_bits(step.run(), step.run(reference=True))


# 7. Equal fp32 results must give equal stored bits.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("rule", RULES)
def test_bits(rule: str, dtype: torch.dtype, size: tuple[int, int, int], device: str) -> None:
    for state in DTYPES if RULES[rule] else [dtype]:
        step = dyadic_rows(rule, size, dtype, state=state)
        check_bits(step, device)
        check_bits(step.replace(decoupled=True), device)
        # an inexact result must be among them, or rounding is not tested
        for name, value in step.exact().items():
            kind = step.tensors[name].dtype
            if kind in LOW and size[0] > 3:
                rows = step.tensors["rows"]
                assert (value[rows].to(kind).double() != value[rows]).double().mean() > 0.3, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("state", DTYPES, ids=name_of)
@pytest.mark.parametrize("rule", ["adagrad", "adam"])
def test_row_wise_bits(rule: str, state: torch.dtype, device: str) -> None:
    for size in SIZES:
        step = dyadic_rows(rule, size, BF16, state=state, row_wise=True)
        check_bits(step, device)
        # With two magnitudes in a row the state is still exact in fp32; the weight, a quotient, is
        # so to its last place.
        g = torch.Generator().manual_seed(4)
        odd = torch.randint(0, 32, step.tensors["grad"].shape, generator=g) * 2 + 1
        step = step.replace(
            grad=odd / 64, second=step.tensors["second"].float().mul(8).round().div(8).to(state)
        ).to(device)
        got, expected, exact = step.run(), step.run(reference=True), step.exact()
        # Else the mean itself is rounded.
        but = ("param",) if size[2] & (size[2] - 1) == 0 else ("param", "second")
        assert_same_bits(got, expected, but=but)
        assert (
            (got["param"].double() - exact["param"]).abs() <= 1.001 * unit(exact["param"], BF16)
        ).all()
        assert (got["param"] == expected["param"]).double().mean() > 0.99


@pytest.mark.parametrize("device", DEVICES)
def test_bits_by_the_row_s_own_step(device: str) -> None:
    """Rows at their first update, while the counter is far ahead: the bits of a first step, at the
    counter's words.
    """
    step = dyadic_rows("adam", (65, 200, 40), BF16)
    step = step.replace(row_step=torch.zeros(200, dtype=torch.int64), counter=make_counter(step=99))
    check_bits(step, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
def test_bits_of_a_decay_that_is_not_owed(rule: str, device: str) -> None:
    """row_decay = decay_sum: the row shrinks by exp(0) = 1, whatever hyper's decay says."""
    step = dyadic_rows(rule, (65, 200, 40), BF16, decoupled=True)
    lazy = step.replace(row_decay=torch.full((200,), -0.375), decay_sum=torch.tensor([-0.375]))
    check_bits(lazy, device)
    none = step.replace(hyper=make_hyper(2.0**-8, 0.0, 0.5, 0.75, 0.0, scale=0.5)).to(device).run()
    assert_same_bits(lazy.to(device).run(), none, but=("row_decay",))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW, ids=name_of)
@pytest.mark.parametrize("rule", RULES)
def test_kahan_bits(rule: str, dtype: torch.dtype, device: str) -> None:
    for count, n, d in SIZES:
        # Without decay: its factor has more bits than fp32 beside kahan's.
        step = dyadic_rows(rule, (count, n, d), dtype)
        step = step.replace(hyper=make_hyper(2.0**-8, 0.0, 0.5, 0.75, 0.0, scale=0.5))
        check_bits(
            step.replace(kahan=multiples((n, d), -14, dtype, torch.Generator().manual_seed(5))),
            device,
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("exponent", [-22, -24, -30, -36])
def test_fp16_subnormal_bits(exponent: int, device: str) -> None:
    """Weights and updates around and far below the smallest fp16 number, 2^-24."""
    step = dyadic_rows(
        "sgd",
        (65, 200, 40),
        F16,
        exponent=max(exponent, -24),
        lr=2.0 ** (exponent + 2),
        decoupled=False,
    )
    step = step.replace(hyper=make_hyper(2.0 ** (exponent + 2), scale=0.5))
    if exponent < -24:
        step = step.replace(param=torch.zeros(200, 40, dtype=F16))
    check_bits(step, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
def test_row_offset_beyond_2_32_and_counters_reach_the_generator(rule: str, device: str) -> None:
    base, stored = dyadic_rows(rule, (65, 200, 40), BF16), []
    row_step = {"row_step": torch.zeros(200, dtype=torch.int64)} if rule == "adam" else {}
    base = base.replace(**row_step)  # Adam's counter may then move without moving the weights
    for offset in (0, 5, 2**32 - 100, 2**40 + 5):
        for seed, number in ((11, 3), (2**31 + 7, 1), (-1, 2**33 + 1)):
            step = base.replace(row_offset=offset, counter=make_counter(seed, number))
            check_bits(step, device)
            stored.append(step.to(device).run()["param"])
    for i, one in enumerate(stored):
        assert not any(torch.equal(one, other) for other in stored[:i])


# 6. Threads, repeats, shards.
MIXES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "sgd bf16": ("sgd", BF16, {"grad": BF16}),
    "momentum fp32": ("momentum", F32, {}),
    "adagrad row-wise": ("adagrad", F16, {"row_wise": True, "state": BF16}),
    "adam bf16": ("adam", BF16, {"lazy": True, "row_step": True}),
    "adam kahan": ("adam", F16, {"kahan": True, "state": F32}),
}


@needs_kernels
@pytest.mark.parametrize("mix", MIXES)
def test_threads_and_repeats_change_nothing(mix: str, threads: None) -> None:
    rule, dtype, given = MIXES[mix]
    for step in (
        random_rows(rule, (2000, 5000, 65), dtype, **given),
        random_bags(rule, (300, 40000, 3000, 33), dtype, **given),
    ):
        torch.set_num_threads(1)
        first = step.run()
        for count in (1, 2, 4, 3):
            torch.set_num_threads(count)
            assert_same_bits(step.run(), first)


@pytest.mark.gpu
@pytest.mark.parametrize("mix", MIXES)
def test_repeats_change_nothing_on_the_card(mix: str) -> None:
    rule, dtype, given = MIXES[mix]
    for step in (
        random_rows(rule, (20000, 50000, 130), dtype, **given).to("cuda"),
        random_bags(rule, (3000, 400000, 30000, 130), dtype, **given).to("cuda"),
    ):
        first = step.run()
        for _ in range(10):
            assert_same_bits(step.run(), first)


def shard(step: RowStep, begin: int, end: int) -> RowStep:
    t = step.tensors
    part = {
        k: t[k][begin:end].clone()
        for k in ("param", "momentum", "second", "kahan", "row_step", "row_decay")
        if k in t
    }
    if "token" in t:
        part["token"] = torch.where(
            (t["token"] >= begin) & (t["token"] < end), t["token"] - begin, -1
        )
    else:
        mine = (t["rows"] >= begin) & (t["rows"] < end)
        part |= {"rows": t["rows"][mine] - begin, "grad": t["grad"][mine]}
    return step.replace(**part, row_offset=step.options.get("row_offset", 0) + begin)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mix", MIXES)
def test_two_shards_are_the_whole(mix: str, device: str) -> None:
    """To the bit: a row's sum does not know in which table it stands."""
    rule, dtype, given = MIXES[mix]
    for step in (
        random_rows(rule, (500, 1000, 40), dtype, **given),
        random_bags(rule, (30, 900, 1000, 40), dtype, **given),
    ):
        moved = step.replace(row_offset=2**33).to(device)
        whole = moved.run()
        for cut in (0, 1, 437, 999):
            a, b = shard(moved, 0, cut).run(), shard(moved, cut, 1000).run()
            assert_same_bits({k: torch.cat([a[k], b[k]]) for k in a}, whole)


# 7. Rounding is without bias through the op.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("units", [0.3, 0.01], ids=["0.3 units", "0.01 units"])
@pytest.mark.parametrize("w", [0.0, 1e-4, 0.5, 2.0**-20])
@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_the_mean_of_many_small_updates_is_the_update(
    dtype: torch.dtype, w: float, units: float, device: str
) -> None:
    """Gradients of ±1 in turn over equal weights: each should move by ∓lr."""
    n, d, repeats = 1024, 16, 8
    start = float(torch.tensor(w).to(dtype))
    size = 1e-5 if w == 0 and dtype == BF16 else float(unit(torch.tensor(start), dtype)) * units
    base = RowStep(
        "sgd",
        {
            "param": torch.full((n, d), start, dtype=dtype),
            "rows": torch.arange(n),
            "hyper": make_hyper(size),
            "grad": torch.tensor([[1.0, -1.0] * (d // 2)]).repeat(n, 1),
        },
    )
    sums = torch.zeros(2, dtype=torch.float64)
    for number in range(repeats):
        param = (
            base.replace(counter=make_counter(7, number)).to(device).run()["param"].double().cpu()
        )
        sums += torch.stack([param[:, 0::2].sum(), param[:, 1::2].sum()])
    count = repeats * n * d // 2
    for mean, sign in zip(sums / count, (-1, 1), strict=True):
        target = start + sign * size
        spacing = float(unit(torch.tensor(target), dtype))
        part = target / spacing % 1
        sigma = spacing * (part * (1 - part) / count) ** 0.5
        assert abs(float(mean) - target) <= 5 * sigma + 2.0**-16 * spacing, (
            float(mean) - target
        ) / max(sigma, 1e-300)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row_wise", [False, True], ids=["full", "row-wise"])
@pytest.mark.parametrize("state", LOW, ids=name_of)
def test_low_precision_moments_follow_a_slow_decay(
    state: torch.dtype, row_wise: bool, device: str
) -> None:
    """b2 = 0.999 changes v by 1e-3 a step, under half a bf16 unit: rounded to nearest it would
    never move.
    """
    n, d, steps = 2048 if row_wise else 128, 2 if row_wise else 32, 200
    step = RowStep(
        "adam",
        {
            "param": torch.zeros(n, d),
            "rows": torch.arange(n),
            "grad": torch.zeros(n, d),
            "momentum": torch.full((n, d), 1.5, dtype=state),
            "counter": make_counter(),
            "second": torch.full((n,) if row_wise else (n, d), 1.5, dtype=state),
            "hyper": make_hyper(0.0, 0.0, 0.999, 0.999, 1e-8),
        },
    ).to(device)
    for number in range(steps):
        step = step.replace(**step.run(), counter=make_counter(4, number).to(device))
    target = 1.5 * 0.999**steps
    for name in ("momentum", "second"):
        value = step.tensors[name].double()
        # spread of a single walk: about sqrt(200 p (1 - p)) units of 2^-7 with p = 0.2
        allowed = 5 * 2.0**-7 * (steps * 0.16 / value.numel()) ** 0.5
        assert float(value.mean()) == pytest.approx(target, abs=allowed), name
    first = step.tensors["momentum"][:, 0] if row_wise else step.tensors["momentum"]
    assert not torch.equal(first, step.tensors["second"]), "streams share their words"
