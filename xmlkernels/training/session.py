"""What a run keeps beside its loop: data, model, checkpoints, metrics. The loop itself stands in
loop.py.
"""

import json
import logging
import math
import resource
from collections.abc import Mapping
from signal import SIGTERM, Signals
from typing import Any, NoReturn

import torch
from torch import Tensor

from xmlkernels import dist
from xmlkernels.checkpoint import rng_state, set_rng_state
from xmlkernels.data.dataset import Split
from xmlkernels.data.formats.matrices import write_npz
from xmlkernels.evaluation import Evaluation, evaluate_schemes, evaluate_split, score_matrix
from xmlkernels.files import naming
from xmlkernels.metrics import decile_table, evaluate, inverse_propensity, macro_metrics
from xmlkernels.models.base import Documents, Model
from xmlkernels.models.saved import model_config
from xmlkernels.training.build import (
    build_model,
    draw_apart,
    keep_class_token,
    start_table,
    warmup_steps,
)
from xmlkernels.training.clock import Clock
from xmlkernels.training.config import Config, recorded, resolved_device
from xmlkernels.training.environment import commit, differences, environment
from xmlkernels.training.folder import RunFolder, write_json
from xmlkernels.training.inputs import open_dataset, open_inputs, open_tree, training_batches
from xmlkernels.training.progress import Frequencies, Progress
from xmlkernels.training.resume import check_same, newest
from xmlkernels.training.stops import Stopped, Watched, asked

log = logging.getLogger(__name__)

SHOWN = {"val": "validation"}


