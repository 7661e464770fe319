"""Build the model of a run from its plan: encoder, label tables and their training."""

import logging
from collections.abc import Callable, Mapping
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
from xmlkernels.memory import check_memory
from xmlkernels.models.base import Model
from xmlkernels.models.cascade import Cascade
from xmlkernels.models.end_to_end import EndToEnd
from xmlkernels.models.saved import model_config
from xmlkernels.models.training import CascadeTraining, Training
from xmlkernels.nn.bow import BowEncoder
from xmlkernels.nn.cascade_heads import CascadeHeads
from xmlkernels.nn.cascade_level import CascadeLevel
from xmlkernels.nn.cluster_shard import tree_shards
from xmlkernels.nn.encoder import Encoder
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.layer_recipe import default_layers
from xmlkernels.nn.mixed import MixedHead, MixedLevel
from xmlkernels.nn.plain import PlainHead, PlainLevel
from xmlkernels.nn.shard import shard_rows
from xmlkernels.nn.stored_head import StoredHead
from xmlkernels.nn.stored_level import StoredLevel
from xmlkernels.nn.table import RowOptimizer
from xmlkernels.nn.table_store import TableStore, parse_store
from xmlkernels.planner import planned, told
from xmlkernels.training.config import Config
from xmlkernels.training.facts import TreeShape
from xmlkernels.training.forecast import (
    COPY,
    RunMemory,
    memory_of,
    process_so_far,
    processes_here,
    room_of_each,
)
from xmlkernels.training.plan import Plan
from xmlkernels.tree.label_tree import LabelTree

log = logging.getLogger(__name__)

_APART = 1 << 40  # between the seeds of processes: more than a run has steps


def build_model(plan: Plan, dataset: Dataset, inputs: Inputs, tree: LabelTree | None) -> Model:
    """Build encoder, tables and their training.

    The memory that they will take is logged before the tables are allocated.

    Args:
        plan: the settings of the run.
        dataset: what it reads.
        inputs: how its documents are read.
        tree: of a cascade; None end to end.

    Raises:
        InputError: the data or the tree do not fit the encoder, it cannot be loaded, or the run
            needs more memory than there is.
    """
    config = plan.config
    torch.manual_seed(config.seed)
    if isinstance(inputs, BowInputs):
        encoder: nn.Module = bag_of_words(plan, inputs.vocabulary)
    else:
        encoder = build_encoder(plan, dataset)
    model = BUILDERS[config.model](plan, encoder, dataset.num_labels, tree).to(plan.device)
    draw_apart(config, 0)
    return model


def bag_of_words(plan: Plan, vocabulary: int) -> BowEncoder:
    """Build the bag of words of a run; vocabulary: V."""
    config = plan.config
    return BowEncoder(
        vocabulary,
        config.bow_width,
        dropout=config.dropout,
        word_dropout=config.word_dropout,
        activation=config.bow_activation,
        optimizer=RowOptimizer(
            "adam",
            epsilon=plan.word_epsilon,
            row_wise=True,
            decay=config.encoder_decay,
            decoupled=True,
        ),
        std=config.word_std,
        seed=config.seed,
    )


def draw_apart(config: Config, step: int) -> None:
    """Give every process but the first dropout of its own; the first draws as one alone would.

    Args:
        config: whose seed is used.
        step: of the run, so that a resumed run does not repeat its draws.
    """
    if dist.rank() > 0:
        torch.manual_seed((config.seed + _APART * dist.rank() + step) % 2**63)


def _end_to_end(plan: Plan, encoder: nn.Module, labels: int, tree: LabelTree | None) -> Model:
    return EndToEnd(encoder, *_full_table(plan, encoder, labels, int(encoder.width)))  # type: ignore[arg-type]


def _full_table(
    plan: Plan, encoder: nn.Module, labels: int, width: int
) -> tuple[FullHead, Training]:
    """Build a table of all labels and its training; log first what they take of the memory."""
    config = plan.config
    make = full_table(plan, labels, width, processes=dist.size(), rank=dist.rank())
    tables = {"label table": planned(make)}
    here = process_so_far(encoder)
    free = room_of_each()
    memory = memory_of(plan, encoder, tables, here=here, processes=dist.size(), free=free)
    announce(plan, memory)
    training = Training(
        config.encoder_lr,
        config.table_lr,
        config.encoder_decay,
        plan.warmup,
        plan.steps,
        config.clip,
        plan.micro_batch,
        plan.mean,
        plan.encoder_epsilon,
    )
    return make(), training


