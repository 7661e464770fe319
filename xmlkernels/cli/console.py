"""Talk to the person at the terminal: progress lines, tables, one sentence for a mistake."""

import io
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from xmlkernels import InputError, dist
from xmlkernels.errors import Failed
from xmlkernels.files import DataWarning, reason_of
from xmlkernels.memory import LESS_MEMORY, out_of_memory
from xmlkernels.metrics.words import by_annif, sentence_of
from xmlkernels.ticks import LIVE
from xmlkernels.training.stops import Stopped, ending, listening

SKIPPED = ("skipped_steps", "skipped_encoder_steps")
_COURTESY = 5.0  # seconds; torchrun ends the others in less


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704  (rich calls it inside `except`, and would end with status 1)


# Fixed width where the output goes to a file or a CI log, so that tables do not wrap at 80 columns.
_console = _Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def say(text: str, console: _Console | None = None) -> None:
    """Print one line at once; of several processes the first speaks for all.

    Args:
        text: the line.
        console: another place than standard output.
    """
    if _silent():
        return
    console = console or _console
    console.print(text, markup=False, soft_wrap=True)
    console.file.flush()


class _Printed(logging.Handler):
    """Print what the library logs; a closed output ends the command, as it does in `say`."""

    live: Status | None = None
    error: _Console | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno != LIVE:
            self.still()  # the next line of progress is drawn below
            say(record.getMessage(), self.error)
        elif not _silent():
            self.live = self.live or Status("", console=self.error or _console)
            self.live.update(escape(record.getMessage()))
            self.live.start()

    def still(self) -> None:
        """Take the line of progress away."""
        if self.live is not None:
            self.live.stop()
            self.live = None


def print_logs() -> None:
    """Let the library's progress appear on standard output, once however often it is called."""
    logger = logging.getLogger("xmlkernels")
    if not any(isinstance(handler, _Printed) for handler in logger.handlers):
        logger.addHandler(_Printed())
        # On a terminal progress is one line that changes.
        logger.setLevel(LIVE if _console.is_terminal else logging.INFO)
        logger.propagate = False


@contextmanager
def telling_apart() -> Iterator[Callable[[str], None]]:
    """Send what the library tells to standard error: standard output is for the result alone.

    Yields:
        What sends a line there, too.
    """
    logger = logging.getLogger("xmlkernels")
    console, level = _Console(highlight=False, stderr=True), logger.level
    printed = [found for found in logger.handlers if isinstance(found, _Printed)]
    for handler in printed:
        handler.still()
        handler.error = console
    if printed:
        logger.setLevel(LIVE if console.is_terminal else logging.INFO)

    def tell(line: str) -> None:
        _still()
        say(line, console)

    try:
        yield tell
    finally:
        for handler in printed:
            handler.still()
            handler.error = None
        logger.setLevel(level)


def _still() -> None:
    """Take away the line of progress, before something else is written or the command ends."""
    for handler in logging.getLogger("xmlkernels").handlers:
        if isinstance(handler, _Printed):
            handler.still()


def typed(command: str) -> str:
    """Return a command of this package as one would type it here."""
    script = Path(sys.executable).with_name("xmlkernels")
    if not script.exists():
        return f"{_here(Path(sys.executable))} -m xmlkernels {command}"
    on_path = shutil.which("xmlkernels")
    if on_path is not None and Path(on_path).resolve() == script.resolve():
        return f"xmlkernels {command}"
    return f"{_here(script)} {command}"


def _here(path: Path) -> str:
    inside = os.path.relpath(path)
    return str(path) if inside.startswith("..") else inside


