"""The plan of a run: every value that "auto", other settings or the data decide, resolved once."""

from dataclasses import dataclass

import torch

from xmlkernels import InputError, dist
from xmlkernels.data.dataset import Dataset
from xmlkernels.devices import find_device
from xmlkernels.models.running_mean import MeanSettings
from xmlkernels.precision import DTYPES, default_autocast, default_table_dtype
from xmlkernels.training.config import Config, layers_of
from xmlkernels.training.facts import Facts, TreeShape, facts_of
from xmlkernels.tree.label_tree import LabelTree

# CascadeXML's for three and four levels (README of its repository). Two and five levels take the
# values of the levels that remain.
_DROPS = {
    2: (0.3, 0.4),
    3: (0.3, 0.3, 0.4),
    4: (0.2, 0.25, 0.4, 0.5),
    5: (0.2, 0.25, 0.3, 0.4, 0.5),
}
_FIRST_TOPK = 128


@dataclass(frozen=True)
class BeforeData:
    """What is known before any data are read.

    Attributes:
        device: of the model.
        label_device: of a cascade's label table; None: the model's.
        table: number format of the label table.
        optimizer: of the tables.
        state: number format of its state; None where it keeps none.
        graphs: whether the passes of a step run as CUDA graphs.
        sharded: whether the processes share the label table.
        encoder_sharded: whether they share the encoder.
    """

    device: torch.device
    label_device: torch.device | None
    table: str
    optimizer: str
    state: str | None
    graphs: bool
    sharded: bool
    encoder_sharded: bool


@dataclass(frozen=True)
class CascadePlan:
    """What a cascade needs besides.

    Attributes:
        topk: clusters kept after each level of clusters.
        layers: encoder layers of each level; None: the encoder's depth decides.
        drops: dropout of each level, labels last.
        scheme: how labels are scored until validation chooses.
        cooldown: updates of the last of three phases.
    """

    topk: tuple[int, ...]
    layers: tuple[tuple[int, ...], ...] | None
    drops: tuple[float, ...]
    scheme: str
    cooldown: int


@dataclass(frozen=True)
class Plan(BeforeData):
    """A run's settings with nothing left to decide.

    Attributes:
        config: the settings as given.
        facts: sizes of the data.
        autocast: number format of the encoder's autocast; None is fp32.
        encoder_epsilon: of the encoder's AdamW.
        word_epsilon: of the Adam that trains word vectors.
        class_token: where the class token of a document is: "first" or "last".
        longest: tokens of the longest document of this run; 0 for a bag of words.
        epoch: updates per epoch.
        steps: updates of the whole run.
        warmup: updates of the warm-up.
        update: documents per update.
        micro_batch: documents per encoder pass; 0: all of an update at once.
        documents: documents of the largest encoder pass of a process.
        mean: how the running mean is taken.
        cascade: None end to end.
    """

    config: Config
    facts: Facts
    autocast: torch.dtype | None
    encoder_epsilon: float
    word_epsilon: float
    class_token: str
    longest: int
    epoch: int
    steps: int
    warmup: int
    update: int
    micro_batch: int
    documents: int
    mean: MeanSettings
    cascade: CascadePlan | None


def before_data(config: Config) -> BeforeData:
    """Resolve what needs no data: devices, number formats, the tables' optimizer.

    Raises:
        InputError: no device of that name, or not in this machine, CUDA graphs where a step has
            none, or one process that is to share table or encoder.
    """
    device = find_device(config.device)
    apart = _label_device(config, device)
    usual = default_table_dtype(device) if config.table == "auto" else config.table
    return early_on(config, device, apart, usual, dist.launched()[1])


def early_on(
    config: Config, device: torch.device, apart: torch.device | None, usual: str, processes: int
) -> BeforeData:
    """Resolve what needs no data on devices that need not be in this machine.

    Args:
        config: the settings.
        device: of the model.
        apart: of a cascade's label table; None: the model's.
        usual: number format of a table there, where nothing else decides it.
        processes: of the run.

    Raises:
        InputError: CUDA graphs where a step has none, or one process that is to share table or
            encoder.
    """
    cascade, dense = config.model == "cascade", config.table_optimizer == "adamw_dense"
    table: str = config.table
    if table == "auto":
        wide = dense or config.impl == "reference" or config.table_compute != "auto"
        table = "fp32" if wide else usual
    optimizer: str = config.table_optimizer
    if optimizer == "auto":
        optimizer = "adam" if cascade else "sgd"
    state = None if optimizer == "sgd" and config.momentum == 0 else config.state
    graphs, sharded = _graphs(config, device, apart, processes), _sharded(config, processes)
    apart_encoder = _encoder_sharded(config, processes)
    return BeforeData(device, apart, table, optimizer, state, graphs, sharded, apart_encoder)


def _sharded(config: Config, processes: int) -> bool:
    """Decide whether the processes share the label table."""
    several = processes > 1
    if config.shard_labels == "on" and not several:
        expected, mend = "several processes", "start it by torchrun, or take auto"
        raise InputError("--shard-labels", expected, "one", mend)
    return several and config.shard_labels != "off"


def _encoder_sharded(config: Config, processes: int) -> bool:
    """Decide whether the processes share the encoder."""
    if config.shard_encoder == "on" and processes == 1:
        expected, mend = "several processes", "start it by torchrun, or take off"
        raise InputError("--shard-encoder", expected, "one", mend)
    return config.shard_encoder == "on"


