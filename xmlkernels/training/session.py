"""What a run works with, opened once: output folder, data, label tree, plan and model."""

import json
import logging

import torch

from xmlkernels import dist
from xmlkernels.metrics import inverse_propensity
from xmlkernels.training.build import build_model
from xmlkernels.training.config import Config, recorded
from xmlkernels.training.environment import commit, environment
from xmlkernels.training.folder import RunFolder
from xmlkernels.training.inputs import open_dataset, open_inputs, open_tree, training_batches
from xmlkernels.training.plan import before_data, resolve
from xmlkernels.training.progress import Frequencies

log = logging.getLogger(__name__)


class Session:
    """Everything of a run that stays as it is while the model trains, and the model.

    Among several processes, each holds all of it but the documents of the others. All take the same
    decisions; the first writes.

    Attributes:
        config: the settings, as given.
        plan: the settings, resolved.
        folder: where the run writes.
        dataset, validation, test: the data; a dataset may lack the last two.
        inputs: how documents are read.
        tree: of a cascade; None end to end.
        batches: of the training split, one per update.
        model: what is trained.
        inverse_propensity: [L], for the metrics.
        frequencies: what a sum over all labels is compared with; None where the loss is a mean.
        environment: what the bits of a result depend on besides settings and data.
        commit: of the source tree.

    Raises:
        InputError: the output folder holds a run (found before any work), or data and settings do
            not fit.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = RunFolder(config)
        self.commit = commit()  # now: the tree may change while the run goes on
        with dist.first_alone():
            self.dataset = open_dataset(config)
        splits = self.dataset.splits
        self.validation, self.test = splits.get("val"), splits.get("test")
        self.inputs = open_inputs(config, self.dataset)
        with dist.first_alone():
            self.tree = open_tree(config, self.dataset)
        early = before_data(config)
        self.batches = training_batches(
            config, self.dataset, self.inputs, self.tree, graphs=early.graphs
        )
        # Propensities always from the documents themselves, never from the labels' own texts.
        train = splits["train"].labels
        self.inverse_propensity = inverse_propensity(train, *self.dataset.propensity)
        self.plan = resolve(config, early, self.dataset, self.tree, len(self.batches))
        self.model = build_model(self.plan, self.dataset, self.inputs, self.tree)
        if self.plan.graphs:
            self.model.capture(None if config.cuda_graph == "on" else log.info)
        self.environment = environment(self.plan, self.model)
        self._agree()
        self._introduce()
        self.frequencies: Frequencies | None = None
        if self.model.sums_loss:
            self.frequencies = Frequencies(train, label_texts=config.label_text)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.plan.device

    def _agree(self) -> None:
        """Refuse processes that would not take the same steps."""
        tree = self.tree and self.tree.content_hash
        versions = self.environment | {"device": self.device.type}
        for what, found in (
            ("settings", recorded(self.config)),
            ("dataset", [self.dataset.content_hash, tree]),
            ("vocabulary", self.inputs.config()),
            ("versions and number formats", versions),
            ("source tree", self.commit),
        ):
            dist.agree(what, json.dumps(found), torch.device("cpu"))

    def _introduce(self) -> None:
        now, data, plan = self.environment, self.dataset, self.plan
        many = f" in each of {dist.size()} processes" if dist.size() > 1 else ""
        log.info(
            f"dataset {data.name} (hash {data.content_hash[:12]}): "
            f"{len(data.splits['train']):,} documents, {data.num_labels:,} labels; "
            f"table {now['table']}, encoder autocast {now['autocast']}, "
            f"{now['device']}, {now['threads']} threads{many}; {plan.steps:,} steps"
        )
        if self.tree is not None:
            levels = " → ".join(f"{size:,}" for size in self.tree.sizes)
            log.info(
                f"label tree {self.tree.content_hash[:12]}: {levels} labels; "
                f"{self.model.describe()}"
            )
        if plan.warmup >= plan.steps:
            log.info(
                f"note: warm-up ({plan.warmup:,} steps) lasts to the end: the learning rate never "
                "reaches its peak"
            )
