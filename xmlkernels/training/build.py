"""From a configuration to a model."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from xmlkernels import InputError, dist
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.inputs import BowInputs, Inputs
from xmlkernels.data.tokens import load_tokenizer
from xmlkernels.evaluation import evaluation_batches
from xmlkernels.installed import source_of
from xmlkernels.models.base import Model
from xmlkernels.models.cascade import Cascade
from xmlkernels.models.end_to_end import EndToEnd
from xmlkernels.models.running_mean import MeanSettings
from xmlkernels.models.saved import model_config
from xmlkernels.models.training import CascadeTraining, Training
from xmlkernels.nn.bow import BowEncoder
from xmlkernels.nn.cascade_heads import CascadeHeads
from xmlkernels.nn.encoder import Encoder
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.layer_recipe import default_layers
from xmlkernels.nn.table import RowOptimizer, Table
from xmlkernels.planner import plan, planned, table_parts
from xmlkernels.precision import default_autocast
from xmlkernels.training.config import (
    Config,
    layers_of,
    resolved_epsilon,
    resolved_label_device,
    resolved_optimizer,
    resolved_table,
)
from xmlkernels.training.memory_plan import announce, documents_of
from xmlkernels.tree.label_tree import LabelTree

log = logging.getLogger(__name__)

# CascadeXML's for three and four levels (README of its repository); for two and five, those levels
# of them that remain.
_DROPS = {
    2: (0.3, 0.4),
    3: (0.3, 0.3, 0.4),
    4: (0.2, 0.25, 0.4, 0.5),
    5: (0.2, 0.25, 0.3, 0.4, 0.5),
}
_FIRST_TOPK = 128
_APART = 1 << 40  # between the seeds of processes: more than a run has steps


def build_model(
    config: Config,
    dataset: Dataset,
    inputs: Inputs,
    steps: int,
    device: torch.device,
    *,
    tree: LabelTree | None,
    epoch: int,
) -> Model:
    """Encoder, tables and their training; says what they will take of the memory before the tables
    are made.

    Args:
        inputs: how its documents are read.
        steps: updates of the whole run.
        tree: of a cascade; None end to end.
        epoch: updates of one epoch.

    Raises:
        InputError: the data or the tree do not fit the encoder, or it cannot be loaded.
    """
    torch.manual_seed(config.seed)
    if isinstance(inputs, BowInputs):
        encoder: nn.Module = BowEncoder(
            inputs.vocabulary,
            config.bow_width,
            dropout=config.dropout,
            word_dropout=config.word_dropout,
            activation=config.bow_activation,
            optimizer=RowOptimizer(
                "adam",
                epsilon=config.encoder_epsilon or 1e-8,
                row_wise=True,
                decay=config.encoder_decay,
                decoupled=True,
            ),
            std=config.word_std,
            seed=config.seed,
        )
    else:
        encoder = build_encoder(config, dataset, device)
    if tree is None:
        model: Model = _end_to_end(config, dataset, encoder, steps, epoch, device).to(device)
    else:
        model = _cascade(config, dataset, encoder, tree, steps, epoch, device).to(device)
    draw_apart(config, 0)
    return model


def draw_apart(config: Config, step: int) -> None:
    """Lets every process but the first drop units of its own from here on; the first draws on as
    one alone would.

    Args:
        step: of the run: draws of a run that goes on do not begin again.
    """
    if dist.rank() > 0:
        torch.manual_seed((config.seed + _APART * dist.rank() + step) % 2**63)


def _end_to_end(
    config: Config,
    dataset: Dataset,
    encoder: nn.Module,
    steps: int,
    epoch: int,
    device: torch.device,
) -> EndToEnd:
    make = partial(
        FullHead,
        dataset.num_labels,
        int(encoder.width),  # type: ignore[arg-type]
        dtype=resolved_table(config, device),
        bias=config.bias,
        optimizer=RowOptimizer(
            resolved_optimizer(config),
            momentum=config.momentum,
            epsilon=config.table_epsilon,
            state_dtype=config.state,
            decay=config.table_decay,
            decoupled=config.decoupled,
            kahan=config.kahan,
        ),
        skip_units=config.skip_tiles,
        seed=config.seed,
    )
    parts = plan(
        encoder,
        {"label table": planned(make)},
        documents=documents_of(config, dataset, _pass(config)),
        tokens=longest_row(config, dataset),
        mean=config.ema > 0,
        table_means=config.ema_tables,
    )
    announce(config, parts, device)
    head = make()
    training = Training(
        config.encoder_lr,
        config.table_lr,
        config.encoder_decay,
        warmup_steps(config, epoch),
        steps,
        config.clip,
        _micro_batch(config),
        _mean(config, epoch, steps),
        resolved_epsilon(config),
    )
    return EndToEnd(encoder, head, training)


def _cascade(
    config: Config,
    dataset: Dataset,
    encoder: nn.Module,
    tree: LabelTree,
    steps: int,
    epoch: int,
    device: torch.device,
) -> Cascade:
    most = tuple(tree.widest(r) for r in range(tree.levels - 1))
    topk = config.topk or default_topk(tree)
    layers = layers_of(config) or _layers(encoder, tree.levels)
    width = int(getattr(encoder, "hidden", None) or encoder.width)  # type: ignore
    candidates = (
        tree.sizes[0],
        *(min(k, n) * m for k, n, m in zip(topk, tree.sizes, most, strict=False)),
    )
    make = partial(
        CascadeHeads,
        tree.sizes,
        most,
        width,
        layers=layers,
        topk=topk,
        scheme="weighted" if config.scheme == "auto" else config.scheme,
        dtype=resolved_table(config, device),
        optimizer=RowOptimizer(
            resolved_optimizer(config),
            momentum=config.momentum,
            epsilon=config.table_epsilon,
            state_dtype=config.state,
            row_wise=True,
        ),
        drops=config.embed_drops or _DROPS[tree.levels],
        seed=config.seed,
    )
    _tell(config, dataset, encoder, planned(make).tables(), candidates, device)
    warmup = warmup_steps(config, epoch)
    if (
        warmup > steps and config.schedule == "three_phase"
    ):  # a cosine may end within its warm-up, and says so
        flag = "--warmup-epochs" if config.warmup_epochs else "--warmup"
        raise InputError(
            flag,
            f"at most {steps:,} updates, all of this run",
            f"{warmup:,}",
            "shorten it or train for longer",
        )
    heads = make(label_device=resolved_label_device(config))
    training = CascadeTraining(
        encoder_lr=config.encoder_lr,
        total=steps,
        warmup=warmup,
        head_lr=config.encoder_lr * config.head_lr_factor,
        decay=config.encoder_decay,
        schedule=config.schedule,
        cooldown=round(config.cooldown_epochs * epoch),
        rw_loss=config.rw_loss,
        positives_bound=config.positives_bound,
        micro_batch=_micro_batch(config),
        clip=config.clip,
        mean=_mean(config, epoch, steps),
        reference_loss=config.reference_loss,
        encoder_epsilon=resolved_epsilon(config),
    )
    return Cascade(encoder, heads, tree, training)


def _tell(
    config: Config,
    dataset: Dataset,
    encoder: nn.Module,
    tables: Mapping[str, Table],
    candidates: tuple[int, ...],
    device: torch.device,
) -> None:
    """What each device will hold of a cascade whose tables these are, the labels' last."""
    apart, tokens = resolved_label_device(config), longest_row(config, dataset)
    update = documents_of(config, dataset, config.batch * config.accumulate)
    whole: dict[str, Any] = {
        "documents": documents_of(config, dataset, _pass(config)),
        "tokens": tokens,
        "update": update,
        "candidates": candidates,
        "mean": config.ema > 0,
        "table_means": config.ema_tables,
    }
    if apart is None:
        announce(config, plan(encoder, tables, **whole), device)
        return
    # The scores of the label level are on both: there they are made, here they are ranked.
    *clusters, last = tables
    here = {name: tables[name] for name in clusters}
    announce(config, plan(encoder, here, **whole), device, named=True)
    there = table_parts({last: tables[last]}, update, candidates[-1:], means=config.ema_tables)
    announce(config, there, apart, named=True)


