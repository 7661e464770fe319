"""Gradient caching: tables see a whole batch at once, the encoder a few documents at a time.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
(RepL4NLP 2021).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from xmlkernels import dist
from xmlkernels.errors import InputError

Gradient = Tensor | dist.Scattered | dist.ScatteredColumns


class EncoderPass:
    """The features of a batch and the way back through the encoder.

    With a micro-batch below the batch, features are first computed without a graph, part by part;
    `backward` computes each part again, with a graph and from the state that the generator had
    then, so that dropout drops the same units.

    Of several processes each encodes its own documents, has the features of all, and takes back the
    gradient of its own. One without a document encodes the stand-in that the batch gives it
    (`AnyBatches.shared`), with a gradient of zero: each process then has gradients of the same
    parameters, as their sum needs. Of a sharded encoder all take as many passes, for each pass
    gathers it: those with fewer documents pass one once more, whose features are left out.

    Attributes:
        x: fp32 [B, D] of each level, without a graph.

    Args:
        features: the encoder's inputs → [n, D] of each level.
        inputs: of this process's documents; alone, of the whole batch.
        documents: B, of the whole batch.
        micro_batch: documents of a part; 0 passes all at once.
        together: whether the processes pass the encoder together.

    Raises:
        InputError: parts of inputs that are no rows of documents, or inputs that are not this
            process's part of the batch.
    """

    def __init__(
        self,
        features: Callable[..., list[Tensor]],
        inputs: tuple[Tensor, ...],
        documents: int,
        micro_batch: int,
        *,
        together: bool = False,
    ) -> None:
        self._features = features
        self._counts = [part.stop - part.start for part in dist.parts(documents)]
        self._own = dist.part(documents)
        self._idle = self._counts[dist.rank()] == 0
        own_count = 1 if self._idle else self._counts[dist.rank()]
        self._parts = _parts(inputs, own_count, micro_batch)
        self._spare = 0  # passes for the others' sake
        if together and dist.size() > 1:
            passes = encoder_passes(documents, dist.size(), micro_batch)
            self._spare = passes - len(self._parts)
            self._parts += [tuple(part[:1] for part in inputs)] * self._spare
        self._states: list[Tensor] = []
        self._graph: list[Tensor] = []
        if len(self._parts) == 1:
            self._graph = features(*inputs)
            own = [f.detach() for f in self._graph]
        else:
            own = self._without_graph()
        self.x = gathered(own, documents)

    @torch.no_grad()
    def _without_graph(self) -> list[Tensor]:
        out = []
        for part in self._parts:
            self._states.append(_generator_state(part[0].device))
            out.append(self._features(*part))
        own = out[: len(out) - self._spare]
        return [torch.cat(level) for level in zip(*own, strict=True)]

    def scatter(self, dx: Tensor) -> dist.Scattered:
        """Begin to sum shards' summands of a gradient [B, D], of which each takes back its own."""
        return dist.scatter_sum(dx, self._counts)

    def scatter_levels(self, dx: Sequence[Tensor]) -> list[dist.ScatteredColumns]:
        """Do what `scatter` does for the gradients of all levels, in one message."""
        return dist.scatter_sums(dx, self._counts)

    def backward(self, dx: Sequence[Gradient]) -> None:
        """Add the parameters' gradients from those of the features.

        Of several parts the first is encoded again before a scattered gradient is waited for.

        Args:
            dx: for each level [B, D], or what `scatter` gave.
        """
        if len(self._parts) == 1:
            _backward(self._graph, [self._own_rows(d) for d in dx])
            return
        start, own = 0, list[Tensor]()
        for part, state in zip(self._parts, self._states, strict=True):
            with _generator_at(part[0].device, state):
                levels = self._features(*part)
            own = own or [self._own_rows(d) for d in dx]
            rest = [d[start : start + len(part[0])] for d in own]
            _backward(levels, [d if len(d) else d.new_zeros(1, *d.shape[1:]) for d in rest])
            start += len(part[0])

    def _own_rows(self, dx: Gradient) -> Tensor:
        own = dx[self._own] if isinstance(dx, Tensor) else dx.rows()
        return own.new_zeros(1, *own.shape[1:]) if self._idle else own


def encoder_passes(documents: int, processes: int, micro_batch: int) -> int:
    """Return the passes of the process that has most documents of a batch.

    Args:
        documents: B, of all processes together.
        processes: G.
        micro_batch: documents of a pass; 0 passes all at once.
    """
    own = max(1, -(-documents // processes))
    return -(-own // micro_batch) if 0 < micro_batch < own else 1


def gathered(own: Sequence[Tensor], documents: int) -> list[Tensor]:
    """Gather the features [B, D] of a batch of B documents, of which each process encoded its part.

    One without a document has those of the stand-in, which are left out. All levels go in one
    message.
    """
    if dist.size() == 1:
        return list(own)
    counts = [part.stop - part.start for part in dist.parts(documents)]
    sent = torch.cat(list(own), 1)
    idle = counts[dist.rank()] == 0  # inputs of any other size than its part are refused
    whole = dist.gather_rows(sent[:0] if idle else sent, counts)
    return [level.contiguous() for level in torch.split(whole, [f.shape[1] for f in own], 1)]


def _parts(inputs: tuple[Tensor, ...], documents: int, size: int) -> list[tuple[Tensor, ...]]:
    if size <= 0 or size >= documents:
        return [inputs]
    if any(len(part) != documents for part in inputs):
        raise InputError(
            "micro_batch",
            "0 for bags of words",
            str(size),
            "leave it out: they need no gradient caching",
        )
    return list(zip(*(torch.split(part, size) for part in inputs), strict=True))


def _backward(features: Sequence[Tensor], dx: Sequence[Tensor]) -> None:
    """One backward from all levels; those of a frozen encoder have no graph."""
    held = [(f, d) for f, d in zip(features, dx, strict=True) if f.requires_grad]
    if held:
        torch.autograd.backward([f for f, _ in held], [d for _, d in held])


def _generator_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _generator_at(device: torch.device, state: Tensor) -> Iterator[None]:
    """Draws from `state` inside, and goes on after it from where the generator stood."""
    before = _generator_state(device)
    put = (
        (lambda s: torch.cuda.set_rng_state(s, device))
        if device.type == "cuda"
        else torch.set_rng_state
    )
    put(state)
    try:
        yield
    finally:
        put(before)
