"""What every model does, whichever way it scores its labels: the interface that training,
evaluation and serving use.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from xmlkernels.data.batches.tokens import BagBatch, Batch
from xmlkernels.errors import InputError
from xmlkernels.records import check_record

if TYPE_CHECKING:
    from xmlkernels.tree.label_tree import LabelTree

Documents = Batch | BagBatch


class Model(Protocol):
    """A classifier over L labels with the step that trains it.

    Attributes:
        steps: steps trained so far.
        skipped_steps, skipped_encoder_steps: fp32 [1], steps that something not finite kept from
            either part.
        labels: L.
        width: D, of what `embed` gives.
        device: where the model is.
        encoder: called as `encoder(*batch.inputs)`; one with a table of its own has `update(lr)`,
            called after backward.
        training: the mode of `nn.Module`.
        sums_loss: whether losses are sums over the documents of a batch; otherwise they are means
            over its candidates.
    """

    steps: int
    skipped_steps: Tensor
    skipped_encoder_steps: Tensor
    training: bool

    @property
    def sums_loss(self) -> bool: ...
    @property
    def labels(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def encoder(self) -> nn.Module: ...

    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...
    def to(self, device: torch.device) -> Any: ...

    def step(self, batch: Documents, *, need_loss: bool = False) -> Tensor:
        """Trains on one batch; its loss [1], or [0] when not asked. Several processes call it
        together, each with its own `inputs` (`AnyBatches.shared`): all take the step of the whole
        batch, and have its loss."""

    def predict(
        self, batch: Documents, k: int, exclude: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits fp32 [B, k] and label ids int64 [B, k], best first; -inf and -1 where there are
        fewer than k.

        Args:
            exclude: int64 [B, E], label ids never to be given; -1 pads.
        """

    def predict_and_loss(
        self, batch: Documents, k: int, exclude: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `predict` gives and the loss [1] of the batch without training, for one pass of the
        encoder.
        """

    def predict_and_embed(
        self, batch: Documents, k: int, exclude: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `predict` and `embed` give, for one pass of the encoder."""

    def embed(self, batch: Documents) -> Tensor:
        """fp32 [B, D]: what the label table meets of each document."""

    def config(self) -> dict[str, Any]:
        """JSON from which `restored` builds the model again: {"kind": …, "encoder": {…}, "head":
        {…}}.
        """

    def tensors(self) -> dict[str, Tensor]:
        """Everything that must survive a stop, by name."""

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `tensors` gave; a model without training takes the share that prediction
        needs.
        """


def tree_of(model: Model) -> "LabelTree | None":
    """The label tree that a model stands on, or None."""
    return getattr(model, "tree", None)


def arrangement(tree: "LabelTree | None") -> dict[str, Any]:
    """How a model on this tree wants its positives: the `order` and `ancestors` of
    `Inputs.batches`; nothing without one.
    """
    if tree is None:
        return {}
    return {
        "order": np.asarray(tree.order),
        "ancestors": tuple(tree.ancestors(r) for r in range(tree.levels - 1)),
    }


def model_config(state: Mapping[str, Any]) -> dict[str, Any]:
    """The model's `config()` in the state of a checkpoint.

    Checkpoints written before there was more than one kind of model hold encoder and head alone.

    Raises:
        InputError: the state describes no model.
    """
    if "model" in state:
        return dict(
            check_record(
                state["model"],
                dict[str, Any],
                where="checkpoint, $.model",
                mend="use another checkpoint",
            )
        )
    if {"encoder", "head"} <= state.keys():
        return {"kind": "end_to_end", "encoder": state["encoder"], "head": state["head"]}
    raise InputError(
        "checkpoint", "the description of a model", "none", "use one that train/run.py wrote"
    )


def check_tensors(own: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> None:
    """Raises InputError unless a checkpoint's tensors have the names, shapes and formats of a
    model's own.
    """
    mend = "use the checkpoint's own configuration"
    missing, extra = sorted(own.keys() - there.keys()), sorted(there.keys() - own.keys())
    if missing or extra:
        got = f"missing {missing[:3]}, left over {extra[:3]}"
        raise InputError("checkpoint", "the tensors of this model", got, mend)
    for name, mine in own.items():
        other = there[name]
        if mine.shape != other.shape or mine.dtype != other.dtype:
            raise InputError(
                f"checkpoint: {name}",
                f"{mine.dtype} {list(mine.shape)}",
                f"{other.dtype} {list(other.shape)}",
                f"{mend} (table formats are chosen by --table and --state)",
            )
