"""Problems, exact and low-precision answers, and the comparisons that the op tests share.

A kernel is compared with the reference run in float64 (`exact`), never with another kernel; how far
it may stray is measured by what plain PyTorch does at the table's precision (`torch_step`).
"""

import ctypes
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from xmlkernels import ops
from xmlkernels.ops import Hyper
from xmlkernels.reference import bce_step as reference_step

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOW = [torch.bfloat16, torch.float16]
# (B, L, D): single, empty batch, empty table, ragged, aligned, wide, many tiles in every dimension.
SHAPES = [
    (1, 1, 1), (0, 37, 16), (5, 0, 7), (1, 1000, 1), (5, 129, 7), (64, 1024, 64),
    (100, 2051, 100), (257, 1537, 384),
    (64, 4999, 384), (257, 5000, 16),
]  # fmt: skip
STATES = ("bias", "momentum", "second", "kahan")
opcheck = library.opcheck
needs_kernels = pytest.mark.skipif(
    ops.missing is not None, reason=f"CPU kernels are not loaded: {ops.missing}"
)


def name_of(value: object) -> str | None:
    """Short test ids."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple):
        return "x".join(str(v) for v in value)
    return None


def decoded(weight: Tensor, row_scale: Tensor) -> Tensor:
    """An e4m3 table's values in fp32."""
    return weight.float() * row_scale[:, :1]


