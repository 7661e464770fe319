"""Calls of the ops with spoiled arguments, from seeds: each ends with results or with a sentence,
and no other memory changes.

`python tests/faults/ops_calls.py public|direct --first 0 --count 6600` prints what became of them,
as JSON in one line, and names each bad call with its seed. `direct` goes past the checks of
`xmlkernels.ops`, through `torch.ops`. A crash takes the process: --progress names a file that holds
the seed that was under way.

Every tensor lies in the middle of a larger buffer. After a call the margins must be what they were,
and so must everything that the op does not update, or everything at all when the call was refused.
"""

import argparse
import json
import math
import os
import random
import resource
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))

from common_calls import DIRECT, PUBLIC, Call, written
from xmlkernels import ops
from xmlkernels.errors import InputError

MARGIN, CANARY = 4096, 0xA5
LONGS = [
    -(2**63),
    -(2**62),
    -(2**33),
    -(2**31),
    -2,
    -1,
    0,
    1,
    7,
    2**31 - 1,
    2**31,
    2**33,
    2**53 + 1,
    2**62,
    2**63 - 1,
]
FLOATS = [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-45, 3e38, -3e38]
DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
OTHER = [
    None,
    [1, 2],
    (),
    "text",
    1.5,
    3,
    {},
    True,
    b"x",
    object(),
    np.zeros(3),
    np.int64(1),
    np.float32(0.5),
]
# Bytes of address space beyond what the process has: a wish for more is refused by the allocator.
LARGEST = 6 << 30


def embedded(t: Tensor) -> Tensor:
    """Copy a tensor into a buffer with margins, as its own storage."""
    size = t.numel() * t.element_size()
    buffer = torch.full((size + 2 * MARGIN,), CANARY, dtype=torch.uint8)
    inside = buffer[MARGIN : MARGIN + size]
    inside.copy_(t.detach().contiguous().reshape(-1).view(torch.uint8))
    return inside.view(t.dtype).view(t.shape)


