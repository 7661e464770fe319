"""The heads of a cascade: a table per level of the label tree, and the layers in front of them."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from xmlkernels.errors import InputError
from xmlkernels.nn.cascade_level import LEVEL_OPTIMIZERS, CascadeLevel, DenseLevel
from xmlkernels.nn.dropout import Dropout
from xmlkernels.nn.layer_recipe import Recipe, checked_layers
from xmlkernels.nn.shard import Shard
from xmlkernels.nn.table import RowOptimizer, check_choice

SCHEMES = ("level", "weighted", "path")
_SEEDS = 1_000_003  # apart, so that levels draw different tables and different rounding


class ShortlistWarning(UserWarning):
    """A number of clusters to keep is larger than the number that there is."""


class CascadeHeads(nn.Module):
    """One head per level: features of the encoder's layers → logits of nodes.

    A level that reads two layers (the coarsest) passes them through dropout and a linear layer
    2D → D; every level then has a dropout of its own. Rows are in tree order: the model translates
    label ids. Source: CascadeXML (NeurIPS 2022), section 3.

    Attributes:
        config: what prediction needs to build it again:
            CascadeHeads(**config, optimizer="sgd", fill=False).
        levels: a `CascadeLevel` each, coarsest first; the last one holds the labels.
        topk: clusters kept after each cluster level, never more than there are.

    Args:
        sizes: nodes of each level, coarse to fine, the number of labels last (`LabelTree.sizes`).
        most: largest number of children of a node, per cluster level (`LabelTree.widest`).
        width: D, of the encoder's vectors.
        layers: the encoder's layers that each level reads; see `default_layers`.
        topk: k of each cluster level (R - 1 of them).
        scheme: score of a label or cluster: "level" its own probability, "weighted" times its
            parent's, "path" the product from the coarsest level on. Shortlists always go by the
            level's own.
        dtype: of the label table: "fp32", "bf16", "fp16", "fp8".
        cluster_dtype: of the other tables; None: as `dtype`, but bf16 where that is fp8.
        optimizer: of the tables: "adam" (with one second moment per row), "sgd" or "adamw_dense"
            (see `DenseLevel`), or a RowOptimizer. The training of a model sets its decay.
        label_device: where the label level lives, and stays whatever `.to` does to the rest; None:
            with the rest. It is no part of `config`, nor of a checkpoint: either is read with any
            placement.
        shards: the rows of each level to hold, where several processes share them
            (`tree_shards`); None holds all. They are no part of `config` either.
        drops: dropout of each level; one number serves all.
        projection_drop: dropout before the linear layer 2D → D.
        seed: of the initial values and of stochastic rounding.
        fill: False leaves tables at zero, to be filled from a checkpoint.
        level: makes a level, with the arguments of `CascadeLevel`: `PlainLevel`, say. None: the
            optimizer decides between `CascadeLevel` and `DenseLevel`.
        label_level: makes the level of the labels, likewise: a `StoredLevel` at its store, say.
            None: as the others.

    Raises:
        InputError: a list of the wrong length, or an option out of range.
    """

    levels: nn.ModuleList

    def __init__(
        self,
        sizes: Sequence[int],
        most: Sequence[int],
        width: int,
        *,
        layers: Sequence[Sequence[int]],
        topk: Sequence[int],
        scheme: str = "weighted",
        dtype: str = "fp32",
        cluster_dtype: str | None = None,
        optimizer: RowOptimizer | str = "adam",
        drops: float | Sequence[float] = 0.0,
        projection_drop: float = 0.2,
        seed: int = 0,
        fill: bool = True,
        label_device: torch.device | None = None,
        shards: Sequence[Shard] | None = None,
        level: Callable[..., CascadeLevel] | None = None,
        label_level: Callable[..., CascadeLevel] | None = None,
    ) -> None:
        super().__init__()
        count = len(sizes)
        if not 2 <= count <= 5:
            mend = "build the label tree with 1 to 4 depths"
            raise InputError("levels of the cascade", "2 to 5", str(count), mend)
        check_choice("scheme", scheme, SCHEMES)
        self.layers: Recipe = checked_layers(layers, count, None)
        self.width, self.scheme = width, scheme
        self.topk, self.most = _clamped(topk, sizes, most), tuple(most)
        self.drops = _per_level(drops, count)
        cluster_dtype = cluster_dtype or ("bf16" if dtype == "fp8" else dtype)
        self.config: dict[str, Any] = {
            "sizes": list(sizes),
            "most": list(most),
            "width": width,
            "layers": [list(level) for level in self.layers],
            "topk": list(self.topk),
            "scheme": scheme,
            "dtype": dtype,
            "cluster_dtype": cluster_dtype,
        }
        self.dropouts = nn.ModuleList(Dropout(p) for p in self.drops)
        self.projection_drop = Dropout(projection_drop)
        doubled = [r for r, level in enumerate(self.layers) if len(level) > 1]
        self.projections = nn.ModuleDict(
            {str(r): _linear(2 * width, width, seed + r) for r in doubled}
        )
        if isinstance(optimizer, str):
            check_choice("cascade table: optimizer", optimizer, LEVEL_OPTIMIZERS)
            optimizer = RowOptimizer(optimizer, row_wise=True)
        dense = optimizer.kind == "adamw_dense"
        make = level or (DenseLevel if dense else CascadeLevel)
        seen = (sizes[0], *(k * m for k, m in zip(self.topk, most, strict=True)))
        self.levels = nn.ModuleList(
            (make if r + 1 < count else label_level or make)(
                n,
                width,
                min(n, seen[r]),
                dtype=dtype if r + 1 == count else cluster_dtype,
                optimizer=optimizer,
                seed=seed + _SEEDS * (r + 1),
                fill=fill,
                shard=None if shards is None else shards[r],
            )
            for r, n in enumerate(sizes)
        )
        if label_device is not None:
            self.levels[-1].place_on(label_device)  # type: ignore[operator]

    def tables(self) -> dict[str, CascadeLevel]:
        """Name the levels' tables as reports do, coarsest first, the labels' last."""
        *clusters, labels = cast(list[CascadeLevel], list(self.levels))
        named = {f"clusters of level {r}": level for r, level in enumerate(clusters)}
        return named | {"label table": labels}

    def use_scheme(self, scheme: str) -> None:
        """Score labels by another scheme from now on; training does not depend on it.

        Raises:
            InputError: no such scheme.
        """
        check_choice("scheme", scheme, SCHEMES)
        self.scheme = self.config["scheme"] = scheme

    def features(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Turn the encoder's vectors [B, D] or [B, 2D] into each level's features, fp32 [B, D]."""
        out = []
        for r, (given, drop) in enumerate(zip(vectors, self.dropouts, strict=True)):
            vector = given
            if str(r) in self.projections:
                vector = self.projections[str(r)](self.projection_drop(given))
            out.append(drop(vector))
        return out


