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
from xmlkernels.nn.shard import own_bytes, part_bytes
from xmlkernels.nn.table import Table, blocks
from xmlkernels.planner.budget import Budget

Built = TypeVar("Built", bound=nn.Module)
_UNSAVED = ("its gradients", "tiles of ")


def planned(make: Callable[[], Built]) -> Built:
    """Build a head without memory for its tables, to ask it what a real one would take."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the real one will warn
        return make()


def encoder_parts(encoder: nn.Module, *, mean: bool = False, parts: int = 1) -> dict[str, int]:
    """Bytes of an encoder by part.

    These are its weights with tables of its own, and of what is trained the gradients, AdamW's two
    moments and, with `mean`, the running mean.

    Args:
        encoder: its tensors may be on the meta device.
        mean: it has a running mean.
        parts: processes that hold it between them, of which this is the first.
    """
    trained = sum(part_bytes(p, parts) for p in encoder.parameters() if p.requires_grad)
    weights = sum(part_bytes(p, parts) for p in encoder.parameters())
    found = {
        "encoder": weights + sum(map(_bytes, encoder.buffers())),
        "its gradients": trained,
        "its optimizer": 2 * trained,
    }
    return found | ({"its running mean": trained} if mean else {})


def gathered_bytes(encoder: Encoder) -> int:
    """Bytes of what a pass of a sharded encoder holds besides: whole weights and whole gradients.

    These are of what is no layer, for the whole pass, of the layer that is passed and of the one
    before it; each is in a message and in place for a moment.
    """
    groups = [sum(map(_bytes, part)) for part in encoder.parts()]
    *layers, rest = groups
    return 2 * (rest + 2 * max(layers, default=0))


def module_bytes(module: nn.Module) -> int:
    """Bytes that this process holds of a module's parameters and buffers."""
    return sum(map(own_bytes, (*module.parameters(), *module.buffers())))


def activation_bytes(
    encoder: nn.Module, documents: int, tokens: int, *, training: bool = True
) -> int:
    """Estimate what one training pass of an encoder keeps for its backward.

    For the transformer of an `Encoder` this is 34 H bytes per token and layer with 16-bit autocast,
    twice that without (Korthikanti et al., MLSys 2023, section 4.1, attention recomputed or fused).
    Of any other encoder only the output [B, D] is counted. Without a backward one layer's are there
    at a time, of a transformer's.

    Args:
        encoder: has `width`.
        documents, tokens: B and T.
        training: a backward follows.
    """
    if not isinstance(encoder, Encoder):
        return 4 * documents * int(encoder.width)  # type: ignore[arg-type]
    wide = 1 if encoder.autocast is not None else 2
    layers = encoder.layers if training else 1
    return 34 * wide * encoder.hidden * layers * documents * tokens


def shortlist_bytes(documents: int, candidates: Sequence[int]) -> int:
    """Bytes of a cascade step's scores, fp32 [B, K M] per level, and candidates' numbers, int64.

    Args:
        documents: B.
        candidates: K M of each level.
    """
    return documents * sum(candidates) * 12


def descent_bytes(documents: int, candidates: Sequence[int]) -> int:
    """Bytes of a cascade's evaluation: nodes, logits and marks of every level, and keys of one.

    Args:
        documents: B.
        candidates: K M of each level.
    """
    return documents * (sum(candidates) * (8 + 4 + 1) + max(candidates, default=0) * (8 + 8 + 4))


