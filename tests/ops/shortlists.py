"""Problems and exact answers that the tests of `shortlist_matmul` share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common import DTYPES, bits
from xmlkernels import ops

F32 = torch.float32
# B, S, n, D: single, empty batch, empty list, empty table, ragged with many duplicates, several
# blocks of entries in one sample and many segments of a shared list, wide batch, more rows than one
# sorting pass tells apart.
SHAPES = [
    (1, 1, 1, 1), (0, 5, 9, 4), (3, 0, 9, 4), (3, 4, 0, 4), (5, 7, 20, 7),
    (2, 1301, 1900, 33), (130, 33, 700, 17),
    (33, 270, 5000, 100),
]  # fmt: skip
BOTH = [False, True]  # whether the batch shares one shortlist


def make(
    b: int,
    s: int,
    n: int,
    d: int,
    dtype: torch.dtype = F32,
    *,
    shared: bool = False,
    x_dtype: torch.dtype | None = None,
    pads: float = 0.2,
    seed: int = 0,
) -> dict[str, Tensor]:
    """x, weight, bias, index and dlogits; the first and the last row are always named, and dlogits
    is NaN at pads.
    """
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(max(n, 1), (s,) if shared else (b, s), generator=g)
    index = (
        torch.where(torch.rand(index.shape, generator=g) < pads, -1, index)
        if n
        else torch.full_like(index, -1)
    )
    if n and index.numel():
        index.view(-1)[0], index.view(-1)[-1] = n - 1, 0
    dlogits = torch.randn(b, s, generator=g)
    return {
        "x": torch.randn(b, d, generator=g).to(x_dtype or dtype),
        "weight": (torch.randn(n, d, generator=g) * 0.3).to(dtype),
        "bias": torch.randn(n, generator=g),
        "index": index,
        "dlogits": torch.where(index >= 0, dlogits, torch.nan),
    }


def make_exact(
    b: int, s: int, n: int, d: int, dtype: torch.dtype, *, shared: bool = False
) -> dict[str, Tensor]:
    """Small whole numbers: every sum is exact in fp32 in any order, and every factor in bf16."""
    t, g = make(b, s, n, d, dtype, shared=shared), torch.Generator().manual_seed(1)
    for name, low in (("x", -4), ("weight", -8), ("bias", -8), ("dlogits", -4)):
        t[name] = torch.randint(low, -low + 1, t[name].shape, generator=g).to(t[name].dtype)
    return t


def make_exact_fp8(b: int, s: int, n: int, d: int, *, shared: bool = False) -> dict[str, Tensor]:
    """The same with an e4m3 table, whose rows have scales from 1/8 to 8."""
    t = make_exact(b, s, n, d, torch.float32, shared=shared)
    scale = torch.exp2(torch.arange(n).remainder(7) - 3.0)
    return t | {
        "weight": t["weight"].to(torch.float8_e4m3fn),
        "row_scale": torch.stack([scale, scale], 1),
    }


def moved(t: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {k: v.to(device) for k, v in t.items()}


def forward(t: dict[str, Tensor]) -> Tensor:
    return ops.shortlist_matmul(t["x"], t["weight"], t.get("bias"), t["index"], t.get("row_scale"))


def backward(t: dict[str, Tensor], **needs: bool) -> dict[str, Tensor]:
    found = torch.ops.xmlkernels.shortlist_backward(
        t["dlogits"],
        t["x"],
        t["weight"],
        t["index"],
        t.get("row_scale"),
        **({"need_dbias": True} | needs),
    )
    return dict(zip(("dx", "rows", "grad", "dbias"), found, strict=True))


def everything(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"logits": forward(t)} | backward(t)


def plain(t: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """The same by indexing and torch's own autograd; every factor and result rounded to `dtype`,
    sums in fp32 or fp64.
    """
    work = torch.promote_types(dtype, F32)
    x, weight, bias = (
        t[k].to(dtype if k != "bias" else work).to(work).requires_grad_()
        for k in ("x", "weight", "bias")
    )
    wide = t["index"].expand(t["x"].shape[0], t["index"].shape[-1])
    real = wide >= 0
    sample = real.nonzero()[:, 0]
    z = (x[sample] * weight[wide[real]]).sum(1) + bias[wide[real]]
    logits = torch.full(wide.shape, -torch.inf, dtype=work)
    logits[real] = z.detach().to(dtype).to(work)
    dx, grad, dbias = torch.autograd.grad(
        z, (x, weight, bias), t["dlogits"][real].to(dtype).to(work), materialize_grads=True
    )
    rows = wide[real].unique()
    found = {"logits": logits, "dx": dx, "grad": grad[rows], "dbias": dbias[rows]}
    return {k: v.to(dtype) for k, v in found.items()} | {"rows": rows}


def exact_results(
    call: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> dict[str, list[list[int]]]:
    """Two checksums of the bits of each result of `call`, on problems whose sums are exact in any
    order.
    """
    out = {}
    for dtype in (*DTYPES, torch.float8_e4m3fn):
        for shape in ((5, 40, 30, 7), (67, 300, 400, 70)):
            for shared in BOTH:
                wide = dtype in DTYPES
                found = call(
                    make_exact(*shape, dtype, shared=shared)
                    if wide
                    else make_exact_fp8(*shape, shared=shared)
                )
                words = [bits(v + 0).long().flatten() for _, v in sorted(found.items())]
                places = [int((w * torch.arange(1, len(w) + 1)).sum()) for w in words]
                out[f"{dtype} {shape} {shared}"] = [[int(w.sum()) for w in words], places]
    return out


def make_choice(
    shape: tuple[int, ...], kind: str = "random", *, positives: int = 0, seed: int = 0
) -> dict[str, Any]:
    """A call of `shortlist_select`: B samples, clusters of up to M nodes, K of them, k and width.

    Args:
        shape: B, M, K, k, width.
        kind: of the scores: "random", with many "ties", with "special" numbers, or all the "same".
        positives: of a sample, some of them no candidates; a row has from none to three times it.
        seed: of all numbers.
    """
    b, most, slots, k, width = shape
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, most + 1, (slots + 3,), generator=g)
    sizes[0] = most
    row_ptr = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    clusters = torch.full((b, slots), -1)
    for row in clusters:
        few = int(torch.randint(0, slots + 1, (), generator=g))
        row[:few] = torch.randperm(len(sizes), generator=g)[:few].sort().values
    scores = torch.randn(b, slots, most, generator=g)
    if kind == "ties":
        scores = scores.round()
    elif kind == "same":
        scores = torch.zeros_like(scores)
    elif kind == "special":
        some = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-45, -1e-45, 3e38, -3e38]
        scores = torch.tensor(some)[torch.randint(len(some), scores.shape, generator=g)]
    real = torch.arange(most) < torch.nn.functional.pad(row_ptr.diff(), (0, 1))[clusters][..., None]
    pairs = {
        (int(torch.randint(int(row_ptr[-1]) + 2, (), generator=g)), sample)
        for sample in range(b)
        for _ in range(positives * (sample % 4))
    }
    node = torch.tensor([n for n, _ in sorted(pairs)], dtype=torch.int64)
    sample = torch.tensor([s for _, s in sorted(pairs)], dtype=torch.int32)
    call = {"scores": torch.where(real, scores, torch.nan), "clusters": clusters}
    call |= {"row_ptr": row_ptr, "k": k, "width": width}
    return call | {"node": node, "sample": sample}