def full_table(
    plan: Plan, labels: int, width: int, *, processes: int = 1, rank: int = 0
) -> Callable[..., FullHead]:
    """Return what makes a process's table of all labels, or its shard of it."""
    config, shard = plan.config, None
    if plan.sharded:
        shard = shard_rows(labels, processes, rank, aligned=config.skip_tiles > 0)
    return partial(
        _head(plan),
        labels,
        width,
        dtype=plan.table,
        bias=config.bias,
        optimizer=RowOptimizer(
            plan.optimizer,
            momentum=config.momentum,
            epsilon=config.table_epsilon,
            state_dtype=config.state,
            decay=config.table_decay,
            decoupled=config.decoupled,
            kahan=config.kahan,
        ),
        skip_units=config.skip_tiles,
        seed=config.seed,
        shard=shard,
    )


def _cascade(plan: Plan, encoder: nn.Module, labels: int, tree: LabelTree | None) -> Model:
    config, own = plan.config, plan.cascade
    assert tree is not None and own is not None, "the plan of a cascade has its tree"
    make = cascade_heads(plan, encoder, tree, processes=dist.size(), rank=dist.rank())
    tables = planned(make).tables()
    here = process_so_far(encoder)
    free = room_of_each()
    memory = memory_of(plan, encoder, tables, tree, here=here, processes=dist.size(), free=free)
    announce(plan, memory)
    heads = make(label_device=plan.label_device)
    training = CascadeTraining(
        encoder_lr=config.encoder_lr,
        total=plan.steps,
        warmup=plan.warmup,
        head_lr=config.encoder_lr * config.head_lr_factor,
        decay=config.encoder_decay,
        schedule=config.schedule,
        cooldown=own.cooldown,
        rw_loss=config.rw_loss,
        positives_bound=config.positives_bound,
        micro_batch=plan.micro_batch,
        clip=config.clip,
        mean=plan.mean,
        reference_loss=config.reference_loss,
        encoder_epsilon=plan.encoder_epsilon,
    )
    return Cascade(encoder, heads, tree, training)


def cascade_heads(
    plan: Plan, encoder: nn.Module, tree: TreeShape, *, processes: int = 1, rank: int = 0
) -> Callable[..., CascadeHeads]:
    """Return what makes a process's heads of the run's cascade: all rows, or its own."""
    config, own, shards, store = plan.config, plan.cascade, None, _store(plan)
    assert own is not None, "the plan of a cascade"
    if plan.sharded:
        bounds = [torch.tensor(tree.bounds(r), device="cpu") for r in range(tree.levels - 1)]
        shards = tree_shards(bounds, tree.sizes[0], processes)[rank]
    most = tuple(tree.widest(r) for r in range(tree.levels - 1))
    width = int(encoder.width)  # type: ignore[arg-type]
    return partial(
        CascadeHeads,
        tree.sizes,
        most,
        width,
        layers=own.layers or _layers(encoder, tree.levels),
        topk=own.topk,
        scheme=own.scheme,
        dtype=plan.table,
        optimizer=RowOptimizer(
            plan.optimizer,
            momentum=config.momentum,
            epsilon=config.table_epsilon,
            state_dtype=config.state,
            row_wise=True,
        ),
        drops=own.drops,
        seed=config.seed,
        shards=shards,
        level=_level(config),
        label_level=None if store is None else partial(StoredLevel, store=store, most=most[-1]),
    )


# By `Config.model`: from the plan, an encoder, L and the label tree (of a cascade) to a model.
BUILDERS: dict[str, Callable[[Plan, nn.Module, int, LabelTree | None], Model]] = {
    "end_to_end": _end_to_end,
    "cascade": _cascade,
}


def _head(plan: Plan) -> Callable[..., FullHead]:
    config = plan.config
    if config.impl == "reference":
        return PlainHead
    if (store := _store(plan)) is not None:
        return partial(StoredHead, store=store)
    mixed = config.table_compute != "auto"
    return partial(MixedHead, compute=config.table_compute) if mixed else FullHead


