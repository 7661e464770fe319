"""`shortlist_select` and `shortlist_merge`: which candidates are kept, as keys and as nodes.

Kernel and reference choose by a total order, so every comparison is of bits; there is no rounding
and no gradient to look at.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common import DEVICES, assert_same_bits, needs_kernels, opcheck
from shortlists import make_choice
from xmlkernels import ops
from xmlkernels.errors import InputError
from xmlkernels.reference import shortlist_select as reference

NATIVE: Any = torch.ops.xmlkernels
# B, nodes of each cluster (drawn up to this), K, k, width.
SHAPES = [
    (0, 3, 4, 2, 3),
    (1, 1, 1, 1, 1),
    (5, 4, 0, 2, 0),
    (3, 4, 6, 0, 5),
    (9, 5, 12, 7, 10),
    (33, 1, 70, 20, 30),
    (70, 300, 2, 64, 96),
    (17, 8, 96, 128, 160),
    (4, 3, 5, 40, 60),
]
KINDS = ["random", "ties", "special", "same"]


def run(call: dict[str, Any], module: Any = ops) -> dict[str, Tensor]:
    """Both ops on one level."""
    keys = module.shortlist_select(**call)
    level = call["clusters"], call["row_ptr"], call["scores"].shape[2], call["k"], call["width"]
    names = ("nodes", "places", "scores", "forced")
    merged = zip(names, module.shortlist_merge(keys, *level), strict=True)
    return {"keys": keys} | dict(merged)


def moved(call: dict[str, Any], device: str) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in call.items()}


# 1.
@pytest.mark.parametrize("device", DEVICES)
def test_by_hand(device: str) -> None:
    """Clusters 0 to 2 own the nodes 0 1 | 2 3 4 | 5. The sample's candidates 0 1 | 5 stand at the
    places 0 1 3; 9 stands where there is none. Node 1 is forced, though the worst.
    """
    call = {
        "scores": torch.tensor([[[0.5, -2.0, 9.0], [0.5, 9.0, 9.0]]]),
        "clusters": torch.tensor([[0, 2]]),
        "row_ptr": torch.tensor([0, 2, 5, 6]),
        "k": 2,
        "width": 3,
        "node": torch.tensor([1, 3]),
        "sample": torch.tensor([0, 0], dtype=torch.int32),
    }
    found = run(moved(call, device))
    assert found["nodes"].tolist() == [[0, 1, -1]] and found["places"].tolist() == [[0, 1, 0]]
    assert found["scores"].tolist() == [[0.5, -2.0, -torch.inf]]
    assert found["forced"].tolist() == [1]
    half = 0x80000000 | 0x3F000000  # the bits of 0.5, above those of every negative number
    low = 0xFFFFFFFF - 0xC0000000
    first, second = half << 30 | (2**30 - 1), 1 << 62 | low << 30 | (2**30 - 2)
    assert found["keys"].tolist() == [[first, second, -1]]
    alone = run(moved(call | {"node": None, "sample": None}, device))
    assert alone["nodes"].tolist() == [[0, 5, -1]] and alone["places"].tolist() == [[0, 3, 0]]


# 2. The reference beside sets.
@pytest.mark.parametrize("module", [ops, reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_best_by_sorting(shape: tuple[int, ...], kind: str, module: Any) -> None:
    call = make_choice(shape, kind, positives=4)
    found, (_, _, most) = run(call, module), call["scores"].shape
    pairs = set(zip(call["sample"].tolist(), call["node"].tolist(), strict=True))
    bits = (call["scores"].numpy() + np.float32(0)).view(np.int32).astype(np.int64)
    order = np.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)
    forced = 0
    for b, clusters in enumerate(call["clusters"].tolist()):
        there = [
            ((b, n) not in pairs, -int(order[b, slot, n - start]), slot * most + n - start, n)
            for slot, c in enumerate(clusters)
            if c >= 0
            for start in [int(call["row_ptr"][c])]
            for n in range(start, int(call["row_ptr"][c + 1]))
        ]
        many = sum(not other for other, *_ in there)
        best = sorted(there)[: min(call["width"], max(call["k"], many))]
        best = sorted(best, key=lambda one: one[2])
        assert found["places"][b, : len(best)].tolist() == [place for _, _, place, _ in best]
        pads = call["width"] - len(best)
        assert found["nodes"][b].tolist() == [n for *_, n in best] + [-1] * pads
        assert (found["keys"][b, len(best) :] == -1).all()
        held = call["scores"][b].flatten()[[place for _, _, place, _ in best]] + 0.0
        assert_same_bits({"s": found["scores"][b, : len(best)]}, {"s": held})
        forced += min(many, call["width"])
    assert found["forced"].tolist() == [forced]


# 3. The bits of the reference.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_bit_for_bit(shape: tuple[int, ...], kind: str, device: str) -> None:
    for positives in (0, 4):
        call = make_choice(shape, kind, positives=positives, seed=1)
        assert_same_bits(
            {k: v.cpu() for k, v in run(moved(call, device)).items()}, run(call, reference)
        )


# 4.
@pytest.mark.parametrize("device", DEVICES)
def test_nodes_and_places_at_the_ends_of_their_range(device: str) -> None:
    """Nodes beyond 2^40, and the last of 2^30 places."""
    base = 2**40
    call: dict[str, Any] = {
        "scores": torch.tensor([[[1.0, 3.0], [2.0, 0.0]]]),
        "clusters": torch.tensor([[1, 2]]),
        "row_ptr": torch.tensor([0, base, base + 2, base + 3]),
        "k": 2,
        "width": 2,
    }
    # Only the chosen clusters must fit: the first one, of 2^40 nodes, is refused.
    with pytest.raises((InputError, RuntimeError), match="largest cluster|cluster_rows"):
        run(call)
    call["row_ptr"] = torch.tensor([base, base, base + 2, base + 3])
    call = moved(call, device)
    assert run(call)["nodes"].tolist() == [[base + 1, base + 2]]
    last = torch.tensor([[0, 2**30 - 2]], device=device)
    keys = ops.shortlist_select(**call, first=last)
    assert (2**30 - 1 - (keys & (2**30 - 1))).tolist() == [[1, 2**30 - 2]]


# 5.
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    call = moved(make_choice((9, 5, 12, 7, 10), "random", positives=4), device)
    args = tuple(call[k] for k in ("scores", "clusters", "row_ptr", "k", "width"))
    more = {k: call[k] for k in ("node", "sample")}
    first = torch.arange(12, device=device).expand(9, 12).contiguous() * 7
    for options in ({}, more, more | {"first": first}):
        opcheck(NATIVE.shortlist_select.default, args, options)
    keys = ops.shortlist_select(*args, **more)
    opcheck(NATIVE.shortlist_merge.default, (keys, *args[1:3], 5, 7, 10))


@needs_kernels
@pytest.mark.parametrize("op", ["shortlist_select", "shortlist_merge"])
def test_the_native_library_serves_the_op(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"xmlkernels::{op}", "CPU")


# 6.
@needs_kernels
def test_threads_and_parts(threads: None) -> None:
    """Any number of threads, and a level in parts whose keys are merged, in any order."""
    call = make_choice((70, 9, 40, 30, 45), "ties", positives=5, seed=3)
    torch.set_num_threads(1)
    whole = run(call)
    torch.set_num_threads(3)
    assert_same_bits(whole, run(call))
    first = (torch.arange(40) * call["scores"].shape[2]).expand(70, 40)
    keys = []
    for part in (slice(25, 40), slice(0, 11), slice(11, 25)):
        own = {"clusters": call["clusters"][:, part].contiguous()}
        own |= {
            "scores": call["scores"][:, part].contiguous(),
            "first": first[:, part].contiguous(),
        }
        keys.append(ops.shortlist_select(**call | own))
    level = call["clusters"], call["row_ptr"], call["scores"].shape[2]
    merged = ops.shortlist_merge(torch.cat(keys, 1), *level, call["k"], call["width"])
    names = ("nodes", "places", "scores", "forced")
    assert_same_bits({k: whole[k] for k in names}, dict(zip(names, merged, strict=True)))


# 8.
BAD: list[tuple[str, str, dict[str, Any], str]] = [
    ("select", "scores", {"scores": torch.zeros(3, 4)}, r"torch.float32 \[any, any, any\]"),
    ("select", "scores", {"scores": torch.zeros(3, 2, 3).double()}, "torch.float32"),
    ("select", "scores", {"scores": torch.zeros(3, 2, 1)}, "2 or more, the size of the largest"),
    ("select", "clusters", {"clusters": torch.zeros(3, 1, dtype=torch.int64)}, r"torch.int64 \[3"),
    ("select", "clusters", {"clusters": torch.full((3, 2), 4)}, "clusters from 0 to 2, or -1"),
    ("select", "row_ptr", {"row_ptr": torch.tensor([0, 2, 1, 3])}, "ascending rows from 0"),
    ("select", "k", {"k": -1}, "0 or more"),
    ("select", "width", {"width": -1}, "0 or more"),
    ("select", "node", {"node": torch.zeros(2)}, "torch.int64"),
    (
        "select",
        "sample",
        {"sample": torch.tensor([0, 3], dtype=torch.int32)},
        "samples from 0 to 2",
    ),
    ("select", "sample", {"sample": torch.tensor([0, 1])}, "torch.int32"),
    ("select", "sample", {"sample": None}, "one beside node"),
    ("select", "first", {"first": torch.zeros(3, 1, dtype=torch.int64)}, r"torch.int64 \[3, 2\]"),
    ("select", "first", {"first": torch.full((3, 2), -1)}, "places from 0 to"),
    ("merge", "keys", {"keys": torch.zeros(3)}, r"torch.int64 \[any, any\]"),
    ("merge", "keys", {"keys": torch.full((3, 2), 2**30 - 8)}, "places below 6"),
    ("merge", "clusters", {"clusters": torch.full((2, 2), 0)}, r"torch.int64 \[3, any\]"),
    ("merge", "most", {"most": 1}, "2 or more"),
    ("merge", "most", {"most": -1}, "0 or more"),
    ("merge", "clusters", {"most": 2**30}, "at most 2\\^30 candidates"),
    ("merge", "k", {"k": -2}, "0 or more"),
]
SILENT = ("first",)  # what no kernel need refuse: it corrupts no memory


def good(op: str) -> dict[str, Any]:
    level = {"clusters": torch.tensor([[0, 1], [1, 2], [2, -1]])}
    level |= {"row_ptr": torch.tensor([0, 2, 3, 4]), "k": 2, "width": 3}
    if op == "merge":
        return level | {"keys": torch.full((3, 2), -1), "most": 3}
    pairs = {"node": torch.tensor([0, 2]), "sample": torch.tensor([0, 1], dtype=torch.int32)}
    return level | pairs | {"scores": torch.zeros(3, 2, 3), "first": torch.tensor([[0, 3]] * 3)}


@pytest.mark.parametrize("op, name, changed, expected", BAD)
def test_message(op: str, name: str, changed: dict[str, Any], expected: str) -> None:
    call = good(op) | changed
    functions: list[Callable[..., Any]] = [getattr(ops, f"shortlist_{op}")]
    with pytest.raises(InputError, match=f"shortlist_{op}: argument {name}: expected {expected}"):
        functions[0](**call)
    if name not in SILENT or "torch.int64" in expected:
        with pytest.raises((InputError, RuntimeError), match=f"shortlist_{op}: argument"):
            getattr(NATIVE, f"shortlist_{op}")(**call)
