"""`cluster_step_`: one training step of the rows in each sample's clusters."""

from typing import Any

import torch
from torch import Tensor

from xmlkernels.errors import InputError
from xmlkernels.ops.checks import (
    check_memory,
    check_no_gradient,
    check_positives,
    check_row_offset,
    check_states,
    check_steering,
    check_table,
)
from xmlkernels.ops.cluster_checks import ascend, check_clusters, check_largest
from xmlkernels.ops.define import define, mark_written, public
from xmlkernels.reference.cluster_step import cluster_step_ as reference


@public
def cluster_step_(
    weight: Tensor,
    x: Tensor,
    clusters: Tensor,
    row_ptr: Tensor,
    cluster_rows: int,
    pos_row: Tensor,
    pos_sample: Tensor,
    hyper: Tensor,
    counter: Tensor,
    *,
    pos_value: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: Tensor | None = None,
    second: Tensor | None = None,
    kahan: Tensor | None = None,
    row_scale: Tensor | None = None,
    row_offset: int = 0,
    rows: int = -1,
    decoupled: bool = False,
    need_loss: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score and train the rows in each sample's clusters, as `bce_step_` does all rows.

    A candidate is a pair (sample b, row r) with r in one of b's clusters and r < rows. With z = x_b
    · w_r + bias_r and g = scale (σ(z) - y) for candidates: dx_b = dx_scale Σ_r g w_r, from the rows
    as they were before the step, and each row that is anybody's candidate is updated once, with Σ_b
    g x_b. A row that no sample selects, and its states, are neither read nor written. The gathered
    `B x S x D` rows and the `N x D` gradient are never held. Not differentiable: pass dx to
    `embedding.backward(dx)`. Source: the shortlists of CascadeXML (NeurIPS 2022), section 3; the
    fusion by cluster is ours.

    Args:
        weight: [n, D] label table, fp32, bf16, fp16 or fp8 e4m3 (with row_scale); updated as
            `bce_step_` does.
        x: [B, D] embeddings, fp32, bf16 or fp16. A non-finite value anywhere leaves every tensor as
            it was, and dx, loss and all scores become NaN. On bf16 and e4m3 tables the products may
            take x rounded to bf16.
        clusters: int64 [B, K], the clusters of each sample; -1 pads; a cluster stands at most once
            in a row. Level 0 of a cascade is K = 1: one cluster of all rows.
        row_ptr: int64 [C + 1], ascending: cluster c owns the rows row_ptr[c] : row_ptr[c + 1].
        cluster_rows: M, at least the size of the largest cluster.
        pos_row: int64 [P], table rows of the positives, ascending; rows from `rows` on are fill and
            are ignored, and so are pairs whose row lies in none of the sample's clusters.
        pos_sample: int32 [P], their samples; pairs sorted by (row, sample), unique.
        hyper: fp32 [7], see `Hyper`; on the table's device. For the mean over candidates, scale is
            1 / their number.
        counter: int64 [2]: seed and step (from 0), on the table's device. The random words depend
            on these, the global row and the column alone. Adam's bias correction counts these
            steps, also for rows that were not in all of them.
        pos_value: fp32 [P], target of each pair; 1 when not given.
        bias: fp32 [n], updated by plain SGD with the same lr, without decay.
        momentum: [n, D] fp32, bf16 or fp16, updated. Alone: SGD momentum (dampening 0). With
            `second`: Adam's first moment.
        second: [n, D], Adam's second moment, or [n], one for each row, from the mean of the squared
            gradient over D; updated; needs `momentum`.
        kahan: [n, D] of the table's dtype (bf16 or fp16), updated: holds what rounding left over;
            stores then round to nearest.
        row_scale: fp32 [n, 2], for e4m3 tables alone, as `bce_step_` takes it: column 0 the row's
            scale, a power of two; column 1 the largest |value| stored so far, updated.
        row_offset: global row of weight[0], for a table that is one shard of a larger one.
        rows: number of real rows; those beyond are padding, never scored or trained. -1: all.
        decoupled: decay shrinks the weights (w -= lr decay w) instead of entering the gradient
            (L2); candidates' rows alone.
        need_loss: also return the loss.

    Returns:
        dx: fp32 [B, D].
        scores: fp32 [B, K, M], z of the m-th row of each cluster, before the update; -inf where a
            cluster has fewer rows, the row is padding or the cluster is -1.
        loss: fp32 [1], scale times the sum over candidates of softplus(z) - y z; [0] when not
            asked.

    Raises:
        InputError: an argument's type, dtype, shape, device or layout does not fit, a tensor that
            is updated shares memory with another, or, on the CPU, positives are not sorted,
            clusters or row_ptr do not fit the table, or hyper is not finite.
    """
    given = (clusters, row_ptr, cluster_rows, pos_row, pos_sample, hyper, counter)
    options: dict[str, Any] = {"pos_value": pos_value, "bias": bias, "row_scale": row_scale}
    options |= {"momentum": momentum, "second": second, "kahan": kahan}
    options |= {"row_offset": row_offset, "rows": rows, "decoupled": decoupled}
    options |= {"need_loss": need_loss}
    _check(weight, x, *given, **options)
    mark_written(weight, bias, momentum, second, kahan, row_scale)
    op = torch.ops.xmlkernels.cluster_step_
    out: tuple[Tensor, Tensor, Tensor] = op(weight, x.detach(), *given, **options)
    return out


def _check(
    weight: Tensor,
    x: Tensor,
    clusters: Tensor,
    row_ptr: Tensor,
    cluster_rows: int,
    pos_row: Tensor,
    pos_sample: Tensor,
    hyper: Tensor,
    counter: Tensor,
    *,
    pos_value: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: Tensor | None = None,
    second: Tensor | None = None,
    kahan: Tensor | None = None,
    row_scale: Tensor | None = None,
    row_offset: int = 0,
    rows: int = -1,
    **_: object,
) -> None:
    op = "cluster_step_"
    check_table(op, x, weight, bias, rows, row_scale, scaled=True)
    check_clusters(op, clusters, row_ptr, x.shape[0], x.device, weight.shape[0])
    check_largest(op, "cluster_rows", row_ptr, cluster_rows)
    _check_unique(op, clusters)
    check_positives(op, x, pos_row, pos_sample, pos_value, weight.shape[0] if rows < 0 else rows)
    check_steering(op, hyper, counter, weight.device)
    check_states(op, weight, momentum, second, kahan, row_wise=True)
    check_row_offset(op, row_offset, weight.shape[0])
    check_no_gradient(op, weight)
    written = {"weight": weight, "bias": bias, "row_scale": row_scale}
    written |= {"momentum": momentum, "second": second, "kahan": kahan}
    read = {"x": x, "pos_row": pos_row, "pos_sample": pos_sample, "pos_value": pos_value}
    read |= {"clusters": clusters, "row_ptr": row_ptr, "hyper": hyper, "counter": counter}
    check_memory(op, written, read)


def _check_unique(op: str, clusters: Tensor) -> None:
    """Check that no sample chooses a cluster twice; those of a shortlist ascend as a rule."""
    if clusters.device.type != "cpu" or clusters.shape[1] < 2 or ascend(clusters):
        return
    order = clusters.sort(1).values
    twice = (order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= 0)
    if bool(twice.any()):
        sample, at = (int(v) for v in twice.nonzero()[0])
        raise InputError(
            f"{op}: argument clusters",
            "each cluster at most once in a sample",
            f"cluster {int(order[sample, at])} twice in sample {sample}",
            "drop duplicates in the shortlist",
        )


def _fake(
    weight: Tensor,
    x: Tensor,
    clusters: Tensor,
    row_ptr: Tensor,
    cluster_rows: int,
    *_: object,
    need_loss: bool = False,
    **__: object,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape, dtype=torch.float32)
    scores = x.new_empty((*clusters.shape, cluster_rows), dtype=torch.float32)
    return dx, scores, x.new_empty(int(need_loss), dtype=torch.float32)


define(
    reference,
    _fake,
    _check,
    writes=("weight", "bias", "momentum", "second", "kahan", "row_scale"),
    cuda="xmlkernels.triton.cluster_step",
)
