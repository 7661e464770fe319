"""What a run will hold in memory, by part, told before it is allocated.

Letters: B documents of a pass, T tokens of the longest, D width, H hidden width; n rows of a table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xmlkernels.errors import InputError

_SIZE = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


@dataclass(frozen=True)
class Table:
    """One table of labels or clusters, as it will be made.

    Attributes:
        name: what to call it.
        rows, width: n and D.
        dtype: of its weights: fp32, bf16, fp16 or fp8.
        optimizer: sgd, adam, or adamw_dense: every row in every step, with the gradient as a table
            of its own.
        momentum: SGD's; 0 keeps no state.
        state: number format of the [n, D] states.
        row_wise: Adam's second moment as one fp32 value for a row.
        bias: an fp32 bias for a row.
        kahan: a compensation beside each weight.
        mean: a running mean of weights and biases.
    """

    name: str
    rows: int
    width: int
    dtype: str = "fp32"
    optimizer: str = "sgd"
    momentum: float = 0.9
    state: str = "fp32"
    row_wise: bool = False
    bias: bool = False
    kahan: bool = False
    mean: bool = False

    def weight_bytes(self) -> int:
        """Weights, biases and, in fp8, a scale and a maximum for each row."""
        return self.rows * (
            self.width * _size(self.dtype) + 4 * self.bias + 8 * (self.dtype == "fp8")
        )

    def state_bytes(self) -> int:
        """What the optimizer keeps, and the Kahan compensation."""
        matrix, dense = self.width * _size(self.state), self.optimizer == "adamw_dense"
        adam = dense or self.optimizer == "adam"
        first = matrix if adam or self.momentum > 0 else 0
        second = 0 if not adam else 4 if self.row_wise and not dense else matrix
        kept = self.width * _size(self.dtype) if self.kahan and self.dtype != "fp32" else 0
        return self.rows * (first + second + kept + 8 * (dense and self.bias))

    def mean_bytes(self) -> int:
        """The running mean in fp32 and, while predictions use it, in the weights' format."""
        rounded = 0 if self.dtype == "fp32" else self.width * _size(self.dtype)
        return self.rows * (4 * self.width + rounded + 4 * self.bias) if self.mean else 0

    def gradient_bytes(self, documents: int) -> int:
        """What a step of B documents holds for this table alone: of a dense optimizer the gradients
        of weights and logits.
        """
        return 4 * self.rows * (self.width + documents) if self.optimizer == "adamw_dense" else 0


def encoder_parts(encoder: nn.Module, *, mean: bool = False) -> dict[str, int]:
    """Bytes of an encoder: weights with its own tables; gradients, AdamW's two moments and the
    `mean` of what is trained.
    """
    trained = sum(_bytes(p) for p in encoder.parameters() if p.requires_grad)
    whole = sum(map(_bytes, encoder.parameters())) + sum(map(_bytes, encoder.buffers()))
    parts = {"encoder": whole, "its gradients": trained, "its optimizer": 2 * trained}
    return parts | ({"its running mean": trained} if mean else {})


def activation_bytes(encoder: nn.Module, documents: int, tokens: int) -> int:
    """An estimate of what one training pass of a transformer keeps for its backward: 34 H bytes per
    token and layer with 16-bit autocast, twice that without (Korthikanti et al., MLSys 2023,
    section 4.1, attention recomputed or fused).

    Args:
        encoder: a transformer with `hidden` and `layers`; of any other, its output [B, D] alone.
        documents, tokens: B and T.
    """
    hidden, layers = getattr(encoder, "hidden", None), getattr(encoder, "layers", None)
    if hidden is None or layers is None:
        return 4 * documents * int(getattr(encoder, "width", 0))
    wide = 1 if getattr(encoder, "autocast", None) is not None else 2
    return 34 * wide * hidden * layers * documents * tokens


def shortlist_bytes(documents: int, candidates: Sequence[int]) -> int:
    """Scores of a cascade's step, fp32 [B, K M] of each level, and the candidates' numbers, int64.

    Args:
        candidates: K M of each level.
    """
    return documents * sum(candidates) * 12


def plan(
    encoder: nn.Module,
    tables: Sequence[Table],
    *,
    documents: int,
    tokens: int,
    update: int = 0,
    candidates: Sequence[int] = (),
    mean: bool = False,
) -> dict[str, int]:
    """Bytes by part, in the order in which they are told.

    Args:
        encoder: built; it is small beside the tables.
        tables: not built yet.
        documents: B, of one pass of the encoder.
        tokens: T, at most.
        update: documents that the tables see together, where an update has several passes.
        candidates: of each level of a cascade, per document.
        mean: the encoder has a running mean.

    Raises:
        InputError: a number format that does not exist.
    """
    parts = encoder_parts(encoder, mean=mean) | table_parts(tables, update or documents, candidates)
    return parts | {"activations (estimate)": activation_bytes(encoder, documents, tokens)}


def table_parts(
    tables: Sequence[Table], documents: int, candidates: Sequence[int] = ()
) -> dict[str, int]:
    """Bytes by part of tables alone, with B documents to an update: the share of a device that has
    no encoder.
    """
    parts = {}
    for table in tables:
        parts[table.name] = table.weight_bytes()
        parts[f"states of {table.name}"] = table.state_bytes()
        parts[f"mean of {table.name}"] = table.mean_bytes()
    # The levels of a cascade are trained one after the other.
    parts["gradients of one table"] = max(
        (table.gradient_bytes(documents) for table in tables), default=0
    )
    if candidates:
        parts["shortlists"] = shortlist_bytes(documents, candidates)
    return parts


def told(parts: Mapping[str, int], device: str = "") -> str:
    """One line: the total, every part of a hundredth of it or more, and the rest.

    Args:
        device: which one, where the model stands on several.
    """
    total = sum(parts.values())
    large = {name: count for name, count in parts.items() if count >= total / 100}
    large |= {"the rest": total - sum(large.values())}
    where = f" on {device}" if device else ""
    return f"memory of the model{where}: about {readable(total)} = " + ", ".join(
        f"{name} {readable(count)}" for name, count in large.items() if count
    )


def readable(count: int) -> str:
    """Bytes in the unit that suits them."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


def _size(dtype: str) -> int:
    if dtype not in _SIZE:
        raise InputError(
            "number format", f"one of {', '.join(_SIZE)}", repr(dtype), "choose one of them"
        )
    return _SIZE[dtype]


def _bytes(tensor: torch.Tensor | Any) -> int:
    return int(tensor.numel() * tensor.element_size())