def whole(t: Tensor) -> Tensor:
    """Return all bytes of the memory that a tensor is part of."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


# --- what may go wrong: each takes a random source, the call and the name of a tensor, and gives
# what is passed instead


def other_dtype(r: random.Random, call: Call, name: str) -> Any:
    return embedded(call[name].float().to(r.choice(DTYPES)))


def other_shape(r: random.Random, call: Call, name: str) -> Any:
    t = call[name]
    shape = list(t.shape)
    kind = r.randrange(7)
    if kind == 0:
        shape.insert(r.randint(0, len(shape)), 1)
    elif kind == 1 and shape:
        shape.pop(r.randrange(len(shape)))
    elif kind == 2:
        shape.reverse()
    elif kind == 3:
        shape = []
    elif shape:
        at = r.randrange(len(shape))
        shape[at] = max(
            0, r.choice([0, shape[at] - 1, shape[at] + 1, 2 * shape[at], shape[at] // 2])
        )
    room = torch.zeros(math.prod(shape), dtype=torch.float32)
    flat = t.float().reshape(-1)[: room.numel()]
    room[: flat.numel()] = flat
    return embedded(room.to(t.dtype).reshape(shape))


def strided(r: random.Random, call: Call, name: str) -> Any:
    t = call[name]
    kind = r.randrange(3)
    if kind == 0 and t.dim() == 2:
        return embedded(t.T.contiguous()).T
    if kind == 1 and t.numel():
        return embedded(t.reshape(-1)[:1]).expand(t.shape) if t.dim() else t
    return embedded(torch.stack([t, t], -1))[..., 0]


def shared_memory(r: random.Random, call: Call, name: str) -> Any:
    """Pass another argument itself, or another view of its bytes."""
    t = call[name]
    other = call[r.choice([k for k in sorted(call) if plain(call[k])])]
    size = t.numel() * t.element_size()
    bytes_of = whole(other)
    room = bytes_of.numel() - MARGIN - size
    if r.random() < 0.4 or room < MARGIN:
        return other
    at = MARGIN + r.randrange(0, max(1, room - MARGIN + 1)) // 16 * 16
    return bytes_of[at : at + size].view(t.dtype).view(t.shape)


def other_values(r: random.Random, call: Call, name: str) -> Any:
    t = call[name].clone()
    flat = t.view(-1)
    if not flat.numel():
        return embedded(t)
    if t.is_floating_point():
        value = torch.tensor(r.choice(FLOATS)).to(t.dtype)
        flat.copy_(value) if r.random() < 0.2 else flat[r.randrange(flat.numel())].copy_(value)
        return embedded(t)
    kind = r.randrange(6)
    if kind == 0:
        flat.copy_(flat.flip(0))
    elif kind == 1:
        flat.copy_(
            flat[
                torch.randperm(
                    flat.numel(), generator=torch.Generator().manual_seed(r.randrange(99))
                )
            ]
        )
    elif kind == 2:
        flat.copy_(flat[0].clone())
    else:
        edges = [len(v) + e for v in call.values() if plain(v) and v.dim() for e in (-1, 0, 1)]
        info = torch.iinfo(t.dtype)
        flat[r.randrange(flat.numel())] = max(info.min, min(info.max, r.choice(LONGS + edges)))
    return embedded(t)


def elsewhere(r: random.Random, call: Call, name: str) -> Any:
    t = call[name]
    kind = r.randrange(4)
    if kind == 0:
        return t.to("meta")
    if kind == 1:
        return t.float().to_sparse() if t.dim() else t
    if kind == 2:
        return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])
    if t.dtype in (torch.float32, torch.float16):
        return t.detach().requires_grad_() if r.random() < 0.5 else t.numpy().copy()
    return t.tolist()


SPOIL: list[Callable[[random.Random, Call, str], Any]] = [
    other_dtype,
    other_shape,
    strided,
    shared_memory,
    other_values,
    other_values,
    other_values,
    elsewhere,
    lambda r, call, name: r.choice(OTHER),
]


def plain(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.device.type == "cpu"
        and not value.is_nested
        and value.layout == torch.strided
    )


def spoil(r: random.Random, call: Call, name: str) -> None:
    """Replace one argument of the call."""
    if isinstance(call[name], Tensor):
        call[name] = r.choice(SPOIL)(r, call, name)
    elif isinstance(call[name], bool) or call[name] is None:
        call[name] = r.choice([*OTHER, torch.ones(2, 3), False])
    elif isinstance(call[name], float):
        call[name] = r.choice([*FLOATS, *OTHER])
    else:
        edges = [len(v) + e for v in call.values() if plain(v) and v.dim() for e in (-1, 0, 1)]
        call[name] = r.choice([*LONGS, *edges, *edges, *OTHER, 2**63, -(2**70), torch.tensor(3)])


def trial(kind: str, seed: int) -> tuple[str, str, str]:
    """Make one call; return its op, "succeeded", "refused" or "bad", and why."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    makers = PUBLIC if kind == "public" else DIRECT
    op = sorted(makers)[seed % len(makers)]
    call = {k: embedded(v) if isinstance(v, Tensor) else v for k, v in makers[op](r).items()}
    wrong = 0 if r.random() < 0.03 else r.choice([1, 1, 1, 2, 3])
    for name in r.sample(sorted(call), min(wrong, len(call))):
        spoil(r, call, name)
    held = {k: whole(v) for k, v in call.items() if plain(v)}
    before = {k: v.clone() for k, v in held.items()}
    function = getattr(ops if kind == "public" else torch.ops.xmlkernels, op)
    try:
        function(**call)
    except Exception as error:
        changed = [k for k in held if not torch.equal(held[k], before[k])]
        if changed:
            return op, "bad", f"refused ({error}), but {', '.join(changed)} changed"
        told = fault_of(kind, op, error)
        if told is None and not wrong:
            return op, "bad", f"a good call was refused: {error}"
        return (op, "refused", "") if told is None else (op, "bad", told)
    for name in written(op) & held.keys():
        # Where the tensor itself lies; contiguous, or the call would have been refused. Others may
        # lie in the same buffer.
        t = call[name]
        start = t.storage_offset() * t.element_size()
        end = start + t.numel() * t.element_size()
        for other in (k for k in held if held[k].data_ptr() == held[name].data_ptr()):
            before[other][start:end] = held[name][start:end]
    for name, now in held.items():
        if not torch.equal(now, before[name]):
            return op, "bad", f"memory that is not the op's to write changed around {name}"
    return op, "succeeded", ""


def fault_of(kind: str, op: str, error: Exception) -> str | None:
    """Return why an exception is not a sentence for a user, or None."""
    text = str(error)
    told = ("allocate", "bad_alloc", "Storage size", "expected memory")
    memory = isinstance(error, MemoryError) or any(words in text for words in told)
    if isinstance(error, InputError):
        good = (
            text.startswith(f"{op}: argument")
            and "\n" not in text
            and all((error.expected, error.got, error.mend))
        )
    elif kind == "direct":
        # Torch's own sentence about a value that the schema does not take, or about tensors of
        # another kind.
        good = isinstance(error, RuntimeError) and (
            text.startswith(f"{op}: argument") or "xmlkernels::" in text
        )
    else:
        good = False
    return None if good or memory else "".join(traceback.format_exception(error))[-1500:]


def run(kind: str, first: int, count: int, progress: Path | None) -> dict[str, Any]:
    torch.set_num_threads(2)
    file = None if progress is None else os.open(progress, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    ends: Counter[str] = Counter()
    by_op: dict[str, Counter[str]] = {}
    bad = []
    for seed in range(first, first + count):
        if file is not None:
            os.pwrite(file, f"{seed:12d}".encode(), 0)
        op, end, why = trial(kind, seed)
        ends[end] += 1
        by_op.setdefault(op, Counter())[end] += 1
        if end == "bad":
            bad.append({"seed": seed, "op": op, "why": why})
    return {"kind": kind, "native": ops.missing is None, **ends, "ops": by_op, "faults": bad}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["public", "direct"])
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--count", type=int, default=100, help="number of seeds")
    parser.add_argument("--progress", type=Path, help="file that names the seed under way")
    args = parser.parse_args()
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # its shadow is address space, too
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + LARGEST
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    json.dump(run(args.kind, args.first, args.count, args.progress), sys.stdout)
    print()


if __name__ == "__main__":
    main()
