"""The cascade: encoder layers → coarse clusters → finer clusters → a shortlist of labels.

Source: Kharbanda et al., "CascadeXML" (NeurIPS 2022).
"""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Self, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from xmlkernels.errors import InputError
from xmlkernels.models.among import best_among, path_scores
from xmlkernels.models.base import Documents, Model
from xmlkernels.models.descent import (
    Descent,
    TreeOnDevice,
    candidates_of,
    descend,
    joined,
    kept_in_training,
    logit_of_log,
    loss_of,
    ranked,
    scores_by,
    shortlist_traffic,
)
from xmlkernels.models.level_steps import train_levels
from xmlkernels.models.running_mean import evaluating
from xmlkernels.models.saved import saved_tree, table_rows
from xmlkernels.models.scored import Answer, Candidates, LevelPrediction
from xmlkernels.models.training import CascadeTraining, no_training, set_rates
from xmlkernels.nn.cascade_heads import SCHEMES, CascadeHeads
from xmlkernels.nn.protocol import check_encoder
from xmlkernels.nn.quantized import INT8, QuantizedLevel
from xmlkernels.nn.stored_level import StoredLevel
from xmlkernels.records import Count, Positive
from xmlkernels.tree.label_tree import LabelTree

_AT_DEFAULTS = CascadeTraining(encoder_lr=0.0, total=1)  # for losses without training


class CascadeHeadsConfig(TypedDict):
    """`CascadeHeads.config`, in a checkpoint."""

    sizes: list[Positive]
    most: list[Positive]
    width: Positive
    layers: list[list[Count]]
    topk: list[Positive]
    scheme: str
    dtype: str
    cluster_dtype: str


