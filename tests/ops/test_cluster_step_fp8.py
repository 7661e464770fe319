"""`cluster_step_` on tables in e4m3 with a power-of-two scale per row."""

import pytest
import torch

from common import (
    DEVICES,
    assert_no_worse,
    assert_same_bits,
    bits,
    decoded,
    fp8_step,
    make_hyper,
    needs_kernels,
    opcheck,
)
from common_cluster import (
    ClusterStep,
    assert_scores,
    dyadic_cluster_step,
    random_cluster_step,
    torch_cluster_step,
)
from xmlkernels.errors import InputError

F32, BF16 = torch.float32, torch.bfloat16
ADAM = make_hyper(0.003, 0.01, 0.9, 0.95, 1e-3, 0.5, 2.0)
SHAPES = {
    "small": (5, [3, 0, 9, 1, 8], 3, 7),
    "mixed": (40, [9, 0, 60, 7, 11, 3, 100, 10], 4, 72),
    "level 0": (65, [600], 1, 40),
}


def to_cluster(step: ClusterStep, scale: float | torch.Tensor = 2.0**-8) -> ClusterStep:
    eight = fp8_step(step, scale)
    return ClusterStep(eight.tensors, eight.options)


def make(shape: str) -> ClusterStep:
    states = {"bias": F32, "momentum": BF16, "second": BF16}
    step = random_cluster_step(*SHAPES[shape], F32, x_dtype=BF16, states=states, hyper=ADAM)
    return to_cluster(step.replace(weight=step.tensors["weight"] * 3))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_torch(shape: str, device: str) -> None:
    step = make(shape).to(device)
    t = step.tensors
    table = decoded(t["weight"], t["row_scale"])
    got, exact = step.run(), step.exact()
    low = torch_cluster_step(
        ClusterStep(
            {k: v for k, v in t.items() if k != "row_scale"} | {"weight": table.to(BF16)},
            step.options,
        )
    )
    for name in ("dx", "loss", "bias"):
        assert_no_worse(got[name], low[name], exact[name], BF16, what=name)
    assert_scores(got["scores"], low["scores"], exact["scores"], BF16)
    for name in ("momentum", "second"):
        assert_no_worse(got[name], low[name], exact[name], BF16, what=name, rounded=BF16)
    new = decoded(got["weight"], got["row_scale"])
    top = torch.maximum(t["row_scale"][:, 1], new.abs().amax(1))
    assert torch.equal(got["row_scale"], torch.stack([t["row_scale"][:, 0], top], 1))
    untouched = ~step.mask().any(0)
    for name in ("weight", "row_scale", "momentum", "second", "bias"):
        assert_same_bits({name: got[name][untouched]}, {name: t[name][untouched]})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_sums_give_the_bits_of_the_reference(shape: str, device: str) -> None:
    """Scales from 2^-11 to 2^-8: subnormals, normals, and rows that saturate."""
    for exponent in (-6, -18):
        base = dyadic_cluster_step(
            *SHAPES[shape], F32, exponent=exponent, lr=2.0 ** (exponent - 2), x_dtype=BF16
        )
        n = len(base.tensors["weight"])
        step = to_cluster(base, 2.0 ** -(torch.arange(n) % 4 + 8).float()).to(device)
        got, expected = step.run(), step.reference()
        assert_same_bits(got, expected, but=("loss",))
        assert (bits(got["weight"]) != bits(step.tensors["weight"])).any()


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    """All but the schema's own test, which compares by torch.allclose: that has no e4m3. It is made
    up for below.
    """
    t = make("small").to(device).tensors
    t["row_scale"][:, 1] = 0  # so that the step raises it
    args = ("weight", "x", "clusters", "row_ptr", "pos_row", "pos_sample", "hyper", "counter")
    states = {k: t[k] for k in ("bias", "momentum", "second", "row_scale")}
    call = [t[k] for k in args]
    call.insert(4, 9)
    function = torch.ops.xmlkernels.cluster_step_.default
    before = {k: v.clone() for k, v in t.items()}
    some = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(function, tuple(call), states, test_utils=some)
    assert_same_bits(before, t)  # opcheck works on copies
    function(*call, **states)
    changed = {k for k in t if not torch.equal(bits(before[k]), bits(t[k]))}
    assert changed == {"weight", *states}


@needs_kernels
def test_threads_change_nothing(threads: None) -> None:
    step = make("level 0")
    torch.set_num_threads(1)
    first = step.run()
    for count in (2, 3):
        torch.set_num_threads(count)
        assert_same_bits(step.run(), first)


def test_compensation_is_refused() -> None:
    step = make("small")
    with pytest.raises(
        InputError,
        match="cluster_step_: argument kahan: expected None for an 8-bit table, got a tensor",
    ):
        step.replace(kahan=torch.zeros_like(step.tensors["weight"])).run()
