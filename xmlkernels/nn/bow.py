"""A bag-of-words encoder: weighted sum of word vectors, bias, ReLU, dropout.

Source: the input side of AnnexML and of fastText (Joulin et al., EACL 2017), with a hidden layer's
    bias and ReLU. The word
table is trained as the label tables are: it never meets a gradient tensor. `forward` keeps the
bags, autograd leaves their gradient there, and `update` takes it to the rows of the words that
occurred (`bag_step_`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xmlkernels import dist
from xmlkernels.errors import InputError
from xmlkernels.nn.dropout import Dropout, dropout
from xmlkernels.nn.table import new_table, normal
from xmlkernels.ops import bag_step_

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPTIMIZERS = ("sgd", "adagrad", "adam")
ACTIVATIONS = ("relu", "none")


class BowEncoder(nn.Module):
    """Bags of words → one fp32 vector per document: dropout(relu(bag + bias)).

    `update` is the whole of the word table's training; only `bias` is a parameter, for the torch
    optimizer beside it. As many bags as were passed forward since the last `update` are trained at
    once: micro-batches add up.

    Attributes:
        table: [V, D] word vectors, fp32 or bf16.
        momentum, second: the optimizer's state, None where it has none.
        width: D.
        autocast, max_length: None: it computes in fp32 and takes bags of any length.

    Args:
        vocabulary: V.
        width: D.
        dropout: probability of dropout on the finished vector.
        word_dropout: probability that an occurrence is left out in training; the rest weighs 1/(1 −
            p) more.
        activation: "relu", or "none" for a linear (low-rank) model.
        dtype: of the table, "fp32" or "bf16". Below fp32, sums use the words' weights rounded to
            bf16 too.
        optimizer: "adam", "adagrad" or "sgd"; None for prediction alone.
        first: Adam's beta1, or SGD's momentum (0 keeps no state).
        beta2, epsilon: Adam's and Adagrad's.
        rowwise: one second moment per word instead of one per value.
        state_dtype: of the optimizer's state; below fp32 it rounds stochastically.
        decay: decoupled weight decay of the words that occur.
        std: standard deviation of the initial N(0, std²). The bags of a normalised TF-IDF have norm
            1, so the hidden units begin with this deviation.
        seed: of the initial table and of the stochastic rounding.

    Raises:
        InputError: an option is out of range.
    """

    table: Tensor
    momentum: Tensor | None
    second: Tensor | None
    hyper: Tensor
    counter: Tensor

    def __init__(
        self,
        vocabulary: int,
        width: int,
        *,
        dropout: float = 0.0,
        word_dropout: float = 0.0,
        activation: str = "relu",
        dtype: str = "fp32",
        optimizer: str | None = None,
        first: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        rowwise: bool = True,
        state_dtype: str = "fp32",
        decay: float = 0.0,
        std: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check(
            vocabulary,
            width,
            {"dropout": dropout, "word_dropout": word_dropout},
            activation,
            dtype,
            optimizer,
            state_dtype,
        )
        self.width = width
        self.autocast: torch.dtype | None = None
        self.max_length: int | None = None
        self.activation, self.dtype, self.word_dropout = activation, dtype, word_dropout
        self.bias = nn.Parameter(torch.zeros(width))
        self.dropout = Dropout(dropout)
        shape = (vocabulary, width)
        adam, state = optimizer == "adam", DTYPES[state_dtype]
        squares = torch.zeros(vocabulary if rowwise else shape, dtype=state)
        self.register_buffer(
            "table", new_table(vocabulary, width, DTYPES[dtype], seed, normal(std))[0]
        )
        keeps = adam or (optimizer == "sgd" and first > 0)
        self.register_buffer("momentum", torch.zeros(shape, dtype=state) if keeps else None)
        self.register_buffer("second", squares if optimizer in ("adam", "adagrad") else None)
        self.register_buffer(
            "hyper", torch.tensor([0.0, decay, first, beta2, epsilon, 1.0, 1.0]), persistent=False
        )
        self.register_buffer("counter", torch.tensor([seed, 0]))
        self.trained = optimizer is not None
        self._passed: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BowEncoder:
        """Rebuild the encoder that `encoder_config()` describes, for prediction: load a state dict
        into it.

        Raises:
            InputError: the dict does not describe one.
        """
        options = dict(config)
        if options.pop("kind", None) != "bow":
            raise InputError(
                "encoder configuration",
                "the kind `bow`",
                repr(config.get("kind")),
                "pass encoder_config()",
            )
        try:
            return cls(**options, std=0.0)
        except TypeError as error:
            raise InputError(
                "encoder configuration",
                "the options of BowEncoder",
                str(error),
                "pass encoder_config()",
            ) from error

    def encoder_config(self) -> dict[str, Any]:
        """JSON-ready description for `from_config`: shape and options of the forward pass, no
        weights.
        """
        return {
            "kind": "bow",
            "vocabulary": self.table.shape[0],
            "width": self.width,
            "dropout": self.dropout.p,
            "word_dropout": self.word_dropout,
            "activation": self.activation,
            "dtype": self.dtype,
        }

    def forward(self, token: Tensor, offset: Tensor, token_weight: Tensor) -> Tensor:
        """Bags of words → fp32 [B, D].

        With gradients on, the bags wait for `update`; an encoder built without an optimizer keeps
        none.

        Args:
            token: int64 [T], word of each occurrence, from 0 to V − 1.
            offset: int64 [B + 1], ascending from 0 to T: bag b is token[offset[b]:offset[b + 1]].
            token_weight: fp32 [T].
        """
        if self.training and self.word_dropout > 0:
            token_weight = dropout(token_weight, self.word_dropout)
        with torch.no_grad():
            bag = nn.functional.embedding_bag(
                token,
                self.table,
                offset,
                mode="sum",
                per_sample_weights=token_weight.to(self.table.dtype),
                include_last_offset=True,
            ).float()
        if self.trained and torch.is_grad_enabled():
            self._passed.append((bag.requires_grad_(), token, offset, token_weight))
        x = bag + self.bias
        return self.dropout(torch.relu(x) if self.activation == "relu" else x)

    def layer_vectors(self, levels: int | Sequence[object], *inputs: Tensor) -> list[Tensor]:
        """The same vector, fp32 [B, D], for each level of a cascade: their number, or a recipe with
        an entry for each.
        """
        count = levels if isinstance(levels, int) else len(levels)
        return [self(*inputs)] * count

    @torch.no_grad()
    def update(self, lr: float) -> None:
        """Takes one optimizer step on the words of the bags passed since the last call; nothing
        where no gradient came.

        A non-finite gradient leaves the table and its state as they were. Call it after every
        backward: bags are kept until then. Of several processes each takes the step on the bags of
        all.

        Args:
            lr: learning rate of this step.
        """
        passed, self._passed = [kept for kept in self._passed if kept[0].grad is not None], []
        if not passed:
            return
        grads, tokens, offsets, weights = zip(
            *((bag.grad, *rest) for bag, *rest in passed), strict=True
        )
        before = torch.tensor([0, *(len(token) for token in tokens)]).cumsum(0).tolist()
        ends = [offset[1:] + start for offset, start in zip(offsets, before, strict=False)]
        grad, token, offset, weight = (
            torch.cat(grads),
            torch.cat(tokens),
            torch.cat([offsets[0][:1], *ends]),
            torch.cat(weights),
        )
        if dist.size() > 1:
            grad, token, weight, lengths = (
                dist.gather_ragged(own) for own in (grad, token, weight, offset.diff())
            )
            offset = nn.functional.pad(lengths.cumsum(0), (1, 0))
        self.hyper[0] = lr
        bag_step_(
            self.table,
            grad,
            token,
            offset,
            self.hyper,
            self.counter,
            token_weight=weight,
            momentum=self.momentum,
            second=self.second,
            decoupled=True,
        )
        self.counter[1] += 1


def _check(
    vocabulary: int,
    width: int,
    shares: dict[str, float],
    activation: str,
    dtype: str,
    optimizer: str | None,
    state: str,
) -> None:
    for name, size in (("vocabulary", vocabulary), ("width", width)):
        if size < 1:
            raise InputError(f"bag-of-words encoder: {name}", "at least 1", str(size), "correct it")
    for name, share in shares.items():
        if not 0.0 <= share < 1.0:
            raise InputError(
                f"bag-of-words encoder: {name}", "a probability in [0, 1)", str(share), "correct it"
            )
    choices = (
        ("activation", activation, ACTIVATIONS),
        ("dtype", dtype, DTYPES),
        ("state_dtype", state, DTYPES),
    )
    for name, value, known in (*choices, ("optimizer", optimizer or OPTIMIZERS[0], OPTIMIZERS)):
        if value not in known:
            raise InputError(
                f"bag-of-words encoder: {name}",
                f"one of {', '.join(known)}",
                repr(value),
                "choose one of them",
            )
