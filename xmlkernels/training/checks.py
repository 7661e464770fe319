"""What a run refuses before any work: settings out of range, contradictory or without effect."""

import difflib
from collections.abc import Collection, Iterator

from xmlkernels import InputError, dist
from xmlkernels.models.kinds import KINDS
from xmlkernels.nn.table_store import parse_store
from xmlkernels.options import check_values, flag, names_only
from xmlkernels.training.config import BEST_BY, Config, layers_of
from xmlkernels.training.plan import BeforeData, before_data

# Of a bag of words: settings of a transformer that a recipe may have on. Only by name they are
# refused.
_BY_NAME = ("pooling", "precision")


def check(
    config: Config, given: Collection[str] = (), early: BeforeData | None = None
) -> BeforeData:
    """Refuse settings that cannot be used, before any work.

    Args:
        config: the settings.
        given: the fields named on the command line, to refuse the ones that would do nothing.
        early: what they resolve to, on devices that are planned for; None: on this machine's.

    Returns:
        What the settings resolve to before any data are read.

    Raises:
        InputError: the first setting out of range, unknown, contradictory or without effect.
    """
    check_values(config)
    parse_store(config.table_store)
    for good, name, expected, mend in _together(config):
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
    early = before_data(config) if early is None else early
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
    """Refuse lists that do not have one entry per level of the tree.

    Args:
        config: the settings.
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


def _together(config: Config) -> Iterator[tuple[bool, str, str, str]]:
    """List what settings must be together: whether they are, the field, what it needs, the mend."""
    many = dist.launched()[1]
    yield (
        config.batch * config.accumulate >= many,
        "batch",
        f"{many} or more, a document for each process",
        "choose a larger one",
    )
    yield (
        not config.rw_loss or any(config.rw_loss),
        "rw_loss",
        "a weight above 0",
        "leave it out for 1 each",
    )
    dense = config.table_optimizer == "adamw_dense"
    mend = "choose adam, which trains every row there (--decoupled for AdamW's decay)"
    yield (
        not (dense and config.model != "cascade"),
        "table_optimizer",
        f"auto, sgd or adam with --model {config.model}",
        mend,
    )
    mend = "choose --table fp32, bf16 or fp16, or the row-sparse adam"
    yield (
        not (dense and config.table == "fp8"),
        "table_optimizer",
        "auto, sgd or adam with --table fp8",
        mend,
    )
    fused, plain = "choose it, or --impl fused", config.impl == "reference"
    for name, wide in (("table", ("auto", "fp32")), ("state", ("fp32",))):
        yield (
            not plain or getattr(config, name) in wide,
            name,
            "fp32 with --impl reference",
            fused,
        )
    yield (
        not (plain and config.skip_tiles),
        "skip_tiles",
        "0 with --impl reference, which trains every label",
        fused,
    )
    mixed, mend = config.table_compute != "auto", "choose it, or --table-compute auto"
    allowed: dict[str, tuple[str, ...]] = {"table": ("auto", "fp32"), "impl": ("fused",)}
    allowed["table_optimizer"] = "auto", "sgd", "adam"
    for name, good in allowed.items():
        yield (
            not mixed or getattr(config, name) in good,
            name,
            f"{' or '.join(good)} with --table-compute {config.table_compute}",
            mend,
        )
    yield (
        not (mixed and config.skip_tiles),
        "skip_tiles",
        f"0 with --table-compute {config.table_compute}, which trains every label",
        mend,
    )
    mend = "choose --table fp32, bf16 or fp16, or leave the tables out of the mean"
    yield (
        not (config.ema_tables and config.table == "fp8"),
        "ema_tables",
        "no --ema-tables with --table fp8",
        mend,
    )
    stored = config.table_store != "ram"
    for fits, name, expected in (
        (not plain, "impl", "fused"),
        (not mixed, "table_compute", "auto"),
        (not dense, "table_optimizer", "auto, sgd or adam"),
        (not config.ema_tables, "ema_tables", "no mean of tables"),
        (config.label_device == "auto", "label_device", "auto"),
        (many == 1 or config.shard_labels != "off", "shard_labels", "auto"),
    ):
        beside = f"{expected} with --table-store {config.table_store}"
        yield fits or not stored, name, beside, "choose that, or --table-store ram"
    apart, mend = config.shard_encoder == "on", "choose that, or --shard-encoder off"
    yield (
        not (apart and many > 1 and config.shard_labels == "off"),
        "shard_labels",
        "auto with --shard-encoder on, for the processes then evaluate together",
        mend,
    )
    yield not (apart and config.compile), "compile", "False with --shard-encoder on", mend
    alone = config.model == "cascade" or config.label_device == "auto"
    yield (
        alone,
        "label_device",
        f"auto with --model {config.model}, whose table stands with the model",
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
    """List settings of the model or the encoder that was not chosen.

    They are named, or differ from what leaving them out gives.
    """
    bow, cascade = config.encoder == "bow", config.model == "cascade"
    # Those of end_to_end serve every kind with a table of all labels; they follow below.
    own = names_only(config, config.model)
    for kind in (one for one in KINDS if one != "end_to_end"):
        for name in names_only(config, kind):
            idle = name in given and name not in own
            yield idle, flag(name), f"--model {kind}", f"--model {config.model}"
    for name in names_only(config, "bow"):
        yield not bow and name in given, flag(name), "--encoder bow", f"--encoder {config.encoder}"
    got = "--model cascade, which has no such part"
    for name in names_only(config, "end_to_end"):
        # What is off by default may be switched off by name: a recipe may have switched it on.
        by_default = getattr(Config, name)
        chosen = name in given if by_default else bool(getattr(config, name))
        yield cascade and chosen, flag(name), "--model end_to_end", got
    drops = cascade and not bow and "dropout" in given
    yield drops, "--dropout", "--embed-drops, one for each level", "--model cascade"
    got = "--encoder bow, which has no such part"
    for name in names_only(config, "transformer"):
        chosen = getattr(config, name) != getattr(Config, name)
        if name in _BY_NAME:
            chosen = name in given
        elif name != "layers":  # which may be emptied by name
            chosen = chosen or name in given
        yield bow and chosen, flag(name), "a transformer", got


def _contradictions(config: Config, given: Collection[str]) -> Iterator[tuple[bool, str, str]]:
    yield config.resume and config.overwrite, "resume", "overwrite"
    yield config.accumulate > 1 and config.micro_batch > 0, "accumulate", "micro_batch"
    yield bool(config.tree) and "tree_depths" in given, "tree", "tree_depths"
    yield config.warmup_epochs > 0 and "warmup" in given, "warmup", "warmup_epochs"
