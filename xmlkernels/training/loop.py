"""The training loop of both models, and how a run that ends early is reported."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from xmlkernels import dist
from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.errors import Failed
from xmlkernels.files import reason_of
from xmlkernels.locks import own_folder
from xmlkernels.memory import LESS_MEMORY, out_of_memory
from xmlkernels.training.checks import check
from xmlkernels.training.clock import Deadline
from xmlkernels.training.config import Config
from xmlkernels.training.evaluator import Evaluator
from xmlkernels.training.first_batch import agree_on_batch
from xmlkernels.training.folder import RUN_FILES, clear_leftovers
from xmlkernels.training.linear import LinearConfig, train_linear
from xmlkernels.training.run_state import RunState
from xmlkernels.training.session import Session
from xmlkernels.training.stops import Stopped, held


def train(config: Config | LinearConfig, deadline: Deadline | None = None) -> dict[str, Any]:
    """Run one configuration from data to metrics; one of the recipe `linear` by `train_linear`.

    Args:
        config: the settings.
        deadline: when the command is to have ended: training stops so much earlier that the
            evaluation and the writing have time, with a whole run; None: never.

    Returns:
        What metrics.json holds.

    Raises:
        InputError: settings or data that cannot be used; before any work.
    """
    if isinstance(config, LinearConfig):
        return train_linear(config, deadline)
    check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    with running(config) as (session, run, evaluator):
        model = session.model.train()
        # Evaluation and checkpoints are counted apart; waiting for data belongs to training.
        run.clock.start("train")
        over = False
        while run.epoch < config.epochs and not over:
            with dist.abreast():
                for batch in session.batches.epoch(run.epoch, start=run.position):
                    need_loss = config.loss_every > 0 and model.steps % config.loss_every == 0
                    loss = model.step(
                        batch.to(session.device, non_blocking=True), need_loss=need_loss
                    )
                    run.position += 1
                    run.collect(loss, batch)
                    # The loop waits for the device in these two lines and nowhere else.
                    if model.steps % config.log_every == 0:
                        run.log_progress()
                    elif run.progress.due():
                        run.tell_progress()
                    if config.save_every and model.steps % config.save_every == 0:
                        run.save()
                    run.stop_if_asked()
                    if over := run.time_is_over(deadline):
                        break
            if run.position == session.plan.epoch:
                run.epoch, run.position = run.epoch + 1, 0
            best, last = False, over or run.epoch == config.epochs
            due = run.epoch % config.evaluate_every == 0 or last
            if session.validation is not None and due:
                best = run.improved(evaluator.validate())
            if best or config.save_every or last:
                run.save(best=best)
                # Measured and written just now: another step would need both once more.
                over = over or (run.epoch < config.epochs and run.time_is_over(deadline))
        if run.epoch < config.epochs:
            run.tell_time_over(deadline)
        return evaluator.finish()


@contextmanager
def running(config: Config) -> Iterator[tuple[Session, RunState, Evaluator]]:
    """Open a run and hold its output folder until the end of the block.

    A signal ends the opening at once. After it the loop ends by `RunState.stop_if_asked`, and
    evaluations between batches. Several processes go through an evaluation together and end after
    it.

    Raises:
        InputError: another process holds the folder, or the configuration cannot be used there;
            nothing was written.
        Failed: the disk refuses what the run has to write, or memory has run out.
        Stopped: by a signal, with what the user is told.
    """
    finished = False
    try:
        with _running(config) as parts:
            yield parts
            finished = True
    except Stopped as stop:
        # While the folder is let go of, all is written already.
        if finished:
            stop.told = (
                f"stopped by {stop.name}; the run had finished: {config.output}/metrics.json "
                "holds its results"
            )
        raise


@contextmanager
def _running(config: Config) -> Iterator[tuple[Session, RunState, Evaluator]]:
    # Of several processes the first alone writes: they are one run.
    first = dist.rank() == 0
    with own_folder(config.output, writes=RUN_FILES) if first else nullcontext():
        run: RunState | None = None
        session: Session | None = None

        def lost(told: str) -> None:
            """From a thread: the loop may be waiting for ever."""
            print(
                f"error: {told} (--timeout {config.timeout:g}); {how_to_go_on(run, config)}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)

        dist.when_lost(lost)
        try:
            if first:
                clear_leftovers(Path(config.output))
            session = Session(config)
            run = RunState(session)
            agree_on_batch(session.batches, run.epoch, run.position)
            with held(), _saved(run):
                yield session, run, Evaluator(session, run)
        except Stopped as stop:
            # torchrun stops all where one is lost; those that stopped in order have met since.
            if not stop.told and (found := dist.missing()) is not None:
                raise dist.ProcessLost(f"{found}; {how_to_go_on(run, config)}") from stop
            stop.told = stop.told or f"stopped by {stop.name}; {how_to_go_on(run, config)}"
            raise
        except dist.ProcessLost as error:
            told = f"{error}; {how_to_go_on(run, config)}"
            raise dist.ProcessLost(told, speaks=error.speaks) from error
        except SafetensorError as error:
            reason = str(error).rpartition("error: ")[2]
            told = f"the checkpoint could not be written: {reason}; {how_to_go_on(run, config)}"
            raise Failed(told) from error
        except BrokenPipeError:
            raise
        except OSError as error:
            raise Failed(f"{reason_of(error)}; {how_to_go_on(run, config)}") from error
        except (MemoryError, RuntimeError) as error:
            if (lack := out_of_memory(error)) is None:
                raise
            raise Failed(f"{lack}; {how_to_go_on(run, config)}; {LESS_MEMORY}") from error
        finally:
            if session is not None:
                for table in session.model.stored_tables().values():
                    table.place.close()


@contextmanager
def _saved(run: RunState) -> Iterator[None]:
    """Wait at the end of the block for a save under way, whatever has ended it."""
    try:
        yield
        run.settle()
    except dist.ProcessLost:
        run.saver.give_up()
        raise
    finally:
        run.saver.end()


def how_to_go_on(run: RunState | None, config: Config) -> str:
    """Say what is left of a run that ends early, and how to go on."""
    if run is not None and run.saved is not None:
        return (
            f"the checkpoint of step {run.saved:,} in {config.output}/ is whole: go on from it "
            "with --resume"
        )
    if config.resume and CheckpointFolder(Path(config.output) / "checkpoint").resumable():
        return f"the checkpoints in {config.output}/ are untouched: go on from them with --resume"
    begun = (Path(config.output) / "config.json").exists()
    again = " with --overwrite" if begun else ""
    return f"no checkpoint was written yet: start the run again{again}"