def _store(plan: Plan) -> TableStore | None:
    """Say where this process keeps its rows of the label table; None: in memory."""
    part, parts = dist.rank(), dist.size()
    pinned = plan.device.type == "cuda"
    return parse_store(plan.config.table_store, part, parts, pinned=pinned)


def _level(config: Config) -> Callable[..., CascadeLevel] | None:
    if config.impl == "reference":
        return PlainLevel
    mixed = config.table_compute != "auto"
    return partial(MixedLevel, compute=config.table_compute) if mixed else None


def _layers(encoder: nn.Module, levels: int) -> tuple[tuple[int, ...], ...]:
    if isinstance(encoder, Encoder):
        return default_layers(encoder.layers, levels)
    return ((0,),) * levels  # a bag of words gives every level the same


def announce(plan: Plan, memory: RunMemory) -> None:
    """Log what each device will hold.

    Args:
        plan: the settings of the run.
        memory: what it takes.

    Raises:
        InputError: it is more than there is, and the settings do not allow that.
    """
    config, several = plan.config, len(memory.budgets()) > 1
    for device, budget in memory.budgets().items():
        log.info(told(budget, device if several else ""))
        if config.beyond_memory:
            continue
        processes = processes_here() if torch.device(device).type == "cpu" else 1
        mends = _mends(config)
        check_memory(budget.parts(), torch.device(device), mends, processes=processes)


def _mends(config: Config) -> dict[str, str]:
    anyway = "or start all the same by --beyond-memory"
    smaller = "a smaller --batch"
    if config.encoder != "bow":
        smaller += " or --micro-batch (the same step in parts)"
    step = "--impl fused" if config.impl == "reference" else "a smaller --batch"
    return {
        "activations": f"take {smaller}, {anyway}",
        "gradients of one": f"take {step}, {anyway}",
        "first values": f"leave out --centroid-norm, {anyway}",
        COPY: f"take --background-save off, {anyway}",
        "rows of": f"take --table-store file: and a folder of a local disk, {anyway}",
        "": f"take --table bf16 or fp8 and --state bf16, or fewer labels, {anyway}",
    }


def start_table(config: Config, dataset: Dataset, inputs: Inputs, model: Model) -> None:
    """Set the label table at the start of a run: biases to frequencies, rows to centroids."""
    train = dataset.splits["train"]
    if config.frequency_bias or model.needs_frequencies:
        counts = np.bincount(train.labels.indices, minlength=dataset.num_labels)
        model.start_at_frequencies(torch.from_numpy(counts).to(model.device), train.labels.shape[0])
    if config.centroid_norm:
        batches = (
            pair[0] for pair in evaluation_batches(model, train, config.evaluate_batch, inputs)
        )
        vectors = ((model.embed(batch), batch.pos_row, batch.pos_sample) for batch in batches)
        model.start_at_centroids(vectors, config.centroid_norm)


def build_encoder(plan: Plan, dataset: Dataset) -> nn.Module:
    """Build or load the transformer of a run and freeze what it must not train.

    Raises:
        InputError: it cannot be loaded, or the data do not fit it.
    """
    config = plan.config
    options: dict[str, Any] = {
        "pooling": config.pooling,
        "class_token": plan.class_token,
        "bottleneck": config.bottleneck,
        "dropout": config.dropout,
        "autocast": plan.autocast,
        "compile": config.compile,
    }
    if config.encoder == "tiny":
        terms = load_tokenizer(dataset.tokenizer_folder).vocab_size
        encoder = Encoder.tiny(terms, seed=config.seed, **options)
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
    if encoder.max_length is not None and plan.longest > encoder.max_length:
        raise InputError(
            f"dataset {dataset.folder}",
            f"rows of at most {encoder.max_length} tokens, the positions of {config.encoder}",
            f"one of {plan.longest}",
            f"prepare the data again with --max-length {encoder.max_length}",
        )
    if config.init_state:
        encoder.load_weights(config.init_state, config.init_prefix)
    if config.freeze:
        encoder.freeze(config.freeze, where="--freeze")
    if plan.encoder_sharded:
        encoder.to(plan.device).shard(plan.device)
    return encoder


def keep_class_token(model: Model, state: Mapping[str, Any]) -> None:
    """Read the class token where the run of a checkpoint did.

    A run from before tokenizers were asked read the first token.
    """
    if isinstance(model.encoder, Encoder):
        model.encoder.class_token = model_config(state)["encoder"].get("class_token", "first")