def _clamped(topk: Sequence[int], sizes: Sequence[int], most: Sequence[int]) -> tuple[int, ...]:
    if len(topk) != len(sizes) - 1:
        expected = f"{len(sizes) - 1} numbers, one for each cluster level"
        mend = "name one number for each level of the tree but the labels"
        raise InputError("topk", expected, f"{len(topk)}", mend)
    if min(topk) < 1:
        mend = "keep at least one cluster"
        raise InputError("topk", "numbers of 1 or more", str(min(topk)), mend)
    out: list[int] = []
    for r, k in enumerate(topk):
        there = sizes[r] if r == 0 else min(sizes[r], out[-1] * most[r - 1])
        if k > there:
            text = (
                f"topk of level {r} is {k}, but a sample has at most {there} candidates there; "
                f"{there} are kept"
            )
            warnings.warn(text, ShortlistWarning, stacklevel=3)
        out.append(min(k, there))
    return tuple(out)


def _per_level(drops: float | Sequence[float], count: int) -> tuple[float, ...]:
    each = [drops] * count if isinstance(drops, int | float) else drops
    out = tuple(float(p) for p in each)
    where = "dropout of the heads"
    if len(out) != count:
        expected = f"one number, or {count}, one for each level"
        raise InputError(where, expected, str(len(out)), "name them all")
    if not all(0 <= p < 1 for p in out):
        raise InputError(where, "probabilities in [0, 1)", str(out), "correct them")
    return out


def _linear(wide: int, width: int, seed: int) -> nn.Linear:
    """Make a layer with a Xavier-uniform weight, its bias as nn.Linear draws it, from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linear = nn.Linear(wide, width)
        nn.init.xavier_uniform_(linear.weight)
    return linear
