"""A text encoder: any Hugging Face transformer, pooled to one fp32 vector per document.

Source: Renee (Jain et al., MLSys 2023, section 3): encoder, masked mean of the last hidden state,
optional bottleneck without bias, dropout last.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from xmlkernels import dist
from xmlkernels.errors import InputError
from xmlkernels.nn import hf
from xmlkernels.nn.layer_recipe import Recipe, checked_layers
from xmlkernels.nn.shard import part_bytes

POOLING = ("mean", "cls")
CLASS_TOKEN = ("first", "last")
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Encoder(nn.Module):
    """Tokens → one fp32 vector per document.

    Attributes:
        width: D, of the finished embedding.
        hidden: H, of the transformer's hidden states.
        max_length: tokens that its positions allow, or None.

    Args:
        model: a transformers encoder whose output has `last_hidden_state` [B, T, H].
        pooling: "mean" is the mean over real tokens, in fp32. "cls" is the class token of each row,
            its first or its last real one (`class_token`). With left padding the first is the one
            after the padding. Models whose absolute positions count from the left edge (BERT,
            DistilBERT) still see shifted positions there, so pad those on the right.
        class_token: "first", as BERT has it, or "last", as XLNet; see `Tokenizer.class_position`.
        bottleneck: width of a bias-free fp32 linear layer after pooling, drawn from
            U(−1/√H, 1/√H); 0 for none.
        dropout: probability of dropout on the finished embedding.
        autocast: torch.bfloat16, torch.float16, or None for fp32; see `precision.default_autocast`.
        compile: run the transformer through torch.compile with dynamic shapes (needs a C++ compiler
            or CUDA; state dicts keep their keys). On a CPU the stock path measured here was faster
            than the compiled one.

    Raises:
        InputError: the model cannot serve as an encoder, or an option is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pooling: str = "mean",
        class_token: str = "first",
        bottleneck: int = 0,
        dropout: float = 0.0,
        autocast: torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        _check_options(pooling, class_token, bottleneck, dropout, autocast)
        self.hidden = hf.hidden_width(model)
        self.model = model
        self.pooling, self.class_token = pooling, class_token
        self.autocast, self.compiled = autocast, compile
        self.width = bottleneck or self.hidden
        self.max_length = hf.most_tokens(model)
        self.bottleneck: nn.Linear | None = None
        if bottleneck:
            self.bottleneck = nn.Linear(self.hidden, bottleneck, bias=False)
            nn.init.uniform_(self.bottleneck.weight, -(self.hidden**-0.5), self.hidden**-0.5)
        self.dropout = nn.Dropout(dropout)
        if compile:
            # In place: a wrapped module would put `_orig_mod.` into every key.
            model.compile(dynamic=True)
        else:
            hf.use_training_path(model)

    @classmethod
    def from_pretrained(cls, name_or_path: str | PathLike[str], **options: Any) -> Encoder:
        """Load a hub name or a local folder; weights become fp32.

        Weights are read from safetensors alone, and code that a folder or repository brings along
        never runs.

        Args:
            name_or_path: "minilm" is the installed all-MiniLM-L6-v2.
            options: as for `Encoder`.

        Raises:
            InputError: nothing loadable there, an encoder-decoder, weights that the file does not
                hold, a model of pickles or of code of its own, or transformers is not installed.
        """
        return cls(hf.load_pretrained(name_or_path), **options)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], shapes: Mapping[str, torch.Size] | None = None
    ) -> Encoder:
        """Rebuild the encoder that `encoder_config()` describes, with random weights.

        Its weights are still to be loaded from a state dict.

        Args:
            config: of `encoder_config()`.
            shapes: of the weights that the transformer will be given, compared before memory is
                taken for any.

        Raises:
            InputError: the dict does not describe an encoder known to the installed transformers,
                or one of other shapes.
        """
        where, mend = "encoder configuration", "pass encoder_config()"
        options = dict(config)
        name = options.pop("autocast", None)
        if name is not None and name not in AUTOCAST:
            expected = f"autocast null or one of {sorted(AUTOCAST)}"
            raise InputError(where, expected, repr(name), "correct it")
        model = hf.from_description(options.pop("model", None), shapes)
        try:
            return cls(model, autocast=AUTOCAST.get(name), **options)
        except TypeError as error:
            raise InputError(where, "the options of Encoder", str(error), mend) from error

    @classmethod
    def tiny(
        cls, vocab_size: int, width: int = 32, layers: int = 2, seed: int = 0, **options: Any
    ) -> Encoder:
        """Build a random BERT of 4 heads for tests; nothing is downloaded.

        The same `seed` gives the same weights.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(hf.tiny_bert(vocab_size, width, layers), **options)

    def load_weights(self, path: str | PathLike[str], prefix: str = "") -> None:
        """Load the transformer's weights from a file of another project, strictly.

        Keys that begin with `prefix` lose it and must match the transformer one to one; other keys
        belong to other modules and are left alone. `position_ids` of old transformers versions and
        a pooling layer, neither of which the encoder has, are dropped. An encoder of NGAME (Dahiya
        et al., WSDM 2023) has the prefix "embedding_labels.encoder.transformer.0.auto_model.".

        Args:
            path: a safetensors file, or a torch file of plain tensors (read with
                weights_only=True).
            prefix: what the keys begin with before the transformer's own names.

        Raises:
            InputError: unreadable file, no key with the prefix, missing or unexpected keys, other
                shapes. The encoder is then unchanged.
        """
        hf.load_weights(self.model, path, prefix)

    def freeze(self, layers: int, *, where: str = "freeze") -> None:
        """Keep the embeddings and the first layers of the transformer as they are.

        Args:
            layers: how many; fewer than there are.
            where: what asked for it, for the message.

        Raises:
            InputError: it has no more layers than that, or not one stack of them.
        """
        hf.freeze(self.model, layers, where)

    def shard(self, device: torch.device) -> None:
        """Leave this process its own rows of every parameter; see `dist.shard_module`.

        The transformer's layers are gathered one at a time. Several processes call it together,
        before there is an optimizer, and pass the encoder together from then on.

        Args:
            device: that the encoder is on.
        """
        # Not the transformer itself: transformers looks models up by their class, which this
        # changes.
        dist.shard_module(self, hf.layer_stack(self.model), device, ("layer_vectors",))

    def shard_traffic(self, processes: int, passes: int) -> dict[str, int]:
        """Return the bytes that a process receives in a step of a sharded encoder.

        Every pass forward gathers all parts: (G - 1) ceil(n / G) rows of each parameter of n rows.
        A pass back gathers those again that have something to train, and what is no layer, and
        scatters as many gradients. Layers behind the last that is read are not among them.

        Args:
            processes: G.
            passes: of the encoder in a step; of several each is passed forward twice (gradient
                caching).
        """
        parts = self.parts()
        trained = any(p.requires_grad for p in self.parameters())
        forward, back = passes * (2 if passes > 1 else 1), passes * trained
        gathered = scattered = 0
        for part in parts:
            moved = _received(part, processes)
            learnt = _received([p for p in part if p.requires_grad], processes)
            again = back if learnt or part is parts[-1] else 0
            gathered, scattered = gathered + moved * (forward + again), scattered + learnt * back
        return {"gathered": gathered, "scattered": scattered}

    def parts(self) -> list[list[nn.Parameter]]:
        """List the parameters of what a sharded encoder gathers together.

        They are those of each layer, and last of all that is no layer.
        """
        layers = [list(layer.parameters()) for layer in hf.layer_stack(self.model)]
        inside = {id(p) for layer in layers for p in layer}
        return [*layers, [p for p in self.parameters() if id(p) not in inside]]

    def encoder_config(self) -> dict[str, Any]:
        """Describe architecture and options for `from_config`, JSON-ready: no weights, no paths."""
        names = {dtype: name for name, dtype in AUTOCAST.items()}
        described = {
            "model": hf.describe(self.model),
            "pooling": self.pooling,
            "bottleneck": 0 if self.bottleneck is None else self.width,
            "dropout": self.dropout.p,
            "autocast": None if self.autocast is None else names[self.autocast],
            "compile": self.compiled,
        }
        # Left out where it is the first, as it was for all before: older checkpoints and today's
        # are alike.
        if self.class_token != "first":
            described["class_token"] = self.class_token
        return described

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode documents: fp32 [B, D], contiguous.

        Args:
            input_ids: int64 [B, T].
            attention_mask: int64 [B, T], 1 for a real token, 0 for padding.

        Raises:
            InputError: T is beyond the model's positions.
        """
        device = input_ids.device.type
        hidden = self._transform(input_ids, attention_mask).last_hidden_state
        with torch.autocast(device, enabled=False):
            pooled = self._pool(hidden.float(), attention_mask)
            if self.bottleneck is not None:
                pooled = self.bottleneck(pooled)
            embedding: Tensor = self.dropout(pooled)
        return embedding.contiguous()

    def check_recipe(self, recipe: Recipe) -> None:
        """Raise InputError unless `layer_vectors` can serve this recipe of a cascade."""
        if self.bottleneck is not None:
            expected = "no bottleneck (every level reads a layer itself)"
            mend = "build the encoder without one"
            raise InputError("encoder of a cascade", expected, "one", mend)
        checked_layers(recipe, len(recipe), self.layers)

    def layer_vectors(
        self, recipe: Recipe, input_ids: Tensor, attention_mask: Tensor
    ) -> list[Tensor]:
        """Pool the hidden states of chosen layers: one vector per level of a cascade.

        They are pooled as `forward` pools, without bottleneck and dropout.

        Source: CascadeXML (NeurIPS 2022), section 3, whose pooling is "cls".

        Args:
            recipe: for each level one or two layer numbers: 0 the embeddings' output, `layers` the
                last.
            input_ids, attention_mask: as `forward` takes them.

        Returns:
            fp32 [B, H] per level, or [B, 2H] where it has two layers.

        Raises:
            InputError: T is beyond the model's positions, or a layer beyond its depth.
        """
        checked_layers(recipe, len(recipe), self.layers)
        states = self._transform(input_ids, attention_mask, output_hidden_states=True).hidden_states
        with torch.autocast(input_ids.device.type, enabled=False):
            pooled = {
                j: self._pool(states[j].float(), attention_mask)
                for j in sorted({j for level in recipe for j in level})
            }
            return [
                torch.cat([pooled[j] for j in level], 1) if len(level) > 1 else pooled[level[0]]
                for level in recipe
            ]

    @property
    def layers(self) -> int:
        """Layers of the transformer."""
        return hf.num_layers(self.model)

    def _transform(self, input_ids: Tensor, attention_mask: Tensor, **options: bool) -> Any:
        if self.max_length is not None and input_ids.shape[1] > self.max_length:
            expected = f"at most {self.max_length} tokens, the positions of this encoder"
            mend = "prepare the data with a smaller maximum length"
            raise InputError("input_ids", expected, f"{input_ids.shape[1]}", mend)
        device, half = input_ids.device.type, self.autocast
        with torch.autocast(device, dtype=half, enabled=half is not None):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **options)

    def _pool(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        if self.pooling == "cls":
            if self.class_token == "first":
                place = attention_mask.argmax(dim=1)  # of equal values argmax names the first
            else:
                place = attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(dim=1)
            return hidden[torch.arange(hidden.shape[0], device=hidden.device), place]
        mask = attention_mask.unsqueeze(-1).float()
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)


def _received(parameters: list[nn.Parameter], processes: int) -> int:
    """Bytes of the rows of G - 1 other processes, each with as many as the first."""
    return (processes - 1) * sum(part_bytes(p, processes) for p in parameters)


def _check_options(
    pooling: str, class_token: str, bottleneck: int, dropout: float, autocast: torch.dtype | None
) -> None:
    if pooling not in POOLING:
        raise InputError("pooling", "'mean' or 'cls'", repr(pooling), "choose one of the two")
    if class_token not in CLASS_TOKEN:
        mend = "take the tokenizer's `class_position`"
        raise InputError("class_token", "'first' or 'last'", repr(class_token), mend)
    if bottleneck < 0:
        raise InputError("bottleneck", "a width ≥ 0 (0 = none)", str(bottleneck), "correct it")
    if not 0.0 <= dropout < 1.0:
        raise InputError("dropout", "a probability in [0, 1)", str(dropout), "correct it")
    if autocast is not None and autocast not in AUTOCAST.values():
        expected = "torch.bfloat16, torch.float16 or None"
        raise InputError("autocast", expected, str(autocast), "choose one of them")
