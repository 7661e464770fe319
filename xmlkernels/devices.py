"""Devices by name: what a flag such as `--device` stands for on this machine."""

import torch

from xmlkernels import dist
from xmlkernels.errors import InputError


def find_device(name: str, where: str = "--device") -> torch.device:
    """Find the device that a name stands for.

    Among several processes of one machine, each has a GPU of its own.

    Args:
        name: cpu, cuda, cuda:NUMBER or auto, which is cuda where there is a GPU and else cpu.
        where: the flag that named it, for the message.

    Raises:
        InputError: no device of that name, not in this machine, or one for several processes.
    """
    mend = "choose cpu, cuda, cuda:NUMBER or auto"
    several = dist.launched()[1] > 1
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if several and name == "cuda" and gpus:
        own = dist.local_rank()
        if own >= gpus:
            got = f"{gpus} GPUs for process {own + 1} of this machine"
            mend = f"start it with --nproc-per-node {gpus}"
            raise InputError(where, "a GPU for each process", got, mend)
        return torch.device("cuda", own)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(where, "a device", repr(name), mend) from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(where, "cpu or cuda", repr(name), mend)
    if several and device.index is not None:
        expected = "cuda, cpu or auto for several processes"
        raise InputError(where, expected, repr(name), "leave the number out: each has its own")
    found = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= found:
        got = f"{name!r} ({found} found)"
        raise InputError(where, "a device of this machine", got, "choose cpu or auto")
    return device
