"""A cascade's level larger than memory: a step streams the rows of the shortlisted clusters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xmlkernels.nn.cascade_level import CascadeLevel
from xmlkernels.nn.cluster_shard import OwnClusters
from xmlkernels.nn.shard import Shard
from xmlkernels.nn.stored import StoredTable
from xmlkernels.nn.table import RowOptimizer, xavier
from xmlkernels.nn.table_store import TableStore
from xmlkernels.nn.tiles import Window
from xmlkernels.rows import Rows


class StoredLevel(StoredTable, CascadeLevel):
    """A level that holds a few tiles of its table at a time, and of those what a batch selects.

    Its weights are those of a `CascadeLevel`, bit for bit, after the same steps: a cluster is
    trained as a whole, in the tile in which it begins, because how the op computes it depends on
    its size. dx and the loss are sums over tiles, in their order: those of `CascadeLevel` within
    rounding.

    Args:
        nodes, width, per_sample, dtype, optimizer, seed, fill, shard: see `CascadeLevel`.
        store: where its rows are made; or rows by the name of their buffer, of a checkpoint: it is
            then for prediction alone.
        most: rows of the largest cluster, which a tile has room for.
    """

    def __init__(
        self,
        nodes: int,
        width: int,
        per_sample: int,
        *,
        store: TableStore | Mapping[str, Rows],
        most: int,
        dtype: str,
        optimizer: RowOptimizer,
        seed: int,
        fill: bool,
        shard: Shard | None = None,
    ) -> None:
        asked = torch.empty(0).is_meta  # what it would take, by a planner
        options: dict[str, Any] = {"dtype": dtype, "optimizer": optimizer, "seed": seed}
        options["fill"] = False
        with torch.device("meta"):
            super().__init__(nodes, width, per_sample, shard=shard, **options)
        tile = CascadeLevel(nodes, width, per_sample, shard=Shard(0, 0, nodes), **options)
        self.together = most
        self._keep(tile, None if asked else store, xavier(nodes) if fill else None)

    @torch.no_grad()
    def update(
        self,
        x: Tensor,
        clusters: Tensor,
        row_ptr: Tensor,
        most: int,
        positives: tuple[Tensor, Tensor],
        *,
        lr: float | Tensor,
        beta1: float | Tensor | None,
        scale: Tensor,
        dx_scale: Tensor | float,
        need_loss: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Train the rows of each sample's clusters, tile by tile; see `CascadeLevel.step`.

        Each tile ends its own step: nothing is left for `after_step`.

        A step that breaks off leaves half of a table: it takes no other one and no checkpoint.
        """
        own = self.own(row_ptr)
        if not self.shard.whole:
            clusters, _ = own.chosen(clusters)
        wanted = torch.unique(clusters[clusters >= 0]) - own.first
        windows = self.tiles.windows(own.row_ptr[wanted], own.row_ptr[wanted + 1])
        options: dict[str, Any] = {"lr": lr, "beta1": beta1, "scale": scale, "dx_scale": dx_scale}
        dx, scores, loss = self._nothing([x, clusters], row_ptr, most, need_loss)
        scores = scores.clone()
        for window, tile in zip(windows, self._changing(windows), strict=True):
            here = own if tile.shard.whole else self._clusters_in(window, own)
            tile._tree = row_ptr, here, here.row_ptr
            chosen, slot = here.chosen(clusters)
            part, z, its = tile.update(
                x, chosen, row_ptr, most, positives, **options, need_loss=need_loss
            )
            # The invariant that the rescaling of an fp8 table needs: rows of the buffers that were
            # not read have not outgrown their scale, because those of other tiles left so.
            tile.after_step()
            dx += part
            loss += its
            sample, column = (chosen >= 0).nonzero(as_tuple=True)
            scores[sample, slot[sample, column]] = z[sample, column]
        return dx, scores, loss

    def _clusters_in(self, window: Window, own: OwnClusters) -> OwnClusters:
        """Find the clusters that begin with the first of a tile, up to its end. Waits."""
        assert window.start is not None
        borders = own.row_ptr.new_tensor([int(window.start[0]), window.end])
        first, end = torch.searchsorted(own.row_ptr, borders).tolist()
        row_ptr = own.row_ptr[first : end + 1] - window.first
        return OwnClusters(own.first + first, own.first + end, row_ptr)
