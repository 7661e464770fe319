"""The memory of a run by device, phase and part: what a run logs and `xmlkernels plan` prints.

Letters: B documents of an update, L labels, n rows of a table, D width.
"""

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from xmlkernels import dist
from xmlkernels.memory import free_memory, resident_memory
from xmlkernels.models.kinds import KINDS
from xmlkernels.nn.bow import BowEncoder
from xmlkernels.nn.encoder import Encoder
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.table import Table
from xmlkernels.planner import Budget, label_bytes, summed, table_parts
from xmlkernels.planner import plan as model_parts
from xmlkernels.planner.parts import (
    activation_bytes,
    descent_bytes,
    evaluation_bytes,
    first_values_bytes,
    gathered_bytes,
    module_bytes,
    report_bytes,
    saved_bytes,
    tree_bytes,
    vector_bytes,
    workspace_bytes,
)
from xmlkernels.training.facts import TreeShape
from xmlkernels.training.plan import Plan

SO_FAR = "process so far"
FIRST, STEP, EVALUATION = "the first values", "a step", "an evaluation"
READING, REPORT = "the best checkpoint read", "the last report"
COPY = "copy for checkpoints"
_HOST = torch.device("cpu")
_CONTEXT = 600 << 20  # of a card: CUDA, its libraries and kernels; an estimate


@dataclass(frozen=True)
class RunMemory:
    """The memory of one process.

    Attributes:
        device: that the model is on, its name, and what it holds; the host's too where that is it.
        host: what the host holds of a model on a card; None where the model is on the host.
        apart: the device of a cascade's label table, where it has one of its own.
    """

    device: tuple[str, Budget]
    host: Budget | None = None
    apart: tuple[str, Budget] | None = None

    def budgets(self) -> dict[str, Budget]:
        """Put together what each memory holds, by device."""
        found = dict([self.device])
        for name, budget in (("cpu", self.host), self.apart or ("", None)):
            if budget is not None:
                found[name] = summed([found[name], budget]) if name in found else budget
        return found


def process_so_far(encoder: nn.Module | None = None) -> dict[str, int]:
    """Bytes that this process holds by now: interpreter, libraries, opened data.

    What the first step loads anyway is loaded before.

    Args:
        encoder: in memory, to be counted by itself.
    """
    _first_use()
    own = 0 if encoder is None else module_bytes(encoder)
    found = resident_memory()
    return {} if found is None else {SO_FAR: max(0, found - own)}


def _first_use() -> None:
    """Load what a run loads on its way: torch's optimizers, checkpoints, the code of the ops.

    It draws nothing from torch's generator.
    """
    importlib.import_module("torch._dynamo")
    importlib.import_module("safetensors.torch")
    head = FullHead(64, 8)
    x, row = torch.ones(2, 8), torch.tensor([1, 5])
    sample = torch.tensor([0, 1], dtype=torch.int32)
    head.step(x, row, sample, lr=0.0, need_loss=True)
    head.topk(x, 2)
    head.loss(x, row, sample)
    bag = BowEncoder(8, 8, optimizer="adam")
    bag(row, torch.tensor([0, 1, 2]), x[0, :2]).sum().backward()
    bag.update(0.0)