class Cascade(Model):
    """Encoder, one head per level of a label tree, and the step that trains them together.

    A step is vectors of the encoder's layers → features of each level → for each level, coarse to
    fine, `cluster_step_` on the children of the clusters kept above (dx, scores, tables updated in
    place) and the next shortlist from those scores → one backward from all features → AdamW. A
    non-finite feature at any level skips every update, decided before level 0; a gradient that
    overflows in the encoder's own backward (fp16 autocast) skips the encoder's alone. Both are
    counted on the device, without a host sync. Table rows are in tree order; label ids are
    translated where they enter and leave the model, nowhere inside.

    Several processes may share the levels (`CascadeHeads`, shards). Each then takes the pairs of a
    document and one of its own clusters through its rows of every level, and what a level hands on
    is chosen among the best of all processes.

    Attributes:
        tree: the label tree.
        lost_positives: int64 [R - 1], (document, cluster) pairs that no shortlist had room for,
            since the start.

    Args:
        encoder: has `layer_vectors(recipe, *batch.inputs)`, `autocast` and `encoder_config()`; one
            that trains a table of its own has `update(lr)`, called after backward.
        heads: made for the tree's sizes.
        tree: a LabelTree of as many levels.
        training: None for prediction alone.

    Raises:
        InputError: heads, tree and encoder do not fit together.
    """

    kind = "cascade"
    head_config = CascadeHeadsConfig
    sums_loss = False
    schemes = SCHEMES
    tree: LabelTree
    training_settings: CascadeTraining | None
    lost_positives: Tensor
    order: Tensor
    place: Tensor
    root: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        heads: CascadeHeads,
        tree: LabelTree,
        training: CascadeTraining | None = None,
    ) -> None:
        super().__init__(encoder, training)
        _check_fit(encoder, heads, tree)
        self.heads, self.tree = heads, tree
        self.register_buffer("lost_positives", torch.zeros(tree.levels - 1, dtype=torch.int64))
        self.register_buffer("order", _tensor(tree.order))
        self.register_buffer("place", _tensor(tree.place), persistent=False)
        self.register_buffer("root", torch.tensor([0, tree.sizes[0]]), persistent=False)
        for r, children in enumerate(tree.children):
            self.register_buffer(f"children_{r}", _tensor(children))
        if training is not None:
            training.check(tree.levels)
            for level in heads.levels:
                level.set_decay(training.table_decay())  # type: ignore[operator]
            self._start_training(training, training.make_optimizer(encoder, heads.projections))

    @property
    def labels(self) -> int:
        """L."""
        return self.order.shape[0]

    @property
    def width(self) -> int:
        """D, the width of an embedding."""
        return self.heads.width

    @property
    def scheme(self) -> str:
        """The scheme that `score` answers by."""
        return self.heads.scheme

    def use_scheme(self, scheme: str) -> None:
        """Answer by another scheme from here on; see `Model.use_scheme`."""
        self._check_schemes([scheme])
        self.heads.use_scheme(scheme)

    def tables(self) -> dict[str, nn.Module]:
        """Name the tables of the levels, coarse to fine; see `Model.tables`."""
        return {f"heads.levels.{r}": level for r, level in enumerate(self.heads.levels)}

    def describe(self) -> str:
        """Say how many clusters each level keeps."""
        return f"keeping {', '.join(map(str, self.heads.topk))} clusters"

    def counters(self) -> dict[str, float]:
        """Count skipped steps and lost positives; see `Model.counters`."""
        return super().counters() | {"lost_positives": int(self.lost_positives.sum())}

    def traffic(
        self, documents: int, processes: int, *, need_loss: bool = False, terms: int = 0
    ) -> dict[str, int]:
        """Return the bytes that the first process receives in a step; see `dist.step_traffic`.

        The vectors of every level are gathered. Where processes share the levels, the gradients
        come back, and each process sends its best clusters of every document.

        Args:
            documents: B, of all processes together.
            processes: G.
            need_loss: of a step that reports its loss.
            terms: of a bag-of-words encoder, those in the bags of the process that has most.
        """
        widths = [self.width] * self.tree.levels
        found = self._step_traffic(
            documents,
            widths,
            processes,
            need_loss=need_loss,
            terms=terms,
            scattered=self.shared,
        )
        if self.shared:
            bound = (self.training_settings or _AT_DEFAULTS).positives_bound
            kept = kept_in_training(self.heads.topk, self._tree().most, bound)
            found["gathered"] += shortlist_traffic(documents, processes, kept)
        return found

    def label_rows(self, start: int, end: int) -> Tensor:
        """Refuse: a logit has a bias per label; see `Model.label_rows`."""
        mend = "an inner product cannot carry it; train end to end without --bias"
        got = "a cascade, which has a bias for each label"
        raise InputError("model", "a label table without bias", got, mend)

    def labels_under(self, level: int) -> tuple[Tensor, Tensor]:
        """List the label ids under each node of a level, as rows of different lengths.

        Args:
            level: 0 (the coarsest) to R - 1, where each node is one label.

        Returns:
            start: int64 [n_r + 1]; labels: int64 [L], on the CPU. The label ids under node c are
            labels[start[c]:start[c + 1]].

        Raises:
            InputError: the tree has no such level.
        """
        return _tensor(self.tree.bounds(level)), _tensor(self.tree.order)

    def clusters_of(self, level: int) -> Tensor:
        """Find the node of a level that each label belongs to: int64 [L] by label id, on the CPU.

        Raises:
            InputError: the tree has no such level.
        """
        return _tensor(self.tree.ancestors(level)[self.tree.place])

    def step(self, batch: Documents, *, need_loss: bool = False) -> Tensor:
        """Train on one batch.

        Returns:
            The loss [1]: the levels' means over candidates, each times its rw_loss, summed; or [0]
            when not asked for.

        Raises:
            InputError: the batch has no cluster positives of this tree, or the model was built
                without training settings.
        """
        settings = self.training_settings
        if settings is None:
            raise no_training()
        self._positives(batch)  # refused before anything is done
        encoder_lr, head_lr, beta1 = settings.rates(self.steps)
        if self.optimizer is not None:
            set_rates(self.optimizer, encoder_lr, head_lr, beta1)
        loss, overflow = self._run_passes(batch, head_lr, beta1, need_loss)
        self._finish_step(overflow, encoder_lr)
        return loss

    def _passes(
        self, batch: Documents, lr: float | Tensor, beta1: float | Tensor | None, need_loss: bool
    ) -> tuple[Tensor, Tensor]:
        settings = self.training_settings
        assert settings is not None and self.scaler is not None
        positives = self._positives(batch)
        encoded = self._encode(batch, settings.micro_batch)
        levels = zip(self.heads.levels, encoded.x, strict=True)
        finite = torch.stack([torch.isfinite(v.operand(f)).all() for v, f in levels]).all()  # type: ignore[operator]
        # One bad level must keep every table as it is, and each op looks at its own x alone.
        x = [torch.where(finite, f, torch.nan) for f in encoded.x]
        done = train_levels(
            self.heads,
            self._tree(),
            x,
            positives,
            settings,
            encoded.scatter_levels,
            lr=lr,
            beta1=beta1,
            dx_scale=self.scaler.scale,
            need_loss=need_loss,
        )
        self.lost_positives += done.lost
        encoded.backward(done.dx)
        return done.loss, (~finite).float().reshape(1)

    def _tree(self) -> TreeOnDevice:
        children = (getattr(self, f"children_{r}") for r in range(self.tree.levels - 1))
        return TreeOnDevice((self.root, *children), (self.tree.sizes[0], *self.heads.most))

    def _positives(self, batch: Documents) -> list[tuple[Tensor, Tensor]]:
        """(node, sample) of every level, the labels last."""
        if len(batch.levels) != self.tree.levels - 1:
            expected = f"positives of {self.tree.levels - 1} cluster levels"
            mend = "make the batches with this tree's order and ancestors"
            raise InputError("batch", expected, f"those of {len(batch.levels)}", mend)
        return [*batch.levels, (batch.pos_row, batch.pos_sample)]

    def _features(self, *inputs: Tensor) -> list[Tensor]:
        return self.heads.features(self.encoder.layer_vectors(self.heads.layers, *inputs))  # type: ignore[operator]

    @evaluating
    def level_losses(self, batch: Documents) -> Tensor:
        """Split the loss by level: fp32 [R], true clusters forced in, without training.

        Raises:
            InputError: the batch has no cluster positives of this tree.
        """
        return torch.cat(self._level_losses(self._whole_features(batch), batch))

    @evaluating
    def candidates(self, batch: Documents) -> list[Candidates]:
        """List what each level would train on for this batch, coarse to fine, the labels last.

        The coarsest level's candidates are all its nodes; each next one's are the children of the
        best clusters and, as in training, of the true ones.

        Raises:
            InputError: the batch has no cluster positives of this tree.
        """
        x, positives = self._whole_features(batch), self._positives(batch)
        tree = self._tree()
        levels = [
            joined(*level)
            for level in zip(
                self._training_descent(x, positives), tree.row_ptr, tree.most, strict=True
            )
        ]
        *above, last = map(candidates_of, levels, positives)
        return [*above, Candidates(self._label_ids(last.nodes), last.logits, last.positive)]

    def _training_descent(
        self, x: list[Tensor], positives: list[tuple[Tensor, Tensor]]
    ) -> list[Descent]:
        bound = (self.training_settings or _AT_DEFAULTS).positives_bound
        return list(descend(self.heads, x, self._tree(), positives=positives, bound=bound))

    def _level_losses(self, x: list[Tensor], batch: Documents) -> list[Tensor]:
        settings, positives = self.training_settings or _AT_DEFAULTS, self._positives(batch)
        levels = self._training_descent(x, positives)
        weights = settings.weights(self.tree.levels)
        return [
            loss_of(level, pairs, weight, settings.reference_loss)
            for level, pairs, weight in zip(levels, positives, weights, strict=True)
        ]

    def _loss(self, x: list[Tensor], batch: Documents) -> Tensor:
        total = torch.zeros(1, device=self.device)
        for loss in self._level_losses(x, batch):
            total += loss
        return total

    def _answers(
        self, x: list[Tensor], k: int, exclude: Tensor | None, schemes: Sequence[str]
    ) -> dict[str, Answer]:
        if not schemes:
            return {}
        levels, out = list(descend(self.heads, x, self._tree())), {}
        for scheme in schemes:
            scored = zip(levels, scores_by(scheme, levels), strict=True)
            found = [
                self._best(r, level, scores, k, exclude, scheme)
                for r, (level, scores) in enumerate(scored)
            ]
            out[scheme] = Answer(found[-1].values, found[-1].nodes, tuple(found))
        return out

    def _answer(self, x: list[Tensor], k: int, exclude: Tensor | None) -> Answer:
        levels, scheme = list(descend(self.heads, x, self._tree())), self.scheme
        *_, scores = scores_by(scheme, levels)
        found = self._best(self.tree.levels - 1, levels[-1], scores, k, exclude, scheme)
        return Answer(found.values, found.nodes)

    def _answer_among(self, x: list[Tensor], k: int, allowed: Tensor) -> Answer:
        above = [torch.from_numpy(part).to(self.device) for part in self._ancestors]
        values, rows = best_among(
            lambda rows: path_scores(self.heads, x, rows, above, self.scheme),
            self.place[allowed].sort().values,
            len(x[-1]),
            k,
        )
        if self.scheme != "level":
            values = torch.where(rows >= 0, logit_of_log(values), -torch.inf)
        return Answer(values, self._label_ids(rows))

    @cached_property
    def _ancestors(self) -> list[np.ndarray]:
        return [self.tree.ancestors(r) for r in range(self.tree.levels - 1)]

    def _best(
        self, r: int, level: Descent, scores: Tensor, k: int, exclude: Tensor | None, scheme: str
    ) -> LevelPrediction:
        if r + 1 < self.tree.levels:
            return LevelPrediction(*ranked(level, scores, k, scheme), level.kept)
        if exclude is not None:
            exclude = torch.where(exclude >= 0, self.place[exclude.clamp(min=0)], -1)
        values, rows = ranked(level, scores, k, scheme, exclude)
        return LevelPrediction(values, self._label_ids(rows), level.kept)

    def _label_ids(self, rows: Tensor) -> Tensor:
        return torch.where(rows >= 0, self.order[rows.clamp(min=0)], -1)

    def config(self) -> dict[str, Any]:
        """Describe the model as JSON; see `Model.config`."""
        return {
            "kind": self.kind,
            "encoder": self.encoder.encoder_config(),  # type: ignore[operator]
            "head": self.heads.config,
            "tree": dict(self.tree.settings),
        }

    @classmethod
    def table_shapes(cls, head: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """Name the levels' tables, with their shapes; see `Model.table_shapes`."""
        sizes, width = head["sizes"], head["width"]
        return {f"heads.levels.{r}.weight": (size, width) for r, size in enumerate(sizes)}

    @classmethod
    def restore(
        cls, config: Mapping[str, Any], encoder: nn.Module, tensors: Mapping[str, Tensor]
    ) -> Self:
        """Build the model that a `config()` describes, for prediction; see `Model.restore`.

        Raises:
            InputError: the tensors hold no label tree.
        """
        tree, head = saved_tree(config, tensors), config["head"]
        rows = table_rows(tensors, f"heads.levels.{tree.levels - 1}")
        level: Any = partial(StoredLevel, store=rows, most=head["most"][-1]) if rows else None
        level = QuantizedLevel if head["dtype"] == INT8 else level
        # SGD without momentum keeps no state, and prediction needs none.
        heads = CascadeHeads(**head, optimizer="sgd", fill=False, label_level=level)
        return cls(encoder, heads, tree)

    def _check_loaded(self, tensors: Mapping[str, Tensor]) -> None:
        own = self.state_dict()
        names = {"order", *(f"children_{r}" for r in range(self.tree.levels - 1))}
        there = {k for k in tensors if k == "order" or k.startswith("children_")}
        if there != names or any(not torch.equal(tensors[k].cpu(), own[k].cpu()) for k in names):
            raise InputError(
                "checkpoint",
                f"a cascade on this label tree ({self.tree.content_hash[:12]}, sizes "
                f"{list(self.tree.sizes)})",
                "one on another tree",
                "pass the tree that it was trained with",
            )


def _check_fit(encoder: nn.Module, heads: CascadeHeads, tree: LabelTree) -> None:
    """Refuse heads, tree and encoder that do not fit together."""
    sizes = [level.shard.rows for level in heads.tables().values()]
    if sizes != list(tree.sizes):
        expected = f"heads of {list(tree.sizes)} nodes, the sizes of the label tree"
        raise InputError("cascade", expected, str(sizes), "make the heads with tree.sizes")
    most = [tree.widest(r) for r in range(tree.levels - 1)]
    if list(heads.most) != most:
        expected = f"heads for clusters of up to {most} children"
        got, mend = str(list(heads.most)), "pass tree.widest of each level"
        raise InputError("cascade", expected, got, mend)
    check_encoder(encoder, heads.layers)
    if heads.width != encoder.width:
        expected = f"heads of width {encoder.width}, the encoder's"
        raise InputError("cascade", expected, str(heads.width), "make the heads for this encoder")


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(values, np.int64))
