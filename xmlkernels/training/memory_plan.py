"""What a run will hold in memory: said before it is allocated, and refused where there is not so
much.
"""

import logging
import os

import torch

from xmlkernels import dist
from xmlkernels.data.dataset import Dataset
from xmlkernels.memory import check_memory
from xmlkernels.planner import told
from xmlkernels.training.config import Config

log = logging.getLogger(__name__)


def announce(
    config: Config, parts: dict[str, int], device: torch.device, *, named: bool = False
) -> None:
    """Says what a device will hold. InputError where it is more than there is, unless the
    configuration wants it so.
    """
    log.info(told(parts, str(device) if named else ""))
    if config.beyond_memory:
        return
    anyway = "or start all the same by --beyond-memory"
    smaller = (
        "a smaller --batch"
        if config.encoder == "bow"
        else "a smaller --batch or --micro-batch (the same step in parts)"
    )
    table = f"take --table bf16 or fp8 and --state bf16, or fewer labels, {anyway}"
    mends = {
        "activations": f"take {smaller}, {anyway}",
        "gradients of one": f"take a smaller --batch, {anyway}",
        "": table,
    }
    processes = (
        int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if device.type == "cpu" and dist.size() > 1
        else 1
    )
    check_memory(parts, device, mends, processes=processes)


def documents_of(config: Config, dataset: Dataset, count: int) -> int:
    """So many, or all that there are to train on."""
    extra = dataset.num_labels if config.label_text else 0
    return min(count, len(dataset.splits["train"]) + extra)
