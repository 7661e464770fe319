import copy
import itertools
import math

import pytest
import torch
from torch import nn

from xmlkernels.errors import InputError
from xmlkernels.optim import (
    LossScaler,
    clip_gradients,
    encoder_optimizer,
    set_learning_rate,
    step_unless,
    three_phase,
    warmup_cosine,
)


class T5LayerNorm(nn.Module):  # as transformers writes it: no subclass of torch's
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.sa_layer_norm = nn.LayerNorm(4)
        self.n1 = nn.RMSNorm(4)
        self.n2 = type("MyNorm", (nn.LayerNorm,), {})(4)
        self.n3 = T5LayerNorm(4)
        self.LayerNorm_like = nn.Linear(4, 4, bias=False)  # the name of a norm on a matrix
        self.scale = nn.Parameter(torch.ones(4))  # a vector that is no norm
        self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.lin.weight


def filled(optimizer: torch.optim.Optimizer, value: float | None = None) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p) if value is None else torch.full_like(p, value)


def snapshot(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            found += [p.detach().clone(), *(v.clone() for v in optimizer.state[p].values())]
    return found


def test_groups_follow_module_types() -> None:
    module = Mixed()
    optimizer = encoder_optimizer(module, 1e-3, 0.1)
    names = {id(p): n for n, p in module.named_parameters()}
    decayed, plain = ([names[id(p)] for p in g["params"]] for g in optimizer.param_groups)
    assert decayed == ["scale", "lin.weight", "LayerNorm_like.weight"]
    assert plain == [
        "lin.bias",
        "sa_layer_norm.weight",
        "sa_layer_norm.bias",
        "n1.weight",
        "n2.weight",
        "n2.bias",
        "n3.weight",
    ]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert all(g["fused"] and g["eps"] == 1e-6 for g in optimizer.param_groups)


def test_adamw_against_the_formula() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    optimizer = encoder_optimizer(module, 0.01, 0.1)
    expected = {n: p.detach().double().clone() for n, p in module.named_parameters()}
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in expected.items()}
    for step in range(1, 4):
        filled(optimizer)
        for n, p in module.named_parameters():
            grad = p.grad.double()
            m, v = moments[n]
            m.mul_(0.9).add_(grad, alpha=0.1)
            v.mul_(0.999).add_(grad**2, alpha=0.001)
            decay = 0.1 if n == "weight" else 0.0
            expected[n] -= 0.01 * decay * expected[n]
            expected[n] -= 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-6)
        optimizer.step()
    for n, p in module.named_parameters():
        torch.testing.assert_close(p.detach().double(), expected[n], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fused", [True, False])
def test_skipped_step_changes_no_bit(fused: bool) -> None:
    torch.manual_seed(0)
    module = Mixed()
    optimizer = encoder_optimizer(module, 1e-2, 0.1)
    if not fused:
        for group in optimizer.param_groups:
            group["fused"] = False
    for _ in range(3):
        filled(optimizer)
        optimizer.step()
    before = snapshot(optimizer)
    filled(optimizer, math.nan)
    step_unless(optimizer, torch.ones(1))
    after = snapshot(optimizer)
    assert len(before) == len(after) == 4 * 10
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not hasattr(optimizer, "found_inf")

    twin = copy.deepcopy(optimizer)
    filled(optimizer)
    for g, h in zip(optimizer.param_groups, twin.param_groups, strict=True):
        for p, q in zip(g["params"], h["params"], strict=True):
            q.grad = p.grad.clone()
    step_unless(optimizer, torch.zeros(1))
    twin.step()
    assert all(torch.equal(a, b) for a, b in zip(snapshot(optimizer), snapshot(twin), strict=True))
    assert not torch.equal(snapshot(optimizer)[0], before[0])


def test_schedule() -> None:
    factors = [warmup_cosine(s, 4, 12) for s in range(13)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.5)
    assert factors[11] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert factors[12] == 0.0 == warmup_cosine(99, 4, 12)
    assert all(a >= b for a, b in itertools.pairwise(factors[3:]))
    assert warmup_cosine(0, 0, 1) == 1.0
    assert warmup_cosine(9, 20, 10) == 0.5
    for bad in [(-1, 0, 1), (0, -1, 1), (0, 0, 0)]:
        with pytest.raises(InputError, match="schedule"):
            warmup_cosine(*bad)


def test_three_phases() -> None:
    """CascadeXML's run on Amazon-670K: 15 epochs, 1 of warm-up, the last 3 falling; rates as
    factors of 1e-4.
    """
    per_epoch = 1000
    at = [
        three_phase(s, per_epoch, 15 * per_epoch, 3 * per_epoch) for s in range(15 * per_epoch + 9)
    ]
    assert at[0] == (pytest.approx(0.1), pytest.approx(0.95))
    assert at[per_epoch - 1] == at[per_epoch] == at[12 * per_epoch - 2] == (1.0, 0.85)
    assert at[499][0] == pytest.approx(0.55, abs=1e-3)
    assert at[499][1] == pytest.approx(0.9, abs=1e-3)
    assert at[12 * per_epoch - 1][0] < 1.0
    assert at[13 * per_epoch - 1][0] == pytest.approx(0.75, abs=1e-3)
    assert at[14 * per_epoch - 1][0] == pytest.approx(0.25, abs=1e-3)
    assert at[15 * per_epoch - 1] == at[-1] == (pytest.approx(1e-3), pytest.approx(0.95))
    for phase in (at[:1000], [(-f, -b) for f, b in at[11_998:]]):
        assert all(a[0] <= b[0] and a[1] >= b[1] for a, b in itertools.pairwise(phase))
    # The product of both cycles: where the rate is high the momentum is low.
    assert all(0.1 <= f <= 1 and b == pytest.approx(0.95 - (f - 0.1) / 9) for f, b in at[:1000])


def test_three_phases_at_the_edges() -> None:
    assert three_phase(0, 0, 1, 0) == (1.0, 0.85)
    assert [three_phase(s, 0, 4, 2)[0] for s in range(4)] == pytest.approx(
        [1.0, 0.75025, 0.25075, 1e-3]
    )
    assert three_phase(9, 10, 10, 0) == (1.0, 0.85)  # all of it is warm-up
    # The cooldown begins where the warm-up ends.
    assert three_phase(5, 4, 12, 99)[0] < 1 == three_phase(3, 4, 12, 99)[0]
    for bad in [(-1, 0, 1, 0), (0, -1, 1, 0), (0, 0, 0, 0), (0, 0, 1, -1), (0, 5, 4, 0)]:
        with pytest.raises(InputError, match="schedule"):
            three_phase(*bad)


def test_learning_rates() -> None:
    optimizer = encoder_optimizer(Mixed(), 1.0, 0.0)
    optimizer.param_groups[1]["lr"] = held = torch.tensor(1.0)
    set_learning_rate(optimizer, [2.0, 4.0], 0.5)
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert optimizer.param_groups[1]["lr"] is held and held.item() == 2.0
    with pytest.raises(InputError, match="2 rates"):
        set_learning_rate(optimizer, [1.0], 0.5)


def test_clipping() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_gradients([a, b], 10.0).item() == 5.0
    assert a.grad.tolist() == [3.0, 0.0]
    assert clip_gradients([a, b], 1.0).item() == 5.0
    torch.testing.assert_close(torch.cat([a.grad, b.grad]), torch.tensor([0.6, 0.0, 0.8]))
    with pytest.raises(InputError, match=r"max_norm: expected a number > 0, got 0\.0"):
        clip_gradients([a], 0.0)


def test_loss_scaler() -> None:
    scaler = LossScaler("cpu", init_scale=8.0, interval=2)
    p, without = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def step(value: float) -> float:
        p.grad = torch.tensor([value, 8.0])
        found = scaler.unscale_([p, without])
        scaler.update(found)
        return found.item()

    assert step(16.0) == 0.0 and p.grad.tolist() == [2.0, 1.0] and scaler.scale.item() == 8.0
    assert step(16.0) == 0.0 and scaler.scale.item() == 16.0
    assert step(math.inf) == 1.0 and scaler.scale.item() == 8.0
    assert step(math.nan) == 1.0 and scaler.scale.item() == 4.0 and scaler.skipped.item() == 2
    assert step(1.0) == 0.0 and scaler.growth_tracker.item() == 1
    saved = {k: v.clone() for k, v in scaler.tensors().items()}
    other = LossScaler("cpu")
    assert other.scale.item() == 2.0**16
    held = other.scale
    other.load_tensors(saved)
    assert held.item() == 4.0 and other.growth_tracker.item() == 1 and other.skipped.item() == 2
    for _ in range(9):
        step(math.inf)
    assert scaler.scale.item() == 1.0
    with pytest.raises(InputError, match="loss scaler"):
        other.load_tensors({"scale": saved["scale"]})


def test_input_errors() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(InputError, match="trainable"):
        encoder_optimizer(frozen, 1e-3, 0.0)
    for bad in [{"lr": -1.0}, {"weight_decay": -1.0}, {"eps": 0.0}, {"betas": (0.9, 1.0)}]:
        with pytest.raises(InputError, match="encoder_optimizer"):
            encoder_optimizer(nn.Linear(2, 2), **{"lr": 1e-3, "weight_decay": 0.0, **bad})
    for bad in [
        {"init_scale": 0.5},
        {"init_scale": 2.0**25},
        {"growth": 0.9},
        {"backoff": 0.0},
        {"backoff": 1.5},
        {"interval": 0},
    ]:
        with pytest.raises(InputError, match="LossScaler"):
            LossScaler("cpu", **bad)  # type: ignore[arg-type]
    LossScaler("cpu", init_scale=1.0, growth=1.0, backoff=1.0, interval=1)