def vector_bytes(documents: int, widths: Sequence[int], *, whole: int = 0) -> int:
    """Bytes of the embeddings of an update and their gradients, fp32, of every level.

    Args:
        documents: of this process.
        widths: D of each level.
        whole: documents of all processes, whose vectors are gathered; 0 alone.
    """
    return 2 * 4 * (documents + whole) * sum(widths)


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
    processes: int = 1,
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
        processes: processes that hold the encoder between them.
    """
    parts = encoder_parts(encoder, mean=mean, parts=processes)
    parts |= table_parts(tables, update or documents, candidates, means=table_means)
    return parts | {"activations (estimate)": activation_bytes(encoder, documents, tokens)}


def first_values_bytes(table: Table, *, centroids: bool) -> int:
    """Bytes that the first values of a table take while they are made.

    They are drawn block by block. From centroids, sums [n, D] and counts [n] in fp32 are held
    meanwhile, and some copies of a block.
    """
    rows, width = table.weight.shape
    first, end = next(blocks(table.weight), (0, 0))
    block = 4 * (end - first) * width
    return 4 * rows * (width + 1) + 3 * block if centroids else 3 * block


def workspace_bytes(table: Table, documents: int, *, cuda: bool) -> int:
    """Bytes that the op of a table's step works in: `bce_step_`, or less of `cluster_step_`.

    On a CPU these are partial sums of dX, 8 to 64 of them and 32 MiB unless 8 are more. On a card
    they are the gradient of a chunk of labels and partial sums, 256 MB at most.
    """
    rows, width = table.weight.shape
    partial = max(1, 4 * documents * width)
    if cuda:
        element = max(2, table.weight.dtype.itemsize)
        return min(256_000_000, 2 * rows * documents * element + 22 * partial)
    sums = min(64, max(8, (32 << 20) // partial), -(-rows // 256))
    return sums * partial + 4 * partial


def tree_bytes(sizes: Sequence[int]) -> int:
    """Bytes of a label tree beside a model: the order of its labels there and back, and children.

    Args:
        sizes: nodes of each level, coarse to fine, labels last.
    """
    return 8 * (2 * sizes[-1] + sum(nodes + 1 for nodes in sizes[:-1]))


def label_bytes(labels: int, *, sums_loss: bool) -> int:
    """Bytes of what a run keeps of each label on the host, in fp64.

    It is the inverse propensity and, where losses are sums, the frequency.
    """
    return 8 * labels * (2 if sums_loss else 1)


def evaluation_bytes(
    documents: int, labels: int, kept: int, *, schemes: int = 1, sums_loss: bool = True
) -> dict[str, int]:
    """Bytes of an evaluation on the host, by part.

    Args:
        documents: of the split.
        labels: L.
        kept: labels per document.
        schemes: predictions of one each are held together.
        sums_loss: the loss is compared with that of frequencies, six arrays [L] of fp64.
    """
    return {
        "predictions of a split": schemes * documents * kept * (4 + 8),
        "metrics over labels": 6 * 8 * labels if sums_loss else 0,
    }


def report_bytes(documents: int, labels: int, kept: int) -> dict[str, int]:
    """Bytes of the last report on the host: counts of 5 cut-offs per label, twice, and sums."""
    return {
        "predictions of a split": documents * kept * (4 + 8),
        "metrics over labels": 24 * 8 * labels,
    }


def saved_bytes(parts: Mapping[str, int]) -> int:
    """Bytes of a checkpoint's tensors, from the parts of a model: no gradients, no tiles.

    Rows that are in no memory are written from where they are.
    """
    return sum(count for name, count in parts.items() if not name.startswith(_UNSAVED))


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
        tiles = held.pop("tiles", 0)  # of a table whose rows are elsewhere
        parts[name] = sum(held.values()) - states
        parts[f"tiles of {name}"] = tiles
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


def told(budget: Budget, device: str = "") -> str:
    """Report a budget in one line: the peak, its phase, every part of a hundredth of it or more.

    Args:
        budget: of a process.
        device: which one, where the run is on several.
    """
    parts, total = budget.parts(), budget.peak
    large = {name: count for name, count in parts.items() if count >= total / 100}
    large |= {"the rest": total - sum(large.values())}
    where = f" on {device}" if device else ""
    when = f", at most during {budget.phase}" if budget.phase else ""
    named = ", ".join(f"{name} {readable(count)}" for name, count in large.items() if count)
    return f"memory of this run{where}: about {readable(total)}{when} = {named}"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
