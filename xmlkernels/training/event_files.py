"""The lines of log.jsonl as event files, for TensorBoard: `tensorboard --logdir RUN`."""

import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from xmlkernels import InputError

EVENTS = "tensorboard"  # a folder of the run
_FILE = "events.out.tfevents.0.xmlkernels"  # TensorBoard goes by this beginning
_LEFT_OUT = ("step", "split", "dataset", "levels")


def check_tensorboard() -> None:
    """Refuse --tensorboard where the package is not installed."""
    if find_spec("tensorboard") is None:
        mend = 'pip install "xmlkernels[tensorboard]", or leave it out'
        raise InputError("--tensorboard", "the package tensorboard", "none", mend)


class EventFile:
    """One event file of a run, which each line is appended to and nothing holds open.

    Args:
        folder: of the run. A file that is there already is gone on with: TensorBoard then forgets
            what it holds of later steps, as log.jsonl does.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self._begun = folder / EVENTS / _FILE, False

    def add(self, line: Mapping[str, Any]) -> None:
        """Append the numbers of a line of the log, by step: `train/loss`, `validation/P@1`."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        now, step = time.time(), int(line["step"])
        events = []
        if not self._begun:
            self.path.parent.mkdir(exist_ok=True)
            if self.path.exists():
                started = SessionLog(status=SessionLog.START)
                events.append(Event(wall_time=now, step=step, session_log=started))
            else:
                events.append(Event(wall_time=now, file_version="brain.Event:2"))
            self._begun = True
        part = line.get("split", "train")
        values = [
            Summary.Value(tag=f"{part}/{name}", simple_value=float(value))
            for name, value in line.items()
            if name not in _LEFT_OUT and isinstance(value, int | float)
        ]
        events.append(Event(wall_time=now, step=step, summary=Summary(value=values)))
        self._append(events)

    def _append(self, events: list[Any]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        with self.path.open("ab") as file:
            records = RecordWriter(file)
            for event in events:
                records.write(event.SerializeToString())
            records.flush()
