"""What a run will hold in memory, by part, before it is allocated.

Tables are asked themselves: built under `torch.device("meta")` (`planned`), a table knows its
buffers and takes no memory. Letters: B documents of a pass, T tokens of the longest, D width, H
hidden width; n rows of a table.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from xmlkernels.memory import readable
from xmlkernels.nn.encoder import Encoder
from xmlkernels.nn.table import Table

Built = TypeVar("Built", bound=nn.Module)


def planned(make: Callable[[], Built]) -> Built:
    """Build a head without memory for its tables, to ask it what a real one would take."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the real one will warn
        return make()


def encoder_parts(encoder: nn.Module, *, mean: bool = False) -> dict[str, int]:
    """Bytes of an encoder by part.

    These are its weights with tables of its own, and of what is trained the gradients, AdamW's two
    moments and, with `mean`, the running mean.
    """
    trained = sum(_bytes(p) for p in encoder.parameters() if p.requires_grad)
    whole = sum(map(_bytes, encoder.parameters())) + sum(map(_bytes, encoder.buffers()))
    parts = {"encoder": whole, "its gradients": trained, "its optimizer": 2 * trained}
    return parts | ({"its running mean": trained} if mean else {})


def activation_bytes(encoder: nn.Module, documents: int, tokens: int) -> int:
    """Estimate what one training pass of an encoder keeps for its backward.

    For the transformer of an `Encoder` this is 34 H bytes per token and layer with 16-bit autocast,
    twice that without (Korthikanti et al., MLSys 2023, section 4.1, attention recomputed or fused).
    Of any other encoder only the output [B, D] is counted.

    Args:
        encoder: has `width`.
        documents, tokens: B and T.
    """
    if not isinstance(encoder, Encoder):
        return 4 * documents * int(encoder.width)  # type: ignore[arg-type]
    wide = 1 if encoder.autocast is not None else 2
    return 34 * wide * encoder.hidden * encoder.layers * documents * tokens


def shortlist_bytes(documents: int, candidates: Sequence[int]) -> int:
    """Bytes of a cascade step's scores, fp32 [B, K M] per level, and candidates' numbers, int64.

    Args:
        documents: B.
        candidates: K M of each level.
    """
    return documents * sum(candidates) * 12


def plan(
    encoder: nn.Module,
    tables: Mapping[str, Table],
    *,
    documents: int,
    tokens: int,
    update: int = 0,
    candidates: Sequence[int] = (),
    mean: bool = False,
    table_means: bool = False,
) -> dict[str, int]:
    """Bytes by part, in the order in which they are reported.

    Args:
        encoder: built; it is small compared with the tables.
        tables: by what to call them; see `planned`.
        documents: B, of one pass of the encoder.
        tokens: T, at most.
        update: documents that the tables see together, where an update has several passes.
        candidates: of each level of a cascade, per document.
        mean: the encoder has a running mean.
        table_means: the tables have one.
    """
    parts = encoder_parts(encoder, mean=mean)
    parts |= table_parts(tables, update or documents, candidates, means=table_means)
    return parts | {"activations (estimate)": activation_bytes(encoder, documents, tokens)}


def table_parts(
    tables: Mapping[str, Table],
    documents: int,
    candidates: Sequence[int] = (),
    *,
    means: bool = False,
) -> dict[str, int]:
    """Bytes by part of tables alone: the share of a device that has no encoder.

    Args:
        tables: by what to call them.
        documents: B, of an update.
        candidates: of each of these levels of a cascade, per document.
        means: the tables have a running mean.
    """
    parts = {}
    for name, table in tables.items():
        held = table.bytes()
        states = sum(held.get(state, 0) for state in table.TRAINING_ONLY)
        parts[name] = sum(held.values()) - states
        parts[f"states of {name}"] = states
        parts[f"mean of {name}"] = _mean_bytes(table) if means else 0
    # The levels of a cascade are trained one after the other.
    gradients = (table.step_bytes(documents) for table in tables.values())
    parts["gradients of one table"] = max(gradients, default=0)
    if candidates:
        parts["shortlists"] = shortlist_bytes(documents, candidates)
    return parts


def _mean_bytes(table: Table) -> int:
    """Bytes of a running mean in fp32 and, while predictions use it, in the weights' format."""
    weight, bias = table.weight, table.bias
    rounded = 0 if weight.dtype == torch.float32 else _bytes(weight)
    return 4 * weight.numel() + rounded + (0 if bias is None else _bytes(bias))


def told(parts: Mapping[str, int], device: str = "") -> str:
    """Report a plan in one line: the total, every part of a hundredth of it or more, the rest.

    Args:
        parts: bytes by part.
        device: which one, where the model is on several.
    """
    total = sum(parts.values())
    large = {name: count for name, count in parts.items() if count >= total / 100}
    large |= {"the rest": total - sum(large.values())}
    where = f" on {device}" if device else ""
    named = ", ".join(f"{name} {readable(count)}" for name, count in large.items() if count)
    return f"memory of the model{where}: about {readable(total)} = {named}"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
