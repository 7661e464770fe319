"""What all processes must have alike."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from xmlkernels.dist.group import size
from xmlkernels.dist.messages import gather_rows
from xmlkernels.errors import InputError


def agree(what: str, text: str, device: torch.device) -> None:
    """Refuse to go on unless `text` is the same on every process.

    It is a configuration, or the hash of a dataset.

    Raises:
        InputError: on every process, where it is not.
    """
    if size() == 1:
        return
    digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
    everyone = gather_rows(digest[None].to(torch.int32).to(device))
    other = [r for r in range(size()) if not torch.equal(everyone[r], everyone[0])]
    if other:
        *most, last = map(str, other)
        names = f"processes {', '.join(most)} and {last}" if most else f"process {last}"
        raise InputError(
            what,
            "the same on every process",
            f"another on {names} than on process 0",
            "mend that one" if not most else "mend those",
        )


def agree_on_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Refuse to go on where copies that ought to be the same differ.

    Compares sums of their bytes.

    Raises:
        RuntimeError: on every process, naming the first tensor that differs.
    """
    if size() == 1:
        return
    sums = [
        value.detach().contiguous().flatten().view(torch.uint8).sum(dtype=torch.int64).cpu()
        for value in tensors.values()
    ]
    everyone = gather_rows(torch.stack(sums)[None])
    for name, column in zip(tensors, everyone.T.tolist(), strict=True):
        if len(set(column)) > 1:
            raise RuntimeError(
                f"the processes hold different copies of {name}: their steps were not the same"
            )
