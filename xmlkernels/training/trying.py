"""Let validation choose what the recipe `linear` reads: words, pairs of them, the labels' names.

What is tried is trained whole, and the best one is the first tree of the result.
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from xmlkernels.data.dataset import Dataset
from xmlkernels.locks import own_folder
from xmlkernels.metrics.resampling import Difference, Sums, differences, grouped_sums
from xmlkernels.predict.base import FOREST
from xmlkernels.report.page import write_report
from xmlkernels.report.run import open_run
from xmlkernels.ticks import TimeOver, given_up
from xmlkernels.training.clock import Deadline
from xmlkernels.training.folder import read_json, write_json
from xmlkernels.training.linear import LinearConfig, train_linear
from xmlkernels.training.owned import refuse_others
from xmlkernels.training.ranker import Answered
from xmlkernels.training.ranker_folder import begin_forest
from xmlkernels.training.ranker_inputs import Words

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """Something to try.

    Attributes:
        what: it in words.
        changes: of the options that were best before it.
    """

    what: str
    changes: dict[str, Any]


WORDS = Kind("words alone", {})
PAIRS = Kind("words and pairs of words", {"longest": 2})
NAMES = Kind("the labels' names as texts, too", {"label_text": True})


@dataclass
class Trial:
    """What was tried.

    Attributes:
        options: of the run to come.
        kind: what it is a trial of.
        found: P@1 on validation, percent.
        sums: of its answers to validation.
        words: its TF-IDF.
        folder: where it is.
    """

    options: LinearConfig
    kind: Kind
    found: float
    sums: Sums
    words: Words
    folder: Path


@dataclass
class Chosen:
    """What came of it.

    Attributes:
        options: with what is best.
        told: what was tried, in words.
        words: TF-IDF for the trees to come.
    """

    options: LinearConfig
    told: list[str] = field(default_factory=list)
    words: Words | None = None


def choose_kind(
    options: LinearConfig, kinds: Sequence[Kind], deadline: Deadline, tell: Callable[[str], None]
) -> Chosen:
    """Train one tree of each kind, and leave the best in the output folder.

    A kind replaces a simpler one before it where it is ahead on validation beyond chance: its P@1
    by the 95% interval of the paired bootstrap; or its P@5, where P@1 is not behind so. The first
    is trained to its end; what there is no time for is given up.

    Args:
        options: of the run to come, with a dataset that has a validation split.
        kinds: the simplest first.
        deadline: when the command is to have ended.
        tell: receives a line for each.
    """
    refuse_others(options.output)
    dataset, output = Dataset.open(options.dataset), Path(options.output)
    told: list[str] = []
    with own_folder(output) as folder, TemporaryDirectory(prefix=".trial-", dir=folder) as place:
        best = _tried(options, kinds[0], Path(place) / "0", dataset, None)
        told.append(f"{best.found:.2f} with {best.kind.what}")
        for number, kind in enumerate(kinds[1:], 1):
            tell(f"trying {kind.what}")
            try:
                with given_up(lambda: deadline.left() <= 0.1 * deadline.seconds):
                    one = _tried(best.options, kind, Path(place) / str(number), dataset, best)
            except TimeOver:
                told.append(f"no time for {kind.what}")
                break
            gap = differences(best.sums, one.sums)
            told.append(f"{one.found:.2f} with {kind.what}")
            if _ahead(gap):
                best = one
            else:
                told[-1] += ", not ahead beyond chance"
        _move(best.folder, folder / "tree0")
    return Chosen(best.options, told, best.words)


def _ahead(gap: dict[str, Difference]) -> bool:
    first, five = gap["P@1"], gap["P@5"]
    return first.low > 0 or (first.high >= 0 and five.low > 0)


def _tried(
    options: LinearConfig, kind: Kind, folder: Path, dataset: Dataset, best: Trial | None
) -> Trial:
    chosen = replace(options, **kind.changes)
    same = best is not None and best.options.longest == chosen.longest
    words = best.words if best is not None and same else Words()
    answers: Answered = {}
    tried = replace(
        chosen, output=str(folder), trees=1, report=False, resume=False, overwrite=False
    )
    report = train_linear(tried, words=words, answers=answers)["validation"]
    split = dataset.splits["val"]
    sums = grouped_sums(answers["val"][1], split.labels, None)
    found = report.get("both") or report["ranker"]
    return Trial(chosen, kind, found["P@1"], sums, words, folder)


def finish(options: LinearConfig) -> dict[str, Any]:
    """Make the tree that was tried the whole result, where there is to be one alone.

    Returns:
        What metrics.json holds.
    """
    with own_folder(options.output) as folder:
        begin_forest(folder, 1, kept=1)
        inner = folder / "tree0"
        for path in sorted(inner.iterdir()):
            _move(path, folder / path.name)
        inner.rmdir()
        (folder / FOREST).unlink()
        report = read_json(folder / "metrics.json")
        own = {"output": options.output, "report": options.report}
        report["options"] = report["options"] | own
        write_json(folder / "metrics.json", report)
        if options.report:
            write_report(open_run(folder))
    return report


def _move(source: Path, target: Path) -> None:
    """Move a file or folder in the place of another."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    source.replace(target)
