"""A bag-of-words encoder: weighted sum of word vectors, bias, ReLU, dropout.

Source: the input side of AnnexML and of fastText (Joulin et al., EACL 2017), with a hidden layer's
bias and ReLU. The word table is trained as the label tables are: it never meets a gradient tensor.
`forward` keeps the bags, autograd leaves their gradient there, and `update` takes it to the rows of
the words that occurred (`bag_step_`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xmlkernels import dist
from xmlkernels.errors import InputError
from xmlkernels.nn.dropout import Dropout, dropout
from xmlkernels.nn.table import RowOptimizer, Table, check_choice, normal
from xmlkernels.ops import bag_step_
from xmlkernels.ops.hyper import LR

DTYPES = ("fp32", "bf16")  # of the table and of its optimizer's state
ACTIVATIONS = ("relu", "none")
_NAME = "bag-of-words encoder"
# Buffers of the word table by their names in a state dict, which are older than `Table`.
_SAVED = {
    "table": "weight",
    "momentum": "momentum",
    "second": "second",
    "kahan": "kahan",
    "counter": "counter",
}


class WordTable(Table):
    """The word vectors of a bag-of-words encoder."""

    NAME: ClassVar[str] = _NAME

    @classmethod
    def check_options(cls, dtype: str, optimizer: RowOptimizer) -> None:
        """Raise InputError unless `bag_step_` takes the formats and the optimizer."""
        check_choice(f"{_NAME}: dtype", dtype, DTYPES)
        check_choice(f"{_NAME}: state_dtype", optimizer.state_dtype, DTYPES)
        super().check_options(dtype, optimizer)


class BowEncoder(nn.Module):
    """Bags of words → one fp32 vector per document: dropout(relu(bag + bias)).

    `update` is the whole of the word table's training; only `bias` is a parameter, for a torch
    optimizer. All bags passed forward since the last `update` are trained at once: micro-batches
    add up.

    Attributes:
        table: a `Table` of the word vectors, [V, D]. In a state dict its buffers are `table`,
            `momentum`, `second`, `kahan` and `counter`, as in every checkpoint so far.
        width: D.
        autocast, max_length: None: it computes in fp32 and takes bags of any length.

    Args:
        vocabulary: V.
        width: D.
        dropout: probability of dropout on the finished vector.
        word_dropout: probability that an occurrence is left out in training; the rest weighs
            1/(1 − p) more.
        activation: "relu", or "none" for a linear (low-rank) model.
        dtype: of the table, "fp32" or "bf16". Below fp32, sums use the words' weights rounded to
            bf16 too.
        optimizer: of the table: "adam" or "adagrad" (with one second moment per word, and a
            decoupled decay), "sgd", or a RowOptimizer; None for prediction alone. Decay concerns
            the words that occur.
        std: standard deviation of the initial N(0, std²). The bags of a normalised TF-IDF have norm
            1, so the hidden units begin with this deviation.
        seed: of the initial table and of the stochastic rounding.

    Raises:
        InputError: an option is out of range.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        *,
        dropout: float = 0.0,
        word_dropout: float = 0.0,
        activation: str = "relu",
        dtype: str = "fp32",
        optimizer: RowOptimizer | str | None = None,
        std: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, size in (("vocabulary", vocabulary), ("width", width)):
            if size < 1:
                raise InputError(f"{_NAME}: {name}", "at least 1", str(size), "correct it")
        for name, share in (("dropout", dropout), ("word_dropout", word_dropout)):
            if not 0.0 <= share < 1.0:
                expected = "a probability in [0, 1)"
                raise InputError(f"{_NAME}: {name}", expected, str(share), "correct it")
        check_choice(f"{_NAME}: activation", activation, ACTIVATIONS)
        self.width = width
        self.autocast: torch.dtype | None = None
        self.max_length: int | None = None
        self.activation, self.dtype, self.word_dropout = activation, dtype, word_dropout
        self.bias = nn.Parameter(torch.zeros(width))
        self.dropout = Dropout(dropout)
        self.trained = optimizer is not None
        if isinstance(optimizer, str):
            check_choice(f"{_NAME}: optimizer", optimizer, WordTable.OPTIMIZERS)
            optimizer = RowOptimizer(optimizer, row_wise=True, decoupled=True)
        self.table = WordTable(
            vocabulary,
            width,
            dtype=dtype,
            optimizer=optimizer or RowOptimizer(),
            draw=normal(std),
            seed=seed,
        )
        self._passed: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.register_state_dict_post_hook(_saved_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_table_names)  # type: ignore[no-untyped-call]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BowEncoder:
        """Rebuild the encoder that `encoder_config()` describes, for prediction.

        Its weights are still to be loaded from a state dict.

        Raises:
            InputError: the dict does not describe one.
        """
        where, mend = "encoder configuration", "pass encoder_config()"
        options = dict(config)
        if options.pop("kind", None) != "bow":
            raise InputError(where, "the kind `bow`", repr(config.get("kind")), mend)
        try:
            return cls(**options, std=0.0)
        except TypeError as error:
            raise InputError(where, "the options of BowEncoder", str(error), mend) from error

    def encoder_config(self) -> dict[str, Any]:
        """Describe the encoder for `from_config`, JSON-ready: shape and options, no weights."""
        return {
            "kind": "bow",
            "vocabulary": self.table.weight.shape[0],
            "width": self.width,
            "dropout": self.dropout.p,
            "word_dropout": self.word_dropout,
            "activation": self.activation,
            "dtype": self.dtype,
        }

    def forward(self, token: Tensor, offset: Tensor, token_weight: Tensor) -> Tensor:
        """Encode bags of words: fp32 [B, D].

        With gradients on, the bags wait for `update`; an encoder built without an optimizer keeps
        none.

        Args:
            token: int64 [T], word of each occurrence, from 0 to V − 1.
            offset: int64 [B + 1], ascending from 0 to T: bag b is token[offset[b]:offset[b + 1]].
            token_weight: fp32 [T].
        """
        if self.training and self.word_dropout > 0:
            token_weight = dropout(token_weight, self.word_dropout)
        table = self.table.weight
        with torch.no_grad():
            bag = nn.functional.embedding_bag(
                token,
                table,
                offset,
                mode="sum",
                per_sample_weights=token_weight.to(table.dtype),
                include_last_offset=True,
            ).float()
        if self.trained and torch.is_grad_enabled():
            self._passed.append((bag.requires_grad_(), token, offset, token_weight))
        x = bag + self.bias
        out: Tensor = self.dropout(torch.relu(x) if self.activation == "relu" else x)
        return out

    def layer_vectors(self, levels: int | Sequence[object], *inputs: Tensor) -> list[Tensor]:
        """Give each level of a cascade the same vector, fp32 [B, D].

        Args:
            levels: their number, or a recipe with an entry for each.
            inputs: as `forward` takes them.
        """
        count = levels if isinstance(levels, int) else len(levels)
        return [self(*inputs)] * count

    def update_traffic(self, documents: int, terms: int, processes: int) -> int:
        """Return the bytes that each process gathers in `update`, in closed form.

        Args:
            documents: B, of all processes together.
            terms: occurrences in the bags of the process that has most.
            processes: G.
        """
        if processes == 1:
            return 0
        counts = 4 * 8
        largest = -(-documents // processes)
        return (processes - 1) * (largest * (4 * self.width + 8) + 12 * terms + counts)

    @torch.no_grad()
    def update(self, lr: float) -> None:
        """Take one optimizer step on the words of the bags passed since the last call.

        Call it after every backward: bags are kept until then. Without a gradient nothing happens;
        a non-finite one leaves the table and its state as they were. With several processes, each
        takes the step on the bags of all.

        Args:
            lr: learning rate of this step.
        """
        passed, self._passed = [kept for kept in self._passed if kept[0].grad is not None], []
        if not passed:
            return
        grads, tokens, offsets, weights = zip(
            *((bag.grad, *rest) for bag, *rest in passed), strict=True
        )
        before = itertools.accumulate((len(token) for token in tokens), initial=0)
        ends = [offset[1:] + start for offset, start in zip(offsets, before, strict=False)]
        grad, token, weight = torch.cat(grads), torch.cat(tokens), torch.cat(weights)
        offset = torch.cat([offsets[0][:1], *ends])
        if dist.size() > 1:
            sent = grad, token, weight, offset.diff()
            grad, token, weight, lengths = dist.gather_together(sent)
            offset = nn.functional.pad(lengths.cumsum(0), (1, 0))
        table = self.table
        table.hyper[LR] = lr
        bag_step_(
            table.weight,
            grad,
            token,
            offset,
            table.hyper,
            table.counter,
            token_weight=weight,
            momentum=table.momentum,
            second=table.second,
            kahan=table.kahan,
            decoupled=table.optimizer.decoupled,
        )
        table.after_step()


def _saved_names(
    module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: object
) -> None:
    """Give the word table's buffers their names in a state dict."""
    for saved, name in _SAVED.items():
        if f"{prefix}table.{name}" in state:
            state[prefix + saved] = state.pop(f"{prefix}table.{name}")


def _table_names(module: nn.Module, state: dict[str, Tensor], prefix: str, *_rest: object) -> None:
    """Give what a state dict holds of the word table its names in the module."""
    for saved, name in _SAVED.items():
        if prefix + saved in state:
            state[f"{prefix}table.{name}"] = state.pop(prefix + saved)