def _mean(config: Config, epoch: int, steps: int) -> MeanSettings:
    settings = MeanSettings(
        config.ema, round(config.ema_start * epoch), config.ema_every, config.ema_tables
    )
    if settings.decay > 0 and settings.start + settings.every > steps:
        got = f"the first value after {settings.start + settings.every:,}"
        mend = "begin earlier (--ema-start), or take values more often (--ema-every)"
        raise InputError(
            "--ema", f"a mean that begins within the {steps:,} updates of this run", got, mend
        )
    return settings


def start_table(config: Config, dataset: Dataset, inputs: Inputs, model: Model) -> None:
    """Puts the label table where the configuration wants it at the start of a run: at frequencies,
    at centroids.
    """
    train = dataset.splits["train"]
    if config.frequency_bias:
        counts = np.bincount(train.labels.indices, minlength=dataset.num_labels)
        model.start_at_frequencies(torch.from_numpy(counts).to(model.device), train.labels.shape[0])
    if config.centroid_norm:
        batches = (
            pair[0] for pair in evaluation_batches(model, train, config.evaluate_batch, inputs)
        )
        vectors = ((model.embed(batch), batch.pos_row, batch.pos_sample) for batch in batches)
        model.start_at_centroids(vectors, config.centroid_norm)


def build_encoder(config: Config, dataset: Dataset, device: torch.device) -> nn.Module:
    """The encoder that the configuration names, with what it may not train frozen.

    Raises:
        InputError: it cannot be loaded, or the data do not fit it.
    """
    autocast = {
        "fp32": None,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "auto": default_autocast(device),
    }[config.precision]
    options: dict[str, Any] = {
        "pooling": config.pooling,
        "class_token": class_token(config, dataset),
        "bottleneck": config.bottleneck,
        "dropout": config.dropout,
        "autocast": autocast,
        "compile": config.compile,
    }
    if config.encoder == "tiny":
        encoder = Encoder.tiny(
            load_tokenizer(dataset.tokenizer_folder).vocab_size, seed=config.seed, **options
        )
    else:
        source = source_of(config.encoder)
        encoder = Encoder.from_pretrained(source, **options)
        if load_tokenizer(source).hash != dataset.tokenizer_hash:
            raise InputError(
                f"dataset {dataset.folder}",
                f"tokens made by the tokenizer of {config.encoder}",
                "tokens of another tokenizer",
                "prepare the data again with --tokenizer set to this encoder",
            )
    longest = longest_row(config, dataset)
    if encoder.max_length is not None and longest > encoder.max_length:
        raise InputError(
            f"dataset {dataset.folder}",
            f"rows of at most {encoder.max_length} tokens, the positions of {config.encoder}",
            f"one of {longest}",
            f"prepare the data again with --max-length {encoder.max_length}",
        )
    if config.init_state:
        encoder.load_weights(config.init_state, config.init_prefix)
    if config.freeze:
        encoder.freeze(config.freeze, where="--freeze")
    return encoder


