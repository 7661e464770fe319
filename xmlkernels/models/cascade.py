"""The cascade: encoder layers → coarse clusters → finer clusters → a shortlist of labels
(CascadeXML, NeurIPS 2022).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xmlkernels.errors import InputError
from xmlkernels.models.base import Documents
from xmlkernels.models.cascade_state import (
    cascade_tensors,
    check_fit,
    load_cascade_tensors,
    saved_tree,
)
from xmlkernels.models.cascade_training import CascadeTraining, cascade_optimizer, set_rates
from xmlkernels.models.descent import (
    Descent,
    LevelPrediction,
    TreeOnDevice,
    descend,
    loss_of,
    loss_scale,
    ranked,
    scores_by,
)
from xmlkernels.models.gradient_caching import EncoderPass
from xmlkernels.models.running_mean import RunningMean, averaged, begun, evaluating
from xmlkernels.nn.cascade_heads import SCHEMES, CascadeHeads
from xmlkernels.nn.shortlist import count, select
from xmlkernels.optim import LossScaler, scaled_step
from xmlkernels.tree.label_tree import LabelTree

__all__ = ["Cascade", "CascadeTraining", "LevelPrediction", "saved_tree"]


class Cascade(nn.Module):
    """Encoder, one head per level of a label tree, and the step that trains them together.

    A step is vectors of the encoder's layers → features of each level → for each level, coarse to
    fine, `cluster_step_` on the children of the clusters kept above (dx, scores, tables updated in
    place) and the next shortlist from those scores → one backward from all features → AdamW. A
    non-finite feature at any level skips every update, decided before level 0; a gradient that
    overflows in the encoder's own backward (fp16 autocast) skips the encoder's alone. Both are
    counted on the device, without a host sync. Table rows stand in tree order; label ids go in and
    out of `predict` alone.

    Attributes:
        tree: the label tree.
        lost_positives: int64 [R - 1], (document, cluster) pairs that no shortlist had room for,
            since the start.
        sums_loss: False: losses are means over candidates, summed over levels.

    Args:
        encoder: has `layer_vectors(recipe, *batch.inputs)`, `autocast` and `encoder_config()`; one
            that trains a table of its own has `update(lr)`, called after backward.
        heads: made for the tree's sizes.
        tree: a LabelTree of as many levels.
        training: None for prediction alone.

    Raises:
        InputError: heads, tree and encoder do not fit together.
    """

    sums_loss = False
    schemes = SCHEMES
    skipped_steps: Tensor
    skipped_encoder_steps: Tensor
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
        super().__init__()
        check_fit(encoder, heads, tree)
        self.encoder, self.heads, self.tree, self.training_settings = encoder, heads, tree, training
        self.steps = 0
        self.average: RunningMean | None = None
        self.register_buffer("skipped_steps", torch.zeros(1))
        self.register_buffer("skipped_encoder_steps", torch.zeros(1))
        self.register_buffer("lost_positives", torch.zeros(tree.levels - 1, dtype=torch.int64))
        self.register_buffer("order", torch.from_numpy(np.array(tree.order, np.int64)))
        self.register_buffer(
            "place", torch.from_numpy(np.array(tree.place, np.int64)), persistent=False
        )
        self.register_buffer("root", torch.tensor([0, tree.sizes[0]]), persistent=False)
        for r, children in enumerate(tree.children):
            self.register_buffer(f"children_{r}", torch.from_numpy(np.array(children, np.int64)))
        if training is not None:
            self._prepare_training(training)

    def _prepare_training(self, training: CascadeTraining) -> None:
        training.check(self.tree.levels)
        for level in self.heads.levels:
            level.set_decay(training.table_decay())  # type: ignore[operator]
        self.optimizer = cascade_optimizer(self.encoder, self.heads.projections, training)
        # Only fp16 needs a scale; elsewhere it stays 1 and the scaler is the check for non-finite
        # gradients.
        half = getattr(self.encoder, "autocast", None) == torch.float16
        self.scaler = (
            LossScaler(self.device)
            if half
            else LossScaler(self.device, init_scale=1.0, growth=1.0, backoff=1.0)
        )
        self.average = begun(self.encoder, self._averaged(), training.mean)

    def _averaged(self) -> dict[str, Tensor]:
        settings = self.training_settings
        tables = self.heads.levels if settings is not None and settings.mean.tables else ()
        return averaged(self, {f"heads.levels.{r}": level for r, level in enumerate(tables)})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Cascade":
        # `.to(device)` must take the loss scaler and the mean weights along; they are no modules.
        super()._apply(fn, recurse)
        if self.training_settings is not None:
            self.scaler.move(fn)
        if self.average is not None:
            self.average.follow(self._averaged())
        return self

    @property
    def labels(self) -> int:
        return self.order.shape[0]

    @property
    def width(self) -> int:
        return self.heads.width

    @property
    def device(self) -> torch.device:
        return self.order.device

    def _tree(self) -> TreeOnDevice:
        children = (getattr(self, f"children_{r}") for r in range(self.tree.levels - 1))
        return TreeOnDevice((self.root, *children), (self.tree.sizes[0], *self.heads.most))

    def step(self, batch: Documents, *, need_loss: bool = False) -> Tensor:
        """Trains on one batch.

        Returns:
            The loss [1]: the levels' means over candidates, each times its rw_loss, summed; or [0]
            when not asked.

        Raises:
            InputError: the batch has no cluster positives of this tree.
        """
        settings = self.training_settings
        assert settings is not None, "this model was built without training settings"
        positives = self._positives(batch)
        encoder_lr, head_lr, beta1 = settings.rates(self.steps)
        if self.optimizer is not None:
            set_rates(self.optimizer, encoder_lr, head_lr, beta1)
            self.optimizer.zero_grad(set_to_none=True)
        held = EncoderPass(self._features, batch.inputs, len(batch), settings.micro_batch)
        finite = torch.stack([torch.isfinite(f).all() for f in held.x]).all()
        # One bad level must keep every table as it is, and each op looks at its own x alone.
        x = [torch.where(finite, f, torch.nan) for f in held.x]
        dx, loss = self._train_tables(x, positives, head_lr, beta1, need_loss)
        held.backward(dx)
        self._encoder_step((~finite).float().reshape(1), encoder_lr)
        self.steps += 1
        return loss

    def _positives(self, batch: Documents) -> list[tuple[Tensor, Tensor]]:
        """(node, sample) of every level, the labels last."""
        if len(batch.levels) != self.tree.levels - 1:
            raise InputError(
                "batch",
                f"positives of {self.tree.levels - 1} cluster levels",
                f"those of {len(batch.levels)}",
                "make the batches with this tree's order and ancestors",
            )
        return [*batch.levels, (batch.pos_row, batch.pos_sample)]

    def _features(self, *inputs: Tensor) -> list[Tensor]:
        return self.heads.features(self.encoder.layer_vectors(self.heads.layers, *inputs))  # type: ignore[operator]

    def _train_tables(
        self,
        x: list[Tensor],
        positives: list[tuple[Tensor, Tensor]],
        lr: float,
        beta1: float | None,
        need_loss: bool,
    ) -> tuple[list[Tensor], Tensor]:
        """dx of every level, and the loss."""
        settings = self.training_settings
        assert settings is not None
        tree, out = self._tree(), list[Tensor]()
        losses = torch.zeros(1 if need_loss else 0, device=self.device)
        clusters = torch.zeros(x[0].shape[0], 1, dtype=torch.int64, device=self.device)
        for r, (level, weight) in enumerate(
            zip(self.heads.levels, settings.weights(self.tree.levels), strict=True)
        ):
            row_ptr, most = tree.row_ptr[r], tree.most[r]
            scale, pads = loss_scale(count(clusters, row_ptr), weight, settings.reference_loss)
            dx, scores, loss = level.step(  # type: ignore[operator]
                x[r],
                clusters,
                row_ptr,
                most,
                positives[r],
                lr=lr,
                beta1=beta1,
                scale=scale,
                dx_scale=self.scaler.scale,
                need_loss=need_loss,
            )
            out.append(dx)
            if need_loss:
                losses += loss + scale * pads
            if r + 1 < self.tree.levels:
                k = self.heads.topk[r]
                width = k + settings.positives_bound
                clusters, _, forced = select(
                    scores, clusters, row_ptr, k, width=width, positives=positives[r]
                )
                there = (positives[r][0] < level.nodes).sum()  # type: ignore[operator]
                self.lost_positives[r : r + 1] += there - forced
        return out, losses

    def _encoder_step(self, overflow: Tensor, lr: float) -> None:
        settings = self.training_settings
        assert settings is not None
        if self.optimizer is not None:
            self.skipped_encoder_steps += scaled_step(
                self.optimizer, self.scaler, overflow, clip=settings.clip
            )
        if update := getattr(self.encoder, "update", None):
            update(lr)
        self.skipped_steps += overflow
        if self.average is not None:
            self.average.step(self.steps)

    def config(self) -> dict[str, Any]:
        """What prediction needs to build the model again, beside its tensors; see `saved_tree`."""
        return {
            "kind": "cascade",
            "encoder": self.encoder.encoder_config(),  # type: ignore[operator]
            "head": self.heads.config,
            "tree": dict(self.tree.settings),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Everything that must survive a stop, by name: weights, tree, optimizer states, counters,
        loss scale, mean weights.
        """
        return cascade_tensors(self)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `tensors` gave; a model without training takes the share that prediction
        needs (where there are mean weights, those).

        Raises:
            InputError: the tensors are those of another tree or another model.
        """
        load_cascade_tensors(self, tensors)

    @evaluating
    def predict(
        self, batch: Documents, k: int, exclude: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The k best labels of each document by the heads' scheme.

        Args:
            exclude: int64 [B, E], label ids never to be given; -1 pads.

        Returns:
            values: fp32 [B, k], descending; sigmoid(value) is the scheme's probability. labels:
            int64 [B, k], label ids. -inf and -1 where a shortlist has fewer than k labels.
        """
        return self._best_labels(self._features(*batch.inputs), k, exclude)

    @evaluating
    def predict_levels(
        self, batch: Documents, k: int, exclude: Tensor | None = None
    ) -> list[LevelPrediction]:
        """What each level says, coarse to fine, and what it hands on: shortlist recall is read from
        `kept`. `exclude` is for the labels, as of `predict`."""
        scheme = self.heads.scheme
        return self._levels(self._features(*batch.inputs), k, exclude, (scheme,))[scheme]

    @evaluating
    def levels_and_loss(
        self, batch: Documents, k: int, exclude: Tensor | None, schemes: Sequence[str]
    ) -> tuple[dict[str, list[LevelPrediction]], Tensor]:
        """`predict_levels` under each of some schemes, and `loss`, for one pass of the encoder;
        nodes are scored once.
        """
        x = self._features(*batch.inputs)
        return self._levels(x, k, exclude, schemes), self._loss(x, batch)

    @evaluating
    def embed(self, batch: Documents) -> Tensor:
        """fp32 [B, D]: what the label table meets of each document."""
        return self._features(*batch.inputs)[-1]

    @evaluating
    def predict_and_embed(
        self, batch: Documents, k: int, exclude: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`predict` and `embed` for one pass of the encoder."""
        x = self._features(*batch.inputs)
        return *self._best_labels(x, k, exclude), x[-1]

    @evaluating
    def predict_and_loss(
        self, batch: Documents, k: int, exclude: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`predict` and `loss` for one pass of the encoder."""
        x = self._features(*batch.inputs)
        return *self._best_labels(x, k, exclude), self._loss(x, batch)

    @evaluating
    def loss(self, batch: Documents) -> Tensor:
        """The loss [1] that `step` would report, true clusters forced in, without training."""
        return self._loss(self._features(*batch.inputs), batch)

    def _loss(self, x: list[Tensor], batch: Documents) -> Tensor:
        settings = self.training_settings or CascadeTraining(encoder_lr=0.0, total=1)
        positives, total = self._positives(batch), torch.zeros(1, device=self.device)
        weights = settings.weights(self.tree.levels)
        levels = descend(
            self.heads, x, self._tree(), positives=positives, bound=settings.positives_bound
        )
        for level, pairs, weight in zip(levels, positives, weights, strict=True):
            total += loss_of(level, pairs, weight, settings.reference_loss)
        return total

    def _levels(
        self, x: list[Tensor], k: int, exclude: Tensor | None, schemes: Sequence[str]
    ) -> dict[str, list[LevelPrediction]]:
        levels = list(descend(self.heads, x, self._tree()))
        return {
            scheme: [
                self._said(r, level, scores, k, exclude, scheme)
                for r, (level, scores) in enumerate(
                    zip(levels, scores_by(scheme, levels), strict=True)
                )
            ]
            for scheme in schemes
        }

    def _best_labels(
        self, x: list[Tensor], k: int, exclude: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        levels = list(descend(self.heads, x, self._tree()))
        *_, scores = scores_by(self.heads.scheme, levels)
        said = self._said(self.tree.levels - 1, levels[-1], scores, k, exclude, self.heads.scheme)
        return said.values, said.nodes

    def _said(
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
