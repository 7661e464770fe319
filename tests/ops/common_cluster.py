"""Problems and comparisons of `cluster_step_`, beside those of `common.py`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from common import (
    STATES,
    Step,
    assert_no_worse,
    decoded,
    dense_targets,
    dyadic_step,
    random_step,
    torch_update,
)
from xmlkernels import ops
from xmlkernels.ops import Hyper
from xmlkernels.reference import cluster_step as reference_step

# name: (B, sizes of the clusters, K, D). Those from 32 rows and 16 samples on are large, the
# kernel's tiles of bce_step_.
SHAPES: dict[str, tuple[int, Sequence[int], int, int]] = {
    "single": (1, [1], 1, 1),
    "ragged": (5, [(7 * i) % 10 for i in range(30)], 7, 7),
    "aligned": (64, [8] * 32, 8, 64),
    "shortlist": (33, [10, 11] * 40, 9, 100),
    "wide": (20, [3, 40, 1], 2, 391),
    "level 0": (65, [1100], 1, 100),
    "level 0, one sample": (1, [300], 1, 40),
    "some large": (100, [120, 5, 300, 0, 33], 3, 130),
    "empty clusters": (9, [0] * 6, 3, 16),
    "no samples": (0, [4, 5], 2, 16),
    "no shortlist": (6, [4, 5], 0, 16),
    "no clusters": (6, [], 3, 16),
}


class ClusterStep(Step):
    """The arguments of one `cluster_step_` call; `run` works on copies."""

    def run(
        self, op: Callable[..., Any] = ops.cluster_step_, *, wide: bool = False
    ) -> dict[str, Tensor]:
        """dx, scores, loss and every tensor after the step. wide: all floating-point arguments but
        hyper in float64.
        """
        t = {k: v.clone() for k, v in self.tensors.items()}
        if wide:
            if "row_scale" in t:
                t["weight"] = decoded(t["weight"], t.pop("row_scale"))
            t = {
                k: v.double() if v.is_floating_point() and k != "hyper" else v for k, v in t.items()
            }
        given = {k: t[k] for k in ("pos_value", "row_scale", *STATES) if k in t}
        options = {k: v for k, v in self.options.items() if k != "cluster_rows"}
        dx, scores, loss = op(
            t["weight"],
            t["x"],
            t["clusters"],
            t["row_ptr"],
            self.options["cluster_rows"],
            t["pos_row"],
            t["pos_sample"],
            t["hyper"],
            t["counter"],
            **given,
            **options,
        )
        states = {k: t[k] for k in ("row_scale", *STATES) if k in t}
        return {"dx": dx, "scores": scores, "loss": loss, "weight": t["weight"], **states}

    def exact(self) -> dict[str, Tensor]:
        return self.run(reference_step.cluster_step_, wide=True)

    def reference(self) -> dict[str, Tensor]:
        return self.run(reference_step.cluster_step_)

    def to(self, device: str) -> "ClusterStep":
        return ClusterStep({k: v.to(device) for k, v in self.tensors.items()}, dict(self.options))

    def replace(self, **changed: Any) -> "ClusterStep":
        step = super().replace(**changed)
        return ClusterStep(step.tensors, step.options)

    def mask(self) -> Tensor:
        """The candidates [B, n], listed one by one."""
        t = self.tensors
        rows = self.options.get("rows", -1)
        n = t["weight"].shape[0]
        mask = torch.zeros(t["x"].shape[0], n, dtype=torch.bool)
        for sample, chosen in enumerate(t["clusters"].tolist()):
            for cluster in chosen:
                if cluster >= 0:
                    mask[sample, int(t["row_ptr"][cluster]) : int(t["row_ptr"][cluster + 1])] = True
        mask[:, n if rows < 0 else rows :] = False
        return mask.to(t["x"].device)


def make_clusters(
    b: int, sizes: Sequence[int], k: int, seed: int = 0, lead: int = 2
) -> dict[str, Tensor]:
    """Clusters of these sizes from row `lead` on; each sample selects up to k of them, pads in any
    place.
    """
    g = torch.Generator().manual_seed(seed)
    row_ptr = torch.tensor([lead, *sizes]).cumsum(0)
    clusters = torch.full((b, k), -1)
    for sample in range(b):
        count = (
            min(k, len(sizes))
            if sample % 3 != 2
            else int(torch.randint(min(k, len(sizes)) + 1, (), generator=g))
        )
        places = torch.randperm(k, generator=g)[:count]
        clusters[sample, places] = torch.randperm(len(sizes), generator=g)[:count]
    return {"clusters": clusters, "row_ptr": row_ptr}


def add_clusters(step: Step, b: int, sizes: Sequence[int], k: int, **options: Any) -> ClusterStep:
    step = step.replace(**make_clusters(b, sizes, k), cluster_rows=max(sizes, default=0), **options)
    return ClusterStep(step.tensors, step.options)


def random_cluster_step(
    b: int,
    sizes: Sequence[int],
    k: int,
    d: int,
    dtype: torch.dtype,
    *,
    share: float = 0.05,
    **options: Any,
) -> ClusterStep:
    """Random numbers of the sizes that training meets; two rows before the clusters and three
    behind belong to none.
    """
    return add_clusters(
        random_step(b, sum(sizes) + 5, d, dtype, share=share, **options), b, sizes, k
    )


def dyadic_cluster_step(
    b: int, sizes: Sequence[int], k: int, d: int, dtype: torch.dtype, **options: Any
) -> ClusterStep:
    """A step whose every sum is exact in any order (see `dyadic_step`)."""
    return add_clusters(dyadic_step(b, sum(sizes) + 5, d, dtype, **options), b, sizes, k)


def torch_row_wise(t: dict[str, Tensor], grad: Tensor, decoupled: bool) -> dict[str, Tensor]:
    """Adam with one second moment for each row, which torch does not have, from torch's own
    arithmetic in fp32.
    """
    lr, decay, beta1, beta2, eps, *_ = Hyper(*t["hyper"].tolist())
    w, step = t["weight"].float(), int(t["counter"][1]) + 1
    if not decoupled:
        grad = grad + decay * w
    m = beta1 * t["momentum"].float() + (1 - beta1) * grad
    v = beta2 * t["second"].float() + (1 - beta2) * grad.square().mean(1)
    root = (v / (1 - beta2**step)).sqrt()[:, None] + eps
    new = w * (1 - lr * decay if decoupled else 1) - lr / (1 - beta1**step) * m / root
    return {
        "weight": new.to(t["weight"].dtype),
        "momentum": m.to(t["momentum"].dtype),
        "second": v.to(t["second"].dtype),
    }


def torch_cluster_step(step: ClusterStep) -> dict[str, Tensor]:
    """The same step as plain PyTorch takes it at the table's precision, dense with a mask; see
    `common.torch_step`.
    """
    t, dtype, mask = step.tensors, step.tensors["weight"].dtype, step.mask()
    hyper = Hyper(*t["hyper"].tolist())
    lr, scale, dx_scale = hyper.lr, hyper.scale, hyper.dx_scale
    w, x = t["weight"].float(), t["x"].to(dtype).float()
    y = dense_targets(t, w.shape[0])
    z = (x @ w.T + t["bias"] if "bias" in t else x @ w.T).to(dtype)
    g = torch.where(mask, (torch.sigmoid(z) - y.to(dtype)) * scale, 0).float()
    out = {"dx": (g @ w).to(dtype).float() * dx_scale}
    out["loss"] = scale * torch.where(
        mask, bce(z, y.to(dtype), reduction="none"), 0
    ).float().sum().reshape(1)
    if "bias" in t:
        out["bias"] = t["bias"] - lr * g.to(dtype).float().sum(0)
    out["scores"] = torch.full(
        (*t["clusters"].shape, step.options["cluster_rows"]), -torch.inf, device=z.device
    )
    for sample, chosen in enumerate(t["clusters"].tolist()):
        for place, cluster in enumerate(chosen):
            if cluster >= 0:
                rows = slice(int(t["row_ptr"][cluster]), int(t["row_ptr"][cluster + 1]))
                real = torch.where(mask[sample, rows], z[sample, rows].float(), -torch.inf)
                out["scores"][sample, place, : len(real)] = real
    touched, states = mask.any(0), [k for k in ("weight", "momentum", "second", "kahan") if k in t]
    part = {k: t[k][touched] for k in states} | {k: t[k] for k in ("hyper", "counter")}
    update = torch_row_wise if "second" in t and t["second"].dim() == 1 else torch_update
    got = update(part, (g.T @ x).to(dtype).float()[touched], step.options.get("decoupled", False))
    for name in got:
        out[name] = t[name].clone()
        out[name][touched] = got[name]
    return out


def assert_scores(got: Tensor, low: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    real = exact != -torch.inf
    assert ((got == -torch.inf) == ~real).all()
    assert_no_worse(got[real], low[real], exact[real], dtype, what="scores")