def _graphs(
    config: Config, device: torch.device, apart: torch.device | None, processes: int
) -> bool:
    """Decide whether the passes of a step run as CUDA graphs."""
    if config.cuda_graph == "off":
        return False
    for good, expected, got in (
        (device.type == "cuda", "a card", f"device {device}"),
        (config.encoder != "bow", "an encoder of fixed shapes", "--encoder bow"),
        (config.micro_batch == 0, "no gradient caching", f"--micro-batch {config.micro_batch}"),
        (config.accumulate == 1, "no gradient caching", f"--accumulate {config.accumulate}"),
        (not config.compile, "an encoder that is not compiled", "--compile"),
        (config.impl == "fused", "--impl fused", f"--impl {config.impl}"),
        (
            config.table_compute == "auto",
            "a table of one format",
            f"--table-compute {config.table_compute}",
        ),
        (
            config.table_store == "ram",
            "a table in the card's memory",
            f"--table-store {config.table_store}",
        ),
        (apart is None, "all tables on one device", f"--label-device {config.label_device}"),
        (processes == 1, "one process", f"{processes}"),
    ):
        if not good and config.cuda_graph == "on":
            raise InputError("--cuda-graph", expected, got, "take auto or off")
        if not good:
            return False
    return True


def resolve(
    config: Config, early: BeforeData, dataset: Dataset, tree: LabelTree | None, epoch: int
) -> Plan:
    """Resolve every setting of a run.

    Args:
        config: the settings, checked.
        early: what `before_data` makes of them.
        dataset: what the run reads.
        tree: of a cascade; None end to end.
        epoch: updates per epoch.

    Raises:
        InputError: a warm-up longer than the run, or a running mean that would begin after it.
    """
    facts = facts_of(config, dataset)
    autocast = autocast_of(config.precision, early.device)
    return resolve_for(config, early, facts, tree, epoch, autocast, dist.size())


def resolve_for(
    config: Config,
    early: BeforeData,
    facts: Facts,
    tree: TreeShape | None,
    epoch: int,
    autocast: torch.dtype | None,
    processes: int,
) -> Plan:
    """Resolve every setting of a run of which only sizes are known.

    Args:
        config: the settings, checked.
        early: what is known before the data.
        facts: of the data.
        tree: of a cascade; None end to end.
        epoch: updates per epoch.
        autocast: number format of the encoder's autocast.
        processes: of the run.

    Raises:
        InputError: as `resolve`.
    """
    steps = config.epochs * epoch
    warmup = round(config.warmup_epochs * epoch) if config.warmup_epochs else config.warmup
    update = config.batch * config.accumulate
    micro_batch = config.batch if config.accumulate > 1 else config.micro_batch
    cascade = None if tree is None else _cascade(config, tree, epoch, steps, warmup)
    return Plan(
        early.device,
        early.label_device,
        early.table,
        early.optimizer,
        early.state,
        early.graphs,
        early.sharded,
        early.encoder_sharded,
        config=config,
        facts=facts,
        autocast=autocast,
        encoder_epsilon=config.encoder_epsilon or (1e-6 if cascade is None else 1e-8),
        word_epsilon=config.encoder_epsilon or 1e-8,
        class_token=facts.class_token,
        longest=facts.longest,
        epoch=epoch,
        steps=steps,
        warmup=warmup,
        update=min(update, facts.trained_on),
        micro_batch=micro_batch,
        documents=min(_largest_pass(config, update, micro_batch, processes), facts.trained_on),
        mean=_mean(config, epoch, steps),
        cascade=cascade,
    )


def autocast_of(precision: str, device: torch.device) -> torch.dtype | None:
    """Resolve the number format of the encoder's autocast on a device of this machine."""
    if precision == "auto":
        return default_autocast(device)
    return None if precision == "fp32" else DTYPES[precision]


def _label_device(config: Config, model: torch.device) -> torch.device | None:
    if config.label_device == "auto":
        return None
    own = find_device(config.label_device, "--label-device")
    return None if (own.type, own.index or 0) == (model.type, model.index or 0) else own


def _cascade(config: Config, tree: TreeShape, epoch: int, steps: int, warmup: int) -> CascadePlan:
    # A cosine may end within its warm-up: that is noted, not refused.
    if warmup > steps and config.schedule == "three_phase":
        flag = "--warmup-epochs" if config.warmup_epochs else "--warmup"
        expected = f"at most {steps:,} updates, all of this run"
        raise InputError(flag, expected, f"{warmup:,}", "shorten it or train for longer")
    return CascadePlan(
        topk=config.topk or default_topk(tree),
        layers=layers_of(config) or None,
        drops=config.embed_drops or _DROPS[tree.levels],
        scheme="weighted" if config.scheme == "auto" else config.scheme,
        cooldown=round(config.cooldown_epochs * epoch),
    )


def default_topk(tree: TreeShape) -> tuple[int, ...]:
    """Keep 128 clusters of the coarsest level and twice as many of each next one.

    It is never more than a document can have.
    """
    out: list[int] = []
    for r in range(tree.levels - 1):
        most = tree.sizes[r] if r == 0 else min(tree.sizes[r], out[-1] * tree.widest(r - 1))
        out.append(min(_FIRST_TOPK * 2**r, most))
    return tuple(out)


def _mean(config: Config, epoch: int, steps: int) -> MeanSettings:
    start = round(config.ema_start * epoch)
    first = start + config.ema_every
    if config.ema > 0 and first > steps:
        expected = f"a mean that begins within the {steps:,} updates of this run"
        mend = "begin earlier (--ema-start), or take values more often (--ema-every)"
        raise InputError("--ema", expected, f"the first value after {first:,}", mend)
    return MeanSettings(config.ema, start, config.ema_every, config.ema_tables)


def _largest_pass(config: Config, update: int, micro_batch: int, processes: int) -> int:
    """Documents of an encoder pass of the first process, which has the largest part of a batch."""
    if processes == 1:
        return micro_batch or config.batch
    own = -(-update // processes)
    return min(micro_batch or own, own)
