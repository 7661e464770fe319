"""The workers of a report: one process per op, started together, that time in turn.

Imports, compiling and checks need many processors and no quiet card, so all workers do them at
once; a case is timed while every other worker waits.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from benchmarks import children, gpu_worker, run

Left = Callable[[], float]
"""Returns the seconds that are left."""


def parsed(line: str) -> dict[str, object]:
    """Return a worker's message; {} for a line that is none, such as a library's own warning."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


@dataclass
class Worker:
    """The process of one op.

    Attributes:
        child: the process.
        plain: cases that cannot be captured in a graph.
        ready: whether it waits for an order.
    """

    child: children.Child
    plain: list[str] = field(default_factory=list)
    ready: bool = False


class Session:
    """The workers of all ops.

    Attributes:
        out: ops that cannot be timed, and why.
        wrong: those of them whose results are not plain PyTorch's.
    """

    def __init__(
        self,
        command: Callable[[str, bool], list[str]],
        say: Callable[[str], None],
        keep: Callable[[run.Row], None],
    ) -> None:
        """Make one without workers.

        Args:
            command: of a worker, by op and whether the op has been checked already.
            say: told a line at a time.
            keep: given each row as soon as it is measured.
        """
        self._command, self._say, self._keep = command, say, keep
        self._workers: dict[str, Worker] = {}
        self.out: dict[str, str] = {}
        self.wrong: set[str] = set()

    def start(self, op: str, checked: bool = False) -> None:
        """Start an op's worker in place of an earlier one."""
        before = self._workers.get(op)
        worker = Worker(children.Child(self._command(op, checked)))
        if before is not None:
            before.child.end()
            worker.plain = before.plain
        self._workers[op] = worker

    def started(self, op: str) -> bool:
        """Say whether an op has a worker."""
        return op in self._workers

    def ready(self, op: str, left: Left) -> bool:
        """Wait until a worker has checked its op; say what it found.

        Returns:
            Whether it waits for an order. One that is late can be waited for again.
        """
        worker = self._workers[op]
        while not worker.ready and op not in self.out:
            line = worker.child.read(left())
            if line is None:
                if worker.child.status is None:
                    self._say(f"  {op}: not checked in time")
                else:
                    self._drop(op, f"its worker ended: {self._last(worker)}")
                break
            message = parsed(line)
            if why := message.get("untimed"):
                self._drop(op, str(why))
            elif name := message.get("wrong"):
                self.wrong.add(op)
                self._drop(op, f"{name} is WRONG: {message.get('why')}")
            elif name := message.get("checked"):
                error = float(str(message.get("error")))
                self._say(f"  {op} {name}: checked, {error:.1e} from plain PyTorch")
            elif message.get("ready"):
                worker.ready = True
        return worker.ready and op not in self.out

    def order(self, op: str, order: Mapping[str, object], left: Left) -> bool:
        """Have a worker do something; start it again without a case that ended it.

        Returns:
            Whether all of it was done.
        """
        if op in self.out:
            return False
        skip: list[str] = []
        while True:
            worker = self._workers[op]
            if not self.ready(op, left):
                return False
            worker.child.send(json.dumps({**order, "skip": skip, "plain": worker.plain}))
            begun: str | None = None
            while (line := worker.child.read(left())) is not None:
                message = parsed(line)
                if message.get("done"):
                    return True
                if message.get("begin"):
                    begun = str(message["begin"])
                    skip.append(begun)
                self._take(message, worker, skip)
            if worker.child.status is None:
                where = f" within {begun}" if begun else ""
                self._say(f"  the time is up{where}: what is missing above was not measured")
                self.start(op, checked=True)  # the one that is late would disturb the next
                return False
            status = worker.child.status
            if begun is None:
                self._drop(op, f"its worker ended: {self._last(worker)}")
                return False
            if status not in (gpu_worker.CAPTURE_FAILED, gpu_worker.BROKE):
                last = self._last(worker)
                self._say(f"  {begun} ended the process with status {status}: {last}")
            self.start(op, checked=True)

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers.values():
            worker.child.end()
        self._workers.clear()

    def _take(self, message: dict[str, object], worker: Worker, skip: list[str]) -> None:
        if isinstance(row := message.get("row"), dict):
            self._keep(row)
        elif name := message.get("capture_failed"):
            worker.plain.append(str(name))
            skip.remove(str(name))
            why = message.get("why")
            self._say(f"  {name} cannot be captured in a graph ({why}): timed launch by launch")
        elif name := message.get("left_out"):
            self._say(f"  {name} is left out: {message.get('why')}")
        elif name := message.get("again"):
            self._say(f"  {name} once more at the end: {message.get('ms')} ms")

    def _drop(self, op: str, why: str) -> None:
        self.out[op] = why
        self._say(f"  {op} is not timed: {why}")

    @staticmethod
    def _last(worker: Worker) -> str:
        lines = [line for line in worker.child.end().splitlines() if line.strip()]
        return lines[-1].strip() if lines else "it said nothing"
