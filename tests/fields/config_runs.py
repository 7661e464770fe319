"""Tiny training runs that record what every step used, for the tests of each flag."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor, nn
from train_runs import Config, cascade, make_dataset, make_tree, run, session, tiny

from xmlkernels.checkpoint import CheckpointFolder, Content
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.prepare import PrepareConfig, prepare

BATCH, EPOCHS, PER_EPOCH = 32, 2, 5  # 160 training documents
STEPS = EPOCHS * PER_EPOCH
# The label table in fp32 (auto is bf16 on some machines), no decay and a short warm-up: what a case
# changes stands out.
_SHARED: dict[str, Any] = {
    "batch": BATCH,
    "epochs": EPOCHS,
    "log_every": 1,
    "loss_every": 1,
    "save_every": 0,
    "warmup": 3,
    "table": "fp32",
    "top_k": 20,
}
BASES: dict[str, dict[str, Any]] = {
    "tiny": {"momentum": 0.0, "table_decay": 0.0, "encoder_decay": 0.0},
    "cascade": {},
    "bow": {
        "encoder": "bow",
        "bow_width": 24,
        "min_df": 1,
        "encoder_lr": 0.02,
        "table_lr": 0.05,
        "table_optimizer": "adam",
        "bias": True,
        "encoder_decay": 0.0,
        "table_decay": 0.0,
    },
}
ONE_STEP: dict[str, Any] = {"batch": 160, "epochs": 1, "warmup": 0}


@dataclass(repr=False)
class Step:
    """What one update used.

    Attributes:
        index: numbers of its documents.
        passes: documents per pass of the transformer; gradient caching passes each twice.
        groups: lr, betas, eps, weight_decay and `head` of each group of the encoder's optimizer.
        norm: of the gradient that the optimizer got, over all its parameters.
        hyper: of each table, in order of the model's modules: lr, decay, beta1, beta2, epsilon,
            scale, dx_scale.
        weights: what is trained, after the step, by name.
    """

    index: list[int]
    passes: list[int]
    groups: list[dict[str, Any]]
    norm: float
    hyper: list[Tensor]
    weights: dict[str, Tensor]

    def rate(self, *, head: bool = False) -> float:
        """Return the rate of the encoder, or of the linear layer of a cascade."""
        return float(next(group["lr"] for group in self.groups if group.get("head", False) == head))


@dataclass(repr=False)
class Seen:
    """A run and what was recorded of it.

    Attributes:
        told: what it printed.
        start: the initial values of what is trained.
        saved: steps of its checkpoints.
        evaluated: documents per pass of the transformer in evaluation.
    """

    config: Config
    folder: Path
    report: dict[str, Any] = field(default_factory=dict)
    told: str = ""
    dataset: Any = None
    inputs: Any = None
    tree: Any = None
    model: Any = None
    start: dict[str, Tensor] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    evaluated: list[int] = field(default_factory=list)

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]

    @property
    def progress(self) -> list[dict[str, Any]]:
        return [line for line in self.log if "split" not in line]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the last checkpoint."""
        return CheckpointFolder(self.folder / "checkpoint").load("last")[0]

    @property
    def predictions(self) -> scipy.sparse.csr_matrix:
        return scipy.sparse.load_npz(self.folder / "predictions.npz").tocsr()

    def moved(self, name: str) -> Tensor:
        """Return how far the run has moved a weight from its initial value."""
        return self.steps[-1].weights[name] - self.start[name]

    def factors(self) -> list[float]:
        """Return the rate of the encoder in every step, in units of --encoder-lr."""
        return [step.rate() / self.config.encoder_lr for step in self.steps]


def _tables(model: nn.Module) -> list[Tensor]:
    return [
        module.hyper
        for module in model.modules()
        if isinstance(getattr(module, "hyper", None), Tensor)
    ]


def _trained(model: Any) -> dict[str, Tensor]:
    """Copy parameters and tables."""
    trained, ends = dict(model.named_parameters()), (".weight", ".bias", ".table")
    held = {k: v for k, v in model.state_dict().items() if k in trained or k.endswith(ends)}
    return {name: value.detach().clone() for name, value in held.items()}


def _watch(seen: Seen, model: Any) -> None:
    """Record every step of a model."""
    passes: list[int] = []
    norms: list[float] = []
    inner = getattr(model.encoder, "model", None)
    if inner is not None:
        inner.register_forward_pre_hook(
            lambda module, given, named: (passes if module.training else seen.evaluated).append(
                len(named["input_ids"])
            ),
            with_kwargs=True,
        )

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        grads = [
            p.grad
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))

    model.optimizer.register_step_pre_hook(before)
    step = model.step

    def stepped(batch: Any, **options: Any) -> Tensor:
        passes.clear()
        norms.clear()
        loss = step(batch, **options)
        keys = ("lr", "betas", "eps", "weight_decay", "head")
        groups = [
            {key: group[key] for key in keys if key in group}
            for group in model.optimizer.param_groups
        ]
        hyper = [table.clone() for table in _tables(model)]
        seen.steps.append(
            Step(batch.index.tolist(), list(passes), groups, norms[0], hyper, _trained(model))
        )
        return loss

    seen.start, model.step = _trained(model), stepped


