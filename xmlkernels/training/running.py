"""A run while it goes on: its folder is its own, and whatever ends it is told together with how to
go on.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from safetensors import SafetensorError

from xmlkernels import dist
from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.errors import Failed
from xmlkernels.files import reason_of
from xmlkernels.locks import own_folder
from xmlkernels.training.config import Config
from xmlkernels.training.folder import RUN_FILES, clear_leftovers
from xmlkernels.training.session import Session
from xmlkernels.training.stops import Stopped, held


@contextmanager
def running(config: Config) -> Iterator[Session]:
    """The session of a run; its output folder is held until the end of the block.

    A signal ends the opening at once. After it the loop ends by `Session.stop_if_asked`, and
    evaluations between batches; several processes go through an evaluation together and end after
    it.

    Raises:
        InputError: another process holds the folder, or the configuration cannot be used there;
            nothing was written.
        Failed: the disk refuses what the run has to write.
        Stopped: by a signal, with what the user is told.
    """
    # Of several processes the first alone writes: they are one run.
    first = dist.rank() == 0
    with own_folder(config.output, writes=RUN_FILES) if first else nullcontext():
        run: Session | None = None

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
            run = Session(config)
            with held():
                yield run
        except Stopped as stop:
            # torchrun stops all where one is lost; those that stopped in order have met since.
            if not stop.told and (found := dist.missing()) is not None:
                raise dist.ProcessLost(f"{found}; {how_to_go_on(run, config)}") from stop
            stop.told = stop.told or f"stopped by {stop.name}; {how_to_go_on(run, config)}"
            raise
        except dist.ProcessLost as error:
            raise dist.ProcessLost(
                f"{error}; {how_to_go_on(run, config)}", speaks=error.speaks
            ) from error
        except SafetensorError as error:
            reason = str(error).rpartition("error: ")[2]
            raise Failed(
                f"the checkpoint could not be written: {reason}; {how_to_go_on(run, config)}"
            ) from error
        except BrokenPipeError:
            raise
        except OSError as error:
            raise Failed(f"{reason_of(error)}; {how_to_go_on(run, config)}") from error


def how_to_go_on(run: Session | None, config: Config) -> str:
    """What is left of a run that ends early."""
    if run is not None and run.saved is not None:
        return (
            f"the checkpoint of step {run.saved:,} in {config.output}/ is whole: go on from it "
            "with --resume"
        )
    if config.resume and CheckpointFolder(Path(config.output) / "checkpoint").resumable():
        return f"the checkpoints in {config.output}/ are untouched: go on from them with --resume"
    begun = (Path(config.output) / "config.json").exists()
    return "no checkpoint was written yet: start the run again" + (
        " with --overwrite" if begun else ""
    )