def processes_here() -> int:
    """Count the processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.size() > 1 else 1


def room_of_each() -> int | None:
    """Bytes of the host that this process can still take beside the others; None: nobody knows."""
    free = free_memory()
    return None if free is None else free // processes_here()


def candidates_of(plan: Plan, tree: TreeShape | None) -> tuple[int, ...]:
    """Candidates of a document at each level of a cascade; none end to end."""
    if tree is None or plan.cascade is None:
        return ()
    kept = zip(plan.cascade.topk, tree.sizes, strict=False)
    return (tree.sizes[0], *(min(k, n) * tree.widest(r) for r, (k, n) in enumerate(kept)))


def memory_of(
    plan: Plan,
    encoder: nn.Module,
    tables: Mapping[str, Table],
    tree: TreeShape | None = None,
    *,
    here: Mapping[str, int],
    processes: int = 1,
    free: int | None = None,
) -> RunMemory:
    """Count what a run will hold, before its tables are allocated.

    Args:
        plan: its settings.
        encoder: of the run; its tensors may be on the meta device.
        tables: by what to call them, the labels' last; see `planned`.
        tree: of a cascade.
        here: what a process holds on the host before it has a model.
        processes: of the run.
        free: bytes of the host that this process may take from then on; None: nobody knows.
    """
    config, cuda = plan.config, plan.device.type == "cuda"
    candidates = candidates_of(plan, tree)
    *clusters, last = tables
    beside = tables if plan.label_device is None else {name: tables[name] for name in clusters}
    parts = model_parts(
        encoder,
        beside,
        documents=plan.documents,
        tokens=plan.longest,
        update=plan.update,
        # The scores of the label level are on both devices: made on one, ranked on the other.
        candidates=candidates,
        mean=config.ema > 0,
        table_means=config.ema_tables,
        processes=processes if plan.encoder_sharded else 1,
    )
    held, step = _split(parts)
    whole = plan.update if processes > 1 else 0
    vectors = vector_bytes(plan.update, [table.width for table in tables.values()], whole=whole)
    step |= {"vectors": vectors, "working memory of the ops": _working(beside, plan.update, cuda)}
    gathered = {}
    if plan.encoder_sharded and isinstance(encoder, Encoder):
        gathered = {"encoder's parts, gathered": gathered_bytes(encoder)}
    elif processes > 1:
        # Gradients are sent in few large messages, of 64 MiB and one gradient more at most.
        step["gradients on their way"] = min(held.get("its gradients", 0), 64 << 20)
    many = config.evaluate_batch
    passed = activation_bytes(encoder, many, plan.longest, training=False)
    evaluation = {
        "activations (estimate)": passed,
        "working memory of the ops": _working(beside, many, cuda),
        "candidates": descent_bytes(many, candidates),
    }
    phases = {FIRST: _first(plan, beside), STEP: step | gathered, EVALUATION: evaluation | gathered}
    beside_model = {"CUDA (estimate)": _CONTEXT} if cuda else {}
    if tree is not None:
        beside_model["label tree"] = tree_bytes(tree.sizes)
    device = Budget(beside_model | held, phases)
    apart = None
    if plan.label_device is not None:
        own = {last: tables[last]}
        far = table_parts(own, plan.update, candidates[-1:], means=config.ema_tables)
        far_held, far_step = _split(far)
        held = held | far_held
        far_step["working memory of the ops"] = _working(own, plan.update, cuda=False)
        apart = str(plan.label_device), Budget(far_held, {STEP: far_step})
    taken = apart[1].held if apart is not None and plan.label_device == _HOST else {}
    host = _host(plan, here, tables, saved_bytes(held), taken if cuda else held, free)
    if cuda:
        return RunMemory((str(plan.device), device), host, apart)
    return RunMemory((str(plan.device), summed([host, device])), None, apart)


def _host(
    plan: Plan,
    here: Mapping[str, int],
    tables: Mapping[str, Table],
    saved: int,
    beside: Mapping[str, int],
    free: int | None,
) -> Budget:
    """Count what the host holds wherever the model is.

    Args:
        plan, here, tables, free: see `memory_of`.
        saved: bytes of a checkpoint's tensors that are in memory.
        beside: what of the model is on the host.
    """
    config, facts, kind = plan.config, plan.facts, KINDS[plan.config.model]
    labels, kept = facts.labels, max(config.top_k, 5)
    chooses = config.scheme == "auto" and facts.validation > 0
    schemes = len(kind.schemes) if chooses else 1
    own = {"propensities": label_bytes(labels, sums_loss=kind.sums_loss)}
    for name, table in tables.items():
        rows = sum(table.stored_bytes().values())
        if config.table_store == "host" and rows:
            own[f"rows of {name}"] = rows
    held = dict(here) | own
    phases: dict[str, dict[str, int]] = {}
    if measured := max(facts.validation, facts.test):
        phases[EVALUATION] = evaluation_bytes(
            measured, labels, kept, schemes=schemes, sums_loss=kind.sums_loss
        )
        reported = facts.test or facts.validation
        phases[REPORT] = report_bytes(reported, labels, kept)
    if facts.validation and config.epochs > config.evaluate_every:
        # Of several evaluations the best may not be the last.
        phases[READING] = {"checkpoint": saved}
    # Decided at the first step, as `has_room` does; the copy stays to the end of the run.
    room = None if free is None else free - sum(own.values()) - sum(beside.values())
    if config.background_save == "on" or room is None or 2 * saved <= room:
        stored = any(table.stored_bytes() for table in tables.values())
        if config.background_save != "off" and not stored:
            for phase in {STEP, EVALUATION, *phases}:
                phases.setdefault(phase, {})[COPY] = saved
    return Budget(held, phases)


_MEANWHILE = ("activations", "gradients of one table", "shortlists")


def _split(parts: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Divide the parts of a model into those that stay and those of a step."""
    step = {name: count for name, count in parts.items() if name.startswith(_MEANWHILE)}
    return {name: count for name, count in parts.items() if name not in step}, step


def _first(plan: Plan, tables: Mapping[str, Table]) -> dict[str, int]:
    centroids = plan.config.centroid_norm > 0
    each = (first_values_bytes(table, centroids=centroids) for table in tables.values())
    return {"first values": max(each, default=0)}


def _working(tables: Mapping[str, Table], documents: int, cuda: bool) -> int:
    """Bytes that the largest op works in: tables are trained one after the other."""
    each = (workspace_bytes(table, documents, cuda=cuda) for table in tables.values())
    return max(each, default=0)


def words_of(encoder: nn.Module) -> Table | None:
    """Find the word table of a bag of words; None of any other encoder."""
    return encoder.table if isinstance(encoder, BowEncoder) else None
