"""How each training setting is tested: rates, schedules, clipping, running means, batches."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from config_runs import PER_EPOCH, STEPS, Case, Seen
from torch import Tensor

from xmlkernels.ops.hyper import DECAY, EPSILON, LR

LINEAR = {"layers": ("1,2", "2", "2")}  # a cascade whose coarsest level has the linear layer


def cosine(warmup: int, total: int = STEPS) -> list[float]:
    """Linear warm-up, then a cosine to 0."""
    rise = [(step + 1) / warmup for step in range(warmup)]
    return rise + [
        0.5 * (1 + math.cos(math.pi * step / (total - warmup))) for step in range(total - warmup)
    ]


def phases(warmup: int, cooldown: int, total: int = STEPS) -> list[float]:
    """Cosine from 1/10, plateau, cosine to 1/1000."""
    end = max(total - 2 - cooldown, warmup - 1)  # of the plateau

    def factor(step: int) -> float:
        if step < warmup - 1:
            return 0.55 - 0.45 * math.cos(math.pi * step / (warmup - 1))
        return 1 - 0.999 * (0.5 - 0.5 * math.cos(math.pi * max(0, step - end) / (total - 1 - end)))

    return [factor(step) for step in range(total)]


def rates_follow(plain: list[float], changed: list[float]) -> Callable[[Seen, Seen], None]:
    """In every step the encoder's rate, in units of its peak, is this one."""

    def holds(before: Seen, after: Seen) -> None:
        assert before.factors() == pytest.approx(plain, rel=1e-5)
        assert after.factors() == pytest.approx(changed, rel=1e-5)

    return holds


def table_rates(seen: Seen, table: int = -1) -> list[float]:
    return [float(step.hyper[table][LR]) for step in seen.steps]


def encoder_rates(plain: Seen, changed: Seen) -> None:
    factors = cosine(3)
    for seen, rate in ((plain, 1e-3), (changed, 4e-4)):
        assert [step.rate() for step in seen.steps] == pytest.approx(
            [rate * f for f in factors], rel=1e-5
        )
        # Is not the table's.
        assert table_rates(seen) == pytest.approx([0.02 * f for f in factors], rel=1e-5)


def word_rates(plain: Seen, changed: Seen) -> None:
    for seen, rate in ((plain, 0.02), (changed, 0.007)):
        assert table_rates(seen, 0) == pytest.approx([rate * f for f in cosine(3)], rel=1e-5)
        assert [step.rate() for step in seen.steps] == pytest.approx(
            [rate * f for f in cosine(3)], rel=1e-5
        )


def label_rates(plain: Seen, changed: Seen) -> None:
    for seen, rate in ((plain, 0.02), (changed, 0.003)):
        assert table_rates(seen) == pytest.approx([rate * f for f in cosine(3)], rel=1e-5)
        assert seen.factors() == pytest.approx(cosine(3), rel=1e-5)


def head_rates(plain: Seen, changed: Seen) -> None:
    """In every step tables and linear layer have the factor times the encoder's rate."""
    for seen, factor in ((plain, 10.0), (changed, 3.5)):
        for step in seen.steps:
            assert step.rate(head=True) == pytest.approx(factor * step.rate())
            assert [float(hyper[LR]) for hyper in step.hyper] == pytest.approx(
                [factor * step.rate()] * 3
            )


def encoder_decays(plain: Seen, changed: Seen) -> None:
    """Matrices decay, biases and norms do not."""
    assert [group["weight_decay"] for group in plain.steps[0].groups] == [0.0, 0.0]
    assert [group["weight_decay"] for group in changed.steps[0].groups] == [0.3, 0.0]


def cascade_decays(plain: Seen, changed: Seen) -> None:
    """Tables and linear layer take a tenth."""
    for seen, decay in ((plain, 0.05), (changed, 0.3)):
        decays = [group["weight_decay"] for group in seen.steps[0].groups]
        assert decays == pytest.approx([decay, 0.0, decay / 10, 0.0])
        tables = [float(hyper[DECAY]) for hyper in seen.steps[0].hyper]
        assert tables == pytest.approx([decay / 10] * 3)


def word_decays(plain: Seen, changed: Seen) -> None:
    assert float(plain.steps[0].hyper[0][DECAY]) == 0
    assert float(changed.steps[0].hyper[0][DECAY]) == pytest.approx(0.3)
    label_table = changed.steps[0].hyper[1]
    assert float(label_table[DECAY]) == 0  # it has --table-decay


