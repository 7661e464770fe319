"""Running means of the weights: how they are taken, that every kind predicts by them alone, what a
checkpoint has of them.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cascade_common import best, best_of_levels, make_batch
from kinds_under_test import MODELS, TREE
from torch import nn

from xmlkernels import InputError
from xmlkernels.models.base import Documents
from xmlkernels.models.end_to_end import EndToEnd
from xmlkernels.models.running_mean import MeanSettings, RunningMean
from xmlkernels.models.training import Training


def documents(seed: int = 0) -> Documents:
    return make_batch(TREE, 6, seed=seed)


def make(name: str, mean: MeanSettings | None, dtype: str = "fp32") -> Any:
    """A model with a running mean; with None one for prediction."""
    if mean is None:
        return MODELS[name].make(dtype=dtype, training=False)
    return MODELS[name].make(dtype=dtype, mean=mean, encoder_lr=0.05, head_lr=0.5)


SAID: dict[str, Callable[[Any, Documents], Any]] = {
    "best": lambda m, batch: best(m, batch, 5),
    "score with a loss": lambda m, batch: [m.score(batch, 5, loss=True).loss],
    "score with an embedding": lambda m, batch: [m.score(batch, 5, embedding=True).embedding],
    "loss": lambda m, batch: [m.loss(batch)],
    "embed": lambda m, batch: [m.embed(batch)],
}
SAID_BY_CASCADE: dict[str, Callable[[Any, Documents], Any]] = {
    "levels": lambda m, batch: [level.values for level in best_of_levels(m, batch, 5)],
    "level_losses": lambda m, batch: [m.level_losses(batch)],
    "candidates": lambda m, batch: [level.logits for level in m.candidates(batch)],
}


@pytest.mark.parametrize(
    ("decay", "shares"), [(1.0, [1, 1 / 2, 1 / 3, 1 / 4]), (0.6, [1, 1 / 2, 0.4, 0.4])]
)
def test_a_mean_begins_plain_and_goes_on_as_its_decay_says(
    decay: float, shares: list[float]
) -> None:
    p = nn.Parameter(torch.zeros(3))
    average, expected = RunningMean({"p": p}, MeanSettings(decay)), torch.zeros(3)
    with average.used():
        assert not p.any()
    for number, share in enumerate(shares):
        p.data = torch.full((3,), float(number**2))
        average.step(number)
        expected += (p.data - expected) * share
    held = p.data.data_ptr()
    with average.used():
        torch.testing.assert_close(p.data, expected)
    assert p.data.data_ptr() == held and p.tolist() == [9.0] * 3
    with pytest.raises(RuntimeError), average.used():
        raise RuntimeError
    assert p.data.data_ptr() == held


def test_it_takes_in_what_it_is_told_to() -> None:
    p = nn.Parameter(torch.zeros(1))
    average = RunningMean({"p": p}, MeanSettings(1.0, start=3, every=4))
    for number in range(12):
        p.data.fill_(number)
        average.step(number)
    assert average.count == 2 and average.means[0].item() == (6 + 10) / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_of_a_table_below_fp32_is_fp32(dtype: torch.dtype) -> None:
    """More rows than are taken at a time, and moves that a mean in the table's own format would
    lose.
    """
    table, p = torch.ones(5000, 3, dtype=dtype), nn.Parameter(torch.ones(2))
    average = RunningMean({"table": table, "p": p}, MeanSettings(0.999))
    for number in range(1200):
        average.step(number)
    table.fill_(2)
    p.data.fill_(2)
    for number in range(3):
        average.step(number)
    mean = 2 - 0.999**3
    assert average.means[0].dtype == torch.float32
    assert torch.tensor(1.001, dtype=torch.bfloat16) == 1
    for found in average.means:
        torch.testing.assert_close(found, torch.full_like(found, mean), atol=1e-5, rtol=0)
    held = table.data_ptr()
    with average.used():
        assert table.dtype == dtype
        assert torch.equal(table, torch.full_like(table, mean))
        assert p.dtype == torch.float32
    assert table.data_ptr() == held and torch.equal(table, torch.full_like(table, 2))
    for number in range(400):
        average.step(number)  # what was rounded before must not be used again
    with average.used():
        assert torch.equal(table, average.means[0].to(dtype))
        assert not torch.equal(table, torch.full_like(table, mean))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_predicts_by_its_means_and_trains_its_weights(
    name: str, tables: bool, dtype: str
) -> None:
    model = make(name, MeanSettings(1.0, 1, 2, tables), dtype)
    plain = make(name, MeanSettings(), dtype)
    seen = []
    for number in range(5):
        for each in (model, plain):
            each.step(documents(number))
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
    for key, value in plain.state_dict().items():
        assert torch.equal(value, seen[-1][key]), f"training must not know of the mean of {key}"
    of_tables = {f"{table}.{part}" for table in model.tables() for part in ("weight", "bias")}
    of_tables &= seen[0].keys()
    assert of_tables and model.average.count == 2
    assert set(model.average.names) == {k for k, _ in model.named_parameters()} | (
        of_tables if tables else set()
    )
    means = {k: (seen[2][k].float() + seen[4][k].float()) / 2 for k in model.average.names}
    for key, mean in zip(model.average.names, model.average.means, strict=True):
        torch.testing.assert_close(mean, means[key], atol=1e-6, rtol=1e-6)
    expected, loaded = make(name, None, dtype), make(name, None, dtype)
    expected.load_state_dict({k: means.get(k, seen[-1][k]) for k in expected.state_dict()})
    loaded.load_tensors({k: v.clone() for k, v in model.tensors().items()})
    batch = documents(9)
    for what, ask in (SAID | (SAID_BY_CASCADE if name == "cascade" else {})).items():
        ours = ask(model, batch)
        assert all(map(torch.equal, ours, ask(loaded, batch))), what
        for a, b in zip(ours, ask(expected, batch), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=what)
    assert not torch.equal(best(model, batch, 5)[0], best(plain, batch, 5)[0])
    for key, value in model.state_dict().items():
        assert torch.equal(value, seen[-1][key]), f"predictions must leave {key} as it was"


@pytest.mark.parametrize("name", MODELS)
def test_a_mean_survives_a_stop(name: str) -> None:
    settings = MeanSettings(0.9, 1, 2, True)
    whole, twin = make(name, settings), make(name, settings)
    for number in range(4):
        whole.step(documents(number))
    twin.load_tensors({k: v.clone() for k, v in whole.tensors().items()})
    for number in range(4, 7):
        for each in (whole, twin):
            each.step(documents(number))
    ours, theirs = whole.tensors(), twin.tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert int(ours["average.count"]) == 3 and whole.steps == 7


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_before_the_first_value_predicts_by_its_weights(name: str) -> None:
    model = make(name, MeanSettings(0.9, start=50))
    model.step(documents())
    loaded = make(name, None)
    loaded.load_tensors(model.tensors())
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


@pytest.mark.parametrize("name", MODELS)
def test_means_follow_a_model_to_another_device(name: str) -> None:
    model = make(name, MeanSettings(0.9, tables=True))
    model.step(documents())
    model.to("meta")
    assert {mean.device.type for mean in model.average.means} == {"meta"}
    assert all(
        w is own for w, own in zip(model.average._weights, model._averaged().values(), strict=True)
    )


@pytest.mark.parametrize("name", MODELS)
def test_means_that_a_model_does_not_go_on_with_are_refused(name: str) -> None:
    plain, mean, more = (
        make(name, MeanSettings(d, tables=t)) for d, t in ((0.0, False), (0.5, False), (0.5, True))
    )
    for model, other in ((plain, mean), (mean, plain), (mean, more), (more, mean)):
        with pytest.raises(
            InputError,
            match=r"checkpoint: expected the running means of this model, got .*; .*--ema-tables",
        ):
            model.load_tensors(other.tensors())
    with pytest.raises(
        InputError, match="checkpoint: expected running means of its weights, got one of word"
    ):
        make(name, None).load_tensors(
            plain.tensors() | {"average.word": torch.zeros(1), "average.count": torch.tensor([1])}
        )


@pytest.mark.parametrize("name", MODELS)
def test_what_is_frozen_has_no_mean(name: str) -> None:
    model = make(name, MeanSettings())
    first, *_ = (key for key, _ in model.encoder.named_parameters())
    model.encoder.requires_grad_(False).get_parameter(first).requires_grad_(True)
    rest = (model.heads, TREE) if name == "cascade" else (model.head,)
    again = type(model)(
        model.encoder, *rest, replace(model.training_settings, mean=MeanSettings(0.9))
    )
    assert [key for key in again.average.names if key.startswith("encoder.")] == [
        f"encoder.{first}"
    ]


@pytest.mark.parametrize("name", MODELS)
def test_settings_of_a_mean_are_checked(name: str) -> None:
    for settings, expected in (
        (
            MeanSettings(1.1),
            r"running mean: decay: expected from 0 \(none\) to 1 \(the plain mean\), got 1.1",
        ),
        (MeanSettings(0.5, start=-1), "running mean: start: expected 0 or more, got -1"),
        (MeanSettings(0.5, every=0), "running mean: every: expected 1 or more, got 0"),
    ):
        with pytest.raises(InputError, match=expected):
            make(name, settings)


@pytest.mark.parametrize("name", [name for name, kind in MODELS.items() if kind.fp8])
def test_an_fp8_table_has_no_mean(name: str) -> None:
    with pytest.raises(
        InputError, match="running mean: expected tables in fp32, bf16 or fp16, got an fp8 one"
    ):
        make(name, MeanSettings(0.5, tables=True), "fp8")
    assert make(name, MeanSettings(0.5), "fp8").average is not None


def test_an_encoder_with_its_own_table_has_no_mean() -> None:
    model, settings = make("end_to_end", MeanSettings()), MeanSettings(0.9)
    model.encoder.update = lambda lr: None
    with pytest.raises(
        InputError, match="running mean: decay: expected 0 for an encoder with a table of its own"
    ):
        EndToEnd(model.encoder, model.head, Training(0.05, 0.5, 0.0, 0, 100, mean=settings))
