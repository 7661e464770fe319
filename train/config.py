"""The settings of one training run: one flat dataclass, saved with the run, checked before any work."""

import difflib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin

import torch

from xmlkernels import InputError
from xmlkernels.nn.full_head import default_table_dtype

BEST_BY = tuple(f"{kind}@{k}" for kind in ("P", "nDCG", "PSP", "PSnDCG", "R") for k in range(1, 6))


@dataclass(frozen=True)
class Config:
    """One run of the end-to-end model. Every field is a flag: `python train/run.py RECIPE --epochs 3`."""

    # ---- data ----
    dataset: str = "docstrings"
    """A folder made by train/prepare.py, or "docstrings": the built-in corpus, made on first use."""
    documents: int = 0
    """Built-in corpus only: take a deterministic part of about this many documents; 0 takes all."""
    cache: str = "cache"
    """Where the built-in corpus is kept, by content: it is rebuilt when code, tokenizer or packages change."""
    output: str = "runs/run"
    """Folder for config.json, log.jsonl, metrics.json, predictions.npz and checkpoint/."""
    label_text: bool = False
    """Add each label's text as a document whose only target is itself (Renee's augmentation)."""
    max_length: int = 64
    """Built-in corpus only: tokens per document; a dataset folder fixes its own."""

    # ---- encoder ----
    encoder: str = "minilm"
    """Hub name or local folder of any Hugging Face encoder; "minilm" is the installed all-MiniLM-L6-v2; "tiny" is a small
    random one."""
    pooling: Literal["mean", "cls"] = "mean"
    bottleneck: int = 0
    """Width of a bias-free linear layer after pooling; 0 is none."""
    dropout: float = 0.2
    """On the embedding."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the encoder's autocast; auto: bf16 where the device multiplies it natively."""
    compile: bool = False
    """Run the encoder through torch.compile."""
    init_state: str = ""
    """A state dict to start the encoder from (NGAME's first module, say); keys lose `init_prefix`, all must fit."""
    init_prefix: str = "embedding_labels.encoder.transformer.0.auto_model."
    """What the keys of `init_state` begin with before the encoder's own names; other keys are left alone."""

    # ---- label table ----
    table: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    """Number format of the label table; auto: bf16 where the device multiplies it natively, else fp32. fp8 is e4m3 with a
    power-of-two scale per row."""
    bias: bool = False
    """One fp32 bias per label; off in Renee. A table with one cannot serve a maximum-inner-product index."""
    table_optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.9
    """Of the table's SGD; 0 keeps no state at all."""
    state: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the table's optimizer state."""
    table_decay: float = 1e-4
    decoupled: bool = False
    """Weight decay shrinks the table instead of entering its gradient."""
    kahan: bool = False
    """Kahan compensation for bf16 and fp16 tables, instead of stochastic rounding."""
    skip_tiles: float = 0.0
    """Skip groups of 128 labels without positives whose weights a step would change by less than so many units of the table's
    format (its spacing at 2^-6); an approximation that saves up to two thirds of the table's step. 0 is off."""

    # ---- training ----
    epochs: int = 10
    batch: int = 32
    micro_batch: int = 0
    """Documents per encoder pass (gradient caching); 0 passes the whole batch at once. Renee's `--accum A` is
    `--micro-batch` = batch / A: the same step within rounding. Its classifier micro-batches are not needed."""
    encoder_lr: float = 2e-4
    table_lr: float = 0.02
    """The loss is summed over the batch, so this belongs to `batch`: change both in proportion."""
    encoder_decay: float = 0.01
    warmup: int = 200
    """Steps of linear warm-up; a cosine to 0 follows."""
    clip: float = 0.0
    """Largest norm of the encoder's gradient; 0 is off."""
    loss_every: int = 10
    """Compute the exact loss over all labels every so many steps; 1 always, 0 never."""
    seed: int = 0

    # ---- evaluation, saving ----
    evaluate_every: int = 1
    """Epochs between looks at the validation split."""
    best_by: str = "P@1"
    """Validation metric that chooses the best checkpoint: P, nDCG, PSP, PSnDCG or R, @1 to @5; the first of equals is kept.
    Without a validation split the last step is kept."""
    top_k: int = 100
    """Labels kept per document in predictions.npz."""
    evaluate_batch: int = 256
    save_every: int = 500
    """Steps between checkpoints; one is written after every epoch too."""
    log_every: int = 50
    """Steps between lines of log.jsonl."""
    resume: bool = False
    """Go on from the last checkpoint in `output`, bit for bit."""
    overwrite: bool = False
    """Replace the run that `output` holds."""
    device: str = "auto"
    """Where the model is trained: cpu, cuda, cuda:1; auto: cuda where there is one. The ops have kernels for the CPU only
    so far; on cuda they run on their references, which hold all logits."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""


def resolved_device(name: str) -> torch.device:
    """The device that "auto" stands for, or the one named.

    Raises:
        InputError: no device of that name, or not in this machine.
    """
    where, mend = "--device", "choose cpu, cuda, cuda:NUMBER or auto"
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(where, "a device", repr(name), mend) from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(where, "cpu or cuda", repr(name), mend)
    found = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= found:
        raise InputError(where, "a device of this machine", f"{name!r} ({found} found)", "choose cpu or auto")
    return device


def resolved_table(config: Config, device: torch.device) -> str:
    """The number format that "auto" stands for on a device, or the one named."""
    return default_table_dtype(device) if config.table == "auto" else config.table


def check(config: Config, given: Collection[str] = ()) -> None:
    """Refuses settings that cannot be used, before any work.

    Args:
        given: the fields named on the command line, to refuse the ones that would do nothing.

    Raises:
        InputError: the first setting out of range, unknown, contradictory or without effect.
    """
    _check_choices(config)
    for good, name, expected, mend in _ranges(config):
        if not good:
            raise InputError(f"--{name.replace('_', '-')}", expected, repr(getattr(config, name)), mend)
    if config.best_by not in BEST_BY:
        known = {name.lower(): name for name in BEST_BY}
        near = difflib.get_close_matches(config.best_by.lower(), known, 1, 0.3)
        mend = f"did you mean {known[near[0]]}?" if near else f"choose one of {', '.join(BEST_BY)}"
        raise InputError("--best-by", "a metric", repr(config.best_by), mend)
    table = resolved_table(config, resolved_device(config.device))
    for idle, flag, needs, got in _without_effect(config, table, given):
        if idle:
            raise InputError(flag, needs, got, "leave it out: it would do nothing")
    if config.resume and config.overwrite:
        raise InputError("--resume", "no --overwrite beside it", "both", "go on with the run or replace it: choose one")


def _check_choices(config: Config) -> None:
    for field in fields(config):
        value: Any = getattr(config, field.name)
        name = f"--{field.name.replace('_', '-')}"
        if get_origin(field.type) is Literal and value not in get_args(field.type):
            raise InputError(name, f"one of {', '.join(get_args(field.type))}", repr(value), "choose one of them")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(name, "a finite number", repr(value), "correct it")


def _ranges(config: Config) -> Iterator[tuple[bool, str, str, str]]:
    for name in ("epochs", "batch", "evaluate_batch", "evaluate_every", "log_every", "top_k", "max_length"):
        yield getattr(config, name) >= 1, name, "1 or more", "choose a larger one"
    for name in ("micro_batch", "save_every", "loss_every", "warmup", "clip", "documents", "threads", "bottleneck"):
        yield getattr(config, name) >= 0, name, "0 or more", "choose 0 to switch it off"
    for name in ("encoder_lr", "table_lr", "encoder_decay", "table_decay", "skip_tiles"):
        yield getattr(config, name) >= 0, name, "0 or more", "choose 0 to switch it off"
    for name in ("dropout", "momentum"):
        yield 0 <= getattr(config, name) < 1, name, "from 0 to below 1", "correct it"
    yield 0 <= config.seed < 2**63, "seed", "an integer from 0 to 2**63 - 1", "choose another"
    for name in ("dataset", "encoder", "output", "cache"):
        yield bool(getattr(config, name)), name, "a name", "give one, or leave the flag out"


def _without_effect(config: Config, table: str, given: Collection[str]) -> Iterator[tuple[bool, str, str, str]]:
    """(would do nothing, flag, what it needs, what stands there)."""
    no_state = config.table_optimizer == "sgd" and config.momentum == 0
    yield config.kahan and table == "fp32", "--kahan", "a table below fp32", f"--table {config.table}, which is fp32 here"
    yield config.kahan and table == "fp8", "--kahan", "a table in bf16 or fp16", "--table fp8, which rounds stochastically"
    yield no_state and config.state != "fp32", "--state", "an optimizer that keeps a state", "SGD without momentum"
    yield "momentum" in given and config.table_optimizer == "adam", "--momentum", "--table-optimizer sgd", "adam"
    yield config.decoupled and config.table_decay == 0, "--decoupled", "a table decay", "--table-decay 0"
    alone = not config.init_state and config.init_prefix != Config.init_prefix
    yield alone, "--init-prefix", "--init-state beside it", "none"
    for name in ("documents", "max_length"):
        folder = config.dataset != "docstrings" and name in given
        flag = f"--{name.replace('_', '-')}"
        yield folder, flag, "the built-in corpus", f"the dataset folder {config.dataset}, which fixes its own"