def epsilons(
    plain: float, changed: float, words: tuple[float, float] | None = None
) -> Callable[[Seen, Seen], None]:
    """Every group of the encoder's AdamW has this epsilon, and the table of a bag of words.

    The label table never does.
    """

    def holds(before: Seen, after: Seen) -> None:
        for number, (seen, value) in enumerate(((before, plain), (after, changed))):
            assert all({group["eps"] for group in step.groups} == {value} for step in seen.steps)
            if words is not None:
                assert float(seen.steps[0].hyper[0][EPSILON]) == pytest.approx(words[number])
        last = [float(seen.steps[0].hyper[-1][EPSILON]) for seen in (before, after)]
        assert last[0] == last[1]

    return holds


def small_steps(plain: Seen, changed: Seen) -> None:
    """With a large epsilon, Adam's first step is rate x gradient / epsilon, not the rate.

    Epsilon is added to the bias-corrected root.
    """
    name = "encoder.model.encoder.layer.1.output.dense.weight"
    first = plain.steps[0].weights[name] - plain.start[name]
    assert float(first.abs().median()) == pytest.approx(plain.steps[0].rate(), rel=0.01)
    moved = changed.steps[0].weights[name] - changed.start[name]
    assert float(moved.abs().max()) < changed.steps[0].rate() * changed.steps[0].norm / 1e4 * 1.01
    assert moved.any()


def norms_are_clipped(limit: float) -> Callable[[Seen, Seen], None]:
    def holds(plain: Seen, changed: Seen) -> None:
        assert all(step.norm > 2 * limit for step in plain.steps)
        assert [step.norm for step in changed.steps] == pytest.approx([limit] * STEPS, rel=1e-3)

    return holds


def documents_of_steps(
    plain: tuple[int, int], changed: tuple[int, int]
) -> Callable[[Seen, Seen], None]:
    """Test for this many updates with this many documents each."""

    def holds(before: Seen, after: Seen) -> None:
        for seen, (steps, documents) in ((before, plain), (after, changed)):
            assert [len(step.index) for step in seen.steps] == [documents] * steps
            assert seen.report["steps"] == steps and len(set(seen.steps[0].index)) == documents

    return holds


def passes_of_steps(plain: list[int], changed: list[int]) -> Callable[[Seen, Seen], None]:
    """Test for this many documents per encoder pass; gradient caching passes each twice."""

    def holds(before: Seen, after: Seen) -> None:
        assert all(step.passes == plain for step in before.steps)
        assert all(step.passes == changed for step in after.steps)
        assert all(len(step.index) == 32 for step in (*before.steps, *after.steps))
        assert len(after.steps) == STEPS

    return holds


def means_follow(seen: Seen) -> None:
    """The checkpoint's means are those of the run's weights, by its own settings."""
    config, tensors = seen.config, seen.tensors
    start = round(config.ema_start * PER_EPOCH)
    taken = [
        n for n in range(len(seen.steps)) if n >= start and (n - start + 1) % config.ema_every == 0
    ]
    names = {key.removeprefix("average.") for key in tensors if key.startswith("average.")} - {
        "count"
    }
    assert int(tensors["average.count"]) == len(taken) and (taken or not config.ema)
    assert {name for name in names if name.startswith("encoder.")} == {
        n for n in seen.start if n.startswith("encoder.")
    }
    assert ("head.weight" in names) == config.ema_tables
    for name in names:
        mean: Tensor = torch.zeros(())
        for count, number in enumerate(taken):
            share = max(1 - config.ema, 1 / (count + 1))
            mean = mean + share * (seen.steps[number].weights[name] - mean)
        assert torch.allclose(tensors[f"average.{name}"], mean, atol=1e-6), name


def a_mean(plain: Seen, changed: Seen) -> None:
    """Without the flag there is no mean; with it, predictions are the mean's."""
    assert not [name for name in plain.tensors if name.startswith("average.")]
    means_follow(changed)
    assert all(
        torch.equal(a.weights["head.weight"], b.weights["head.weight"])
        for a, b in zip(plain.steps, changed.steps, strict=True)
    )
    assert (plain.predictions != changed.predictions).nnz


def another_mean(plain: Seen, changed: Seen) -> None:
    means_follow(plain)
    means_follow(changed)
    name = "average.encoder.model.encoder.layer.1.output.dense.weight"
    assert changed.config.ema_tables or not torch.equal(plain.tensors[name], changed.tensors[name])


