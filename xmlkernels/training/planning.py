"""What a run will take, before its data or its devices are there: `xmlkernels plan`.

Everything is built on the meta device: a plan takes no memory of the run's own. Letters: B
documents of an update, D width, G processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from xmlkernels import dist
from xmlkernels.models.descent import kept_in_training, shortlist_traffic
from xmlkernels.models.gradient_caching import encoder_passes
from xmlkernels.models.training import decision_bytes
from xmlkernels.nn import hf
from xmlkernels.nn.bow import BowEncoder
from xmlkernels.nn.encoder import Encoder
from xmlkernels.nn.table import Table
from xmlkernels.planner import planned
from xmlkernels.planner.speed import (
    Timed,
    Work,
    encoder_work,
    full_table_work,
    level_work,
    search_work,
    seconds,
    timed,
    words_work,
)
from xmlkernels.precision import DTYPES, default_autocast, default_table_dtype
from xmlkernels.training.build import bag_of_words, cascade_heads, full_table
from xmlkernels.training.checks import check
from xmlkernels.training.facts import TreeShape
from xmlkernels.training.forecast import (
    SO_FAR,
    RunMemory,
    candidates_of,
    memory_of,
    process_so_far,
)
from xmlkernels.training.known_encoders import KNOWN
from xmlkernels.training.plan import Plan, early_on, resolve_for
from xmlkernels.training.planned_sizes import GB, PlanConfig, Subject, data_bytes, subject_of
from xmlkernels.training.recipe import Recipe

BASE, DATA = "interpreter and libraries", "documents and labels"


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        subject: what was planned.
        plan: its settings, resolved.
        here: bytes of the host before there is a model.
        memory: of one process, the largest.
        wire: bytes that the first process receives in a step without a loss, by kind and by what.
        step, evaluation: how long each part of a step, and of an evaluation of the validation
            split, takes.
    """

    subject: Subject
    plan: Plan
    here: Mapping[str, int]
    memory: RunMemory
    wire: Mapping[str, int]
    step: tuple[Timed, ...]
    evaluation: tuple[Timed, ...]

    @property
    def hours(self) -> float:
        """Hours of the run: its steps and evaluations."""
        looks = -(-self.plan.config.epochs // self.plan.config.evaluate_every)
        return (self.plan.steps * seconds(self.step) + looks * seconds(self.evaluation)) / 3600

    @property
    def money(self) -> float:
        """The price of the run, in the unit of --price."""
        return self.hours * self.subject.options.price * self.subject.options.gpus

    def lacks(self) -> dict[str, tuple[int, int]]:
        """List what does not fit: by device, bytes at the peak and bytes that there are."""
        card, options = self.subject.card, self.subject.options
        found = {}
        for device, budget in self.memory.budgets().items():
            main = device == self.memory.device[0]
            limit = card.memory if main else (int(options.host_memory * GB) or None)
            # Processes on one machine's processors share its memory.
            shared = options.gpus if main and not card.cuda else 1
            if limit is not None and budget.peak * shared > limit:
                found[device] = budget.peak * shared, limit
        return found


def forecast_of(options: PlanConfig, recipe: Recipe[PlanConfig]) -> Forecast:
    """Count what a run takes.

    Raises:
        InputError: a device that nobody knows, no sizes, or settings that no run can have.
    """
    subject = subject_of(options, recipe)
    _built(subject)  # so that all that a run loads is loaded
    here = process_so_far()
    if not subject.opened:
        here = {BASE: here.get(SO_FAR, 0), DATA: data_bytes(subject)}
    return forecast(subject, here)


def forecast(subject: Subject, here: Mapping[str, int]) -> Forecast:
    """Count what a run takes.

    Args:
        subject: what is planned.
        here: bytes of the host before there is a model, by part.

    Raises:
        InputError: settings that no run can have.
    """
    plan, encoder, tables, beside = _built(subject)
    processes = subject.options.gpus
    free = subject.host_limit
    if free is not None:
        free -= sum(here.values())
    memory = memory_of(
        plan, encoder, tables, subject.tree, here=here, processes=processes, free=free
    )
    wire = traffic_of(
        plan, encoder, tables, processes, terms=subject.words, beside=beside, tree=subject.tree
    )
    parts = _timed(subject, tables, _step(subject, plan, encoder, tables))
    if received := sum(wire.values()):
        floor = received / subject.card.wire
        parts.append(Timed("wire", floor, floor, "the rate alone: nothing overlaps"))
    return Forecast(
        subject,
        plan,
        here,
        memory,
        wire,
        tuple(parts),
        tuple(_timed(subject, tables, _looks(subject, plan, encoder, tables))),
    )


def _timed(subject: Subject, tables: Mapping[str, Table], works: Iterable[Work]) -> list[Timed]:
    """Time the parts of a step, and the way of the rows of a table that is stored elsewhere."""
    found = []
    for work in works:
        found.append(timed(work, subject.card))
        table = tables.get(work.what.removeprefix("evaluation: "))
        if table is not None and table.stored_bytes():
            rate, how = _store_rate(subject)
            carried = work.bytes
            if work.op == "matmul_topk":
                carried /= 2  # all rows, which are carried once and scored twice
            elif work.what.startswith("evaluation"):
                # Documents of a batch share rows: no batch carries more than all, twice.
                batches = -(-subject.facts.validation // subject.config.evaluate_batch)
                carried = min(carried, 2 * batches * table.stored_bytes()["weight"])
            floor = carried / rate
            found.append(Timed(f"{work.what}, to and from its store", floor, floor, how))
    return found


def _store_rate(subject: Subject) -> tuple[float, str]:
    """Return bytes per second between a table's store and its device, and whose word that is."""
    if subject.options.store_rate:
        return subject.options.store_rate * 1e9, "the rate given alone: nothing overlaps"
    if subject.config.table_store != "host":
        return 2e9, "assumed: 2 GB/s of a disk (--store-rate); nothing overlaps"
    if subject.card.cuda:
        return 25e9, "assumed: 25 GB/s of PCIe 4 (--store-rate); nothing overlaps"
    return subject.card.copy, "the rate of a copy alone: nothing overlaps"


def traffic_of(
    plan: Plan,
    encoder: nn.Module,
    tables: Mapping[str, Table],
    processes: int,
    *,
    terms: float,
    beside: Iterable[nn.Parameter] = (),
    tree: TreeShape | None = None,
) -> dict[str, int]:
    """Return the bytes that the first process receives in a step, by kind and by what.

    The vectors of every table are gathered. Where the processes share the tables, gradients come
    back, and of a cascade each sends its shortlists. The encoder's are summed, or an encoder in
    parts is gathered and its gradients scattered. See `dist.step_traffic` and
    `Encoder.shard_traffic`.

    Args:
        plan: the settings of the run.
        encoder: of the run.
        tables: by what to call them, the labels' last.
        processes: G.
        terms: of a document, for a bag of words, whose bags are gathered.
        beside: parameters of the heads, which are trained as the encoder's are.
        tree: of a cascade.
    """
    found = dict[str, int]()
    for name, table in tables.items():
        each = dist.step_traffic(plan.update, [table.width], processes, scattered=plan.sharded)
        found[f"gathered, {name}"] = each["gathered"]
        found[f"scattered, {name}"] = each["scattered"]
    if plan.sharded and tree is not None and plan.cascade is not None and processes > 1:
        most = (tree.sizes[0], *(tree.widest(r) for r in range(tree.levels - 1)))
        kept = kept_in_training(plan.cascade.topk, most, plan.config.positives_bound)
        found["gathered, shortlists"] = shortlist_traffic(plan.update, processes, kept)
    parameters, decisions = [*encoder.parameters(), *beside], 0
    if plan.encoder_sharded and processes > 1 and isinstance(encoder, Encoder):
        passes = encoder_passes(plan.update, processes, plan.micro_batch)
        for kind, count in encoder.shard_traffic(processes, passes).items():
            found[f"{kind}, encoder"] = count
        parameters, decisions = list(beside), decision_bytes(plan.config.clip)
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad) + decisions
    summed = dist.step_traffic(plan.update, [], processes, summed=trained)["summed"]
    found["summed, encoder"] = summed
    if isinstance(encoder, BowEncoder):
        bags = round(-(-plan.update // processes) * terms)
        found["gathered, bags of words"] = encoder.update_traffic(plan.update, bags, processes)
    return {name: count for name, count in found.items() if count}


def _built(
    subject: Subject,
) -> tuple[Plan, nn.Module, dict[str, Table], list[nn.Parameter]]:
    """Build the run on the meta device: plan, encoder, tables by what to call them, and the rest.

    That is the parameters of a cascade's heads.
    """
    config, card, facts = subject.config, subject.card, subject.facts
    processes = subject.options.gpus
    device = torch.device("cuda" if card.cuda else "cpu")
    apart = None if config.label_device == "auto" else torch.device(config.label_device)
    usual = "bf16" if card.cuda else default_table_dtype("cpu")
    early = early_on(config, device, apart, usual, processes)
    autocast = DTYPES[config.precision] if config.precision in ("bf16", "fp16") else None
    if config.precision == "auto":
        autocast = torch.bfloat16 if card.cuda else default_autocast("cpu")
    check(replace(config, documents=0), early=early)
    epoch = -(-facts.trained_on // (config.batch * config.accumulate))
    plan = resolve_for(config, early, facts, subject.tree, epoch, autocast, processes)
    encoder = planned_encoder(plan, subject.vocabulary)
    if subject.tree is None:
        width = int(encoder.width)  # type: ignore[arg-type]
        # The first process has as many rows as any.
        make = full_table(plan, facts.labels, width, processes=processes)
        return plan, encoder, {"label table": planned(make)}, []
    heads = planned(cascade_heads(plan, encoder, subject.tree, processes=processes))
    return plan, encoder, dict(heads.tables()), list(heads.parameters())


def planned_encoder(plan: Plan, vocabulary: int) -> nn.Module:
    """Build the encoder of a run on the meta device.

    Raises:
        InputError: nobody knows its shape.
    """
    config = plan.config
    if config.encoder == "bow":
        return planned(lambda: bag_of_words(plan, vocabulary))
    options = {"pooling": config.pooling, "bottleneck": config.bottleneck}

    def make() -> Encoder:
        if config.encoder == "tiny":
            model = hf.tiny_bert(vocabulary, 32, 2)
        else:
            known = KNOWN.get(config.encoder)
            found = hf.describe_pretrained(config.encoder) if known is None else known
            model = hf.from_description(found, None)
        return Encoder(model, autocast=plan.autocast, **options)  # type: ignore[arg-type]

    encoder = planned(make)
    if config.freeze:
        encoder.freeze(config.freeze, where="--freeze")
    return encoder


def _step(
    subject: Subject, plan: Plan, encoder: nn.Module, tables: Mapping[str, Table]
) -> list[Work]:
    """List the parts of a step of one process."""
    own = -(-plan.update // subject.options.gpus)
    work = _encoding(subject, encoder, own, cached=0 < plan.micro_batch < own)
    candidates = candidates_of(plan, subject.tree)
    if not candidates:
        return [*work, *(full_table_work(table, plan.update) for table in tables.values())]
    return [
        *work,
        *(
            level_work(table, plan.update, count, what=name)
            for (name, table), count in zip(tables.items(), candidates, strict=True)
        ),
    ]


def _encoding(
    subject: Subject, encoder: nn.Module, documents: int, *, cached: bool = False
) -> list[Work]:
    if isinstance(encoder, BowEncoder):
        return [words_work(encoder.table, documents, subject.words)]
    assert isinstance(encoder, Encoder)
    work = [encoder_work(encoder, documents, subject.words)]
    if cached:  # features are computed without a graph first
        first = encoder_work(encoder, documents, subject.words, training=False)
        work.append(replace(first, what="encoder, first pass"))
    return work


def _looks(
    subject: Subject, plan: Plan, encoder: nn.Module, tables: Mapping[str, Table]
) -> list[Work]:
    """List the parts of an evaluation of the validation split."""
    documents, options = subject.facts.validation, subject.options
    if not documents:
        return []
    own = -(-documents // options.gpus)
    out = []
    if isinstance(encoder, Encoder):
        passed = encoder_work(encoder, own, subject.words, training=False)
        out.append(replace(passed, what="evaluation: encoder"))
    candidates = candidates_of(plan, subject.tree)
    if not candidates:
        (table,) = tables.values()
        batches = -(-documents // plan.config.evaluate_batch)
        each = search_work(table, plan.config.evaluate_batch, with_loss=True)
        times = documents / plan.config.evaluate_batch
        work = replace(each, bytes=each.bytes * batches, operations=each.operations * times)
        return [*out, work]
    for (name, table), count in zip(tables.items(), candidates, strict=True):
        per = 2 * 2 * count * table.width  # scored for the answer and for the loss
        rows = 2 * count * table.width * table.weight.element_size()
        half = "bf16" if table.weight.dtype != torch.float32 else "fp32"
        op = "cluster_step"
        out.append(Work(f"evaluation: {name}", op, half, own * rows, own * per))
    return out