class Session:
    """One run's state.

    Of several processes each holds all of it but the documents of the others: all take the same
        decisions, the first writes.

    Attributes:
        model, batches, validation, test: what the loop works on; validation and test may be None.
        epoch, position: where the run stands: batches of this epoch already trained on.
        clock: seconds in the training loop, in evaluation and in writing checkpoints, over all
            resumed parts.
        best: the best validation metric so far, with its epoch and step; empty before the first
            evaluation.
        saved: the step of the last checkpoint; None before there is one.
        commits: of the source tree at the start of the run and wherever a resumed part had another
            one.

    Raises:
        InputError: the output folder holds a run (told before any work), or data and settings do
            not fit.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = RunFolder(config)
        self.commits = [commit()]  # now: the tree may change while the run goes on
        self.device = resolved_device(config.device)
        with dist.first_alone():
            self.dataset = open_dataset(config)
        splits = self.dataset.splits
        self.validation, self.test = splits.get("val"), splits.get("test")
        self.inputs = open_inputs(config, self.dataset)
        with dist.first_alone():
            self.tree = open_tree(config, self.dataset)
        self.batches = training_batches(config, self.dataset, self.inputs, self.tree)
        # Propensities always from the documents themselves, never from the labels' own texts.
        self.inverse_propensity = inverse_propensity(
            splits["train"].labels, *self.dataset.propensity
        )
        self.total = len(self.batches) * config.epochs
        self.model = build_model(
            config,
            self.dataset,
            self.inputs,
            self.total,
            self.device,
            tree=self.tree,
            epoch=len(self.batches),
        )
        self.environment = environment(config, self.model)
        self._agree()
        self.clock = Clock()
        self.epoch = self.position = self.documents = 0
        self.best: dict[str, float] = {}
        self.measured: tuple[Any, dict[str, Any], Evaluation] | None = (
            None  # of which split and step
        )
        self.pending: list[tuple[Tensor, int]] = []
        self.marked = (0, 0.0)  # documents and seconds at the last log line
        self.saved: int | None = None
        self._stop = dist.Vote()
        if self.folder.resumable:
            self._resume()
        else:
            start_table(config, self.dataset, self.inputs, self.model)
            self.folder.begin(self.dataset, self.inputs, self.tree)
        self._introduce()
        sums, log = self.model.sums_loss, self.folder.log_file if self.folder.writes else None
        self.frequencies = (
            Frequencies(splits["train"].labels, label_texts=config.label_text) if sums else None
        )
        told = self.frequencies.told() if self.frequencies else ""
        self.progress = Progress(self.total, self.model.steps, reference=told, log=log)

    def _agree(self) -> None:
        """Refuses processes that would not take the same steps."""
        tree, versions = (
            self.tree and self.tree.content_hash,
            self.environment | {"device": self.device.type},
        )
        for what, found in (
            ("settings", recorded(self.config)),
            ("dataset", [self.dataset.content_hash, tree]),
            ("vocabulary", self.inputs.config()),
            ("versions and number formats", versions),
            ("source tree", self.commits),
        ):
            dist.agree(what, json.dumps(found), torch.device("cpu"))

    def _introduce(self) -> None:
        now = self.environment
        many = f" in each of {dist.size()} processes" if dist.size() > 1 else ""
        log.info(
            f"dataset {self.dataset.name} (hash {self.dataset.content_hash[:12]}): "
            f"{len(self.dataset.splits['train']):,} "
            f"documents, {self.dataset.num_labels:,} labels; table {now['table']}, encoder "
            f"autocast {now['autocast']}, "
            f"{now['device']}, {now['threads']} threads{many}; {self.total:,} steps"
        )
        if self.tree is not None:
            levels = " → ".join(f"{size:,}" for size in self.tree.sizes)
            log.info(
                f"label tree {self.tree.content_hash[:12]}: {levels} labels; "
                f"{self.model.describe()}"
            )
        if (warmup := warmup_steps(self.config, len(self.batches))) >= self.total:
            log.info(
                f"note: warm-up ({warmup:,} steps) lasts to the end: the learning rate never "
                "reaches its peak"
            )

    # ---- checkpoints ----

    def _resume(self) -> None:
        checkpoints = self.folder.checkpoints
        tensors, state, which = newest(checkpoints, self.config, len(self.batches))
        dist.agree("the checkpoint to go on from", which, torch.device("cpu"))
        check_same(state, self.dataset, self.inputs, self.tree)
        self._take(tensors, state)
        keep_class_token(self.model, state)
        self._draw_on(state)
        self.epoch, self.position, self.best = state["epoch"], state["position"], state["best"]
        self.clock.spent |= {
            part: float(value)  # type: ignore[arg-type]
            for part, value in state["seconds"].items()
            if part in self.clock.spent
        }
        self.pending = [(torch.tensor([value]), count) for value, count in state["pending"]]
        self.documents, self.marked = (
            state["documents"],
            (state["documents"], state["seconds"]["train"]),
        )
        before = state.get("commits", [])
        self.commits = before + [c for c in self.commits if before[-1:] != [c]]
        self.saved = self.model.steps
        dist.wait()  # until all have read what the first may move
        if which != "last" and self.folder.writes:
            checkpoints.put_back(which)
        self.folder.go_on(state.get("beside"), self.dataset, self.inputs)
        if self.best.get("step") == self.model.steps and self.folder.writes:
            # the run may have been stopped between writing `last` and linking `best` to it
            checkpoints.save_best()
        self.folder.rewind_log(state["log_bytes"])
        log.info(
            f"resumed at step {self.model.steps:,} (epoch {self.epoch + 1}, batch {self.position})"
        )
        if changed := differences(state.get("environment", {}), self.environment):
            log.info(f"note: {changed}; the run goes on, but not bit for bit as it would have")

    def _take(self, tensors: dict[str, Tensor], state: Mapping[str, Any]) -> None:
        """Puts a checkpoint's weights into the model, with the scheme that validation had chosen
        when it was written.
        """
        self.model.load_tensors(tensors)
        scheme = model_config(state)["head"].get("scheme", self.model.scheme)
        self.model.use_scheme(scheme)

    def _draw_on(self, state: Mapping[str, Any]) -> None:
        """Draws as the run would have; a process that it did not have, or had with other devices,
        draws anew.
        """
        states = [state["rng"], *state.get("other_rngs", [])]
        if dist.rank() < len(states):
            set_rng_state(states[dist.rank()])
        else:
            draw_apart(self.config, self.model.steps)

    def _state(self) -> dict[str, Any]:
        model, (rng, *others) = (
            self.model,
            map(json.loads, dist.gather_texts(json.dumps(rng_state()))),
        )
        return {
            "model": model.config(),
            "inputs": self.inputs.config(),
            "dataset": self.dataset.content_hash,
            "epoch": self.epoch,
            "position": self.position,
            "steps": model.steps,
            "seconds": self.clock.seconds(),
            "best": self.best,
            "documents": self.documents,
            "pending": [(float(value), count) for value, count in self.pending],
            "log_bytes": self.folder.sync_log(),
            "rng": rng,
            "commits": self.commits,
            "environment": self.environment,
            "tree": self.tree and self.tree.content_hash,
            "beside": self.folder.beside,
        } | ({"other_rngs": others} if others else {})

    def save(self, *, best: bool = False) -> None:
        """Writes the last checkpoint and, where it is the best too, links it as that; `_resume`
        mends a stop in between.
        """
        with self.clock.on("save"):
            tensors, state = self.model.tensors(), self._state()
            dist.agree_on_tensors(tensors)
            if self.folder.writes:
                with naming(self.folder.path / "checkpoint"):
                    self.folder.checkpoints.save_last(tensors, state)
            self.saved = self.model.steps
            if best and self.folder.writes:
                self.folder.checkpoints.save_best()

    def stop_if_asked(self) -> None:
        """Saves and raises Stopped where a signal has asked for it; of several processes all do at
        the same step.
        """
        if self._stop.yes(asked() != 0):
            self._save_and_stop()

    def _save_and_stop(self) -> NoReturn:
        if self.saved != self.model.steps:
            self.save()
        dist.wait()  # torchrun ends all as soon as one has left
        how = (
            f"stopped at step {self.model.steps:,}, whose checkpoint is written: go on from it "
            "with --resume"
        )
        number = asked() or SIGTERM  # another process may be the one that was asked
        raise Stopped(number, f"{how} ({Signals(number).name})")

    def validate(self) -> dict[str, float]:
        """The metrics of the validation split; a run that is stopped meanwhile goes on from the
        step before.
        """
        assert self.validation is not None
        try:
            return self.evaluate(self.validation)[0]
        except Stopped:
            self.epoch, self.position = self.epoch - 1, len(self.batches)
            self._save_and_stop()

    def improved(self, metrics: dict[str, float]) -> bool:
        """Whether the validation metrics are the best so far; remembers them if so."""
        by = self.config.best_by
        if self.best and not metrics[by] > self.best[by]:
            return False
        self.best = {by: metrics[by], "epoch": self.epoch, "step": self.model.steps}
        return True

    # ---- log ----

    def collect(self, loss: Tensor, batch: Documents) -> None:
        self.documents += len(batch)
        if loss.numel():
            # Per document: a sum over the batch as it is, a mean once for each document.
            self.pending.append((loss if self.model.sums_loss else loss * len(batch), len(batch)))

    def log_progress(self) -> None:
        """One line to the log: the mean of the finite losses since the last, speed, skipped steps;
        and, where it is time for one, to the terminal."""
        loss, speed, seconds = self._since()
        epoch = self.epoch + self.position / len(self.batches)
        self.folder.log(
            {
                "step": self.model.steps,
                "epoch": epoch,
                "loss": loss,
                "documents_per_second": speed,
                "seconds": seconds,
            }
            | self.model.counters()
        )
        if self.progress.due(logged=True):
            self.progress.tell(self.model.steps, epoch, loss, speed, a_sum=self.model.sums_loss)
        self.pending, self.marked = [], (self.documents, seconds)

    def tell_progress(self) -> None:
        """The line to the terminal alone, between two of the log; the next of the log is what it
        would have been.
        """
        loss, speed, _ = self._since()
        epoch = self.epoch + self.position / len(self.batches)
        self.progress.tell(self.model.steps, epoch, loss, speed, a_sum=self.model.sums_loss)

    def _since(self) -> tuple[float | None, float, float]:
        """Since the last line of the log: mean of the finite losses and documents per second; and
        seconds of training.
        """
        seconds = self.clock.seconds()["train"]
        speed = (self.documents - self.marked[0]) / max(seconds - self.marked[1], 1e-9)
        finite = [
            (value, count)
            for value, count in ((float(v), n) for v, n in self.pending)
            if math.isfinite(value)
        ]
        loss = (
            sum(value for value, _ in finite) / sum(count for _, count in finite)
            if finite
            else None
        )
        return loss, speed, seconds

    # ---- evaluation ----

    def evaluate(self, split: Split) -> tuple[dict[str, Any], Evaluation]:
        """Metrics in percent, the loss and, of a cascade, `levels`; and the predictions they came
        from.

        With --scheme auto the validation split chooses the cascade's scheme. What was measured last
        is not measured again: mostly the last epoch is the best one.
        """
        if self.measured is None or self.measured[0] != (split.name, self.model.steps):
            self.measured = ((split.name, self.model.steps), *self._measure(split))
        return self.measured[1:]

    def _measure(self, split: Split) -> tuple[dict[str, Any], Evaluation]:
        model, k = (
            self.model,
            max(self.config.top_k, 5),
        )  # the metrics go to 5, however few are kept
        # Several processes meet in an evaluation: they go through it together.
        inputs = self.inputs if dist.size() > 1 else Watched(self.inputs)
        how: dict[str, Any] = {"batch_size": self.config.evaluate_batch, "inputs": inputs}
        with self.clock.on("evaluate"):
            if len(model.schemes) > 1 and self.config.scheme == "auto" and split is self.validation:
                metrics, found = self._best_scheme(
                    model, split, evaluate_schemes(model, split, k, **how)
                )
            else:
                found = evaluate_split(model, split, k, **how)
                metrics = evaluate(found.labels, split.labels, self.inverse_propensity)
        metrics |= {"loss": found.loss} | ({"levels": found.levels} if found.levels else {})
        name, content = SHOWN.get(split.name, split.name), self.dataset.content_hash
        self.folder.log(
            {"step": model.steps, "epoch": self.epoch, "split": name, **metrics, "dataset": content}
        )
        shown = "  ".join(
            f"{key} {metrics[key]:.2f}" for key in ("P@1", "P@3", "P@5", "nDCG@5", "PSP@5")
        )
        told = (
            f"{found.loss:.1f} per document ({self.frequencies.told(split.labels)})"
            if self.frequencies
            else ""
        )
        log.info(
            f"{name} after epoch {self.epoch}: {shown}  loss {told or f'{found.loss:.3g}'}  "
            f"(dataset {content[:12]})"
        )
        if found.levels:
            log.info(levels_line(found.levels))
        return metrics, found

    def _best_scheme(
        self, model: Model, split: Split, found: dict[str, Evaluation]
    ) -> tuple[dict[str, Any], Evaluation]:
        """Puts the scheme that does best into the model, of equals the model's own; its metrics and
        evaluation.
        """
        by, own = self.config.best_by, model.scheme
        metrics = {
            scheme: evaluate(found[scheme].labels, split.labels, self.inverse_propensity)
            for scheme in found
        }
        best = max(metrics, key=lambda scheme: (metrics[scheme][by], scheme == own))
        model.use_scheme(best)
        told = ", ".join(f"{scheme} {metrics[scheme][by]:.2f}" for scheme in metrics)
        log.info(f"--scheme auto: {best} is best by validation {by} ({told})")
        return metrics[best], found[best]

    def _put_best(self) -> dict[str, float]:
        """The best checkpoint by validation into the model; without a validation split the last
        step is the best.
        """
        checkpoints = self.folder.checkpoints
        if self.validation is None:
            if self.folder.writes:
                checkpoints.save_best()
            log.info("no validation split: the last step is kept as the best checkpoint")
            return {"epoch": self.epoch, "step": self.model.steps}
        dist.wait()  # until the first has written it
        if self.best["step"] != self.model.steps:
            self._take(*checkpoints.load("best"))
            self.epoch = int(self.best["epoch"])
        log.info(f"the best checkpoint by validation {self.config.best_by} is epoch {self.epoch}'s")
        return self.best

    def finish(self) -> dict[str, Any]:
        """The one look at the test split; writes predictions.npz and metrics.json."""
        counters = {
            "steps": self.model.steps,
            **self.model.counters(),
        }  # of the run, not of its best step
        self.clock.start(None)
        report: dict[str, Any] = {
            "dataset": self.dataset.name,
            "dataset_hash": self.dataset.content_hash,
        }
        report["best"] = self._put_best()
        if self.tree is not None:
            report |= {"scheme": self.model.scheme, "tree": self.tree.content_hash}
        for split in (self.validation, self.test):
            if split is None:
                continue
            metrics, found = self.evaluate(split)
            report[SHOWN.get(split.name, split.name)] = metrics
            if self.folder.writes and (split is self.test or self.test is None):
                kept = self.config.top_k
                scores = score_matrix(
                    found.values[:, :kept], found.labels[:, :kept], self.dataset.num_labels
                )
                write_npz(self.folder.path / "predictions.npz", scores, keep_zeros=True)
                report["macro"] = macro_metrics(found.labels, split.labels)
                report["deciles"] = decile_table(
                    found.labels, split.labels, self.dataset.splits["train"].labels
                )
        if self.validation is None and self.test is None:
            log.info("no validation and no test split: no metrics and no predictions.npz")
        report |= counters | {
            "seconds": self.clock.seconds(),
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "commit": self.commits[0],
            "propensity": self.dataset.propensity,
            "environment": self.environment,
        }
        if len(self.commits) > 1:
            report["commits"] = self.commits
        if self.folder.writes:
            write_json(self.folder.path / "metrics.json", report)
        return report


def levels_line(levels: list[dict[str, Any]]) -> str:
    """What the shortlists kept, on one line."""
    told = ", ".join(
        f"{x['shortlist_recall']:.2f}% in {x['kept']:,.0f} of {x['clusters']:,} clusters"
        for x in levels
    )
    return f"   true labels still in the shortlist: {told}"
