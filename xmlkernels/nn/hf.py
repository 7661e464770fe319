"""What lies inside transformers: models from a folder, a hub name or a description; their shape.

This is the one file that knows the insides of transformers; it is imported when it is used.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xmlkernels.errors import InputError
from xmlkernels.foreign import refuse_model, refuse_settings
from xmlkernels.installed import MINILM, minilm_folder, need_transformers, not_fetched
from xmlkernels.nn.dropout import Dropout, training_attention
from xmlkernels.threads import torch_threads

_ATTENTION = "xmlkernels"  # the name under which transformers finds `training_attention`
_OWN = "use the checkpoint's own configuration"
_SUITABLE = "choose a text encoder, as BERT, RoBERTa, DistilBERT or MiniLM"


def load_pretrained(name_or_path: str | PathLike[str]) -> nn.Module:
    """Load the model of `Encoder.from_pretrained`, in fp32."""
    need_transformers(f"encoder {name_or_path}")
    from transformers import AutoConfig, AutoModel

    if name_or_path == MINILM:
        name_or_path = minilm_folder("encoder")
    where, folder = f"encoder {str(name_or_path)!r}", Path(name_or_path)
    if folder.is_dir():
        refuse_model(folder)
    model: nn.Module
    with _quiet(), _one_sentence(where, str(name_or_path)):
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        # A folder has been looked at; the settings of a hub name are looked at here.
        refuse_settings(config.to_dict(), where)
        model, report = AutoModel.from_pretrained(
            name_or_path,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
            **_loading_options(config, where),
        )
    missing = sorted(k for k in report["missing_keys"] if not k.startswith("pooler."))
    if missing:
        # transformers would train on from random numbers after a log line.
        expected, got = "a weight for every parameter", f"none for {_few(missing)}"
        raise InputError(where, expected, got, "use a complete checkpoint")
    return model


def from_description(description: Any, shapes: Mapping[str, torch.Size] | None) -> nn.Module:
    """Build the model that `describe` described, with random weights, in fp32.

    Args:
        description: a dict with a `model_type`.
        shapes: of the weights that it will be given, compared before memory is taken for any.

    Raises:
        InputError: it describes no model known to the installed transformers, or other shapes.
    """
    where = "encoder configuration"
    need_transformers(where)
    from transformers import AutoConfig, AutoModel

    try:
        settings = dict(description)
        # A repository's own code never runs: the class of transformers was trained, and is built.
        settings.pop("auto_map", None)
        kind = settings.pop("model_type")
    except (KeyError, TypeError) as error:
        expected = "a `model` with a `model_type`"
        raise InputError(where, expected, f"{error}", "pass encoder_config()") from error
    with _quiet(), _one_sentence(where):
        config = type(AutoConfig.for_model(kind)).from_dict(settings)
        options = {"dtype": torch.float32, "trust_remote_code": False}
        options |= _loading_options(config, where)
        if shapes is not None:
            _check_depth(config, shapes)
            with torch.device("meta"):
                _check_shapes(AutoModel.from_config(config, **options), shapes)
        model: nn.Module = AutoModel.from_config(config, **options)
    return model


def describe_pretrained(name_or_path: str | PathLike[str]) -> dict[str, Any]:
    """Describe the model of a hub name or a folder from its `config.json`; no weights are read.

    Raises:
        InputError: none there that transformers knows.
    """
    where = f"encoder {str(name_or_path)!r}"
    need_transformers(where)
    from transformers import AutoConfig

    with _quiet(), _one_sentence(where):
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        refuse_settings(config.to_dict(), where)
    return dict(config.to_dict())


def describe(model: nn.Module) -> dict[str, Any]:
    """Describe a model's architecture for `from_description`: no weights and no paths."""
    described = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]
    # A path of this machine; and weights are fp32, whatever the file held.
    for key in ("_name_or_path", "dtype"):
        described.pop(key, None)
    return dict(described)


