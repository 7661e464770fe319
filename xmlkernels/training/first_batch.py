"""Before the first step all processes compare what they are about to train on."""

import copy
import hashlib

import torch

from xmlkernels import dist
from xmlkernels.data.batches.bags import BagBatches
from xmlkernels.data.batches.tokens import Batches


def agree_on_batch(batches: Batches | BagBatches, epoch: int, position: int) -> None:
    """Refuse to train where processes would not train on the same batch.

    Hashes of datasets and settings say what each process was given; this compares what it has read:
    the order of documents, and the content and labels of a whole batch.

    Args:
        batches: of the training split, of which each process encodes a part.
        epoch, position: of the batch; the last one of an epoch stands for one beyond it.

    Raises:
        InputError: on every process, naming what differs and where.
    """
    if dist.size() == 1:
        return
    plan = batches.plan(epoch)
    number = min(position, len(plan) - 1)
    documents = plan[number]
    # Of the whole batch: a process encodes its part alone.
    batch = copy.copy(batches).shared(lambda count: slice(0, count)).collate(documents)
    levels = [part for level in batch.levels for part in level]
    where = f"batch {number + 1} of epoch {epoch + 1}"
    for what, parts in (
        ("documents", [batch.index]),
        ("labels", [batch.pos_row, batch.pos_sample, *levels]),
        ("content", list(batch.inputs)),
    ):
        dist.agree(f"{what} of {where}", _digest(parts), torch.device("cpu"))


def _digest(parts: list[torch.Tensor]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(f"{part.dtype} {tuple(part.shape)}".encode())
        total.update(part.contiguous().numpy().tobytes())
    return total.hexdigest()