def to_fp8(value: Tensor, scale: float | Tensor = 2.0**-8) -> tuple[Tensor, Tensor]:
    """The nearest e4m3 table [n, D], saturated, and its row_scale [n, 2]; scale: one, or one per
    row.
    """
    scale = torch.as_tensor(scale).expand(value.shape[0])
    weight = (value / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    row_scale = torch.stack([scale, torch.zeros_like(scale)], 1)
    row_scale[:, 1] = decoded(weight, row_scale).abs().amax(1)
    return weight, row_scale


def make_hyper(
    lr: float = 0.0,
    decay: float = 0.0,
    beta1: float = 0.0,
    beta2: float = 0.0,
    eps: float = 0.0,
    scale: float = 1.0,
    dx_scale: float = 1.0,
) -> Tensor:
    return Hyper(lr, decay, beta1, beta2, eps, scale, dx_scale).tensor()


def make_counter(seed: int = 11, step: int = 3) -> Tensor:
    return torch.tensor([seed, step])


def make_positives(b: int, n: int, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """About share * b * n distinct (row, sample) pairs, sorted; a corner pair is always among
    them.
    """
    g = torch.Generator().manual_seed(seed)
    y = torch.rand(n, b, generator=g) < share
    if b and n and share:
        y[-1, -1] = y[0, 0] = True
    row, sample = y.nonzero(as_tuple=True)
    return row, sample.to(torch.int32)


@dataclass
class Step:
    """The arguments of one `bce_step_` call; `run` works on copies."""

    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def run(
        self, op: Callable[..., tuple[Tensor, Tensor]] = ops.bce_step_, *, wide: bool = False
    ) -> dict[str, Tensor]:
        """dx, loss and every tensor after the step. wide: all floating-point arguments but hyper in
        float64.
        """
        t = {k: v.clone() for k, v in self.tensors.items()}
        if wide:
            if "row_scale" in t:
                t["weight"] = decoded(t["weight"], t.pop("row_scale"))
            t = {
                k: v.double() if v.is_floating_point() and k != "hyper" else v for k, v in t.items()
            }
        given = {k: t[k] for k in ("pos_value", "row_scale", "skipped", *STATES) if k in t}
        dx, loss = op(
            t["weight"],
            t["x"],
            t["pos_row"],
            t["pos_sample"],
            t["hyper"],
            t["counter"],
            **given,
            **self.options,
        )
        return {
            "dx": dx,
            "loss": loss,
            "weight": t["weight"],
            **{k: t[k] for k in ("row_scale", "skipped", *STATES) if k in t},
        }

    def exact(self) -> dict[str, Tensor]:
        return self.run(reference_step.bce_step_, wide=True)

    def reference(self) -> dict[str, Tensor]:
        return self.run(reference_step.bce_step_)

    def to(self, device: str) -> "Step":
        return Step({k: v.to(device) for k, v in self.tensors.items()}, dict(self.options))

    def replace(self, **changed: Any) -> "Step":
        """A copy with other tensors or options."""
        tensors = {k: v for k, v in changed.items() if isinstance(v, Tensor)}
        options = {k: v for k, v in changed.items() if not isinstance(v, Tensor)}
        return Step(self.tensors | tensors, self.options | options)


def random_step(
    b: int,
    n: int,
    d: int,
    dtype: torch.dtype,
    *,
    x_dtype: torch.dtype | None = None,
    share: float = 0.02,
    states: dict[str, torch.dtype] | None = None,
    hyper: Tensor | None = None,
    values: bool = False,
    seed: int = 0,
    **options: Any,
) -> Step:
    """A step on random numbers of the sizes that training meets."""
    g = torch.Generator().manual_seed(seed)
    row, sample = make_positives(b, n, share, seed)
    tensors = {
        "weight": (torch.randn(n, d, generator=g) * 0.3 / max(d, 1) ** 0.5).to(dtype),
        "x": torch.randn(b, d, generator=g).to(x_dtype or dtype),
        "pos_row": row,
        "pos_sample": sample,
        "counter": make_counter(),
        "hyper": make_hyper(0.05, scale=1.0) if hyper is None else hyper,
    }
    if values:
        tensors["pos_value"] = torch.rand(row.shape[0], generator=g)
    for name, state_dtype in (states or {}).items():
        if name == "bias":
            tensors[name] = torch.randn(n, generator=g)
        elif name == "kahan":
            tensors[name] = (torch.randn(n, d, generator=g) * 1e-4).to(state_dtype)
        else:
            noise = torch.randn(n, d, generator=g)
            tensors[name] = (noise.square() + 0.1 if name == "second" else noise * 0.1).to(
                state_dtype
            )
    return Step(tensors, {"need_loss": True} | options)


def dyadic_step(
    b: int,
    n: int,
    d: int,
    dtype: torch.dtype,
    *,
    exponent: int = -6,
    lr: float = 2.0**-8,
    x_bits: int = 6,
    share: float = 0.1,
    seed: int = 0,
    hyper: Tensor | None = None,
    x_dtype: torch.dtype | None = None,
    **options: Any,
) -> Step:
    """A step whose every sum is exact in fp32 in any order, so that bits can be compared.

    Columns come in pairs with the same x and opposite weights: all logits are 0 and sigma is 1/2.
    Weights are multiples of 2^exponent with 6 bits, x odd multiples of 1/16; an odd last column has
    weight 0.
    """
    g = torch.Generator().manual_seed(seed)
    pairs = d // 2
    weight, x = torch.zeros(n, d), torch.zeros(b, d)
    half = torch.randint(-63, 64, (n, pairs), generator=g) * 2.0**exponent
    weight[:, 0 : 2 * pairs : 2], weight[:, 1 : 2 * pairs : 2] = half, -half
    odd = (2 * torch.randint(0, 2 ** (x_bits - 1), (b, d), generator=g) + 1) / 16
    odd *= torch.randint(0, 2, (b, d), generator=g) * 2 - 1
    x[:, 0 : 2 * pairs : 2] = x[:, 1 : 2 * pairs : 2] = odd[:, 0 : 2 * pairs : 2]
    if d % 2:
        x[:, -1] = odd[:, -1]
    row, sample = make_positives(b, n, share, seed)
    tensors = {
        "weight": weight.to(dtype),
        "x": x.to(x_dtype or dtype),
        "pos_row": row,
        "pos_sample": sample,
        "counter": make_counter(),
        "hyper": make_hyper(lr, scale=0.5, dx_scale=4.0) if hyper is None else hyper,
    }
    return Step(tensors, {"need_loss": True} | options)


def fp8_step(step: Step, scale: float | Tensor = 2.0**-8) -> Step:
    """The step with its table in e4m3."""
    weight, row_scale = to_fp8(step.tensors["weight"].float(), scale)
    return step.replace(weight=weight, row_scale=row_scale)


def dense_targets(t: dict[str, Tensor], n: int) -> Tensor:
    """Targets [B, n] in fp32."""
    y = torch.zeros(t["x"].shape[0], n, device=t["x"].device)
    real = t["pos_row"] < n
    value = t["pos_value"] if "pos_value" in t else torch.ones(t["pos_row"].shape, device=y.device)
    y[t["pos_sample"][real].long(), t["pos_row"][real]] = value[real]
    return y


def torch_step(step: Step) -> dict[str, Tensor]:
    """The same step as plain PyTorch takes it at the table's precision, every intermediate stored
    in that format.

    Products accumulate in fp32 and the optimizer computes in fp32, as torch's own fused kernels do.
    """
    t, dtype = step.tensors, step.tensors["weight"].dtype
    hyper = Hyper(*t["hyper"].tolist())
    lr, scale, dx_scale = hyper.lr, hyper.scale, hyper.dx_scale
    w, x = t["weight"].float(), t["x"].to(dtype).float()
    if "kahan" in t:
        w = (w + t["kahan"].float()).to(dtype).float()
    y = dense_targets(t, w.shape[0])
    z = (x @ w.T + t["bias"] if "bias" in t else x @ w.T).to(dtype)
    g = ((torch.sigmoid(z) - y.to(dtype)) * scale).float()
    out = {"dx": (g @ w).to(dtype).float() * dx_scale}
    out["loss"] = scale * bce(z, y.to(dtype), reduction="none").float().sum().reshape(1)
    if "bias" in t:
        out["bias"] = t["bias"] - lr * g.to(dtype).float().sum(0)
    return out | torch_update(t, (g.T @ x).to(dtype).float(), step.options.get("decoupled", False))


def torch_update(t: dict[str, Tensor], grad: Tensor, decoupled: bool) -> dict[str, Tensor]:
    """The table and its states after torch's own optimizer took `grad` [n, D] in fp32, rounded to
    nearest.
    """
    lr, decay, beta1, beta2, eps, *_ = Hyper(*t["hyper"].tolist())
    dtype = t["weight"].dtype
    w = (
        (t["weight"].float() + t["kahan"].float()).to(dtype).float()
        if "kahan" in t
        else t["weight"].float()
    )
    p = torch.nn.Parameter(w.clone())
    p.grad = grad
    out: dict[str, Tensor] = {}
    optimizer: torch.optim.Optimizer
    if "second" in t:
        kind = torch.optim.AdamW if decoupled else torch.optim.Adam
        optimizer = kind([p], lr, (beta1, beta2), eps, decay)
        optimizer.state[p] = {
            "step": t["counter"][1].float().cpu(),
            "exp_avg": t["momentum"].float(),
            "exp_avg_sq": t["second"].float(),
        }
    else:
        if decoupled:
            p.data.mul_(1 - lr * decay)
        optimizer = torch.optim.SGD(
            [p], lr, beta1 if "momentum" in t else 0, weight_decay=0 if decoupled else decay
        )
        if "momentum" in t:
            optimizer.state[p] = {"momentum_buffer": t["momentum"].float()}
    optimizer.step()
    state = optimizer.state[p]
    if "momentum" in t:
        name = "exp_avg" if "second" in t else "momentum_buffer"
        out["momentum"] = state[name].to(t["momentum"].dtype)
    if "second" in t:
        out["second"] = state["exp_avg_sq"].to(t["second"].dtype)
    return out | {"weight": p.detach().to(dtype)}


def unit(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of `dtype` at each value, in float64."""
    info = torch.finfo(dtype)
    return (
        torch.exp2(value.double().abs().clamp(min=info.smallest_normal).log2().floor()) * info.eps
    )


def rms(value: Tensor) -> Tensor:
    return value.double().square().mean().sqrt()


def assert_no_worse(
    got: Tensor,
    low: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    *,
    what: str = "",
    rounded: torch.dtype | None = None,
) -> None:
    """|got - exact| <= 2 |low - exact| + a format epsilon, in RMS and in the maximum over the
    tensor.

    The epsilon is one unit of the largest value (of the RMS value, in RMS). For fp32 it is four in
    the maximum: there both errors are rounding noise alone, and the largest of a few thousand draws
    differs by chance between two summation orders.

    rounded: the low-precision format in which `got` is stored with stochastic rounding: a unit more
    in the maximum, half a unit in RMS.
    """
    assert got.shape == exact.shape and got.isfinite().all(), what
    if not got.numel():
        return
    exact = exact.double()
    mine, theirs, eps = got.double() - exact, low.double() - exact, torch.finfo(dtype).eps
    extra, extra_rms = torch.zeros(()), torch.zeros(())
    if rounded in LOW:
        units = unit(exact, rounded)
        extra, extra_rms = units.max(), 0.5 * rms(units)
    most = (
        2 * theirs.abs().max()
        + (4 if dtype == torch.float32 else 1) * eps * exact.abs().max()
        + extra
    )
    assert mine.abs().max() <= most, (
        f"{what}: largest error {mine.abs().max():.3e}, allowed {most:.3e}"
    )
    most = 2 * rms(theirs) + eps * rms(exact) + extra_rms
    assert rms(mine) <= most, f"{what}: RMS error {rms(mine):.3e}, allowed {most:.3e}"


def bits(t: Tensor) -> Tensor:
    """The stored bits, so that NaN equals itself and -0 differs from 0."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.detach().contiguous().view(sizes[t.element_size()]).cpu()


def assert_same_bits(
    a: dict[str, Tensor], b: dict[str, Tensor], *, but: tuple[str, ...] = ()
) -> None:
    for name in a.keys() - set(but):
        differing = int((bits(a[name]) != bits(b[name])).sum())
        assert differing == 0, f"{name}: {differing} of {a[name].numel()} entries differ"


def huge_table(rows: int, width: int, edge: int) -> Tensor:
    """A bf16 table of more addresses than bytes: its middle is one 2 MB piece of memory mapped
    again and again.

    The first and last `edge` bytes (a multiple of 2 MB) are memory of their own. All zeros.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    size, piece = rows * width * 2, 1 << 21
    assert size % piece == 0 and edge % piece == 0
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    file = os.memfd_create("table")
    os.ftruncate(file, piece)
    for at in range(edge, size - edge, piece):
        # MAP_FIXED.
        got = libc.mmap(
            start + at, piece, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | 0x10, file, 0
        )
        assert got == start + at, os.strerror(ctypes.get_errno())
    os.close(file)
    return torch.frombuffer(area, dtype=torch.bfloat16).view(rows, width)