def command(
    main: Callable[[], Any], *, interrupted: str = "interrupted", several: bool = False
) -> None:
    """Run a command; whatever ends it is said in one sentence on standard error.

    Exit statuses: 0 done; 2 a user's mistake, before any work or with nothing changed; 1 the work
    began and failed (a full disk, a lost process); 130, 143 and 129 ended by SIGINT, SIGTERM and
    SIGHUP; 141 the reader of the output has left.

    Warnings of this project are for the owner of the data: they are shown as `note: …`, without a
    line of source. What all processes of torchrun meet is said once: the others give the first,
    whose end ends them, the time to say it. Likewise a process that only misses another leaves the
    word to that one.

    Args:
        main: the command.
        interrupted: the answer to Ctrl-C, where the command itself says nothing better.
        several: whether torchrun may start it; other commands would write the same files at once.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal cannot show must not end the work.
        sys.stdout.reconfigure(errors="backslashreplace")
    print_logs()
    with warnings.catch_warnings(), listening():
        warnings.simplefilter("always", DataWarning)
        warnings.showwarning = _show_warning
        try:
            if (count := dist.launched()[1]) > 1 and not several:
                mend = "start it without torchrun; xmlkernels train takes several processes"
                raise InputError("torchrun", "one process for this command", str(count), mend)
            try:
                main()
            finally:
                _still()
            sys.stdout.flush()
            if dist.running():
                _leave(0)
        except InputError as error:
            ending(2, quiet=not _first())
            if not _first():
                time.sleep(_COURTESY)
            print(f"error: {error}", file=sys.stderr)
            _leave(2)
        except dist.ProcessLost as error:
            ending(1, quiet=not error.speaks)
            if not error.speaks:
                time.sleep(_COURTESY)
            print(f"error: {error}", file=sys.stderr)
            _leave(1)
        except Failed as error:
            ending(1)
            print(f"error: {error}", file=sys.stderr)
            _leave(1)
        except KeyboardInterrupt as error:
            stop = error if isinstance(error, Stopped) else Stopped(2)
            if _first():
                print(stop.told or f"{interrupted} ({stop.name})", file=sys.stderr)
            _leave(stop.status)
        except BrokenPipeError:
            # The reader (`| head`) has what it wanted; without this the interpreter's last flush
            # would complain.
            _close_output()
            sys.exit(128 + 13)
        except OSError as error:
            ending(1)
            print(f"error: {reason_of(error)}", file=sys.stderr)
            _close_output()
            _leave(1)
        except Exception as error:
            if (told := out_of_memory(error)) is not None:
                ending(1)
                print(f"error: {told}; {LESS_MEMORY}", file=sys.stderr)
                _leave(1)
            dist.stop(failed=True)  # the others leave the word to this one's traceback
            raise


def _close_output() -> None:
    """Close standard output, so that the interpreter's last flush does not fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(status: int) -> NoReturn:
    """End the process.

    One of several ends without the interpreter's own shutdown, in which a thread of gloo that still
    lets go of a tensor aborts it (pytorch/pytorch, pull request 179291).
    """
    if not dist.running():
        sys.exit(status)
    dist.stop(failed=status != 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _first() -> bool:
    """Return whether this is torchrun's first process, whatever else the environment holds."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def _silent() -> bool:
    """Return whether another process speaks for this one, also before it has joined the others."""
    return dist.rank() > 0 or not _first()


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    if _silent():
        return
    if category.__module__.partition(".")[0] == "xmlkernels":
        text = f"note: {message}"
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line).rstrip()
    print(text, file=sys.stderr, flush=True)


def metrics_table(
    title: str,
    rows: dict[str, dict[str, float]],
    kinds: tuple[str, ...] = ("P", "nDCG", "PSP", "R"),
) -> Table:
    """Return a table of percentages at 1, 3 and 5, one row per named set of metrics.

    Below it a sentence says what each kind of metric is.
    """
    told = "\n".join(f"{kind}@k: {sentence_of(f'{kind}@k')}" for kind in kinds)
    table = Table(title=title, title_justify="left", title_style="bold", caption=told)
    table.caption_justify = "left"
    table.add_column("percent")
    names = [f"{kind}@{k}" for kind in kinds for k in (1, 3, 5)]
    for name in names:
        table.add_column(name, justify="right")
    for label, metrics in rows.items():
        shown = (f"{metrics[name]:.2f}" if name in metrics else "–" for name in names)
        table.add_row(label, *shown)
    return table


def print_metrics(report: dict[str, Any], output: Path, show: str = "short") -> None:
    """Print the metrics of a finished run, by split and by label frequency; `all` with sentences.

    Of several processes the first prints them.
    """
    if _silent():
        return
    a, b = report["propensity"]
    title = (
        f"{report['dataset']} (hash {report['dataset_hash'][:12]}), propensity constants A={a}, "
        f"B={b}"
    )
    names = [name for name in ("validation", "test") if name in report]
    rows: dict[str, dict[str, float]] = {name: report[name] for name in names}
    if rows:
        _console.print(metrics_table(title, rows))
    for name in names:
        if "levels" in report[name]:
            print_levels(name, report[name]["levels"])
    if "macro" in report and show != "all":
        print_every(
            "over labels (percent)", {n: v for n, v in report["macro"].items() if n[-2:] == "@5"}
        )
    if "deciles" in report:
        print_deciles(report["deciles"])
    if show == "all":
        for name in names:
            print_every(name, report[name])
        print_every_label(report)
    seconds = report["seconds"]
    say(
        f"{report['steps']:,} steps, train {seconds['train']:.0f} s, "
        f"evaluate {seconds['evaluate']:.0f} s, peak memory {report['peak_rss_mb']:.0f} MB; "
        f"written to {output}/"
    )
    skipped = [f"{report[name]:,} {name.replace('_', ' ')}" for name in SKIPPED if report[name]]
    if skipped:
        say(f"note: {', '.join(skipped)}, where something was not finite")
    if lost := report.get("lost_positives"):
        say(
            f"note: {lost:,} times a true cluster found no place in a training shortlist; "
            "--positives-bound makes room"
        )


def print_every(title: str, metrics: Mapping[str, Any]) -> None:
    """Print every metric of a set, each with a sentence that says what it is.

    Those of `annif eval` are fractions of 1 or counts, all others percent.
    """
    table = Table(title=title, title_justify="left", title_style="bold")
    for name, justify in (("metric", "left"), ("value", "right"), ("what it says", "left")):
        table.add_column(name, justify=justify, no_wrap=name != "what it says")  # type: ignore[arg-type]
    for name, value in metrics.items():
        if name != "loss" and isinstance(value, int | float):
            told = f"{value:.4f}" if by_annif(name) and isinstance(value, float) else _cell(value)
            table.add_row(name, told, sentence_of(name))
    _console.print(table)


def print_every_label(report: Mapping[str, Any]) -> None:
    """Print the metrics over labels and those of Annif that a report holds."""
    if "macro" in report:
        print_every("over labels (percent)", report["macro"])
    if "annif" in report:
        print_every("as `annif eval` has them, of ten labels per document", report["annif"])


def print_levels(name: str, levels: list[dict[str, Any]]) -> None:
    """Print metrics of each level of clusters, and how many true labels are left after it."""
    title = f"{name}: levels of clusters, coarse to fine (percent)"
    table = Table(title=title, title_justify="left")
    shown = ("P@1", "P@3", "P@5", "R@5")
    for column in ("level", "clusters", "kept", *shown, "true labels kept"):
        table.add_column(column, justify="right")
    for x in levels:
        numbers = [
            f"{x['level']}",
            f"{x['clusters']:,}",
            f"{x['kept']:,.1f}",
            *(f"{x[key]:.2f}" for key in shown),
        ]
        table.add_row(*numbers, f"{x['shortlist_recall']:.2f}")
    _console.print(table)


def print_deciles(deciles: list[dict[str, Any]]) -> None:
    """Print recall by label frequency in training: ten groups of equal size, rarest first."""
    title = "by label frequency in train (ten groups of equally many labels)"
    table = Table(title=title, title_justify="left")
    for name in deciles[0]:
        table.add_column(name, justify="right")
    for row in deciles:
        # Where no document has one of the labels there is nothing to find.
        empty = [name for name in row if "@" in name and not row["positives"]]
        table.add_row(*("–" if name in empty else _cell(value) for name, value in row.items()))
    _console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def print_comparison(
    title: str,
    rows: dict[str, dict[str, float]],
    kinds: tuple[str, ...] = ("P", "nDCG", "PSP", "R"),
) -> None:
    """Print `metrics_table`."""
    _console.print(metrics_table(title, rows, kinds))


def print_rows(
    title: str, names: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = True
) -> None:
    """Print a table of texts, the first column on the left, and the last one where it is words."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, name in enumerate(names):
        left = number == 0 or (words and number == len(names) - 1)
        table.add_column(name, justify="left" if left else "right")
    for row in rows:
        table.add_row(*row)
    _console.print(table)
