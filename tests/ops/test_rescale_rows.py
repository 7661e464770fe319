"""`rescale_rows_`: rows of an e4m3 table that outgrow half their range."""

import sys

import pytest
import torch
from torch import Tensor

from common import (
    DEVICES,
    assert_same_bits,
    bits,
    decoded,
    huge_table,
    make_counter,
    needs_kernels,
    opcheck,
    to_fp8,
    unit,
)
from xmlkernels.errors import InputError
from xmlkernels.ops import rescale_rows_
from xmlkernels.reference.rescale_rows import rescale_rows_ as reference

E4M3 = torch.float8_e4m3fn
S = 2.0**-8


def random_table(n: int, d: int, seed: int = 0) -> dict[str, Tensor]:
    """Rows of every size from far below their range to beyond it, several scales. Within a row
    values of every size too: dividing by powers of two rounds the subnormals alone."""
    g = torch.Generator().manual_seed(seed)
    size = torch.exp2(torch.rand(n, 1, generator=g) * 14 - 12)
    scale = torch.exp2(-torch.randint(6, 10, (n,), generator=g).float())
    weight, row_scale = to_fp8(
        torch.randn(n, d, generator=g) * size * torch.exp2(-16 * torch.rand(n, d, generator=g)),
        scale,
    )
    return {"weight": weight, "row_scale": row_scale, "counter": make_counter()}


def run(t: dict[str, Tensor], op: object = rescale_rows_, row_offset: int = 0) -> dict[str, Tensor]:
    t = {k: v.clone() for k, v in t.items()}
    count = op(t["weight"], t["row_scale"], t["counter"], row_offset)  # type: ignore[operator]
    assert count.shape == (1,) and count.dtype == torch.int64
    return t | {"count": count}


# 1.
@pytest.mark.parametrize("device", DEVICES)
def test_by_hand(device: str) -> None:
    """Row 0 lies at exactly half (224 s): kept. Row 1 at 240 s: doubled, its even codes halve
    exactly. Row 2 claims 1000 s: doubled three times, and its maximum becomes true."""
    weight = torch.tensor([[224.0, -3], [-240, 16], [64, 8]]).to(E4M3).to(device)
    row_scale = torch.tensor([[S, 224 * S], [S, 240 * S], [S, 1000 * S]], device=device)
    count = rescale_rows_(weight, row_scale, make_counter().to(device))
    assert count.tolist() == [2]
    assert weight.float().tolist() == [[224, -3], [-120, 8], [8, 1]]
    assert row_scale.tolist() == [[S, 224 * S], [2 * S, 240 * S], [8 * S, 64 * S]]


# 2. and 3.: every quotient is exact, so the bits are the reference's.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "shape", [(1, 1), (0, 5), (9, 7), (700, 130), (513, 64), (2000, 3)], ids=str
)
def test_the_reference_bit_for_bit(shape: tuple[int, int], device: str) -> None:
    t = {k: v.to(device) for k, v in random_table(*shape).items()}
    assert_same_bits(run(t, row_offset=2**33 - 9), run(t, reference, row_offset=2**33 - 9))


@pytest.mark.parametrize("op", [rescale_rows_, reference])
def test_values_stay_within_a_unit_and_the_range_is_free_again(op: object) -> None:
    t = random_table(700, 130)
    got = run(t, op)
    old = decoded(t["weight"], t["row_scale"]).double()
    new = decoded(got["weight"], got["row_scale"]).double()
    scale = got["row_scale"][:, :1].double()
    assert ((new - old).abs() < unit(old / scale, E4M3) * scale).all()
    touched = got["row_scale"][:, 0] != t["row_scale"][:, 0]
    assert 0 < int(touched.sum()) == int(got["count"]) < 700
    assert torch.equal(got["row_scale"][touched, 1], new.abs().amax(1)[touched].float())
    # Rounding up may pass the half again by one unit, no more.
    assert (got["row_scale"][:, 1] <= 240 * got["row_scale"][:, 0]).all()
    kept = {k: t[k][~touched] for k in ("weight", "row_scale")}
    assert_same_bits(kept, {k: got[k][~touched] for k in kept})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("code", [1.0, 3.0, 0.5 / 8, 3 / 512, 1 / 512, 15.0, 416.0])
def test_it_is_unbiased(code: float, device: str) -> None:
    """Codes that stay exact and codes that fall below the smallest spacing, in many equal rows that
    grow fourfold.
    """
    n, d = 4000, 8
    weight = torch.full((n, d), code).to(E4M3).to(device)
    row_scale = torch.tensor([[S, 700 * S]], device=device).repeat(n, 1)
    rescale_rows_(weight, row_scale, make_counter().to(device))
    assert (row_scale[:, 0] == 4 * S).all()
    mean = weight.float().double().mean().cpu()
    fraction = torch.tensor(code / 4, dtype=torch.float64)
    assert abs(float(mean - fraction)) <= 5 * 0.5 * float(unit(fraction, E4M3)) / (n * d) ** 0.5