def tiny_bert(vocab_size: int, width: int, layers: int) -> nn.Module:
    """Build a random BERT of 4 heads from torch's generator; nothing is downloaded."""
    need_transformers("tiny encoder")
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
    )
    with _quiet(), _one_sentence("tiny encoder"):
        options = {"add_pooling_layer": False, "attn_implementation": "sdpa"}
        model: nn.Module = BertModel._from_config(config, **options)
    return model


@torch.no_grad()
def hidden_width(model: nn.Module) -> int:
    """Measure the width of the last hidden state with two tokens.

    Of a model on the meta device it is what its configuration says.

    Raises:
        InputError: the model cannot serve as a text encoder.
    """
    config: Any = model.config
    where = f"model {config.model_type!r}"
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(where, "an encoder", "an encoder-decoder", _SUITABLE)
    missing = {"input_ids", "attention_mask"} - set(inspect.signature(model.forward).parameters)
    if missing:
        expected = "a text model that takes input_ids and attention_mask"
        raise InputError(where, expected, f"no {sorted(missing)}", _SUITABLE)
    training = model.training
    device = next(model.parameters()).device
    if device.type == "meta":  # there is nothing to measure
        return int(config.hidden_size)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    # A process that has only built a model may still fork: no OpenMP pool for two tokens.
    with torch_threads(1):
        output = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    model.train(training)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None or hidden.shape[:2] != ids.shape:
        expected = "an output `last_hidden_state` of shape [B, T, H]"
        raise InputError(where, expected, f"{type(output).__name__}", _SUITABLE)
    return int(hidden.shape[2])


def num_layers(model: nn.Module) -> int:
    """Layers of the transformer."""
    return int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]


def most_tokens(model: nn.Module) -> int | None:
    """Tokens that learned absolute positions allow; None without such positions.

    RoBERTa's positions start after its padding index.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - unused
    return None


def freeze(model: nn.Module, layers: int, where: str) -> None:
    """Keep the embeddings and the first layers as they are: they require no gradient any more.

    Raises:
        InputError: the model has no more layers than that, or not one stack of them.
    """
    depth = num_layers(model)
    if layers >= depth:
        expected = f"fewer than {depth}, the layers of this encoder"
        mend = "leave one layer to train, or train a bag of words"
        raise InputError(where, expected, str(layers), mend)
    stack = layer_stack(model)
    embeddings = [m for name, m in model.named_children() if "embed" in name]
    if not stack or not embeddings:
        expected = "an encoder of embeddings and one stack of layers"
        raise InputError(where, expected, "another build", "leave it out")
    for module in (*embeddings, *stack[:layers]):
        module.requires_grad_(False)


def layer_stack(model: nn.Module) -> list[nn.Module]:
    """List the layers of a model in their order; none where it is not one stack of them."""
    depth = num_layers(model)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return list(stacks[0]) if len(stacks) == 1 else []


def use_training_path(model: nn.Module) -> None:
    """Exchange torch's Dropout and, where transformers allows it, SDPA for ours, in place."""
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
        AttentionMaskInterface.register(_ATTENTION, _mask_of(sdpa_mask))
        inner.set_attn_implementation(_ATTENTION)


