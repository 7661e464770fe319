"""Tensors of a step on their way to a table that stands on a device of its own, and back."""

import torch
from torch import Tensor


def moved(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """The tensors on `device`; one that is there already is handed on as it is.

    Between host and card the copies are asynchronous and go through page-locked memory, which
    torch's allocator keeps until they are done. The host waits once, for all of them together, and
    only where it is the one who reads them next.

    Args:
        device: with its number, as a tensor's `.device` says it.
        tensors: of any shapes and devices.
    """
    sources = {t.device for t in tensors if t.device != device}
    if not sources:
        return list(tensors)
    if device.type == "cuda":
        tensors = tuple(t.pin_memory() if t.device.type == "cpu" else t for t in tensors)
    out = [t.to(device, non_blocking=True) for t in tensors]
    if device.type == "cpu":
        for source in sources:
            wait_for(source)
    return out


def wait_for(device: torch.device) -> None:
    """Until all that was asked of the current stream of a card is done."""
    torch.cuda.current_stream(device).synchronize()