# 4.
@needs_kernels
def test_threads_shards_and_steps(threads: None) -> None:
    t = random_table(1300, 70)
    torch.set_num_threads(1)
    whole = run(t, row_offset=2**33 - 500)
    torch.set_num_threads(3)
    assert_same_bits(whole, run(t, row_offset=2**33 - 500))
    names = ("weight", "row_scale")
    parts = [
        run({k: t[k][a:b] for k in names} | {"counter": t["counter"]}, row_offset=2**33 - 500 + a)
        for a, b in ((0, 500), (500, 1300))
    ]
    for name in names:
        assert torch.equal(bits(torch.cat([p[name] for p in parts])), bits(whole[name])), name
    assert int(parts[0]["count"] + parts[1]["count"]) == int(whole["count"])
    for other in (run(t), run(t | {"counter": make_counter(step=4)}, row_offset=2**33 - 500)):
        assert torch.equal(other["row_scale"][:, 0], whole["row_scale"][:, 0])
        assert not torch.equal(bits(other["weight"]), bits(whole["weight"]))


# 5.
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    """All but the schema's own test, which has no e4m3; what changes is compared in the tests
    above.
    """
    t = {k: v.to(device) for k, v in random_table(40, 7).items()}
    some = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    args = (t["weight"], t["row_scale"], t["counter"], 3)
    opcheck(torch.ops.xmlkernels.rescale_rows_.default, args, test_utils=some)
    before = t["counter"].clone()
    rescale_rows_(*args)
    assert torch.equal(t["counter"], before)


@needs_kernels
def test_the_native_library_serves_the_op() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("xmlkernels::rescale_rows_", "CPU")


# 6.
@needs_kernels
@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="maps one piece of memory many times, as Linux can"
)
def test_addresses_beyond_2_31() -> None:
    """2^32 numbers, of which the last rows alone change; those between would be the same memory
    again and again.
    """
    table = huge_table(2**21, 1024, 1 << 21).view(E4M3)
    row_scale = torch.tensor([[S, 0.0]]).repeat(2**21, 1)
    small = random_table(64, 2048)
    table[-64:], row_scale[-64:] = small["weight"], small["row_scale"]
    count = rescale_rows_(table, row_scale, small["counter"])
    expected = run(small, row_offset=2**21 - 64)
    assert_same_bits(
        expected, expected | {"weight": table[-64:], "row_scale": row_scale[-64:], "count": count}
    )
    assert not bits(table[:64]).any() and 0 < int(count) < 64


@pytest.mark.parametrize("device", DEVICES)
def test_the_largest_scale_is_kept(device: str) -> None:
    weight = torch.full((2, 3), 448.0).to(E4M3).to(device)
    row_scale = torch.tensor([[2.0**100, 448 * 2.0**100], [2.0**99, torch.inf]], device=device)
    assert rescale_rows_(weight, row_scale, make_counter().to(device)).tolist() == [1]
    assert row_scale.tolist() == [[2.0**100, 448 * 2.0**100], [2.0**100, 224 * 2.0**100]]


# 7.
@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("weight", torch.zeros(6, 3), "torch.float8_e4m3fn"),
        ("weight", torch.zeros(6, 0).to(E4M3), "a table with at least one column"),
        ("weight", torch.zeros(3, 6).to(E4M3).T, "a contiguous tensor"),
        ("row_scale", torch.ones(6), r"torch.float32 \[6, 2\]"),
        ("row_scale", torch.full((6, 2), 0.3), "powers of two"),
        ("counter", torch.zeros(2), "torch.int64"),
        ("row_offset", -1, "0 or more"),
    ],
)
def test_message(name: str, value: Tensor | int, expected: str) -> None:
    t = random_table(6, 3) | {"row_offset": 0, name: value}
    with pytest.raises(InputError, match=f"rescale_rows_: argument {name}: expected {expected}"):
        rescale_rows_(t["weight"], t["row_scale"], t["counter"], t["row_offset"])  # type: ignore[arg-type]


def test_a_table_in_autograd_is_refused() -> None:
    t = random_table(6, 3)
    with pytest.raises(
        InputError, match="argument weight: expected a tensor that requires no gradient"
    ):
        rescale_rows_(t["weight"].requires_grad_(), t["row_scale"], t["counter"])
