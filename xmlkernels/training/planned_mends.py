"""The nearest change that makes a run fit: what can be given up, in the order of what it costs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from xmlkernels.training.forecast import COPY
from xmlkernels.training.planned_sizes import PlanConfig
from xmlkernels.training.planning import Forecast, forecast

_MOST = 3  # changes together
_GPUS = 1024


@dataclass(frozen=True)
class Mend:
    """One change.

    Attributes:
        kind: no two of a kind go together.
        flags: as one types it.
        cost: what is given up for it.
        run: fields of the run that it changes.
        gpus: processes; 0 leaves them.
    """

    kind: str
    flags: str
    cost: str
    run: dict[str, Any]
    gpus: int = 0

    def applied(self, options: PlanConfig) -> PlanConfig:
        """Return the options with this change."""
        options = replace(options, run=replace(options.run, **self.run))
        return replace(options, gpus=self.gpus) if self.gpus else options


@dataclass(frozen=True)
class Tried:
    """Changes that were tried together, and what they lead to."""

    mends: tuple[Mend, ...]
    forecast: Forecast

    @property
    def flags(self) -> str:
        """As one types them."""
        return " ".join(mend.flags for mend in self.mends)

    @property
    def costs(self) -> str:
        """What is given up."""
        return "; ".join(mend.cost for mend in self.mends)


def mends_of(found: Forecast) -> list[Mend]:
    """List what can be changed, cheapest first.

    Waiting for checkpoints, a second forward pass and an encoder in parts cost time alone; then
    come coarser states, coarser weights, no momentum, e4m3; then another device beside, a table on
    the host or on a disk, then more devices.
    """
    return list(_mends(found))


def _mends(found: Forecast) -> Iterator[Mend]:
    plan, run, options = found.plan, found.plan.config, found.subject.options
    budgets = found.memory.budgets()
    if any(COPY in budgets[device].parts() for device in found.lacks()):
        cost, off = "training waits for each checkpoint", {"background_save": "off"}
        yield Mend("copy", "--background-save off", cost, off)
    if run.encoder != "bow" and run.accumulate == 1:
        own = plan.documents
        for parts in (2, 4, 8, 16, 32):
            if own // parts >= 1:
                flags, cost = f"--micro-batch {own // parts}", "a second forward pass"
                yield Mend("micro", flags, cost, {"micro_batch": own // parts})
    whole = run.shard_encoder == "off" and run.shard_labels != "off" and not run.compile
    if run.encoder != "bow" and options.gpus > 1 and whole:
        cost = "layers are gathered in every pass"
        yield Mend("encoder", "--shard-encoder on", cost, {"shard_encoder": "on"})
    fused = run.impl == "fused" and run.table_compute == "auto"
    if fused and plan.state == "fp32":
        cost = "states are rounded, without bias"
        yield Mend("state", "--state bf16", cost, {"state": "bf16"})
    if fused and plan.table == "fp32":
        cost = "weights are rounded, without bias"
        yield Mend("table", "--table bf16", cost, {"table": "bf16"})
    if plan.optimizer == "sgd" and plan.state is not None:
        gone: dict[str, Any] = {"momentum": 0.0, "state": "fp32"}
        yield Mend("state", "--momentum 0", "no momentum", gone)
    dense = plan.optimizer == "adamw_dense"
    if fused and plan.table != "fp8" and not (dense or run.kahan or run.ema_tables):
        yield Mend("table", "--table fp8", "weights of three bits", {"table": "fp8"})
    cascade = run.model == "cascade"
    here = run.label_device == "auto" and run.table_store == "ram"
    if cascade and found.subject.card.cuda and here:
        cost = "the label level at the host's rate"
        yield Mend("place", "--label-device cpu", cost, {"label_device": "cpu"})
    kept_alone = options.gpus == 1 or plan.sharded
    if fused and here and kept_alone and not (dense or run.ema_tables):
        if found.subject.card.cuda:
            cost, kept = "the label table at the rate of the bus", {"table_store": "host"}
            yield Mend("place", "--table-store host", cost, kept)
        cost, kept = "the label table at a disk's rate", {"table_store": "file:FOLDER"}
        yield Mend("place", "--table-store file:FOLDER", cost, kept)
    gpus = 2 * options.gpus
    while found.subject.card.cuda and gpus <= min(_GPUS, plan.update):
        yield Mend("gpus", f"--gpus {gpus}", f"{gpus} devices", {}, gpus)
        gpus *= 2


def nearest(found: Forecast) -> tuple[Tried | None, list[Tried]]:
    """Find the nearest change that fits, and what was tried before it.

    Single changes come first, in the order of `mends_of`; then two, then three together.

    Returns:
        The change, None where three together do not suffice; and the single ones that do not.
    """
    mends, failed = mends_of(found), list[Tried]()
    for count in range(1, _MOST + 1):
        for chosen in combinations(mends, count):
            if len({mend.kind for mend in chosen}) < count:
                continue
            options = found.subject.options
            for mend in chosen:
                options = mend.applied(options)
            subject = replace(found.subject, options=options)
            tried = Tried(chosen, forecast(subject, found.here))
            if not tried.forecast.lacks():
                return tried, failed
            if count == 1:
                failed.append(tried)
    return None, failed
