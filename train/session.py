"""What a run keeps beside its loop: data, model, checkpoints, metrics. The loop itself stands in run.py."""

import math
import resource
from typing import Any

import numpy as np
import torch
from torch import Tensor

from build import build_model, open_dataset, training_batches
from config import Config, resolved_device
from facts import Clock, commit, differences, environment
from output import RunFolder, write_json
from report import print_metrics, say
from xmlkernels import InputError
from xmlkernels.checkpoint import rng_state, set_rng_state
from xmlkernels.data.dataset import Split
from xmlkernels.data.loader import Batch
from xmlkernels.data.matrices import write_npz
from xmlkernels.metrics import decile_table, evaluate, inverse_propensity, macro_metrics
from xmlkernels.predict import predict_and_loss, score_matrix

SHOWN = {"val": "validation"}


class Session:
    """One run's state.

    Attributes:
        model, batches, validation, test: what the loop works on; validation and test may be None.
        epoch, position: where the run stands: batches of this epoch already trained on.
        clock: seconds in the training loop, in evaluation and in writing checkpoints, over all resumed parts.
        best: the best validation metric so far, with its epoch and step; empty before the first evaluation.
        commits: of the source tree at the start of the run and wherever a resumed part had another one.

    Raises:
        InputError: the output folder holds a run (told before any work), or data and settings do not fit.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = RunFolder(config)
        self.commits = [commit()]  # now: the tree may change while the run goes on
        self.device = resolved_device(config.device)
        self.dataset = open_dataset(config)
        splits = self.dataset.splits
        self.validation, self.test = splits.get("val"), splits.get("test")
        self.batches = training_batches(config, self.dataset)
        # Propensities always from the documents themselves, never from the labels' own texts.
        self.inverse_propensity = inverse_propensity(splits["train"].labels, *self.dataset.propensity)
        self.total = len(self.batches) * config.epochs
        self.model = build_model(config, self.dataset, self.total, self.device)
        self.environment = environment(self.model)
        self.clock = Clock()
        self.epoch = self.position = self.documents = 0
        self.best: dict[str, float] = {}
        self.pending: list[tuple[Tensor, int]] = []
        self.marked = (0, 0.0)  # documents and seconds at the last log line
        if self.folder.resumable:
            self._resume()
        else:
            self.folder.begin(self.dataset)
        self._introduce()

    def _introduce(self) -> None:
        now = self.environment
        say(
            f"dataset {self.dataset.name} (hash {self.dataset.content_hash[:12]}): {len(self.dataset.splits['train']):,} "
            f"documents, {self.dataset.num_labels:,} labels; table {now['table']}, encoder autocast {now['autocast']}, "
            f"{now['device']}, {now['threads']} threads; {self.total:,} steps"
        )
        if self.config.warmup >= self.total:
            say(f"note: warm-up ({self.config.warmup:,} steps) lasts to the end: the learning rate never reaches its peak")

    # ---- checkpoints ----

    def _resume(self) -> None:
        checkpoints = self.folder.checkpoints
        tensors, state = checkpoints.load("last")
        if state["dataset"] != self.dataset.content_hash:
            raise InputError(
                "--resume", f"dataset hash {state['dataset'][:12]}", self.dataset.content_hash[:12],
                "resume on the data it began with",
            )  # fmt: skip
        self.model.load_tensors(tensors)
        set_rng_state(state["rng"])
        self.epoch, self.position, self.best = state["epoch"], state["position"], state["best"]
        self.clock.spent |= state["seconds"]
        self.pending = [(torch.tensor([value]), count) for value, count in state["pending"]]
        self.documents, self.marked = state["documents"], (state["documents"], state["seconds"]["train"])
        before = state.get("commits", [])
        self.commits = before + [c for c in self.commits if before[-1:] != [c]]
        if self.best.get("step") == self.model.steps:
            checkpoints.save_best()  # the run may have been stopped between writing `last` and linking `best` to it
        self.folder.rewind_log(state["log_bytes"])
        say(f"resumed at step {self.model.steps:,} (epoch {self.epoch + 1}, batch {self.position})")
        if changed := differences(state.get("environment", {}), self.environment):
            say(f"note: {changed}; the run goes on, but not bit for bit as it would have")

    def _state(self) -> dict[str, Any]:
        model = self.model
        return {
            "encoder": model.encoder.encoder_config(), "head": model.head.config, "max_length": self.dataset.max_length,
            "dataset": self.dataset.content_hash, "epoch": self.epoch, "position": self.position, "steps": model.steps,
            "seconds": self.clock.seconds(), "best": self.best, "documents": self.documents,
            "pending": [(float(value), count) for value, count in self.pending],
            "log_bytes": self.folder.sync_log(), "rng": rng_state(), "commits": self.commits,
            "environment": self.environment,
        }  # fmt: skip

    def save(self, *, best: bool = False) -> None:
        """Writes the last checkpoint and, where it is the best too, links it as that; `_resume` mends a stop in between."""
        with self.clock.on("save"):
            self.folder.checkpoints.save_last(self.model.tensors(), self._state())
            if best:
                self.folder.checkpoints.save_best()

    def improved(self, metrics: dict[str, float]) -> bool:
        """Whether the validation metrics are the best so far; remembers them if so."""
        by = self.config.best_by
        if self.best and not metrics[by] > self.best[by]:
            return False
        self.best = {by: metrics[by], "epoch": self.epoch, "step": self.model.steps}
        return True

    # ---- log ----

    def collect(self, loss: Tensor, batch: Batch) -> None:
        self.documents += len(batch)
        if loss.numel():
            self.pending.append((loss, len(batch)))

    def log_progress(self) -> None:
        """One line to the log and one to the terminal: the mean of the finite losses since the last, speed, skipped steps."""
        seconds = self.clock.seconds()["train"]
        speed = (self.documents - self.marked[0]) / max(seconds - self.marked[1], 1e-9)
        finite = [(value, count) for value, count in ((float(v), n) for v, n in self.pending) if math.isfinite(value)]
        loss = sum(value for value, _ in finite) / sum(count for _, count in finite) if finite else None
        line = {
            "step": self.model.steps, "epoch": self.epoch + self.position / len(self.batches), "loss": loss,
            "documents_per_second": speed, "seconds": seconds, **self._skipped(),
        }  # fmt: skip
        self.folder.log(line)
        told = "" if loss is None else f"  loss {loss:.3f} per document"
        say(f"step {line['step']:,}  epoch {line['epoch']:.2f}{told}  {speed:.0f} documents/s")
        self.pending, self.marked = [], (self.documents, seconds)

    def _skipped(self) -> dict[str, float]:
        model = self.model
        steps = {"skipped_steps": int(model.skipped_steps), "skipped_encoder_steps": int(model.skipped_encoder_steps)}
        if model.head.skipped is None:
            return steps
        skipped, seen = model.head.skipped.tolist()
        return steps | {"skipped_tiles": skipped / max(1, seen)}  # share since the start, or since it was resumed

    # ---- evaluation ----

    def evaluate(self, split: Split, k: int) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
        """Metrics in percent and the loss, and the predictions they came from (logits [N, k], labels [N, k])."""
        with self.clock.on("evaluate"):
            values, rows, loss = predict_and_loss(self.model, split, k, batch_size=self.config.evaluate_batch)
            metrics = evaluate(rows, split.labels, self.inverse_propensity) | {"loss": loss}
        name, content = SHOWN.get(split.name, split.name), self.dataset.content_hash
        self.folder.log({"step": self.model.steps, "epoch": self.epoch, "split": name, **metrics, "dataset": content})
        shown = "  ".join(f"{key} {metrics[key]:.2f}" for key in ("P@1", "P@3", "P@5", "nDCG@5", "PSP@5"))
        say(f"{name} after epoch {self.epoch}: {shown}  loss {loss:.3f}  (dataset {content[:12]})")
        return metrics, values, rows

    def _put_best(self) -> dict[str, float]:
        """The best checkpoint by validation into the model; without a validation split the last step is the best."""
        checkpoints = self.folder.checkpoints
        if self.validation is None:
            checkpoints.save_best()
            say("no validation split: the last step is kept as the best checkpoint")
            return {"epoch": self.epoch, "step": self.model.steps}
        tensors, _ = checkpoints.load("best")
        self.model.load_tensors(tensors)
        self.epoch = int(self.best["epoch"])
        say(f"the best checkpoint by validation {self.config.best_by} is epoch {self.epoch}'s: measured once more, in full")
        return self.best

    def finish(self) -> dict[str, Any]:
        """The one look at the test split; writes predictions.npz and metrics.json and prints them."""
        counters = {"steps": self.model.steps, **self._skipped()}  # of the run, not of its best step
        self.clock.start(None)
        report: dict[str, Any] = {"dataset": self.dataset.name, "dataset_hash": self.dataset.content_hash}
        report["best"] = self._put_best()
        for split in (self.validation, self.test):
            if split is None:
                continue
            metrics, values, rows = self.evaluate(split, self.config.top_k)
            report[SHOWN.get(split.name, split.name)] = metrics
            if split is self.test or self.test is None:
                write_npz(self.folder.path / "predictions.npz", score_matrix(values, rows, self.dataset.num_labels))
                report["macro"] = macro_metrics(rows, split.labels)
                report["deciles"] = decile_table(rows, split.labels, self.dataset.splits["train"].labels)
        if self.validation is None and self.test is None:
            say("no validation and no test split: no metrics and no predictions.npz")
        report |= counters | {
            "seconds": self.clock.seconds(), "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "commit": self.commits[0], "propensity": self.dataset.propensity, "environment": self.environment,
        }  # fmt: skip
        if len(self.commits) > 1:
            report["commits"] = self.commits
        write_json(self.folder.path / "metrics.json", report)
        print_metrics(report, self.folder.path)
        return report
