"""What a model answers about a batch of documents.

Letters: B documents, D width of an embedding, S candidates, K clusters handed on, k labels asked
for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LevelPrediction:
    """The best nodes of one level of a label tree.

    Attributes:
        values: fp32 [B, k], logits of the scheme's probability, descending; -inf where there are
            fewer than k nodes.
        nodes: int64 [B, k], clusters of the level, or label ids at the last one; -1 where there
            are fewer.
        kept: int64 [B, K], clusters handed on to the next level, ascending, -1 pads; [B, 0] at the
            last level.
    """

    values: Tensor
    nodes: Tensor
    kept: Tensor


@dataclass(frozen=True)
class Answer:
    """The best labels of each document under one scheme.

    Attributes:
        values: fp32 [B, k], logits, descending; -inf where there are fewer than k labels.
        labels: int64 [B, k], label ids; -1 where there are fewer.
        levels: of a model on a label tree: each level, coarse to fine, the labels last; else empty.
    """

    values: Tensor
    labels: Tensor
    levels: tuple[LevelPrediction, ...] = ()


@dataclass(frozen=True)
class Scored:
    """The result of `Model.score`.

    Attributes:
        values: fp32 [B, k], logits under the model's own scheme, descending; -inf where there are
            fewer than k labels.
        labels: int64 [B, k], label ids; -1 where there are fewer.
        loss: fp32 [1], the loss that `step` would report; None unless asked for.
        embedding: fp32 [B, D], see `Model.embed`; None unless asked for.
        by_scheme: an answer for each scheme that was asked for.
    """

    values: Tensor
    labels: Tensor
    loss: Tensor | None = None
    embedding: Tensor | None = None
    by_scheme: Mapping[str, Answer] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidates:
    """What one level of a cascade trains on for a batch.

    Attributes:
        nodes: int64 [B, S], clusters of the level, or label ids at the last one; -1 pads.
        logits: fp32 [B, S], the level's own; -inf at pads.
        positive: bool [B, S], whether the document has the node.
    """

    nodes: Tensor
    logits: Tensor
    positive: Tensor
