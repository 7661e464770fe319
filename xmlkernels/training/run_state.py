"""Where a run is: its position, its best metric and its losses; saved, checked and resumed."""

import json
import logging
import math
from collections.abc import Mapping
from functools import partial
from signal import SIGTERM, Signals
from typing import Any, NoReturn

import torch
from torch import Tensor

from xmlkernels import dist
from xmlkernels.checkpoint import (
    Saver,
    new_identity,
    rng_state,
    set_rng_state,
)
from xmlkernels.files import reason_of
from xmlkernels.memory import readable, resident_memory
from xmlkernels.models.base import Documents
from xmlkernels.models.saved import model_config
from xmlkernels.training.build import draw_apart, keep_class_token, start_table
from xmlkernels.training.clock import Clock, Deadline
from xmlkernels.training.config import Config
from xmlkernels.training.environment import differences
from xmlkernels.training.forecast import room_of_each
from xmlkernels.training.progress import Progress
from xmlkernels.training.saved_state import check_same, newest
from xmlkernels.training.session import Session
from xmlkernels.training.stops import Stopped, asked

log = logging.getLogger(__name__)

_RESERVE = 1.0  # seconds before a deadline, for calibrating and the report
_SLOWER = 1.3  # an evaluation against the one before: other work on the machine


class RunState:
    """How far a run has come, from its start or from its checkpoint.

    Attributes:
        epoch, position: epochs that are done, and batches of the next that were trained on.
        clock: seconds in the training loop, in evaluation and in writing checkpoints, over all
            resumed parts.
        best: the best validation metric so far, with its epoch and step; empty before the first
            evaluation.
        saver: writes the checkpoints.
        documents: trained on so far.
        pending: losses not logged yet, with their documents.
        measured: documents that this process has evaluated, and the seconds that it took.
        time_over: what metrics.json says of a run that a deadline has ended; None of any other.
        commits: of the source tree at the start of the run and wherever a resumed part had another
            one.

    Raises:
        InputError: there is a checkpoint, but the run cannot go on from it.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.config = session, session.config
        self.model, self.folder = session.model, session.folder
        self.clock = Clock()
        self.epoch = self.position = self.documents = 0
        self.best: dict[str, float] = {}
        self.pending: list[tuple[Tensor, int]] = []
        # No method of this object: it would then live on, with messages that it waits for.
        room = partial(has_room, self.config)
        self.saver = Saver(self.folder.checkpoints, dist.board(), room)
        self._best_there: dict[str, float] = {}  # of the best checkpoint on the disk
        self._best_under_way: dict[str, float] | None = None
        self.commits = [session.commit]
        self._logged = (0, 0.0)  # documents and seconds at the last log line
        self.measured, self._saves = (0, 0.0), 0
        self.time_over: dict[str, Any] | None = None
        self._stop, self._over = dist.Vote(), dist.Vote()
        if self.folder.resumable:
            self._resume()
        else:
            start_table(self.config, session.dataset, session.inputs, self.model)
            self.folder.begin(session.dataset, session.inputs, session.tree)
        frequencies = session.frequencies
        self.progress = Progress(
            session.plan.steps,
            self.model.steps,
            reference=frequencies.told() if frequencies else "",
            log=self.folder.log_file if self.folder.writes else None,
        )

    # ---- checkpoints ----

    def _resume(self) -> None:
        session, checkpoints = self.session, self.folder.checkpoints
        tensors, state, which = newest(
            checkpoints,
            self.config,
            session.plan.epoch,
            self.model.shards(),
            self.model.stored_tensors(),
        )
        dist.agree("the checkpoint to go on from", which, torch.device("cpu"))
        check_same(state, session.dataset, session.inputs, session.tree)
        self.load(tensors, state)
        keep_class_token(self.model, state)
        self._draw_on(state)
        self.epoch, self.position, self.best = state["epoch"], state["position"], state["best"]
        self.clock.go_on(state["seconds"])
        self.pending = [(torch.tensor([value]), count) for value, count in state["pending"]]
        self.documents = state["documents"]
        self._logged = (state["documents"], state["seconds"]["train"])
        before = state.get("commits", [])
        self.commits = before + [c for c in self.commits if before[-1:] != [c]]
        self.saver.saved = self.saver.begun = self.model.steps
        self._best_there = dict(self.best)
        dist.wait()  # until all have read what the first may move
        if which != "last" and self.folder.writes:
            checkpoints.put_back(which)
        self.folder.go_on(state.get("beside"), session.dataset, session.inputs)
        if self.best.get("step") == self.model.steps and self.folder.writes:
            # The run may have been stopped between writing `last` and linking `best` to it.
            checkpoints.save_best()
        self.folder.rewind_log(state["log_bytes"])
        log.info(
            f"resumed at step {self.model.steps:,} (epoch {self.epoch + 1}, batch {self.position})"
        )
        if changed := differences(state.get("environment", {}), session.environment):
            log.info(f"note: {changed}; the run goes on, but not bit for bit as it would have")

    def load(self, tensors: dict[str, Tensor], state: Mapping[str, Any]) -> None:
        """Load a checkpoint's weights into the model, with the scheme that was best by then."""
        self.model.load_tensors(tensors)
        scheme = model_config(state)["head"].get("scheme", self.model.scheme)
        self.model.use_scheme(scheme)

    def _draw_on(self, state: Mapping[str, Any]) -> None:
        """Draw as the run would have.

        A process that it did not have, or had with other devices, draws anew.
        """
        states = [state["rng"], *state.get("other_rngs", [])]
        if dist.rank() < len(states):
            set_rng_state(states[dist.rank()])
        else:
            draw_apart(self.config, self.model.steps)

    def _state(self) -> tuple[dict[str, Any], str]:
        """Collect the state of the run, and draw the identity of its checkpoint: one for all."""
        session, model = self.session, self.model
        told = json.dumps([rng_state(), new_identity()])
        (rng, identity), *others = map(json.loads, dist.gather_texts(told))
        state = {
            "model": model.config(),
            "inputs": session.inputs.config(),
            "dataset": session.dataset.content_hash,
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
            "environment": session.environment,
            "tree": session.tree and session.tree.content_hash,
            "beside": self.folder.beside,
        }
        if others:
            state["other_rngs"] = [generators for generators, _ in others]
        return state, identity

    @property
    def saved(self) -> int | None:
        """The step of the last checkpoint that is whole on the disk; None before there is one."""
        return self.saver.saved

    def save(self, *, best: bool = False) -> None:
        """Write the last checkpoint and, where it is the best too, link it as that.

        Where memory has room for a copy the file is written while the run goes on, and its errors
        are raised by `settle`. A stop in between is mended by resuming.
        """
        self.settle()
        self._saves += 1
        with self.clock.on("save"), dist.apart():
            tensors = self.model.tensors()
            shards = {k: shard for k, shard in self.model.shards().items() if k in tensors}
            state, identity = self._state()
            dist.agree_on_tensors({k: t for k, t in tensors.items() if k not in shards})
            self._best_under_way = dict(self.best) if best else None
            self.saver.save(tensors, state, shards, identity, step=self.model.steps, best=best)
        if self.saver.failed and self.saver.waits:
            self.settle()

    def settle(self) -> None:
        """Wait for a save that is under way.

        Raises:
            OSError: the disk refused it, unless --save-failure is continue: then a note says so.
        """
        with self.clock.on("save"), dist.apart():
            best, self._best_under_way = self._best_under_way, None
            try:
                self.saver.settle()
            except OSError as error:
                if self.config.save_failure == "end":
                    raise
                there = "there is none yet"
                if self.saved is not None:
                    there = f"the one of step {self.saved:,} is whole"
                log.info(
                    f"note: no checkpoint of step {self.saver.begun:,}: {reason_of(error)}; "
                    f"{there}; training goes on (--save-failure continue)"
                )
                if best is not None:  # a later one is the best as soon as it beats what is there
                    self.best = dict(self._best_there)
            else:
                self._best_there = best or self._best_there

    def stop_if_asked(self) -> None:
        """Save and raise Stopped where a signal has asked for it, or the disk has refused a save.

        Among several processes, all do at the same step.
        """
        failed = self.saver.failed and self.config.save_failure == "end"
        if self._stop.yes(asked() != 0 or failed):
            self.settle()
            self.save_and_stop()

    def time_is_over(self, deadline: Deadline | None) -> bool:
        """Tell whether all the time that is left is needed to evaluate and to write.

        Among several processes, all say the same at the same step.
        """
        if deadline is None:
            return False
        return self._over.yes(deadline.left() <= self._ending())

    def _ending(self) -> float:
        """Estimate the seconds that the run needs once it stops training."""
        spent, session = self.clock.seconds(), self.session
        steps = max(1, self.model.steps)
        documents, seconds = self.measured
        if not documents:  # before there is an evaluation, as long as a document's training
            documents, seconds = max(1, self.documents), spent["train"]
        splits = [split for split in (session.validation, session.test) if split is not None]
        evaluation = sum(map(len, splits)) * seconds / documents
        save = spent["save"] / max(1, self._saves)
        return _RESERVE + spent["train"] / steps + save + _SLOWER * evaluation

    def tell_time_over(self, deadline: Deadline | None) -> None:
        """Note that a deadline has ended the training, and say how it goes on."""
        assert deadline is not None
        self.time_over = {
            "minutes": deadline.seconds / 60,
            "epochs": round(self._epochs(), 3),
            "planned": self.config.epochs,
        }
        self.folder.log({"step": self.model.steps, "epoch": self.reached, "time_over": True})
        log.info(
            f"the time is over ({deadline.told}) after {self._epochs():.3g} of "
            f"{self.config.epochs} epochs: the run ends whole; the same command with --resume and "
            "more --minutes goes on with it"
        )

    @property
    def reached(self) -> float:
        """Epochs that are done; whole ones as a whole number."""
        return round(self._epochs(), 3) if self.position else self.epoch

    def save_and_stop(self) -> NoReturn:
        """Save, unless this step is saved already, and raise Stopped."""
        if self.saver.begun != self.model.steps:
            self.save()
        self.settle()
        dist.wait()  # torchrun ends all as soon as one has left
        number = asked() or SIGTERM  # another process may be the one that was asked
        told = ""
        if self.saved == self.model.steps:
            told = (
                f"stopped at step {self.model.steps:,}, whose checkpoint is written: go on from it "
                f"with --resume ({Signals(number).name})"
            )
        raise Stopped(number, told)

    def back_to_last_batch(self) -> None:
        """Return to the end of the last epoch's batches, before its validation."""
        if self.position:  # a deadline has ended the training among them
            return
        self.epoch, self.position = self.epoch - 1, self.session.plan.epoch

    def improved(self, metrics: dict[str, float]) -> bool:
        """Tell whether the validation metrics are the best so far; remember them if so."""
        by = self.config.best_by
        if self.best and not metrics[by] > self.best[by]:
            return False
        self.best = {by: metrics[by], "epoch": self.reached, "step": self.model.steps}
        return True

    # ---- log ----

    def collect(self, loss: Tensor, batch: Documents) -> None:
        """Keep a step's loss for the next line of the log."""
        if not self.saver.prepared:  # the first step has made the optimizer's states
            self.saver.prepare(self.model.tensors())
        self.documents += len(batch)
        if loss.numel():
            # Per document: a sum over the batch as it is, a mean once for each document.
            self.pending.append((loss if self.model.sums_loss else loss * len(batch), len(batch)))

    def log_progress(self) -> None:
        """Log the mean of the finite losses since the last line, speed and skipped steps.

        The terminal gets a line, too, where it is time for one.
        """
        loss, speed, seconds = self._since()
        rates, held = self._rates(), resident_memory()
        line = {
            "step": self.model.steps,
            "epoch": self._epochs(),
            "loss": loss,
            "encoder_lr": rates[0],
            "table_lr": rates[1],
            "documents_per_second": speed,
            "seconds": seconds,
            "memory_mb": None if held is None else held / 2**20,
        }
        self.folder.log(line | self.model.counters())
        if self.progress.due(logged=True):
            self._tell(loss, speed)
        self.pending, self._logged = [], (self.documents, seconds)

    def tell_progress(self) -> None:
        """Print a line between two of the log, which stays as it would have been."""
        loss, speed, _ = self._since()
        self._tell(loss, speed)

    def _tell(self, loss: float | None, speed: float) -> None:
        model = self.model
        rate = self._rates()[0]
        self.progress.tell(
            model.steps, self._epochs(), loss, speed, a_sum=model.sums_loss, rate=rate
        )

    def _rates(self) -> tuple[float, float]:
        """Return the rates of encoder and tables in the step that has just been taken."""
        settings = self.model.training_settings
        assert settings is not None
        return settings.rates(max(0, self.model.steps - 1))[:2]

    def _epochs(self) -> float:
        return self.epoch + self.position / self.session.plan.epoch

    def _since(self) -> tuple[float | None, float, float]:
        """Compute the mean of the finite losses and documents per second since the last log line.

        Returns:
            Both, and the seconds of training so far. The first is None without a loss.
        """
        seconds = self.clock.seconds()["train"]
        documents, before = self._logged
        speed = (self.documents - documents) / max(seconds - before, 1e-9)
        losses = [(float(value), count) for value, count in self.pending]
        finite = [(value, count) for value, count in losses if math.isfinite(value)]
        if not finite:
            return None, speed, seconds
        loss = sum(value for value, _ in finite) / sum(count for _, count in finite)
        return loss, speed, seconds


def has_room(config: Config, size: int | None) -> bool:
    """Tell whether checkpoints are written beside the loop: all processes take a copy, or none.

    Args:
        config: the settings of the run.
        size: bytes of a copy; None where there can be none.
    """
    wanted, own = config.background_save, False
    if size is not None and wanted != "off":
        room = room_of_each()
        own = wanted == "on" or room is None or 2 * size <= room
    everyone = all(map(int, dist.gather_texts(str(int(own)))))
    if wanted != "off" and not everyone:
        copy = "rows in files" if size is None else f"a copy of {readable(size)}"
        log.info(
            "note: training waits while a checkpoint is written: memory has no room to spare for "
            f"{copy} (--background-save)"
        )
    return everyone