def class_token(config: Config, dataset: Dataset) -> str:
    """Where the class token of a document stands: "first" or "last", by the dataset's tokenizer."""
    if config.pooling != "cls":
        return "first"
    position = load_tokenizer(dataset.tokenizer_folder).class_position
    if position is None:
        log.info(
            "note: this tokenizer sets no class token; --pooling cls reads the first token of a "
            "document"
        )
    return position or "first"


def keep_class_token(model: Model, state: Mapping[str, Any]) -> None:
    """Reads the class token where a checkpoint's run did: one that began before tokenizers were
    asked read the first token.
    """
    if isinstance(model.encoder, Encoder):
        model.encoder.class_token = model_config(state)["encoder"].get("class_token", "first")


def longest_row(config: Config, dataset: Dataset) -> int:
    """Tokens of the longest document that this run will read; 0 for a bag of words."""
    if config.encoder == "bow":
        return 0
    longest = max(int(split.tokens.lengths.max(initial=0)) for split in dataset.splits.values())
    if config.label_text and dataset.label_tokens is not None:
        longest = max(longest, int(dataset.label_tokens.lengths.max(initial=0)))
    return longest


def default_topk(tree: LabelTree) -> tuple[int, ...]:
    """128 clusters of the coarsest level and twice as many of each next one, but never more than a
    document can have.
    """
    out: list[int] = []
    for r in range(tree.levels - 1):
        there = tree.sizes[r] if r == 0 else min(tree.sizes[r], out[-1] * tree.widest(r - 1))
        out.append(min(_FIRST_TOPK * 2**r, there))
    return tuple(out)


def warmup_steps(config: Config, epoch: int) -> int:
    """Updates of the warm-up, whichever way it was given."""
    return round(config.warmup_epochs * epoch) if config.warmup_epochs else config.warmup


def _layers(encoder: nn.Module, levels: int) -> tuple[tuple[int, ...], ...]:
    count = getattr(encoder, "layers", None)
    return default_layers(int(count), levels) if count is not None else ((0,),) * levels


def _micro_batch(config: Config) -> int:
    return config.batch if config.accumulate > 1 else config.micro_batch


def _pass(config: Config) -> int:
    """Documents of an encoder pass of the first process, which has the largest part of a batch."""
    own = dist.parts(config.batch * config.accumulate)[0].stop
    return (
        _micro_batch(config) or config.batch
        if dist.size() == 1
        else min(_micro_batch(config) or own, own)
    )
