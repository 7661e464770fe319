"""The best labels of an allow-list: every label of it is scored, so that none is missing.

Letters: B documents, A labels of a list, K labels wanted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from xmlkernels.models.scored import Answer
from xmlkernels.nn.cascade_heads import CascadeHeads
from xmlkernels.nn.shortlist import best, better, nothing_yet

_PAIRS = 1 << 22  # pairs (document, label) scored at one time

Features = list[Tensor]


def best_among(
    score: Callable[[Tensor], Tensor], rows: Tensor, documents: int, k: int
) -> tuple[Tensor, Tensor]:
    """Find the k best of some rows, a bounded number of scores at a time.

    Args:
        score: rows int64 [n] → scores fp32 [B, n].
        rows: int64 [A], ascending.
        documents: B.
        k: rows per document.

    Returns:
        values: fp32 [B, k], descending, -inf where there are fewer than k. rows: int64 [B, k];
        equal values in ascending order of row, -1 where there are fewer.
    """
    found = nothing_yet(documents, k, rows.device)
    for some in torch.split(rows, max(1, _PAIRS // max(1, documents))) if len(rows) else ():
        scores = score(some)
        place, there = best(scores, ~scores.isnan(), k)
        values = torch.where(there, scores.gather(1, place), -torch.inf)
        found = better(found, (values, torch.where(there, some[place], -1)))
    return found


def path_scores(
    heads: CascadeHeads, x: Features, rows: Tensor, ancestors: Sequence[Tensor], scheme: str
) -> Tensor:
    """Score rows of a cascade's label table, whether or not a beam would come to their clusters.

    Args:
        heads: tables of the R levels.
        x: fp32 [B, D] for each level.
        rows: int64 [n].
        ancestors: of each level of clusters, coarse to fine, int64 [L]: the node above each row.
        scheme: as of `descent.scores_by`, whose sums these are, in the same order.

    Returns:
        fp32 [B, n]: logits for "level", logs of probabilities for the other schemes.
    """
    levels = list(heads.tables().values())
    if scheme == "level":
        return levels[-1].scores(x[-1], rows)
    first = 0 if scheme == "path" else max(0, len(levels) - 2)
    total: Tensor | None = None
    for r, level in enumerate(levels[first:], first):
        if r + 1 == len(levels):
            own = logsigmoid(level.scores(x[r], rows))
        else:
            nodes, of = torch.unique(ancestors[r][rows], return_inverse=True)
            own = logsigmoid(level.scores(x[r], nodes))[:, of]
        total = own if total is None else own + total
    assert total is not None
    return total


def complement(excluded: Tensor, labels: int) -> Tensor:
    """List the labels that are not among some: int64, ascending; -1 among them is no label."""
    kept = torch.ones(labels, dtype=torch.bool, device=excluded.device)
    kept[excluded[excluded >= 0]] = False
    return kept.nonzero().flatten()


def limited(
    answer: Callable[[Features, int, Tensor | None], Answer],
    among: Callable[[Features, int, Tensor], Answer],
    x: Features,
    k: int,
    exclude: Tensor | None,
    allow: Sequence[Tensor | None],
) -> Answer:
    """Answer documents of which some have an allow-list; those of one list together.

    Args:
        answer: (features, k, exclude) → the answer of all labels.
        among: (features, k, labels int64 [A]) → the answer of these alone.
        x: features of B documents.
        k: labels per document.
        exclude: int64 [B, E] or None; counts for documents without a list.
        allow: of each document its labels, ascending, or None; one list of several documents is
            the same tensor.
    """
    parts, places = [], []
    for labels, place in _grouped(allow):
        at = torch.tensor(place, device=x[0].device)
        some = [level[at] for level in x]
        if labels is not None:
            parts.append(among(some, k, labels.to(at.device)))
        else:
            parts.append(answer(some, k, None if exclude is None else exclude[at]))
        places.append(at)
    order = torch.cat(places).argsort()
    values, found = (torch.cat(column)[order] for column in zip(*map(_pair, parts), strict=True))
    return replace(parts[0], values=values, labels=found, levels=())


def _pair(answer: Answer) -> tuple[Tensor, Tensor]:
    return answer.values, answer.labels


def _grouped(allow: Sequence[Tensor | None]) -> Iterator[tuple[Tensor | None, list[int]]]:
    places: dict[int, list[int]] = {}
    for number, labels in enumerate(allow):
        places.setdefault(id(labels), []).append(number)
    for place in places.values():
        yield allow[place[0]], place
