"""Steps by CUDA graphs: the order of captures and replays here, the bits of a step on a card.

Without a card, `Recorder` stands for one: a capture keeps the call without running it, and a replay
runs it on the same tensors, as a graph would.
"""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cascade_common
import kinds_under_test
import pytest
import torch

from xmlkernels import InputError
from xmlkernels.data.batches.tokens import Batch
from xmlkernels.models.base import Model
from xmlkernels.models.running_mean import MeanSettings

TREE = kinds_under_test.TREE


class Recorder:
    """Captures by keeping the call; `events` says what was asked of it, in order."""

    def __init__(self, error: str = "") -> None:
        self.events: list[str] = []
        self.error = error

    def warm(self, call: Callable[[], None]) -> None:
        self.events.append("run")
        call()

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        self.events.append("capture")
        if self.error:
            raise RuntimeError(self.error + "\nand more")

        def replay() -> None:
            self.events.append("replay")
            call()

        return replay


def batch(seed: int, size: int = 6, width: int = 16, most: int = 3) -> Batch:
    """A batch of a cascade, padded to a width."""
    made = cascade_common.make_batch(TREE, size, seed, most)
    ids, mask = (torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in made.inputs)
    index = torch.arange(size)
    labels = kinds_under_test.LABELS
    return Batch(ids, mask, made.pos_row, made.pos_sample, index, labels, made.levels)


def full(**options: Any) -> Model:
    return kinds_under_test.full_table(kinds_under_test.EndToEnd, **options).train()


MODELS: dict[str, Callable[[], Model]] = {
    "full": lambda: full(clip=1.0, bias=True, mean=MeanSettings(0.9)),
    "full, fp8": lambda: full(dtype="fp8"),
    "cascade": lambda: kinds_under_test.cascade(drops=0.1),
    "cascade, adamw_dense": lambda: kinds_under_test.cascade(drops=0.1, optimizer="adamw_dense"),
}


def shown(model: Model, step: Batch) -> Batch:
    """The batch as the model takes it: levels are a cascade's."""
    return step if len(model.tables()) > 1 else replace(step, levels=())


def take(model: Model, batches: list[Batch], device: str = "cpu") -> list[torch.Tensor]:
    torch.manual_seed(5)
    losses = [
        model.step(shown(model, b).to(device), need_loss=n != 1) for n, b in enumerate(batches)
    ]
    return [loss.cpu() for loss in losses]


def check_equal(one: Model, other: Model) -> None:
    theirs = other.tensors()
    for name, value in one.tensors().items():
        assert torch.equal(value.cpu(), theirs[name].cpu()), name


BATCHES = [
    batch(0), batch(1), batch(2), batch(3, width=32), batch(4), batch(5, width=32),
    batch(6, size=4), batch(7, width=32), batch(8), batch(9, size=4), batch(10, most=30),
    batch(11, most=30),
]  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_graphed_steps_are_the_eager_ones(name: str) -> None:
    eager, graphed = MODELS[name](), MODELS[name]()
    recorder = Recorder()
    graphed.capture(capturer=recorder)
    losses = take(eager, BATCHES), take(graphed, BATCHES)
    for one, other in zip(*losses, strict=True):
        assert torch.equal(one, other)
    check_equal(eager, graphed)
    # The second batch, without loss, has a shape of its own, and never comes again.
    told = "run run capture run replay capture run replay replay capture run capture"
    assert recorder.events == told.replace("capture", "capture replay").split()
    assert graphed.graphs is not None and graphed.graphs.captured == 4


def test_rates_of_every_step_reach_a_replay() -> None:
    model = kinds_under_test.cascade(warmup=9)
    recorder = Recorder()
    model.capture(capturer=recorder)
    (settings,) = [model.training_settings]
    for step in range(5):
        model.step(batch(step))
        rate, beta1 = settings.rates(step)[1:]  # type: ignore[union-attr, attr-defined]
        for table in model.tables().values():
            assert torch.equal(table.hyper[[0, 2]], torch.tensor([rate, beta1]))  # type: ignore[index]
    assert recorder.events.count("replay") == 4


def test_losses_are_no_views_of_what_the_next_replay_writes() -> None:
    model = kinds_under_test.cascade()
    model.capture(capturer=Recorder())
    losses = [model.step(batch(seed), need_loss=True) for seed in range(5)]
    assert len({float(loss) for loss in losses}) == 5


def test_gradients_belong_to_the_parameters_that_the_passes_reach() -> None:
    model = kinds_under_test.full_table(kinds_under_test.EndToEnd)
    model.encoder.model.embeddings.requires_grad_(False)  # type: ignore[union-attr, operator]
    model.capture(capturer=Recorder())
    for seed in range(3):
        model.step(shown(model, batch(seed)))
    held = {name for name, p in model.named_parameters() if p.grad is not None}
    assert held == {name for name, p in model.named_parameters() if p.requires_grad}


def test_failed_capture_is_told_and_the_step_taken() -> None:
    eager, graphed = MODELS["full"](), MODELS["full"]()
    told: list[str] = []
    recorder = Recorder("operation not permitted")
    graphed.capture(told.append, recorder)
    take(eager, BATCHES), take(graphed, BATCHES)
    check_equal(eager, graphed)
    assert len(told) == 1 and "operation not permitted" in told[0]
    assert recorder.events.count("capture") == 1 and recorder.events.count("run") == len(BATCHES)


def test_failed_capture_is_refused_where_graphs_were_asked_for() -> None:
    model = MODELS["full"]()
    model.capture(None, Recorder("operation not permitted"))
    model.step(shown(model, batch(0)))
    before = copy.deepcopy(model.tensors())
    with pytest.raises(InputError, match="operation not permitted"):
        model.step(shown(model, batch(1)))
    for name, value in model.tensors().items():
        assert torch.equal(value, before[name]), name


def test_tables_that_wait_for_the_device_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["full"]()
    monkeypatch.setattr(model.head, "WAITS", True)
    with pytest.raises(InputError, match="do not wait for the device, got head"):
        model.capture(capturer=Recorder())
    assert model.graphs is None


def test_moved_model_has_no_graphs() -> None:
    model = MODELS["full"]()
    model.capture(capturer=Recorder())
    model.double()
    assert model.graphs is None


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_graph_and_eager_steps_agree_in_bits_on_a_card(name: str, autocast: Any) -> None:
    eager, graphed = MODELS[name](), MODELS[name]()
    for model in (eager, graphed):
        model.encoder.autocast = autocast
        model.to("cuda")
    graphed.capture()
    with contextlib.ExitStack() as held:
        held.enter_context(torch.backends.cudnn.flags(enabled=True, deterministic=True))
        losses = take(eager, BATCHES, "cuda"), take(graphed, BATCHES, "cuda")
    assert graphed.graphs is not None and graphed.graphs.captured == 4
    for one, other in zip(*losses, strict=True):
        assert torch.equal(one, other)
    check_equal(eager, graphed)
