"""A schedule and an optimizer of one's own, handed to a model of every kind."""

from typing import Any

import pytest
import torch
from cascade_common import make_batch
from kinds_under_test import MODELS, TREE, cascade

from xmlkernels import InputError
from xmlkernels.models.base import Model
from xmlkernels.optim import three_phase, warmup_cosine


def trained(model: Model, steps: int = 3) -> dict[str, torch.Tensor]:
    for number in range(steps):
        model.step(make_batch(TREE, 6, seed=number))
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(model: Model, before: dict[str, torch.Tensor]) -> set[str]:
    """The first parts of the names of what has changed, counters left out."""
    now = model.state_dict()
    names = (n for n in before if not n.endswith("counter") and not torch.equal(before[n], now[n]))
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", MODELS)
def test_a_schedule_of_ones_own_sets_every_rate(name: str) -> None:
    asked: list[int] = []

    def schedule(step: int) -> float:
        asked.append(step)
        return 0.0 if step < 2 else 0.5

    model = MODELS[name].make(schedule=schedule)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    asked.clear()
    trained(model, 2)
    assert asked == [0, 1] and {g["lr"] for g in model.optimizer.param_groups} == {0.0}
    assert all(
        torch.equal(before[k], v)
        for k, v in model.state_dict().items()
        if k.endswith("weight")  # at a rate of 0 nothing moves but moments and counters
    )
    trained(model, 1)
    assert asked == [0, 1, 2]
    rates = [g["lr"] for g in model.optimizer.param_groups]
    assert rates[:2] == [0.005, 0.005] and set(rates[2:]) <= {0.05}
    tables = {table.split(".")[0] for table in model.tables()}
    assert {"encoder", *tables} <= moved(model, before)


@pytest.mark.parametrize("name", MODELS)
def test_the_default_schedule_handed_over_gives_the_same_bits(name: str) -> None:
    def schedule(step: int) -> float:
        return warmup_cosine(step, 0, 100)

    own = MODELS[name].make(schedule=schedule)
    named = MODELS[name].make(**({"schedule": "warmup_cosine"} if name == "cascade" else {}))
    ours, theirs = trained(own), trained(named)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_function_in_place_of_three_phases_leaves_beta1_as_it_is() -> None:
    cycle = cascade()
    trained(cycle, 1)
    assert {g["betas"][0] for g in cycle.optimizer.param_groups} == {three_phase(0, 0, 100, 20)[1]}
    own = cascade(schedule=lambda step: three_phase(step, 0, 100, 20)[0])
    trained(own, 1)
    assert {g["betas"][0] for g in own.optimizer.param_groups} == {0.9}


@pytest.mark.parametrize("name", MODELS)
def test_an_optimizer_of_ones_own_trains_everything_that_is_no_table(name: str) -> None:
    seen: list[list[dict[str, Any]]] = []

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        seen.append(groups)
        return torch.optim.SGD(groups, lr=1.0, momentum=0.5)

    model = MODELS[name].make(optimizer=make)
    assert isinstance(model.optimizer, torch.optim.SGD)
    (groups,) = seen
    assert len(groups) == MODELS[name].groups and groups[1]["weight_decay"] == 0
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for g in groups for p in g["params"]} == trainable
    twin = MODELS[name].make(optimizer=make)
    trained(model, 2)
    twin.load_tensors({k: v.clone() for k, v in model.tensors().items()})
    ours, theirs = trained(model), trained(twin)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    plain = trained(MODELS[name].make(), 5)
    assert any(not torch.equal(ours[k], plain[k]) for k in plain if k.startswith("encoder."))


@pytest.mark.parametrize("name", MODELS)
def test_the_default_optimizer_handed_over_gives_the_same_bits(name: str) -> None:
    own = MODELS[name].make(
        optimizer=lambda groups: torch.optim.AdamW(
            groups, lr=0.01, eps=MODELS[name].epsilon, fused=True
        )
    )
    ours, theirs = trained(own), trained(MODELS[name].make())
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("name", MODELS)
def test_neither_is_part_of_what_a_checkpoint_says(name: str) -> None:
    own = MODELS[name].make(schedule=lambda step: 1.0, optimizer=torch.optim.SGD)
    assert own.config() == MODELS[name].make().config()


def test_a_schedule_by_an_unknown_name_is_refused() -> None:
    with pytest.raises(InputError, match="schedule: expected one of three_phase, warmup_cosine"):
        cascade(schedule="cosine")
