"""What a run refuses before any work: settings out of range, unknown, contradictory or without
effect.
"""

import difflib
import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

from xmlkernels import InputError, dist
from xmlkernels.training.config import BEST_BY, Config, layers_of
from xmlkernels.training.plan import BeforeData, before_data

OF_CASCADE = (
    "tree",
    "tree_depths",
    "topk",
    "layers",
    "embed_drops",
    "rw_loss",
    "scheme",
    "positives_bound",
    "reference_loss",
    "head_lr_factor",
    "schedule",
    "cooldown_epochs",
    "label_device",
)
_FULL_TABLE = (
    "bottleneck",
    "bias",
    "frequency_bias",
    "centroid_norm",
    "table_lr",
    "table_decay",
    "decoupled",
    "kahan",
    "skip_tiles",
)
_OFF = (
    "bottleneck",
    "bias",
    "frequency_bias",
    "centroid_norm",
    "decoupled",
    "kahan",
    "skip_tiles",
)  # off by default
_BOW = (
    "bow_width",
    "bow_activation",
    "ngrams",
    "min_df",
    "max_features",
    "word_dropout",
    "word_std",
)
_TRANSFORMER = (
    "pooling",
    "bottleneck",
    "precision",
    "compile",
    "init_state",
    "init_prefix",
    "freeze",
    "layers",
    "micro_batch",
    "accumulate",
    "clip",
    "ema",
    "ema_start",
    "ema_every",
    "ema_tables",
)