def losses_at(plain: list[int], changed: list[int]) -> Callable[[Seen, Seen], None]:
    """Test that the loss of these steps (from 1) was computed."""

    def holds(before: Seen, after: Seen) -> None:
        for seen, steps in ((before, plain), (after, changed)):
            assert [line["step"] for line in seen.progress if line["loss"] is not None] == steps

    return holds


def another_seed(plain: Seen, changed: Seen) -> None:
    """Initial encoder and table and the order of documents change.

    The documents themselves do not.
    """
    for name in ("head.weight", "encoder.model.encoder.layer.0.output.dense.weight"):
        assert not torch.equal(plain.start[name], changed.start[name])
    orders = [
        [n for step in seen.steps[:PER_EPOCH] for n in step.index] for seen in (plain, changed)
    ]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


EVERY = list(range(1, STEPS + 1))
FIELDS: dict[str, tuple[Case, ...]] = {
    "epochs": (
        Case("tiny", {"epochs": 3}, documents_of_steps((STEPS, 32), (15, 32))),
        Case("tiny", {"epochs": 3}, rates_follow(cosine(3), cosine(3, 15))),
    ),
    "batch": (Case("tiny", {"batch": 16}, documents_of_steps((STEPS, 32), (2 * STEPS, 16))),),
    "micro_batch": (Case("tiny", {"micro_batch": 8}, passes_of_steps([32], [8] * 8)),),
    "accumulate": (
        Case("tiny", {"batch": 16, "accumulate": 2}, passes_of_steps([32], [16] * 4)),
        Case("cascade", {"batch": 16, "accumulate": 2}, passes_of_steps([32], [16] * 4)),
    ),
    "encoder_lr": (
        Case("tiny", {"encoder_lr": 4e-4}, encoder_rates),
        Case("bow", {"encoder_lr": 0.007}, word_rates),
    ),
    "table_lr": (Case("tiny", {"table_lr": 0.003}, label_rates),),
    "head_lr_factor": (Case("cascade", {"head_lr_factor": 3.5}, head_rates, LINEAR),),
    "encoder_decay": (
        Case("tiny", {"encoder_decay": 0.3}, encoder_decays),
        Case("cascade", {"encoder_decay": 0.3}, cascade_decays, LINEAR),
        Case("bow", {"encoder_decay": 0.3}, word_decays),
    ),
    "encoder_epsilon": (
        Case("tiny", {"encoder_epsilon": 1e4}, epsilons(1e-6, 1e4)),
        Case("tiny", {"encoder_epsilon": 1e4}, small_steps),
        Case("cascade", {"encoder_epsilon": 3e-5}, epsilons(1e-8, 3e-5), LINEAR),
        Case("bow", {"encoder_epsilon": 3e-5}, epsilons(1e-6, 3e-5, (1e-8, 3e-5))),
    ),
    "warmup": (
        Case("tiny", {"warmup": 5}, rates_follow(cosine(3), cosine(5))),
        Case(
            "cascade",
            {"warmup": 5},
            rates_follow(phases(3, 5), phases(5, 5)),
            {"cooldown_epochs": 1.0},
        ),
    ),
    "warmup_epochs": (
        Case("tiny", {"warmup_epochs": 0.8}, rates_follow(cosine(3), cosine(4))),
        Case("cascade", {"warmup_epochs": 0.8}, rates_follow(phases(3, 5), phases(4, 5))),
    ),
    "schedule": (
        Case("cascade", {"schedule": "warmup_cosine"}, rates_follow(phases(3, 5), cosine(3))),
    ),
    "cooldown_epochs": (
        Case("cascade", {"cooldown_epochs": 0.4}, rates_follow(phases(3, 5), phases(3, 2))),
    ),
    "clip": (
        Case("tiny", {"clip": 0.01}, norms_are_clipped(0.01)),
        Case("cascade", {"clip": 1e-4}, norms_are_clipped(1e-4), LINEAR),
    ),
    "ema": (Case("tiny", {"ema": 0.5}, a_mean),),
    "ema_start": (Case("tiny", {"ema_start": 0.6}, another_mean, {"ema": 0.5}),),
    "ema_every": (Case("tiny", {"ema_every": 2}, another_mean, {"ema": 0.5}),),
    "ema_tables": (Case("tiny", {"ema_tables": True}, another_mean, {"ema": 0.5}),),
    "loss_every": (
        Case("tiny", {"loss_every": 4}, losses_at(EVERY, [1, 5, 9])),
        Case("tiny", {"loss_every": 0}, losses_at(EVERY, [])),
    ),
    "seed": (Case("tiny", {"seed": 5}, another_seed),),
}
