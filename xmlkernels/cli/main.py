"""The command `xmlkernels`: `xmlkernels COMMAND …`, also `python -m xmlkernels COMMAND …`."""

import difflib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from types import FrameType

from xmlkernels import InputError, __version__
from xmlkernels.cli import waiting

# Each is a module of this package with a `main(words)`, loaded when it is called.
COMMANDS = {
    "prepare": "raw files → a dataset folder",
    "train": "train a model by a recipe",
    "plan": "say what a run will take: memory, seconds, money",
    "tree": "build the label tree of a dataset",
    "rank": "train a linear ranker over shortlists",
    "neighbours": "score a split by its nearest training texts",
    "labels": "add labels to a run, or drop some, without training",
    "calibrate": "fit probabilities and thresholds on validation",
    "predict": "label texts",
    "serve": "answer requests over HTTP",
    "export": "write label vectors, embeddings or shortlists as arrays",
    "ensemble": "sum score files and measure them",
    "compare": "compare runs: metrics with significance, settings, cost",
    "report": "write a run's report.html",
    "demo": "train on the built-in corpus, compare, answer three questions",
    "env": "print versions, native libraries and devices",
}
MODULES = {"env": "environment"}  # where the module has another name than the command
_INTERRUPTED = {"demo": "interrupted; the next `make demo` goes on from the last checkpoint"}
_SEVERAL = {"train"}  # torchrun may start these


def main(words: Sequence[str] | None = None, prog: str = "") -> None:
    """Run one command, and leave the process with its exit status.

    Args:
        words: the command and its arguments; by default those of this process.
        prog: the command as it is typed, where that is not `xmlkernels COMMAND`.
    """
    with _interrupts_before_work():
        _main(sys.argv[1:] if words is None else list(words), prog)


def _main(words: Sequence[str], prog: str) -> None:
    if words and words[0] == "--version":
        _print(f"xmlkernels {__version__}")
        return
    if words and words[0] in ("-h", "--help", "help"):
        _print(_help())
        sys.exit(0)
    if not words:
        print(_help(), file=sys.stderr)
        sys.exit(2)
    name, *rest = words
    if name not in COMMANDS:
        print(f"error: {_unknown(name)}", file=sys.stderr)
        sys.exit(2)
    if rest or name == "demo":  # without arguments no other command computes anything
        waiting.choose(rest)  # before torch is loaded
    from xmlkernels.cli.console import command

    module = import_module(f"xmlkernels.cli.{MODULES.get(name, name)}")
    run = partial(module.main, rest, **({"prog": prog} if prog else {}))
    command(run, interrupted=_INTERRUPTED.get(name, "interrupted"), several=name in _SEVERAL)


@contextmanager
def _interrupts_before_work() -> Iterator[None]:
    """Let Ctrl-C end the process in one sentence while torch is loaded, which takes seconds.

    Nothing has begun then, and an exception in the middle of an import is a traceback of files
    that no user knows. Once `command` listens, it answers signals itself.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # switched off, or another program's
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        if os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0":
            os.write(2, b"interrupted (SIGINT)\n")
        os._exit(128 + number)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is end:
            signal.signal(signal.SIGINT, before)


def _print(text: str) -> None:
    """Print a text that needs no model, before `command` is loaded, which does the same later."""
    try:
        print(text, flush=True)
    except OSError as error:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for the interpreter's last flush)
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + 13)
        place = "standard output could not be written"
        print(f"error: {place}: {error.strerror}; make room there", file=sys.stderr)
        sys.exit(1)


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{what}" for name, what in COMMANDS.items()]
    head = "usage: xmlkernels COMMAND [ARGUMENTS]   (xmlkernels COMMAND --help: all about one)"
    return "\n".join(
        [head, "", "Train and serve text classifiers with millions of labels.", "", *lines]
    )


def _unknown(name: str) -> InputError:
    near = difflib.get_close_matches(name, COMMANDS, 1)
    mend = f"did you mean {near[0]}?" if near else "xmlkernels --help lists them"
    return InputError("xmlkernels", f"a command ({', '.join(COMMANDS)})", repr(name), mend)
