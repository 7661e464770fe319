"""A full head whose table is larger than memory: it stands in files, and is streamed by tiles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.shard import Shard
from xmlkernels.nn.shortlist import better, nothing_yet
from xmlkernels.nn.stored import READ, StoredTable
from xmlkernels.nn.table import fill_rows, normal
from xmlkernels.nn.table_store import TableStore
from xmlkernels.ops.hyper import DX_SCALE, LR
from xmlkernels.rows import Rows


class StoredHead(StoredTable, FullHead):
    """A full head that holds a few tiles of its table at a time.

    Its weights are those of a `FullHead`, bit for bit, after the same steps. dx and the loss are
    sums over tiles, in their order: those of `FullHead` within rounding.

    Args:
        labels, width, std, seed, shard, options: see `FullHead`.
        store: where its rows are made; or rows by the name of their buffer, of a checkpoint: it is
            then for prediction alone.
    """

    def __init__(
        self,
        labels: int,
        width: int,
        *,
        store: TableStore | Mapping[str, Rows],
        std: float = 0.02,
        seed: int = 0,
        shard: Shard | None = None,
        **options: Any,
    ) -> None:
        asked = torch.empty(0).is_meta  # what it would take, by a planner
        with torch.device("meta"):
            super().__init__(labels, width, std=0, seed=seed, shard=shard, **options)
        tile = FullHead(labels, width, std=0, seed=seed, shard=Shard(0, 0, labels), **options)
        self._keep(tile, None if asked else store, normal(std))

    @torch.no_grad()
    def start_at_frequencies(self, positives: Tensor, documents: int) -> None:
        """Set each bias to the logit of its label's frequency; see `FullHead`."""
        self._check_frequencies(positives)
        for _, _, tile in self._stream(("bias",), ("bias",)):
            own = positives[tile.shard.first : tile.shard.end].to(tile.bias.device)
            tile.bias.copy_(torch.logit((own.double() + 0.5) / (documents + 1)))

    @torch.no_grad()
    def start_at_centroids(
        self, vectors: Iterable[tuple[Tensor, Tensor, Tensor]], norm: float
    ) -> None:
        """Point each row from the mean of all documents to its label's mean; see `FullHead`.

        The embeddings of all documents are held meanwhile, in place of one for each label.
        """
        self._check_norm(norm)
        device = self.counter.device
        held = [
            (x.float(), row, sample.long()) for x, row, sample in vectors
        ]  # sums run in the order of the batches, as in memory
        documents = sum(len(x) for x, _, _ in held)
        if documents == 0:
            raise self._no_documents()
        x = torch.cat([part for part, _, _ in held])
        starts = torch.tensor([0, *(len(part) for part, _, _ in held)]).cumsum(0).tolist()
        row = torch.cat([part for _, part, _ in held])
        sample = torch.cat([s + at for at, (_, _, s) in zip(starts, held, strict=False)])
        mean = torch.zeros(self.width, device=device)
        for part, _, _ in held:
            mean += part.sum(0)
        mean /= documents
        row, order = row.sort(stable=True)
        sample = sample[order]
        for _, _, tile in self._stream(("weight", "row_scale"), ("weight", "row_scale")):
            first, end = tile.shard.first, tile.shard.end
            begin, stop = torch.searchsorted(
                row, torch.tensor([first, end], device=device)
            ).tolist()
            own, its = row[begin:stop] - first, sample[begin:stop]
            total = torch.zeros(end - first, self.width, device=device).index_add_(0, own, x[its])
            seen = torch.bincount(own, minlength=end - first)[:, None].float()
            rows = norm * nn.functional.normalize(total / seen.clamp(min=1) - mean)
            rows = torch.where(seen > 0, rows, tile.rows(0, end - first))
            fill_rows(tile.weight, tile.row_scale, 0, rows)

    @torch.no_grad()
    def update(
        self,
        x: Tensor,
        pos_row: Tensor,
        pos_sample: Tensor,
        *,
        lr: float | Tensor,
        dx_scale: Tensor | float = 1.0,
        need_loss: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Train the table on one batch, tile by tile; see `FullHead.step`.

        Each tile ends its own step: nothing is left for `after_step`.

        A step that breaks off leaves half of a table: it takes no other one and no checkpoint.
        """
        self.hyper[LR] = lr
        self.hyper[DX_SCALE] = dx_scale
        dx = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        loss = torch.zeros(int(need_loss), dtype=torch.float32, device=x.device)
        rate, scale = self.hyper[LR].clone(), self.hyper[DX_SCALE].clone()
        for tile in self._changing():
            own, part = tile.step(
                x, pos_row, pos_sample, lr=rate, dx_scale=scale, need_loss=need_loss
            )
            dx += own
            loss += part
        return dx, loss

    def after_step(self) -> None:
        """Do nothing: `update` has counted the step."""

    @torch.no_grad()
    def topk(self, x: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the k best rows of all; see `Table.topk`. Tiles are read once."""
        best = nothing_yet(len(x), k, x.device)
        for _, _, tile in self._stream(READ):
            best = better(best, tile.topk(x, k, exclude))
        return best

    @torch.no_grad()
    def loss(self, x: Tensor, pos_row: Tensor, pos_sample: Tensor) -> Tensor:
        """Sum the loss [1] over samples and all rows, tile by tile; not differentiable."""
        total = torch.zeros(1, device=x.device)
        for _, _, tile in self._stream(READ):
            total += tile.loss(x, pos_row, pos_sample)
        return total

    @torch.no_grad()
    def topk_and_loss(
        self, x: Tensor, k: int, exclude: Tensor | None, pos_row: Tensor, pos_sample: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Do what `topk` and `loss` do; tiles are read once for both."""
        best, total = nothing_yet(len(x), k, x.device), torch.zeros(1, device=x.device)
        for _, _, tile in self._stream(READ):
            best = better(best, tile.topk(x, k, exclude))
            total += tile.loss(x, pos_row, pos_sample)
        return best, total
