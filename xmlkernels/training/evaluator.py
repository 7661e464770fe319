"""Measure a run's model on the validation and the test split, and report."""

import logging
import resource
from typing import Any

from xmlkernels import dist
from xmlkernels.data.dataset import Split
from xmlkernels.data.formats.matrices import write_npz
from xmlkernels.evaluation import Evaluation, evaluate_schemes, evaluate_split, score_matrix
from xmlkernels.memory import release_free
from xmlkernels.metrics import evaluate, macro_metrics
from xmlkernels.predict.model import checkpoint_identity
from xmlkernels.report.page import write_report
from xmlkernels.report.run import open_run
from xmlkernels.training.calibrating import Found, calibrated_at_end
from xmlkernels.training.folder import write_json
from xmlkernels.training.measured import split_report
from xmlkernels.training.run_state import RunState
from xmlkernels.training.session import Session
from xmlkernels.training.stops import Stopped, Watched

log = logging.getLogger(__name__)

_SHOWN = {"val": "validation"}


class Evaluator:
    """Looks at the splits of a run; what was measured last is not measured again."""

    def __init__(self, session: Session, run: RunState) -> None:
        self.session, self.run = session, run
        self.model, self.config, self.folder = session.model, session.config, session.folder
        self._measured: tuple[Any, dict[str, Any], Evaluation] | None = None  # split and step first

    def validate(self) -> dict[str, float]:
        """Measure the validation split.

        A run that is stopped meanwhile goes on from the step before.
        """
        assert self.session.validation is not None
        if self.config.save_failure == "continue":
            self.run.settle()  # a best one that the disk refuses is none to beat
        try:
            return self.evaluate(self.session.validation)[0]
        except Stopped:
            self.run.back_to_last_batch()
            self.run.save_and_stop()

    def evaluate(self, split: Split, *, write: bool = True) -> tuple[dict[str, Any], Evaluation]:
        """Measure a split.

        With --scheme auto the validation split chooses the cascade's scheme.

        Args:
            split: of the run's dataset.
            write: put a line into log.jsonl; False where it is there already.

        Returns:
            Metrics in percent, the loss and, of a cascade, `levels`; and the predictions that they
            were computed from.
        """
        which = (split.name, self.model.steps)
        if self._measured is None or self._measured[0] != which:
            self._measured = (which, *self._measure(split, write))
        return self._measured[1:]

    def _measure(self, split: Split, write: bool) -> tuple[dict[str, Any], Evaluation]:
        session, model = self.session, self.model
        k = max(self.config.top_k, 5)  # the metrics go to 5, however few are kept
        # Several processes meet in an evaluation: they go through it together.
        inputs = session.inputs if dist.size() > 1 else Watched(session.inputs)
        how: dict[str, Any] = {"batch_size": self.config.evaluate_batch, "inputs": inputs}
        chooses = self.config.scheme == "auto" and split is session.validation
        before = self.run.clock.seconds()["evaluate"]
        with self.run.clock.on("evaluate"):
            if chooses and len(model.schemes) > 1:
                with dist.abreast():
                    schemes = evaluate_schemes(model, split, k, **how)
                metrics, found = self._best_scheme(split, schemes)
            else:
                with dist.abreast():
                    found = evaluate_split(model, split, k, **how)
                metrics = self._metrics(split, found)
        documents, seconds = self.run.measured
        seconds += self.run.clock.seconds()["evaluate"] - before
        self.run.measured = documents + len(split), seconds
        metrics |= {"loss": found.loss} | ({"levels": found.levels} if found.levels else {})
        self._tell(split, metrics, found, write)
        return metrics, found

    def _metrics(self, split: Split, found: Evaluation) -> dict[str, Any]:
        """Compute the metrics, of validation also one over labels that chooses the checkpoint."""
        by = self.config.best_by
        metrics: dict[str, Any] = evaluate(
            found.labels, split.labels, self.session.inverse_propensity
        )
        if by not in metrics and split is self.session.validation:
            metrics[by] = macro_metrics(found.labels, split.labels, (int(by[-1]),))[by]
        return metrics

    def _tell(self, split: Split, metrics: dict[str, Any], found: Evaluation, write: bool) -> None:
        name, content = _SHOWN.get(split.name, split.name), self.session.dataset.content_hash
        line = {"step": self.model.steps, "epoch": self.run.reached, "split": name}
        if write:
            self.folder.log(line | metrics | {"dataset": content})
        keys = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@5")
        shown = "  ".join(f"{key} {metrics[key]:.2f}" for key in keys)
        loss = f"{found.loss:.3g}"
        if self.session.frequencies:
            reference = self.session.frequencies.told(split.labels)
            loss = f"{found.loss:.1f} per document ({reference})"
        log.info(
            f"{name} after epoch {self.run.reached}: {shown}  loss {loss}  (dataset {content[:12]})"
        )
        if found.levels:
            log.info(_levels_line(found.levels))

    def _best_scheme(
        self, split: Split, found: dict[str, Evaluation]
    ) -> tuple[dict[str, Any], Evaluation]:
        """Set the model's scheme to the best one, its own among equals.

        Returns:
            That scheme's metrics and evaluation.
        """
        by, own = self.config.best_by, self.model.scheme
        metrics = {scheme: self._metrics(split, found[scheme]) for scheme in found}
        best = max(metrics, key=lambda scheme: (metrics[scheme][by], scheme == own))
        self.model.use_scheme(best)
        told = ", ".join(f"{scheme} {metrics[scheme][by]:.2f}" for scheme in metrics)
        log.info(f"--scheme auto: {best} is best by validation {by} ({told})")
        return metrics[best], found[best]

    def _load_best(self) -> dict[str, float]:
        """Load the best checkpoint by validation; without a validation split keep the last step."""
        checkpoints, run = self.folder.checkpoints, self.run
        run.settle()
        now: dict[str, float] = {"epoch": run.epoch, "step": self.model.steps}
        if self.session.validation is None and run.saved == self.model.steps:
            if self.folder.writes:
                checkpoints.save_best()
            log.info("no validation split: the last step is kept as the best checkpoint")
            return now
        if self.session.validation is None or not run.best:
            log.info("note: the last step is measured, of which there is no checkpoint")
            return now
        dist.wait()  # until the first has written it
        if run.best["step"] != self.model.steps:
            model = self.model
            release_free()  # most of a run is held at once now, and a checkpoint besides
            run.load(*checkpoints.load("best", rows=model.shards(), on_disk=model.stored_tensors()))
            run.epoch, run.position = int(run.best["epoch"]), 0
        at = run.best["epoch"]
        log.info(f"the best checkpoint by validation {self.config.best_by} is epoch {at}'s")
        return run.best

    def finish(self) -> dict[str, Any]:
        """Measure the best checkpoint, once on the test split; write predictions and metrics."""
        session, run = self.session, self.run
        # Of the run, not of its best step.
        counters = {"steps": self.model.steps, **self.model.counters()}
        run.clock.start(None)
        # The log of a checkpoint that is the best holds its validation: a run that was stopped
        # after the last save measures it again, but does not write it again.
        written = run.best.get("step") == self.model.steps
        report: dict[str, Any] = {
            "dataset": session.dataset.name,
            "dataset_hash": session.dataset.content_hash,
            "dataset_folder": str(session.dataset.folder.resolve()),
            "best": self._load_best(),
        }
        if session.tree is not None:
            report |= {"scheme": self.model.scheme, "tree": session.tree.content_hash}
        answers = {}
        for split in (session.validation, session.test):
            if split is None:
                continue
            again = written and split is session.validation
            metrics, found = self.evaluate(split, write=not again)
            report[_SHOWN.get(split.name, split.name)] = metrics
            answers[split.name] = (found.values, found.labels)
            if self.folder.writes and (split is session.test or session.test is None):
                report |= self._write_predictions(split, found)
        if session.validation is None and session.test is None:
            log.info("no validation and no test split: no metrics and no predictions.npz")
        if "val" in answers and self.folder.writes:
            report |= self._calibrate(answers)
        report |= counters | {
            "seconds": run.clock.seconds(),
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "commit": run.commits[0],
            "propensity": session.dataset.propensity,
            "environment": session.environment,
        }
        if len(run.commits) > 1:
            report["commits"] = run.commits
        if run.time_over is not None:
            report["time_over"] = run.time_over
        if self.folder.writes:
            write_json(self.folder.path / "metrics.json", report)
            if self.config.report:
                write_report(open_run(self.folder.path, session.dataset))
        return report

    def _calibrate(self, answers: Found) -> dict[str, Any]:
        """Fit probabilities on validation, beside the checkpoint that was measured."""
        inner = self.folder.path / "checkpoint"
        if not self.run.best or not self.folder.checkpoints.exists("best"):
            return {}
        with self.run.clock.on("evaluate"):
            identity = checkpoint_identity(inner, "best")
            return calibrated_at_end(inner, identity, answers, self.session.dataset)

    def _write_predictions(self, split: Split, found: Evaluation) -> dict[str, Any]:
        """Write predictions.npz; return the metrics that are reported of its split alone."""
        kept, data = self.config.top_k, self.session.dataset
        scores = score_matrix(found.values[:, :kept], found.labels[:, :kept], data.num_labels)
        write_npz(self.folder.path / "predictions.npz", scores, keep_zeros=True)
        return split_report(found.labels, split.labels, data.splits["train"].labels)


def _levels_line(levels: list[dict[str, Any]]) -> str:
    """Say on one line what the shortlists kept."""
    told = ", ".join(
        f"{x['shortlist_recall']:.2f}% in {x['kept']:,.0f} of {x['clusters']:,} clusters"
        for x in levels
    )
    return f"   true labels still in the shortlist: {told}"