class Runs:
    """Makes runs on one small dataset and keeps them: cases with the same settings share a run.

    Attributes:
        dataset: 160 documents, 30 labels, with texts and label texts.
        other: 64 documents, 400 labels.
        tree: of the first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dataset = make_dataset(folder / "raw", keep_texts=True)
        self.tree = make_tree(self.dataset, folder / "tree.safetensors")
        self._kept: dict[str, Seen] = {}
        self._number = itertools.count()

    @functools.cached_property
    def other(self) -> Path:
        """A dataset of whose labels only the first ten occur.

        Of four groups of 128 rows one has positives.
        """
        folder = self.folder / "other"
        folder.mkdir()
        for part, count in (("train", 64), ("test", 20)):
            (folder / f"{part}.txt").write_text(
                "".join(f"w{n % 10} w{n % 7}\n" for n in range(count))
            )
            (folder / f"{part}_labels.txt").write_text(
                f"{count} 400\n" + "".join(f"{n % 10}:1\n" for n in range(count))
            )
        files = {
            f"{part}_{what}": folder / f"{part}{end}.txt"
            for part in ("train", "test")
            for what, end in (("text", ""), ("labels", "_labels"))
        }
        tokenizer = str(self.folder / "raw" / "tokenizer")
        prepare(
            PrepareConfig(output=folder / "dataset", tokenizer=tokenizer, max_length=16, **files)
        )
        return folder / "dataset"

    def config(self, base: str, **changes: Any) -> Config:
        """Configure a run of 10 steps with a folder of its own."""
        output = self.folder / f"run{next(self._number)}"
        made = (
            cascade(self.dataset, output, self.tree)
            if base == "cascade"
            else tiny(self.dataset, output)
        )
        return replace(made, **_SHARED | BASES[base] | changes)

    def of(self, base: str, **changes: Any) -> Seen:
        key = json.dumps([base, changes], sort_keys=True)
        if key not in self._kept:
            self._kept[key] = recorded(self.config(base, **changes))
        return self._kept[key]


def recorded(config: Config) -> Seen:
    """Run a configuration and record it."""
    seen, told = Seen(config, Path(config.output)), io.StringIO()
    build, save = session.build_model, CheckpointFolder.write_last

    def built(plan: Any, dataset: Dataset, inputs: Any, tree: Any) -> Any:
        model = build(plan, dataset, inputs, tree)
        seen.dataset, seen.inputs, seen.tree, seen.model = dataset, inputs, tree, model
        _watch(seen, model)
        return model

    def saved(self: CheckpointFolder, content: Content, *rest: Any) -> None:
        seen.saved.append(json.loads(content.text)["steps"])
        save(self, content, *rest)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
        patch.setattr(session, "build_model", built)
        patch.setattr(session, "commit", lambda: "a commit")
        patch.setattr(CheckpointFolder, "write_last", saved)
        seen.report = run(config)
    seen.told = told.getvalue()
    seen.model.eval()
    return seen


@dataclass(frozen=True)
class Case:
    """How one field is tested.

    Attributes:
        base: a key of BASES.
        changes: the field's value, and whatever else it needs.
        holds: asserts on (the run without the change, the run with it).
        beside: settings of both runs.
    """

    base: str
    changes: dict[str, Any]
    holds: Callable[[Seen, Seen], None]
    beside: dict[str, Any] = field(default_factory=dict)

    def check(self, runs: Runs) -> None:
        self.holds(
            runs.of(self.base, **self.beside), runs.of(self.base, **self.beside | self.changes)
        )


def zero_share(values: Tensor) -> float:
    """Return the share of exact zeros."""
    return float((values == 0).float().mean())


@contextlib.contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Put the model into training mode, to look at its dropout."""
    before = model.training
    model.train()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(before)


def documents(seen: Seen, split: str = "test") -> Any:
    """Make one batch of all documents of a split, as the run reads them."""
    found = seen.dataset.splits[split]
    more: dict[str, Any] = {}
    if seen.tree is not None:
        order = np.asarray(seen.tree.order)
        more = {
            "order": order,
            "ancestors": tuple(seen.tree.ancestors(r) for r in range(seen.tree.levels - 1)),
        }
    (batch,) = seen.inputs.batches(found, len(found), shuffle=False, **more).epoch(0)
    return batch
