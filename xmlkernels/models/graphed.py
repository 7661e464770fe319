"""Steps as CUDA graphs: the passes of a step are captured once per shape, and replayed.

A graph is a list of kernels with their arguments, launched by one call: the host no longer sets the
pace of a small encoder's hundreds of launches. Shapes must repeat, so each shape has a graph of its
own, over tensors that stay where they are; a batch is copied into them, its positives padded with
fill to a power of two.

A step's passes are captured: encoder, tables with their updates, and the way back. What follows
them is not: the encoder's optimizer (a few launches) takes its rate and beta1 as double-precision
numbers of the host, and torch's fused kernel would round a rate that it reads on the device, so
graph and eager steps would differ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from xmlkernels.data.batches.bags import BagBatch
from xmlkernels.data.batches.tokens import Batch
from xmlkernels.errors import InputError

Documents = Batch | BagBatch
_FEWEST = 64  # positives that the smallest graph has room for
_MOST_GRAPHS = 64  # each holds about a megabyte of kernel arguments on the card


class Run(Protocol):
    """The passes of a step; see `Model._passes`."""

    def __call__(
        self, batch: Documents, lr: Tensor, beta1: Tensor | None, need_loss: bool
    ) -> tuple[Tensor, Tensor]:
        """Give the loss and the overflow."""


class Capturer(Protocol):
    """What captures: a card, or what stands for one in a test."""

    def warm(self, call: Callable[[], None]) -> None:
        """Run a call where captures run."""

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """Record what a call would do, without doing it; give what does it."""


class Card:
    """Captures on a card, on a stream of its own; all graphs share one pool of memory.

    They may: no tensor of the pool lives from one replay to the next.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def warm(self, call: Callable[[], None]) -> None:
        """Run a call on the stream of the captures, in order with the current one."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            call()
        current.wait_stream(self._stream)

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """Capture a call; see `Capturer.capture`."""
        graph = torch.cuda.CUDAGraph()
        # Other threads go on reading documents meanwhile: what they ask of the card is no part.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            call()
        return graph.replay


@dataclass
class _Shape:
    """What belongs to one shape: its batch, which parameters have gradients, and its graph."""

    batch: Documents
    trained: list[nn.Parameter]
    replay: Callable[[], None] | None = None


class GraphedPasses:
    """Runs the passes of each step: as they are where a shape is new, from then on as a graph.

    Every call trains on its batch once. Where a shape comes for the first time, kernels are
    compiled and libraries choose theirs, which no capture allows.

    Attributes:
        failed: why there are no graphs any more; empty as long as there are.
        captured: graphs so far.

    Args:
        run: the passes; they read no value on the host.
        parameters: whose `.grad` the passes fill.
        fill: number of rows of each table, coarse to fine, the labels' last: a positive of that row
            is fill.
        device: of the batches.
        capturer: of that device.
        tell: told in one sentence where a step cannot be captured, and steps go on without graphs;
            None raises there.
    """

    def __init__(
        self,
        run: Run,
        parameters: Sequence[nn.Parameter],
        fill: Sequence[int],
        device: torch.device,
        capturer: Capturer,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._run, self._parameters, self._fill = run, list(parameters), tuple(fill)
        self._capturer, self._tell = capturer, tell
        self._shapes: dict[tuple[Any, ...], _Shape] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._lr, self._beta1 = torch.zeros(1, device=device), torch.zeros(1, device=device)
        self._loss, self._overflow = torch.zeros(1, device=device), torch.zeros(1, device=device)
        self.failed, self.captured = "", 0

    def __call__(
        self, batch: Documents, lr: float, beta1: float | None, need_loss: bool
    ) -> tuple[Tensor, Tensor]:
        """Run the passes on a batch; afterwards the parameters have their gradients.

        Returns:
            The loss [1], or [0] when not asked for; the overflow, fp32 [1].

        Raises:
            InputError: the step cannot be captured, and nobody is to be told instead.
        """
        # Numbers of a launch, so the host may change its own at once.
        self._lr.fill_(lr)
        if beta1 is not None:
            self._beta1.fill_(beta1)
        rates = self._lr[0], None if beta1 is None else self._beta1[0]
        room = _capacity(batch)
        shapes = tuple(tuple(part.shape) for part in batch.inputs)
        key = (shapes, len(batch), room, beta1 is None, need_loss)
        shape = self._shapes.get(key)
        new = shape is None
        if shape is None:
            shape = _Shape(_empty_like(batch, room), [])
        self._load(shape.batch, batch)
        if new and not self.failed and len(self._shapes) < _MOST_GRAPHS:
            self._shapes[key] = shape
        elif not self.failed and not new and shape.replay is None:
            shape.replay = self._captured(shape, rates, need_loss)
        if shape.replay is None:
            return self._as_it_is(shape, rates, need_loss)
        shape.replay()
        for parameter in self._parameters:
            parameter.grad = None
        for parameter in shape.trained:
            parameter.grad = self._gradients[parameter]
        # Copies: the next replay writes to these again.
        return self._loss[: int(need_loss)].clone(), self._overflow.clone()

    def _as_it_is(
        self, shape: _Shape, rates: tuple[Tensor, Tensor | None], need_loss: bool
    ) -> tuple[Tensor, Tensor]:
        out: list[Tensor] = []

        def call() -> None:
            self._drop_gradients()
            out.extend(self._run(shape.batch, *rates, need_loss))

        self._capturer.warm(call)
        shape.trained = [p for p in self._parameters if p.grad is not None]
        loss, overflow = out
        return loss, overflow

    def _captured(
        self, shape: _Shape, rates: tuple[Tensor, Tensor | None], need_loss: bool
    ) -> Callable[[], None] | None:
        """Capture the passes of a shape; None where that fails and the user has been told."""
        for parameter in shape.trained:
            if parameter not in self._gradients:
                self._gradients[parameter] = torch.zeros_like(parameter)
        held = [self._gradients[parameter] for parameter in shape.trained]

        def call() -> None:
            self._drop_gradients()
            loss, overflow = self._run(shape.batch, *rates, need_loss)
            self._loss[: int(need_loss)].copy_(loss)
            self._overflow.copy_(overflow)
            found: list[Tensor] = [p.grad for p in shape.trained if p.grad is not None]
            with torch.no_grad():
                torch._foreach_copy_(held, found)
            # What the pool holds of them is free for the next graph.
            self._drop_gradients()

        try:
            replay = self._capturer.capture(call)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if self._tell is None:
                where, expected = "--cuda-graph", "a step that can be captured"
                raise InputError(where, expected, reason, "take auto or off") from error
            self.failed = reason
            self._tell(f"note: the step cannot be captured as a CUDA graph ({reason}); it runs on")
            for other in self._shapes.values():
                other.replay = None
            return None
        self.captured += 1
        return replay

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _load(self, held: Documents, batch: Documents) -> None:
        """Copy a batch over the one of a graph, with fill behind its positives."""
        for own, given in zip(held.inputs, batch.inputs, strict=True):
            own.copy_(given, non_blocking=True)
        for rows, own_pairs, pairs in zip(
            self._fill,
            (*held.levels, (held.pos_row, held.pos_sample)),
            (*batch.levels, (batch.pos_row, batch.pos_sample)),
            strict=True,
        ):
            for own, given, rest in zip(own_pairs, pairs, (rows, 0), strict=True):
                own[: len(given)].copy_(given, non_blocking=True)
                own[len(given) :].fill_(rest)


def _capacity(batch: Documents) -> int:
    """Positives that every level of a batch has room for: a power of two."""
    most = max(len(row) for row, _ in (*batch.levels, (batch.pos_row, batch.pos_sample)))
    return max(_FEWEST, 1 << max(0, most - 1).bit_length())


def _empty_like(batch: Documents, room: int) -> Documents:
    """Make a batch of the same documents' shapes with room for so many positives at each level."""

    def pairs(row: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        return row.new_empty(room), sample.new_empty(room)

    row, sample = pairs(batch.pos_row, batch.pos_sample)
    own = {
        name: torch.empty_like(value)
        for name, value in vars(batch).items()
        if isinstance(value, Tensor)
    }
    own |= {"pos_row": row, "pos_sample": sample}
    levels = tuple(pairs(*level) for level in batch.levels)
    return type(batch)(**vars(batch) | own | {"levels": levels})
