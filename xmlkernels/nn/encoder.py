"""A text encoder: any Hugging Face transformer, pooled to one fp32 vector per document.

Source: Renee (Jain et al., MLSys 2023, §3): encoder, masked mean of the last hidden state, optional
bottleneck without bias, dropout last. This is the only module that loads transformers models.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xmlkernels.errors import InputError
from xmlkernels.foreign import refuse_model, refuse_settings
from xmlkernels.installed import MINILM, minilm_folder, need_transformers
from xmlkernels.nn.dropout import Dropout, training_attention
from xmlkernels.nn.hf import (
    AUTOCAST,
    check_depth,
    check_options,
    check_shapes,
    checked_width,
    longest,
    told_of,
)
from xmlkernels.nn.layer_recipe import Recipe, checked_layers
from xmlkernels.nn.ngame import few, load_ngame

__all__ = ["Encoder", "load_ngame"]

_ATTENTION = "xmlkernels"  # the name under which transformers finds `training_attention`


class Encoder(nn.Module):
    """Tokens → one fp32 vector per document.

    Args:
        model: a transformers encoder whose output has `last_hidden_state` [B, T, H].
        pooling: "mean" = mean over real tokens, in fp32; "cls" = the class token of each row, which
            is its first or its last real one (`class_token`). With left padding the first is the
            one after the padding; models with absolute positions counted from the left edge (BERT,
            DistilBERT) still see shifted positions there, so pad those on the right.
        class_token: "first", as BERT has it, or "last", as XLNet; see `Tokenizer.class_position`.
        bottleneck: width of a bias-free fp32 linear layer after pooling, drawn from U(−1/√H, 1/√H);
            0 = none.
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
        check_options(pooling, class_token, bottleneck, dropout, autocast)
        self.hidden = checked_width(model)
        self.model = model
        self.pooling, self.class_token, self.autocast, self.compiled = (
            pooling,
            class_token,
            autocast,
            compile,
        )
        self.width = bottleneck or self.hidden
        self.max_length = longest(model)
        self.bottleneck: nn.Linear | None = None
        if bottleneck:
            self.bottleneck = nn.Linear(self.hidden, bottleneck, bias=False)
            nn.init.uniform_(self.bottleneck.weight, -(self.hidden**-0.5), self.hidden**-0.5)
        self.dropout = nn.Dropout(dropout)
        if compile:
            model.compile(
                dynamic=True
            )  # in place: a wrapped module would put `_orig_mod.` into every key
        else:
            _use_training_path(model)

    @classmethod
    def from_pretrained(cls, name_or_path: str | PathLike[str], **options: Any) -> Encoder:
        """Load a hub name or a local folder; weights become fp32. `options` as for `Encoder`.

        Weights are read from safetensors alone, and code that a folder or repository brings along
        never runs.

        Args:
            name_or_path: "minilm" is the installed all-MiniLM-L6-v2.

        Raises:
            InputError: nothing loadable there, an encoder-decoder, weights that the file does not
                hold, a model of pickles or of code of its own, or transformers is not installed.
        """
        need_transformers(f"encoder {name_or_path}")
        from transformers import AutoConfig, AutoModel

        if name_or_path == MINILM:
            name_or_path = minilm_folder("encoder")
        where, folder = f"encoder {str(name_or_path)!r}", Path(name_or_path)
        if folder.is_dir():
            refuse_model(folder)
        with _quiet(), told_of(where):
            config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
            refuse_settings(config.to_dict(), where)  # of a hub name; a folder has been looked at
            extra = _loading_options(config, where)
            model, report = AutoModel.from_pretrained(
                name_or_path,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
                use_safetensors=True,
                **extra,
            )
        missing = sorted(k for k in report["missing_keys"] if not k.startswith("pooler."))
        if missing:
            # transformers would train on from random numbers after a log line.
            raise InputError(
                where,
                "a weight for every parameter",
                f"none for {few(missing)}",
                "use a complete checkpoint",
            )
        return cls(model, **options)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], shapes: Mapping[str, torch.Size] | None = None
    ) -> Encoder:
        """Rebuild the encoder that `encoder_config()` describes, with random weights: load a state
        dict into it.

        Args:
            shapes: of the weights that the transformer will be given: compared before memory is
                taken for any.

        Raises:
            InputError: the dict does not describe an encoder known to the installed transformers,
                or one of other shapes.
        """
        where = "encoder configuration"
        need_transformers(where)
        from transformers import AutoConfig, AutoModel

        options = dict(config)
        try:
            inner = dict(options.pop("model"))
            inner.pop(
                "auto_map", None
            )  # a repository's own code, beside the class that was trained and is built here
            kind = inner.pop("model_type")
        except (KeyError, TypeError) as error:
            raise InputError(
                where, "a `model` with a `model_type`", f"{error}", "pass encoder_config()"
            ) from error
        name = options.pop("autocast", None)
        if name is not None and name not in AUTOCAST:
            raise InputError(
                where, f"autocast null or one of {sorted(AUTOCAST)}", repr(name), "correct it"
            )
        with _quiet(), told_of(where):
            hf_config = type(AutoConfig.for_model(kind)).from_dict(inner)
            how = {
                "dtype": torch.float32,
                "trust_remote_code": False,
                **_loading_options(hf_config, where),
            }
            if shapes is not None:
                check_depth(hf_config, shapes)
                with torch.device("meta"):
                    check_shapes(AutoModel.from_config(hf_config, **how), shapes)
            model = AutoModel.from_config(hf_config, **how)
        try:
            return cls(model, autocast=AUTOCAST.get(name), **options)
        except TypeError as error:
            raise InputError(
                where, "the options of Encoder", str(error), "pass encoder_config()"
            ) from error

    @classmethod
    def tiny(
        cls, vocab_size: int, width: int = 32, layers: int = 2, seed: int = 0, **options: Any
    ) -> Encoder:
        """A random BERT of 4 heads for tests; the same `seed` gives the same weights. Nothing is
        downloaded.
        """
        need_transformers("tiny encoder")
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=4 * width,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with _quiet(), told_of("tiny encoder"):
                model = BertModel._from_config(
                    config, add_pooling_layer=False, attn_implementation="sdpa"
                )
            return cls(model, **options)

    def encoder_config(self) -> dict[str, Any]:
        """JSON-ready description for `from_config`: architecture and options, no weights and no
        paths.
        """
        model = json.loads(self.model.config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]
        for key in (
            "_name_or_path",
            "dtype",
        ):  # a path of this machine; weights are fp32 whatever the file held
            model.pop(key, None)
        names = {dtype: name for name, dtype in AUTOCAST.items()}
        described = {
            "model": model,
            "pooling": self.pooling,
            "bottleneck": 0 if self.bottleneck is None else self.width,
            "dropout": self.dropout.p,
            "autocast": None if self.autocast is None else names[self.autocast],
            "compile": self.compiled,
        }
        # Left out where it is the first, as it was for all before: older checkpoints and today's
        # are alike.
        return described | (
            {} if self.class_token == "first" else {"class_token": self.class_token}
        )

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """int64 [B, T] ids and a mask of 1 = real token, 0 = padding → fp32 [B, D], contiguous.

        Raises:
            InputError: T is beyond the model's positions.
        """
        device = input_ids.device.type
        hidden = self._transform(input_ids, attention_mask).last_hidden_state
        with torch.autocast(device, enabled=False):
            pooled = self._pool(hidden.float(), attention_mask)
            if self.bottleneck is not None:
                pooled = self.bottleneck(pooled)
            return self.dropout(pooled).contiguous()

    def layer_vectors(
        self, recipe: Recipe, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> list[torch.Tensor]:
        """One vector per level from the hidden states of chosen layers, pooled as this encoder
        pools, without more.

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
        return int(self.model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]

    def _transform(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: bool
    ) -> Any:
        if self.max_length is not None and input_ids.shape[1] > self.max_length:
            raise InputError(
                "input_ids",
                f"at most {self.max_length} tokens, the positions of this encoder",
                f"{input_ids.shape[1]}",
                "prepare the data with a smaller maximum length",
            )
        with torch.autocast(
            input_ids.device.type, dtype=self.autocast, enabled=self.autocast is not None
        ):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **options)

    def _pool(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        if self.pooling == "cls":
            if self.class_token == "first":
                place = attention_mask.argmax(dim=1)  # of equal values argmax names the first
            else:
                place = attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(dim=1)
            return hidden[torch.arange(hidden.shape[0], device=hidden.device), place]
        mask = attention_mask.unsqueeze(-1).float()
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)


def _loading_options(config: Any, where: str) -> dict[str, Any]:
    from transformers import MODEL_MAPPING

    if getattr(config, "is_encoder_decoder", False):
        mend = "choose an encoder alone, as BERT, RoBERTa, DistilBERT or MiniLM"
        raise InputError(where, "an encoder", f"the encoder-decoder {config.model_type!r}", mend)
    found = MODEL_MAPPING[type(config)]
    classes: tuple[Any, ...] = found if isinstance(found, tuple) else (found,)
    options: dict[str, Any] = {
        "attn_implementation": "sdpa" if all(c._supports_sdpa for c in classes) else "eager"
    }
    if all("add_pooling_layer" in inspect.signature(c).parameters for c in classes):
        options["add_pooling_layer"] = False
    return options


def _use_training_path(model: nn.Module) -> None:
    """Exchange modules of exactly torch's Dropout, and SDPA where transformers lets it be
    exchanged, in place.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p).train(child.training))
    inner: Any = model
    if inner.config._attn_implementation == "sdpa" and inner._can_set_attn_implementation():
        AttentionInterface.register(_ATTENTION, training_attention(sdpa_attention_forward))
        AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
        inner.set_attn_implementation(_ATTENTION)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and load reports; what matters of them is raised here as
    an InputError.
    """
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