def flag(name: str) -> str:
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def check_least(options: object, least: int, *names: str) -> None:
    """InputError where one of these flags of a command is below the least that it takes."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(
                flag(name), f"{least} or more", str(value), "choose a larger one, or leave it out"
            )


def check(config: Config, given: Collection[str] = ()) -> BeforeData:
    """Refuse settings that cannot be used, before any work.

    Args:
        config: the settings.
        given: the fields named on the command line, to refuse the ones that would do nothing.

    Returns:
        What the settings resolve to before any data are read.

    Raises:
        InputError: the first setting out of range, unknown, contradictory or without effect.
    """
    _check_choices(config)
    for good, name, expected, mend in _ranges(config):
        if not good:
            raise InputError(flag(name), expected, repr(getattr(config, name)), mend)
    if config.best_by not in BEST_BY:
        known = {name.lower(): name for name in BEST_BY}
        near = difflib.get_close_matches(config.best_by.lower(), known, 1, 0.3)
        mend = f"did you mean {known[near[0]]}?" if near else f"choose one of {', '.join(BEST_BY)}"
        raise InputError("--best-by", "a metric", repr(config.best_by), mend)
    if config.model == "cascade":
        layers_of(config)
        if not config.tree:
            depths = " ".join(map(str, config.tree_depths))
            check_levels(config, len(config.tree_depths) + 1, f"as --tree-depths {depths} has them")
    early = before_data(config)
    for idle, name, needs, got in (
        *_without_effect(config, early, given),
        *_of_another(config, given),
    ):
        if idle:
            raise InputError(name, needs, got, "leave it out: it would do nothing")
    for both, name, other in _contradictions(config, given):
        if both:
            raise InputError(
                flag(name), f"no {flag(other)} beside it", "both", "choose one of them"
            )
    return early


def check_levels(config: Config, levels: int, why: str) -> None:
    """Refuses lists that do not have one entry for each level of the tree.

    Args:
        levels: R, the label level included.
        why: which tree has so many.

    Raises:
        InputError: the first list of another length.
    """
    for name, count in (
        ("topk", levels - 1),
        ("layers", levels),
        ("embed_drops", levels),
        ("rw_loss", levels),
    ):
        found = len(getattr(config, name))
        if found and found != count:
            what = "level of clusters" if name == "topk" else "level, labels included"
            noun = "number" if count == 1 else "numbers"
            raise InputError(
                flag(name),
                f"{count} {noun}, one for each {what}, {why}",
                str(found),
                "name them all, or none",
            )


def _check_choices(config: Config) -> None:
    for field in fields(config):
        value: Any = getattr(config, field.name)
        if get_origin(field.type) is Literal and value not in get_args(field.type):
            raise InputError(
                flag(field.name),
                f"one of {', '.join(get_args(field.type))}",
                repr(value),
                "choose one of them",
            )
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise InputError(flag(field.name), "a finite number", repr(number), "correct it")


def _ranges(config: Config) -> Iterator[tuple[bool, str, str, str]]:
    for name in (
        "epochs",
        "batch",
        "evaluate_batch",
        "evaluate_every",
        "log_every",
        "top_k",
        "max_length",
        "accumulate",
        "bow_width",
        "ngrams",
        "min_df",
        "ema_every",
    ):
        yield getattr(config, name) >= 1, name, "1 or more", "choose a larger one"
    for name in (
        "micro_batch",
        "save_every",
        "loss_every",
        "warmup",
        "clip",
        "documents",
        "threads",
        "bottleneck",
        "encoder_lr",
        "table_lr",
        "encoder_decay",
        "table_decay",
        "freeze",
        "max_features",
        "positives_bound",
        "warmup_epochs",
        "cooldown_epochs",
        "ema_start",
        "centroid_norm",
        "skip_tiles",
        "encoder_epsilon",
        "keep",
    ):
        yield getattr(config, name) >= 0, name, "0 or more", "choose 0 to switch it off"
    for name in ("dropout", "momentum", "word_dropout"):
        yield 0 <= getattr(config, name) < 1, name, "from 0 to below 1", "correct it"
    many = dist.launched()[1]
    yield (
        config.batch * config.accumulate >= many,
        "batch",
        f"{many} or more, a document for each process",
        "choose a larger one",
    )
    yield 0 <= config.ema <= 1, "ema", "from 0 to 1", "correct it"
    for name in ("word_std", "table_epsilon"):
        yield getattr(config, name) > 0, name, "more than 0", "correct it"
    yield config.timeout >= 1, "timeout", "1 or more seconds", "choose a longer one"
    yield config.head_lr_factor > 0, "head_lr_factor", "more than 0", "correct it"
    yield 0 <= config.seed < 2**63, "seed", "an integer from 0 to 2**63 - 1", "choose another"
    for name in ("dataset", "encoder", "output", "cache"):
        yield bool(getattr(config, name)), name, "a name", "give one, or leave the flag out"
    depths = config.tree_depths
    ascending = all(a < b for a, b in itertools.pairwise(depths))
    good = 1 <= len(depths) <= 4 and ascending and depths[0] >= 0 and depths[-1] <= 30
    yield (
        good,
        "tree_depths",
        "one to four ascending exponents from 0 to 30",
        "name them coarse to fine, as 10 13 16",
    )
    yield (
        all(k >= 1 for k in config.topk),
        "topk",
        "numbers of 1 or more",
        "keep at least one cluster",
    )
    yield (
        all(0 <= p < 1 for p in config.embed_drops),
        "embed_drops",
        "numbers from 0 to below 1",
        "correct them",
    )
    yield all(w >= 0 for w in config.rw_loss), "rw_loss", "weights of 0 or more", "correct them"
    yield (
        not config.rw_loss or any(config.rw_loss),
        "rw_loss",
        "a weight above 0",
        "leave it out for 1 each",
    )
    dense = config.table_optimizer == "adamw_dense"
    mend = "choose adam, which trains every row there (--decoupled for AdamW's decay)"
    yield (
        not (dense and config.model == "end_to_end"),
        "table_optimizer",
        "auto, sgd or adam with --model end_to_end",
        mend,
    )
    mend = "choose --table fp32, bf16 or fp16, or the row-sparse adam"
    yield (
        not (dense and config.table == "fp8"),
        "table_optimizer",
        "auto, sgd or adam with --table fp8",
        mend,
    )
    mend = "choose --table fp32, bf16 or fp16, or leave the tables out of the mean"
    yield (
        not (config.ema_tables and config.table == "fp8"),
        "ema_tables",
        "no --ema-tables with --table fp8",
        mend,
    )
    alone = config.model == "cascade" or config.label_device == "auto"
    yield (
        alone,
        "label_device",
        "auto with --model end_to_end, whose table stands with the model",
        "leave it out",
    )


def _without_effect(
    config: Config, early: BeforeData, given: Collection[str]
) -> Iterator[tuple[bool, str, str, str]]:
    """(would do nothing, flag, what it needs, what stands there)."""
    yield (
        config.kahan and early.table == "fp32",
        "--kahan",
        "a table below fp32",
        f"--table {config.table}, which is fp32 here",
    )
    yield (
        config.kahan and early.table == "fp8",
        "--kahan",
        "a table in bf16 or fp16",
        "--table fp8, which rounds stochastically",
    )
    no_state = early.state is None and config.state != "fp32"
    yield no_state, "--state", "an optimizer that keeps a state", "SGD without momentum"
    optimizer = early.optimizer
    yield (
        "momentum" in given and optimizer != "sgd",
        "--momentum",
        "--table-optimizer sgd",
        optimizer,
    )
    yield (
        "table_epsilon" in given and optimizer == "sgd",
        "--table-epsilon",
        "--table-optimizer adam",
        optimizer,
    )
    yield (
        config.decoupled and config.table_decay == 0,
        "--decoupled",
        "a table decay",
        "--table-decay 0",
    )
    alone = not config.init_state and config.init_prefix != Config.init_prefix
    yield alone, "--init-prefix", "--init-state beside it", "none"
    yield config.frequency_bias and not config.bias, "--frequency-bias", "--bias beside it", "none"
    for name in ("ema_start", "ema_every", "ema_tables"):
        yield (
            config.ema == 0 and getattr(config, name) != getattr(Config, name),
            flag(name),
            "--ema beside it",
            "none",
        )
    cosine = config.schedule == "warmup_cosine"
    yield (
        cosine and "cooldown_epochs" in given,
        "--cooldown-epochs",
        "--schedule three_phase",
        "warmup_cosine",
    )
    for name in ("documents", "max_length"):
        folder = config.dataset != "docstrings" and name in given
        yield (
            folder,
            flag(name),
            "the built-in corpus",
            f"the dataset folder {config.dataset}, which fixes its own",
        )
    bow = config.encoder == "bow"
    yield (
        bow and "max_length" in given,
        "--max-length",
        "an encoder that reads tokens",
        "--encoder bow, which reads all words",
    )


def _of_another(config: Config, given: Collection[str]) -> Iterator[tuple[bool, str, str, str]]:
    """Settings of the model or of the encoder that was not chosen: named, or other than what
    leaving them out gives.
    """
    bow, cascade = config.encoder == "bow", config.model == "cascade"
    for name in OF_CASCADE:
        yield not cascade and name in given, flag(name), "--model cascade", "--model end_to_end"
    for name in _BOW:
        yield not bow and name in given, flag(name), "--encoder bow", f"--encoder {config.encoder}"
    told = "--model cascade, which has no such part"
    for name in _FULL_TABLE:
        # What is off by default may be switched off by name: a recipe may have switched it on.
        set_so = bool(getattr(config, name)) if name in _OFF else name in given
        yield cascade and set_so, flag(name), "--model end_to_end", told
    yield (
        cascade and not bow and "dropout" in given,
        "--dropout",
        "--embed-drops, one for each level",
        "--model cascade",
    )
    for name in _TRANSFORMER:
        unlike = getattr(config, name) != getattr(Config, name)
        set_so = (
            unlike
            if name == "layers"
            else name in given or (name not in ("pooling", "precision") and unlike)
        )
        yield bow and set_so, flag(name), "a transformer", "--encoder bow, which has no such part"


def _contradictions(config: Config, given: Collection[str]) -> Iterator[tuple[bool, str, str]]:
    yield config.resume and config.overwrite, "resume", "overwrite"
    yield config.accumulate > 1 and config.micro_batch > 0, "accumulate", "micro_batch"
    yield bool(config.tree) and "tree_depths" in given, "tree", "tree_depths"
    yield config.warmup_epochs > 0 and "warmup" in given, "warmup", "warmup_epochs"
