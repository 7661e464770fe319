"""`bce_step_`: rounding is without bias through the op, so that small updates add up in every
format.
"""

import pytest
import torch

from common import DEVICES, LOW, Step, make_counter, make_hyper, name_of, random_step, unit

F32, BF16 = torch.float32, torch.bfloat16


# 7. Rounding without bias through the op.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("units", [0.3, 0.01], ids=["0.3 units", "0.01 units"])
@pytest.mark.parametrize("w", [0.0, 1e-4, 0.0117, 0.5, 2.0**-20])
@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_the_mean_of_many_small_updates_is_the_update(
    dtype: torch.dtype, w: float, units: float, device: str
) -> None:
    """x = ±1 in turn over equal weights: z = 0 and the gradient is ±1/2, so each weight should move
    by ∓lr / 2.
    """
    n, d, repeats = 2048, 16, 12
    start = float(torch.tensor(w).to(dtype))
    step_size = (
        1e-5 if w == 0 and dtype == BF16 else float(unit(torch.tensor(start), dtype)) * units
    )
    x = torch.tensor([[1.0, -1.0] * (d // 2)])
    base = Step(
        {
            "weight": torch.full((n, d), start, dtype=dtype),
            "x": x.to(dtype),
            "hyper": make_hyper(2 * step_size),
            "pos_row": torch.empty(0, dtype=torch.int64),
            "pos_sample": torch.empty(0, dtype=torch.int32),
        }
    )
    sums = torch.zeros(2, dtype=torch.float64)
    for number in range(repeats):
        weight = (
            base.replace(counter=make_counter(7, number)).to(device).run()["weight"].double().cpu()
        )
        sums += torch.stack([weight[:, 0::2].sum(), weight[:, 1::2].sum()])
    count = repeats * n * d // 2
    for mean, sign in zip(sums / count, (-1, 1), strict=True):
        target = start + sign * step_size
        spacing = float(unit(torch.tensor(target), dtype))
        part = target / spacing % 1
        sigma = spacing * (part * (1 - part) / count) ** 0.5
        assert abs(float(mean) - target) <= 5 * sigma + 2.0**-16 * spacing, (
            float(mean) - target
        ) / max(sigma, 1e-300)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_small_steps_add_up_where_nearest_would_stand_still(
    dtype: torch.dtype, device: str
) -> None:
    """200 steps of decay by 2^-14 each; half a unit is 2^-9 or 2^-12 of a weight. An empty batch:
    nothing else moves it.
    """
    n, d, steps = 512, 16, 200
    empty = random_step(0, n, d, dtype, hyper=make_hyper(2.0**-4, 2.0**-10), decoupled=True).tensors
    weight = torch.full((n, d), 0.75, dtype=dtype)
    step = Step(empty | {"weight": weight}, {"decoupled": True}).to(device)
    for number in range(steps):
        step = step.replace(weight=step.run()["weight"], counter=make_counter(9, number).to(device))
    spacing = float(unit(torch.tensor(0.75), dtype))
    target = 0.75 * (1 - 2.0**-14) ** steps
    # each step adds the variance of one rounding, at most p (1 - p) of a unit with p = 0.75 * 2^-14
    # / unit
    p = 0.75 * 2.0**-14 / spacing
    sigma = spacing * (steps * p * (1 - p) / (n * d)) ** 0.5
    assert abs(float(step.tensors["weight"].double().mean()) - target) < 5 * sigma
    assert 0.75 - target > 20 * sigma


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("state", LOW, ids=name_of)
def test_low_precision_moments_follow_a_slow_decay(state: torch.dtype, device: str) -> None:
    """b2 = 0.999 changes v by 1e-3 a step, under half a bf16 unit: rounded to nearest it would
    never move.
    """
    n, d, steps = 256, 16, 200
    step = random_step(0, n, d, F32, hyper=make_hyper(0.0, 0.0, 0.999, 0.999, 1e-8))
    states = {k: torch.full((n, d), 1.5, dtype=state) for k in ("momentum", "second")}
    step = step.replace(**states).to(device)
    for number in range(steps):
        got = step.run()
        step = step.replace(
            momentum=got["momentum"],
            second=got["second"],
            counter=make_counter(4, number).to(device),
        )
    target = 1.5 * 0.999**steps
    for name in states:
        mean = float(step.tensors[name].double().mean())
        # spread of a single walk: about sqrt(200 p (1 - p)) units of 2^-7 with p = 0.2
        assert mean == pytest.approx(target, abs=5 * 2.0**-7 * (steps * 0.16 / (n * d)) ** 0.5)
    assert not torch.equal(step.tensors["momentum"], step.tensors["second"]), (
        "streams share their words"
    )
