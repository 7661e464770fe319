"""`bce_step_`: what is stored. Bits equal to the reference's where fp32 results are equal,
independence of threads, shards and tiles."""

import pytest
import torch

from common import (
    DEVICES,
    DTYPES,
    LOW,
    Step,
    assert_same_bits,
    dyadic_step,
    make_counter,
    make_hyper,
    name_of,
    needs_kernels,
    random_step,
    unit,
)
from xmlkernels import ops
from xmlkernels.reference.bce_step import bce_step_ as reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIZES = [(1, 1, 1), (5, 300, 7), (33, 1025, 64), (64, 3001, 100), (257, 1100, 130)]


def multiples(n: int, d: int, exponent: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """Random 6-bit multiples of 2^exponent."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randint(-63, 64, (n, d), generator=g) * 2.0**exponent).to(dtype)


def check_bits(step: Step, device: str, *, but: tuple[str, ...] = ()) -> None:
    step = step.to(device)
    got, expected = step.run(), step.reference()
    assert_same_bits(got, expected, but=("loss", *but))
    torch.testing.assert_close(got["loss"], expected["loss"], rtol=2e-6, atol=0)


# 7. Equal fp32 results must give equal stored bits: every sum of a dyadic step is exact in any
# order.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("size", SIZES, ids=name_of)
def test_sgd_bits(size: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    step = dyadic_step(*size, dtype)
    check_bits(step, device)
    n = size[1]
    # an inexact result must be among them, or rounding is not tested
    if dtype in LOW and n > 1:
        exact = step.exact()["weight"]
        assert (exact.to(dtype).double() != exact).float().mean() > 0.3
    l2 = make_hyper(2.0**-8, 2.0**-4, scale=0.5, dx_scale=4.0)
    check_bits(step.replace(hyper=l2, bias=torch.zeros(n)), device)
    check_bits(step.replace(hyper=l2, decoupled=True), device)
    g = torch.Generator().manual_seed(3)
    quarters = torch.randint(-2, 5, step.tensors["pos_row"].shape, generator=g) / 4
    check_bits(step.replace(pos_value=quarters), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("state", DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_momentum_bits(dtype: torch.dtype, state: torch.dtype, device: str) -> None:
    for b, n, d in ((5, 300, 7), (65, 1025, 100)):
        hyper = make_hyper(2.0**-8, 2.0**-4, 0.5, scale=0.5, dx_scale=4.0)
        step = dyadic_step(b, n, d, dtype, hyper=hyper).replace(momentum=multiples(n, d, -5, state))
        check_bits(step, device)
        check_bits(step.replace(decoupled=True), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("state", DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_adam_bits(dtype: torch.dtype, state: torch.dtype, device: str) -> None:
    """First step from zero states: m / (1 - b1) = g, v / (1 - b2) = g², the step is lr times the
    sign of g.
    """
    for b, n, d in ((5, 300, 7), (65, 521, 40)):  # odd batches: no gradient is zero, so eps may be
        hyper = make_hyper(2.0**-8, 2.0**-4, 0.5, 0.75, 0.0, scale=1.0)
        step = dyadic_step(b, n, d, dtype, hyper=hyper, decoupled=True).replace(
            momentum=torch.zeros(n, d, dtype=state),
            second=torch.zeros(n, d, dtype=state),
            counter=make_counter(step=0),
        )
        check_bits(step, device)
        exact = step.exact()
        assert (exact["second"] > 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("state", LOW, ids=name_of)
def test_adam_state_bits(state: torch.dtype, device: str) -> None:
    """From states that are not zero: both moments are exact in fp32, the weight is within a
    unit.
    """
    b, n, d = 5, 1025, 40
    hyper = make_hyper(2.0**-8, 0.0, 0.5, 0.75, 2.0**-10, scale=1.0)
    step = dyadic_step(b, n, d, BF16, x_bits=3, hyper=hyper).replace(
        momentum=multiples(n, d, -13, state), second=multiples(n, d, -18, state, seed=2).abs()
    )
    step = step.to(device)
    got, expected, exact = step.run(), step.reference(), step.exact()
    assert_same_bits({k: got[k] for k in ("momentum", "second", "dx")}, expected)
    for name in ("momentum", "second"):
        assert (exact[name].to(state).double() != exact[name]).float().mean() > 0.2
    assert (
        (got["weight"].double() - exact["weight"]).abs() <= 1.001 * unit(exact["weight"], BF16)
    ).all()
    assert (got["weight"] == expected["weight"]).float().mean() > 0.999


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_kahan_bits(dtype: torch.dtype, device: str) -> None:
    for b, n, d in ((5, 300, 7), (65, 1025, 100)):
        step = dyadic_step(b, n, d, dtype).replace(kahan=multiples(n, d, -14, dtype))
        check_bits(step, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("exponent", [-22, -24, -30, -36, -44])
def test_fp16_subnormal_bits(exponent: int, device: str) -> None:
    """Weights and updates around and far below the smallest fp16 number, 2^-24."""
    step = dyadic_step(33, 700, 24, F16, exponent=max(exponent, -24), lr=2.0 ** (exponent - 4))
    if exponent < -24:
        step = step.replace(weight=torch.zeros(700, 24, dtype=F16))
    check_bits(step, device)


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_subnormal_bits(device: str) -> None:
    """Subnormal weights keep their bits' meaning where the product of lr and gradient is normal in
    fp32.
    """
    step = dyadic_step(33, 700, 24, BF16, lr=2.0**-124).replace(
        weight=multiples(700, 24, -133, BF16)
    )
    step = step.replace(x=step.tensors["x"][:, :1].repeat(1, 24))
    weight = step.tensors["weight"]
    weight[:, 1::2] = -weight[:, 0::2]
    check_bits(step, device, but=("dx",))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_row_offset_beyond_2_32_reaches_the_generator(dtype: torch.dtype, device: str) -> None:
    base = dyadic_step(33, 700, 24, dtype)
    stored = []
    for offset in (0, 5, 2**32 - 300, 2**32 + 5, 2**40 + 5):
        step = base.replace(row_offset=offset)
        check_bits(step, device)
        stored.append(step.to(device).run()["weight"])
    for i, one in enumerate(stored):
        for other in stored[:i]:
            assert not torch.equal(one, other)


@pytest.mark.parametrize("device", DEVICES)
def test_counter_takes_the_low_words(device: str) -> None:
    base = dyadic_step(33, 700, 24, BF16)
    for seed, number in ((0, 0), (2**31 + 7, 1), (-1, 2**31), (2**62 + 3, 2**33 + 1)):
        check_bits(base.replace(counter=make_counter(seed, number)), device)


# 6. Threads, repeats, shards.
MIXES = {
    "fp32": (F32, {"momentum": F32}, {}),
    "bf16": (BF16, {"momentum": BF16, "bias": F32}, {"decoupled": True}),
    "bf16 adam": (BF16, {"momentum": BF16, "second": BF16}, {}),
    "fp16 kahan": (F16, {"kahan": F16}, {}),
}


@needs_kernels
@pytest.mark.parametrize("mix", MIXES)
def test_threads_and_repeats_change_nothing(mix: str, threads: None) -> None:
    dtype, states, options = MIXES[mix]
    hyper = make_hyper(0.02, 0.01, 0.9, 0.999, 1e-8)
    for b, n, d in ((100, 4999, 64), (7, 15011, 17)):
        step = random_step(b, n, d, dtype, states=states, hyper=hyper, **options)
        torch.set_num_threads(1)
        first = step.run()
        for count in (1, 2, 2, 2, 4, 3):
            torch.set_num_threads(count)
            assert_same_bits(step.run(), first)


@pytest.mark.gpu
@pytest.mark.parametrize("mix", MIXES)
def test_repeats_change_nothing_on_the_card(mix: str) -> None:
    dtype, states, options = MIXES[mix]
    hyper = make_hyper(0.02, 0.01, 0.9, 0.999, 1e-8)
    step = random_step(100, 20011, 100, dtype, states=states, hyper=hyper, **options).to("cuda")
    first = step.run()
    for _ in range(10):
        assert_same_bits(step.run(), first)


def shard(step: Step, begin: int, end: int) -> Step:
    t = step.tensors
    mine = (t["pos_row"] >= begin) & (t["pos_row"] < end)
    part = {k: t[k][begin:end] for k in ("weight", "momentum", "second", "kahan", "bias") if k in t}
    part |= {"pos_row": t["pos_row"][mine] - begin, "pos_sample": t["pos_sample"][mine]}
    return step.replace(**part, row_offset=step.options.get("row_offset", 0) + begin)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("cut", [1, 1237])
def test_two_shards_are_the_whole(cut: int, mix: str, device: str) -> None:
    if device == "cpu" and ops.missing:
        pytest.skip(
            "torch.mm, on which the reference stands, sums in another order for another shape"
        )
    dtype, states, options = MIXES[mix]
    n = 2001
    step = random_step(
        65, n, 40, dtype, states=states, hyper=make_hyper(0.02, 0.01, 0.9, 0.999, 1e-3), **options
    )
    step = step.replace(row_offset=2**33).to(device)
    whole, parts = step.run(), [shard(step, 0, cut).run(), shard(step, cut, n).run()]
    before = step.tensors["weight"].double().abs()
    for name in step.tensors.keys() & {"weight", "momentum", "second", "kahan"}:
        joined = torch.cat([p[name] for p in parts])
        size = (
            torch.maximum(before, whole[name].double().abs()) if name == "weight" else whole[name]
        )
        allowed = unit(size, whole[name].dtype) if name != "kahan" else unit(before, dtype)
        assert ((joined.double() - whole[name].double()).abs() <= allowed).all(), name
        assert name == "kahan" or (joined == whole[name]).float().mean() > 0.98, name
    for name in ("dx", "loss"):
        torch.testing.assert_close(
            parts[0][name] + parts[1][name], whole[name], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_two_shards_are_the_whole_to_the_bit_where_sums_are_exact(
    dtype: torch.dtype, device: str
) -> None:
    step = dyadic_step(65, 3001, 40, dtype, row_offset=2**32 - 1000).to(device)
    whole = step.run()
    for cut in (1, 999, 1500, 3000):
        a, b = shard(step, 0, cut).run(), shard(step, cut, 3001).run()
        joined = {"weight": torch.cat([a["weight"], b["weight"]]), "dx": a["dx"] + b["dx"]}
        assert_same_bits(joined, whole)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_rest_of_the_batch_width_and_table_changes_no_row(
    dtype: torch.dtype, device: str
) -> None:
    """A row's stored bits depend on its own sums alone: not on D's tail, B's tail or where its tile
    begins.
    """
    step = dyadic_step(70, 1500, 72, dtype).to(device)
    t, whole = step.tensors, step.run()
    narrow = {k: t[k][:, :50].contiguous() for k in ("weight", "x")}
    assert_same_bits(
        {"weight": step.replace(**narrow).run()["weight"]}, {"weight": whole["weight"][:, :50]}
    )
    x = torch.cat([t["x"], torch.zeros(13, 72, dtype=dtype, device=device)])
    assert_same_bits({"weight": step.replace(x=x).run()["weight"]}, whole)


def test_the_reference_is_the_definition_of_the_bits() -> None:
    """One weight, stored by hand: 0.5 - 2^-8 * (1/2 * 1/16) with the draw of (seed 11, step 3, row
    0, group 0, stream 0).
    """
    from xmlkernels.reference.rounding import philox

    word = int(philox((torch.tensor(11), torch.tensor(3)), (torch.tensor(0),) * 4)[0])
    weight, x = torch.zeros(1, 1, dtype=BF16), torch.full((1, 1), 1 / 16, dtype=BF16)
    none = torch.empty(0, dtype=torch.int64)
    reference(weight, x, none, none.int(), make_hyper(2.0**-8 * 1.25), make_counter())
    value = -(2.0**-13) * 1.25  # bits 0xB920 0000: representable, so no draw may move it
    assert float(weight) == value
    weight = torch.full((1, 1), 0.5, dtype=BF16)
    reference(
        weight,
        torch.zeros(1, 1, dtype=BF16),
        none,
        none.int(),
        make_hyper(2.0**-8, 1.0),
        make_counter(),
        decoupled=True,
    )
    # 0.5 (1 - 2^-8) = 0x3EFF0000: representable again. With decay 1.25 it is 0x3EFEC000: up where
    # the draw is >= 0x4000.
    assert float(weight) == 0.498046875
    weight = torch.full((1, 1), 0.5, dtype=BF16)
    zero = torch.zeros(1, 1, dtype=BF16)
    reference(
        weight, zero, none, none.int(), make_hyper(2.0**-8, 1.25), make_counter(), decoupled=True
    )
    up = (word & 0xFFFF) >= 0x4000
    assert int(weight.view(torch.int16)) == (0x3EFF if up else 0x3EFE)
