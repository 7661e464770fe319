"""Bytes on the wire: what this process has received from others, by kind, and what it will.

A gather counts the rows of the others, padded to the longest part, as they are sent. A scatter
counts the summands of the others for this process's rows. A sum over n bytes counts
2 (G - 1) / G n, what a ring of G processes hands to each. Signs of life and the store that keeps
them are not counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from xmlkernels.dist.group import size

KINDS = ("gathered", "scattered", "summed", "routed")
_held = dict.fromkeys(KINDS, 0)  # of sums G times as much, so that it stays a whole number


def note(kind: str, count: int) -> None:
    """Count bytes; of a sum, G times those that are received."""
    _held[kind] += count


def traffic() -> dict[str, int]:
    """Return the bytes received by this process so far, by kind."""
    return _told(_held)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count the bytes received inside the block: the dict is filled at its end."""
    before, found = dict(_held), dict.fromkeys(KINDS, 0)
    try:
        yield found
    finally:
        found |= _told({kind: _held[kind] - before[kind] for kind in KINDS})


def _told(held: dict[str, int]) -> dict[str, int]:
    return held | {"summed": -(-held["summed"] // size())}


def ring(count: int, processes: int) -> int:
    """Return G times the bytes that each of G processes receives for a sum of `count` bytes."""
    return 2 * (processes - 1) * count


def step_traffic(
    documents: int,
    widths: list[int],
    processes: int,
    *,
    summed: int = 0,
    scattered: bool = True,
    rank: int = 0,
) -> dict[str, int]:
    """Return the bytes that one process receives in a training step, in closed form.

    The vectors of all documents are gathered and the gradients of its own come back:
    (G - 1) ceil(B / G) D 4 bytes either way. Nothing depends on the number of labels.

    Args:
        documents: B, of all processes together.
        widths: D of every level whose vectors are gathered in fp32.
        processes: G.
        summed: bytes that are summed over all: the encoder's gradients, the loss.
        scattered: whether the gradients come back from shards of the table; of copies each process
            has them already.
        rank: which process; the first have one document more.
    """
    found = dict.fromkeys(KINDS, 0)
    if processes == 1:
        return found
    widest = -(-documents // processes)
    own = documents // processes + (rank < documents % processes)
    found["gathered"] = 4 * (processes - 1) * widest * sum(widths)
    if scattered:
        found["scattered"] = 4 * (processes - 1) * own * sum(widths)
    found["summed"] = -(-ring(summed, processes) // processes)
    return found