def _mask_of(stock: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """Make the mask of `training_attention`: transformers', which looks into it on the CPU alone.

    Where no token is padding, transformers leaves the mask out. Elsewhere the host would wait for
    the device to learn that, in every step, and a captured step cannot.
    """

    def mask(*sizes: Any, allow_is_bidirectional_skip: bool = False, **options: Any) -> Any:
        if not _may_look(options.get("attention_mask")):
            allow_is_bidirectional_skip = False
        return stock(*sizes, allow_is_bidirectional_skip=allow_is_bidirectional_skip, **options)

    return mask


def _may_look(mask: Tensor | None) -> bool:
    return mask is None or mask.device.type == "cpu"


def load_weights(model: nn.Module, path: str | PathLike[str], prefix: str) -> None:
    """Load weights from a file, strictly; see `Encoder.load_weights`."""
    where = str(path)
    state = _read_state(Path(path))
    named = {k.removeprefix(prefix): value for k, value in state.items() if k.startswith(prefix)}
    if not named:
        expected = f"keys that begin with {prefix!r}"
        raise InputError(where, expected, _few(list(state)), "pass the file's own prefix")
    own = model.state_dict()
    # Buffers of old transformers versions, and a pooling layer, which the encoder does not have.
    for key in [k for k in named if k not in own]:
        if key.endswith("position_ids") or key.startswith("pooler."):
            del named[key]
    mend = "use a file of the same architecture as the encoder"
    if missing := [k for k in own if k not in named]:
        expected = f"{len(own)} weights of the encoder"
        raise InputError(where, expected, f"none for {_few(missing)}", mend)
    if unexpected := [k for k in named if k not in own]:
        raise InputError(where, "only weights of the encoder", f"also {_few(unexpected)}", mend)
    if wrong := [k for k in own if named[k].shape != own[k].shape]:
        key = wrong[0]
        got = f"{tuple(named[key].shape)} ({len(wrong)} such: {_few(wrong)})"
        raise InputError(where, f"shape {tuple(own[key].shape)} for {key}", got, mend)
    model.load_state_dict(named, strict=True)


def _read_state(path: Path) -> dict[str, Tensor]:
    where = str(path)
    if not path.is_file():
        raise InputError(where, "a file of weights", "no such file", "correct the path")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has exceptions of its own for a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        expected = "safetensors or a torch file of plain tensors"
        raise InputError(where, expected, reason, "fetch it again") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        mend = "save model.state_dict() alone"
        raise InputError(where, "a flat dict of tensors", type(state).__name__, mend)
    return state


def _loading_options(config: Any, where: str) -> dict[str, Any]:
    from transformers import MODEL_MAPPING

    if getattr(config, "is_encoder_decoder", False):
        got = f"the encoder-decoder {config.model_type!r}"
        mend = "choose an encoder alone, as BERT, RoBERTa, DistilBERT or MiniLM"
        raise InputError(where, "an encoder", got, mend)
    found = MODEL_MAPPING[type(config)]
    classes: tuple[Any, ...] = found if isinstance(found, tuple) else (found,)
    attention = "sdpa" if all(c._supports_sdpa for c in classes) else "eager"
    options: dict[str, Any] = {"attn_implementation": attention}
    if all("add_pooling_layer" in inspect.signature(c).parameters for c in classes):
        options["add_pooling_layer"] = False
    return options


def _check_depth(config: Any, shapes: Mapping[str, torch.Size]) -> None:
    """Refuse more layers than there are weights: building so many would never end."""
    layers = getattr(config, "num_hidden_layers", 0)
    if not isinstance(layers, int) or not 0 <= layers <= len(shapes):
        got = f"num_hidden_layers {layers!r} beside {len(shapes)} weights"
        raise InputError("encoder configuration", "the layers of the checkpoint", got, _OWN)


def _check_shapes(model: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    """Refuse a model whose weights are not those that it will be given."""
    own = {name: value.shape for name, value in model.state_dict().items()}
    for name in sorted(own.keys() | shapes.keys()):
        if own.get(name) != shapes.get(name):
            here, there = (str(list(f[name])) if name in f else "none" for f in (own, shapes))
            where = f"checkpoint: encoder weight {name}"
            raise InputError(where, f"shape {here}", there, _OWN)


@contextlib.contextmanager
def _one_sentence(where: str, name: str = "") -> Iterator[None]:
    """Turn whatever transformers raises into an InputError; `name` is what it was to load."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # damaged settings end in whatever transformers happens to raise
        if told := not_fetched(error, where, name):
            raise told from error
        lines = (line.strip() for line in str(error).splitlines())
        reason = next((line for line in lines if line), type(error).__name__)
        mend = "check the name or path; a hub name needs network or a filled cache"
        if "custom code" in reason:
            mend = "choose a model that transformers knows: no other code runs"
        raise InputError(where, "a model that transformers can load", reason, mend) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and load reports; what matters is raised here."""
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


def _few(names: list[str]) -> str:
    """Name the first three and how many more there are, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
