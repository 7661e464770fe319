"""The CUDA kernels compiled as host code and run on an emulated card (emulated_card.h), against the
references: bit for bit where fp32 results are exact, within a unit elsewhere. It needs the CUDA
toolkit and no card."""

import pytest
import torch

from common import DTYPES, LOW, assert_same_bits, bits, huge_table, make_counter, name_of, unit
from cuda_arithmetic import DTYPES as CODES
from cuda_arithmetic import call, run_on_host
from nvcc import need_nvcc
from sparse_common import RULES, RowStep, dyadic_rows, multiples, random_bags, random_rows
from xmlkernels.ops.hyper import DECAY
from xmlkernels.reference.rounding import (
    MOMENTUM,
    SECOND,
    WEIGHT,
    philox,
    random16,
    round_stochastic,
    saturate,
)

pytestmark = pytest.mark.compile
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def compiler() -> None:
    need_nvcc()


def test_philox_words() -> None:
    """The known answers of Random123's kat_vectors, and random counters against the reference."""
    known = [
        ([0] * 6, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 6, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0xA4093822, 0x299F31D0, 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    random = torch.randint(0, 2**32, (500, 6), generator=torch.Generator().manual_seed(0))
    given = torch.cat([torch.tensor([k for k, _ in known]), random])
    got = torch.empty(given.shape[0], 4, dtype=torch.int32)
    call("philox_words", given.to(torch.int32), given.shape[0], got)
    words = got.long() & 0xFFFFFFFF
    assert [" ".join(f"{int(w):08x}" for w in row) for row in words[:3]] == [
        answer for _, answer in known
    ]
    k0, k1, *counter = given.unbind(1)
    assert torch.equal(words, torch.stack(philox((k0, k1), tuple(counter)), 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("row", [0, 5, 2**32 - 1, 2**32 + 7, 2**40 + 3])
def test_every_column_takes_its_bits(row: int) -> None:
    for stream in (WEIGHT, MOMENTUM, SECOND):
        got = torch.empty(53, dtype=torch.int16)
        call("row_bits", 2**62 + 3, 2**33 + 1, row, 53, stream, got)
        expected = random16(torch.tensor([2**62 + 3, 2**33 + 1]), torch.tensor([row]), 53, stream)[
            0
        ]
        assert torch.equal(got.long() & 0xFFFF, expected)


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_rounding(dtype: torch.dtype) -> None:
    """Every exponent of fp32, every kind of draw: the reference's bits."""
    g = torch.Generator().manual_seed(1)
    pattern = torch.randint(-(2**31), 2**31, (200_000,), generator=g).to(torch.int32)
    special = torch.tensor(
        [
            0.0,
            -0.0,
            1.0,
            65504.0,
            65519.9,
            3.4e38,
            -3.4e38,
            2.0**-24,
            2.0**-25,
            2.0**-14,
            1e-42,
            torch.inf,
        ]
    )
    value = torch.cat([pattern.view(F32), special.repeat_interleave(64)])
    value = value[~value.isnan()]
    draw = torch.randint(0, 65536, value.shape, generator=g)
    draw[::7], draw[::11] = 65535, 0
    got = torch.empty(value.shape, dtype=torch.int16)
    call("round16", value, draw.to(torch.int32), value.numel(), CODES[dtype], got)
    differing = got != bits(round_stochastic(value, draw, dtype))
    assert not differing.any(), value[differing][:5]
    back = torch.empty_like(value)
    call("nearest", value, value.numel(), CODES[dtype], got, back)
    assert torch.equal(got, bits(saturate(value, dtype)))
    assert torch.equal(back, got.view(dtype).float())


def check_bits(step: RowStep) -> None:
    before = {k: v.clone() for k, v in step.tensors.items()}
    got, expected = run_on_host(step), step.run(reference=True)
    assert_same_bits(got, expected)
    assert not torch.equal(bits(got["param"]), bits(before["param"])), "nothing was updated"


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("rule", RULES)
def test_update_bits(rule: str, dtype: torch.dtype) -> None:
    """Vector and scalar layouts, one lane to several passes of a warp, each with every dtype of the
    states.
    """
    for size in ((3, 37, 7), (130, 300, 64), (40, 90, 257), (9, 20, 520)):
        for state in DTYPES if RULES[rule] else [dtype]:
            step = dyadic_rows(rule, size, dtype, state=state)
            check_bits(step)
            check_bits(step.replace(decoupled=True, row_offset=2**33 + 5))
            check_bits(step.replace(grad=step.tensors["grad"].to(BF16)))


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
@pytest.mark.parametrize("rule", RULES)
def test_kahan_bits(rule: str, dtype: torch.dtype) -> None:
    for size in ((3, 37, 7), (130, 300, 64)):
        step = dyadic_rows(rule, size, dtype)
        step.tensors["hyper"][DECAY] = 0
        step.tensors["kahan"] = multiples(
            step.tensors["param"].shape, -14, dtype, torch.Generator().manual_seed(3)
        )
        check_bits(step)


@pytest.mark.parametrize("rule", ["adagrad", "adam"])
def test_row_wise_and_row_step_bits(rule: str) -> None:
    for state in DTYPES:
        check_bits(dyadic_rows(rule, (65, 200, 64), BF16, state=state, row_wise=True))
    if rule == "adam":
        step = dyadic_rows(rule, (65, 200, 40), BF16)
        check_bits(
            step.replace(
                row_step=torch.zeros(200, dtype=torch.int64), counter=make_counter(step=99)
            )
        )


CASES = {
    "bf16": (BF16, {}),
    "fp16 decoupled": (F16, {"decoupled": True}),
    "fp32 states in bf16": (F32, {"state": BF16}),
    "row-wise": (BF16, {"row_wise": True}),
    "row-wise, L2, kahan": (BF16, {"row_wise": True, "kahan": True}),
    "late decay": (BF16, {"lazy": True, "kahan": True}),
    "own steps": (BF16, {"row_step": True, "lazy": True}),
}


def check_close(step: RowStep) -> None:
    """Within a unit of the exact result, and mostly the reference's own bits; other rows are
    untouched.
    """
    got, expected, exact = run_on_host(step), step.run(reference=True), step.exact()
    for name, value in got.items():
        if not value.is_floating_point() or name == "row_decay":
            assert torch.equal(value, expected[name]), name
            continue
        if name != "kahan":
            wide = exact[name].double()
            size = (
                torch.maximum(wide.abs(), step.tensors[name].double().abs())
                if name == "param"
                else wide
            )
            allowed = 1.01 * unit(size, value.dtype)
            if value.dtype == F32:  # rounding noise of sums, as large as the reference's own
                allowed = (
                    2 * (expected[name].double() - wide).abs().max()
                    + 4 * torch.finfo(F32).eps * wide.abs().max()
                )
            assert ((value.double() - wide).abs() <= allowed).all(), name
        if value.dtype != F32:
            assert (value == expected[name]).double().mean() > 0.98, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", RULES)
def test_update_is_close(rule: str, case: str) -> None:
    dtype, given = CASES[case]
    needs = {
        "row_wise": "second" in RULES[rule],
        "row_step": rule == "adam",
        "state": bool(RULES[rule]),
    }
    given = {k: v for k, v in given.items() if needs.get(k, True)}
    for shape in ((130, 2000, 64), (70, 300, 385)):
        check_close(random_rows(rule, shape, dtype, fill=5, **given))


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_bags_are_close(rule: str, weights: bool) -> None:
    for shape in ((9, 200, 40, 64), (33, 500, 300, 20)):
        for dtype in DTYPES:
            check_close(random_bags(rule, shape, dtype, weights=weights))
    if "second" in RULES[rule]:
        check_close(random_bags(rule, (9, 200, 40, 64), BF16, weights=weights, row_wise=True))


@pytest.mark.parametrize("rule", RULES)
def test_long_runs(rule: str) -> None:
    """Rows with more than 128 occurrences go through the other kernels; so do not those with
    128.
    """
    step = random_bags(rule, (40, 1500, 6, 100), BF16)
    assert (torch.bincount(step.tensors["token"].clamp(min=0)) > 128).sum() >= 2
    check_close(step)
    step = random_bags(rule, (40, 2 * 128 + 1 + 7, 3, 20), F32, fill=0, weights=False)
    order = torch.randperm(264, generator=torch.Generator().manual_seed(2))
    step.tensors["token"][:] = torch.tensor([0] * 128 + [2] * 129 + [1] * 7)[order]
    step.tensors["offset"][-1] = 264
    check_close(step)


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_threads_and_blocks_changes_nothing(rule: str) -> None:
    for step in (
        random_rows(rule, (130, 2000, 70), BF16, row_wise="second" in RULES[rule]),
        random_rows(rule, (130, 2000, 520), F16, lazy=True),
        random_bags(rule, (40, 1500, 60, 36), BF16, row_wise="second" in RULES[rule]),
    ):
        assert_same_bits(run_on_host(step), run_on_host(step, reverse=True))


def test_addresses_beyond_2_31() -> None:
    """The last row of a table of more than 2^31 values, most of which is one piece of memory mapped
    again and again.
    """
    n, d = 2**27 + 2**16, 16
    table = huge_table(n, d, 1 << 21)
    step = dyadic_rows("sgd", (2, 2, d), BF16)
    rows = torch.tensor([0, n - 1])
    table[rows] = step.tensors["param"]
    run_on_host(step.replace(param=table, rows=rows), copy=False)
    for entry, row in enumerate((0, n - 1)):
        t = step.tensors
        alone = {
            "param": t["param"][entry : entry + 1],
            "grad": t["grad"][entry : entry + 1],
            "rows": torch.tensor([0]),
        }
        expected = step.replace(**alone, row_offset=row).run(reference=True)["param"]
        assert torch.equal(bits(table[row : row + 1]), bits(expected)), row
    assert not table[1:1000].any() and not table[-1000:-1].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_touches_nothing(bad: float) -> None:
    for width in (64, 7):
        for grad in DTYPES:
            step = random_rows("adam", (30, 90, width), BF16, grad=grad, fill=3)
            # Fill holds NaN.
            assert not torch.equal(run_on_host(step)["param"], step.tensors["param"])
            step.tensors["grad"][29, -1] = bad
            assert_same_bits(run_on_host(step), step.tensors)
    # More rows than 1,024 blocks check at a time: each of some blocks' rows is seen.
    step = random_rows("sgd", (4500, 5000, 256), BF16)
    for row in (0, 3, 4095, 4096, 4499):
        broken = step.replace(grad=step.tensors["grad"].clone())
        broken.tensors["grad"][row, row % 256] = bad
        assert_same_bits(run_on_host(broken), broken.tensors)
    bags = random_bags("adam", (9, 200, 40, 64), BF16)
    for name in ("grad", "token_weight"):
        broken = bags.replace(**{name: bags.tensors[name].clone()})
        broken.tensors[name].view(-1)[-1] = bad
        assert_same_bits(run_on_host(broken), broken.tensors)
