"""Devices by name: how much memory they have, and what they do in a second, each with its source.

Rates are what was seen or published, not what this package reaches: `speed` knows how far the two
are apart.
"""

import functools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from xmlkernels.errors import InputError
from xmlkernels.memory import machine_memory

_COPY = 256 << 20  # bytes of the copy that a CPU is timed by: larger than most caches
_SIDE = 1024  # of the matrices that it multiplies
_TRIES = 3


@dataclass(frozen=True)
class Card:
    """What a device has and does.

    Attributes:
        name: as one asks for it.
        cuda: whether it is a card; otherwise the processors of a machine.
        memory: bytes; None where nobody knows.
        copy: bytes per second read and written by a large copy.
        products: operations per second of a large matrix product, by number format.
        wire: bytes per second that a process receives from others.
        source: where these are from.
    """

    name: str
    cuda: bool
    memory: int | None
    copy: float
    products: Mapping[str, float]
    wire: float
    source: str

    def rate(self, dtype: str) -> float:
        """Operations per second in a format; e4m3 is multiplied as bf16."""
        return self.products["bf16" if dtype == "fp8" else dtype]


def _half(bf16: float, fp32: float) -> dict[str, float]:
    return {"bf16": bf16, "fp16": bf16, "fp32": fp32}


_GIB = 1 << 30
# A memory is what the driver reports, or the data sheet's gigabytes where no report is known.
# NVLink and PCIe: one direction, data sheets.
CARDS = {
    card.name: card
    for card in (
        Card("h200", True, 139 * _GIB, 4.3e12, _half(790e12, 51e12), 450e9,
             "copy, bf16 products and memory as seen on such cards; fp32 and NVLink: data sheet"),
        Card("h100", True, 80 * 10**9, 3.0e12, _half(790e12, 51e12), 450e9,
             "nine tenths of the data sheet's memory rate; bf16 as seen on an H200, of as many "
             "multiprocessors; the rest: data sheet"),
        Card("a100", True, 80 * 10**9, 1.8e12, _half(250e12, 17.5e12), 300e9,
             "nine tenths of the data sheet's memory rate, eight of its products; NVLink and "
             "memory: data sheet of the card of 80 GB"),
        Card("rtx4090", True, 24 * 10**9, 0.9 * 1.008e12, _half(0.8 * 165.2e12, 0.8 * 82.6e12),
             32e9, "nine tenths of the data sheet's memory rate, eight of its products; PCIe 4"),
        Card("l4", True, 24 * 10**9, 0.9 * 0.3e12, _half(0.8 * 121e12, 0.8 * 30.3e12), 32e9,
             "nine tenths of the data sheet's memory rate, eight of its products; PCIe 4"),
    )
}  # fmt: skip
_TOLD = {"nvidia h200": "h200", "nvidia h100": "h100", "nvidia a100": "a100",
         "nvidia geforce rtx 4090": "rtx4090", "nvidia l4": "l4"}  # fmt: skip


def card_of(name: str, where: str = "--device") -> Card:
    """Find a device by name: one of `CARDS`, "cpu", "cuda" (this machine's) or "auto".

    Raises:
        InputError: no device of that name, or a card of this machine that nobody knows.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] == "cuda":
        found = torch.cuda.get_device_name(name) if torch.cuda.is_available() else "no card"
        known = next((own for told, own in _TOLD.items() if found.lower().startswith(told)), "")
        if not known:
            mend = "name the card to plan for, as --device h200"
            raise InputError(where, f"a card that is known ({', '.join(CARDS)})", found, mend)
        own = torch.cuda.get_device_properties(name).total_memory
        return replace(CARDS[known], memory=int(own))
    if name == "cpu":
        return this_cpu()
    if name not in CARDS:
        known = ", ".join((*CARDS, "cpu"))
        raise InputError(where, f"a known device ({known})", repr(name), "choose one of them")
    return CARDS[name]


@functools.cache
def this_cpu() -> Card:
    """Measure this machine's processors, once: a copy and products, in a second or less.

    What else runs here slows them. Processes of one machine share them, and its memory; over a
    network nobody knows, so bytes count as copies.
    """
    source, target = torch.ones(_COPY, dtype=torch.uint8), torch.empty(_COPY, dtype=torch.uint8)
    copy = 2 * _COPY / _fastest(lambda: target.copy_(source))
    products = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.ones(_SIDE, _SIDE, dtype=dtype)
        products[name] = 2 * _SIDE**3 / _fastest(lambda a=a: a @ a)  # type: ignore[misc]
    # Half precision is widened by the kernels, which then multiply in fp32.
    products["fp16"] = products["fp32"]
    threads = torch.get_num_threads()
    told = f"measured now on {threads} of {os.cpu_count()} processors: a copy of {_COPY >> 20} MiB"
    told += f" and products of {_SIDE} x {_SIDE}"
    return Card("cpu", False, machine_memory(), copy, products, copy / 2, told)


def _fastest(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(_TRIES + 1):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return max(best, 1e-9)
