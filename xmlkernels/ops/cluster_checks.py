"""Checks of clusters as ranges of rows, and of each sample's choice of them."""

import torch
from torch import Tensor

from xmlkernels.errors import InputError
from xmlkernels.ops.checks import check_tensor, describe, expect


def check_clusters(
    op: str,
    clusters: Tensor,
    row_ptr: Tensor,
    samples: int,
    device: torch.device,
    rows: int | None = None,
) -> None:
    """Check that clusters are ranges of rows, and that samples choose clusters that there are.

    Args:
        op: as messages name it.
        clusters: int64 [B, K], -1 pads.
        row_ptr: int64 [C + 1], ascending.
        samples: B.
        device: that of both.
        rows: of the table; None sets no bound.
    """
    check_tensor(op, "clusters", clusters, (torch.int64,), (samples, None), device)
    check_tensor(op, "row_ptr", row_ptr, (torch.int64,), (None,), device)
    expect(
        row_ptr.shape[0] >= 1,
        f"{op}: argument row_ptr",
        "int64 [C + 1], at least one entry",
        describe(row_ptr),
        "give the first row of each cluster, and the end of the last",
    )
    if device.type != "cpu":
        return
    count, smallest = row_ptr.shape[0] - 1, 0
    first, last = int(row_ptr[0]), int(row_ptr[-1])
    if count:
        smallest = int(row_ptr.diff().min())
    if first < 0 or smallest < 0 or (rows is not None and last > rows):
        bound = "" if rows is None else f" to {rows}, the rows of weight"
        raise InputError(
            f"{op}: argument row_ptr",
            f"ascending rows from 0{bound}",
            f"first {first}, last {last}, smallest step {smallest}",
            "number clusters in the order of their rows",
        )
    if clusters.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(clusters))
    expect(
        low >= -1 and high < count,
        f"{op}: argument clusters",
        f"clusters from 0 to {count - 1}, or -1 for none",
        f"values from {low} to {high}",
        "number clusters as row_ptr does",
    )


def check_largest(op: str, name: str, row_ptr: Tensor, most: int) -> None:
    """Check that no cluster has more than `most` rows, the argument `name`."""
    where, mend = f"{op}: argument {name}", "pass the size of the largest cluster"
    expect(most >= 0, where, "0 or more", str(most), mend)
    if row_ptr.device.type != "cpu" or row_ptr.shape[0] == 1:
        return
    largest = int(row_ptr.diff().max())
    expected = f"{largest} or more, the size of the largest cluster"
    expect(largest <= most, where, expected, str(most), "raise it")


def ascend(clusters: Tensor) -> bool:
    """Whether each sample's clusters, int64 [B, K], ascend, with pads last; reads the device."""
    left, right = clusters[:, :-1], clusters[:, 1:]
    return bool(((right < 0) | ((right > left) & (left >= 0))).all())
