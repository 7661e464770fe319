"""Train the rankers of a forest one after the other, as many as there is time for."""

import json
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xmlkernels import InputError
from xmlkernels.predict.base import RANKER
from xmlkernels.ticks import TimeOver, given_up
from xmlkernels.training.clock import Deadline
from xmlkernels.training.folder import read_json
from xmlkernels.training.ranker import train_ranker
from xmlkernels.training.ranker_config import RankerConfig
from xmlkernels.training.ranker_folder import remove_trees
from xmlkernels.training.ranker_inputs import Words

log = logging.getLogger(__name__)

# Of a ranker, what may change between its training and a resumed one.
MAY_CHANGE = ("dataset", "output", "tree", "threads", "report", "show")
_RESERVE, _SLOWER = 2.0, 1.3  # seconds for the report; a tree against the one before it


@dataclass(frozen=True)
class Trained:
    """Rankers of a forest.

    Attributes:
        reports: what metrics.json of each holds.
        planned: how many were asked for; a deadline may have ended the training before.
    """

    reports: list[dict[str, Any]]
    planned: int

    def told(self, deadline: Deadline) -> dict[str, Any]:
        """Return what metrics.json says of a forest that has fewer trees than were asked for."""
        return {
            "minutes": deadline.seconds / 60,
            "trees": len(self.reports),
            "planned": self.planned,
        }


def train_rankers(
    trees: int,
    ranker_of: Callable[[int], RankerConfig],
    folder: Path,
    *,
    done: Sequence[dict[str, Any]] = (),
    deadline: Deadline | None = None,
    words: Words | None = None,
) -> Trained:
    """Train rankers that share their features.

    The first is trained to its end whatever the time, so that there is a model. A later one begins
    where there is time for it, and is given up where the time is over all the same.

    Args:
        trees: how many.
        ranker_of: makes the options of a ranker, and its label tree.
        folder: of the forest.
        done: reports of the first rankers, which are trained already.
        deadline: when the forest is to be measured and written; None: never.
        words: TF-IDF of the texts, where somebody has computed it.
    """
    reports, words = list(done), words or Words()
    for number in range(len(reports), trees):
        if reports and deadline is not None and deadline.left() < _needed(reports):
            break
        log.info(f"ranker {number + 1} of {trees}")
        if not reports or deadline is None:
            reports.append(train_ranker(ranker_of(number), words))
            continue
        try:
            with given_up(lambda: deadline.left() <= _ending(reports)):
                found = train_ranker(ranker_of(number), words)
        except TimeOver:
            remove_trees(folder, number)
            break
        reports.append(found)
    if len(reports) < trees and deadline is not None:
        log.info(
            f"the time is over ({deadline.told}): {len(reports)} of {trees} trees are trained and "
            "make a whole forest; the same command with --resume and more --minutes trains the rest"
        )
    return Trained(reports, trees)


def _seconds(report: dict[str, Any], parts: Collection[str]) -> float:
    return sum(float(spent["wall"]) for part, spent in report["seconds"].items() if part in parts)


def _needed(reports: list[dict[str, Any]]) -> float:
    """Estimate the seconds of one ranker more, and of what comes behind the last."""
    own = _seconds(reports[-1], reports[-1]["seconds"].keys() - {"TF-IDF"})
    return _SLOWER * own + _ending([*reports, reports[-1]])


def _ending(reports: list[dict[str, Any]]) -> float:
    """Estimate the seconds of measuring and calibrating a forest: each ranker answers again."""
    return _RESERVE + _SLOWER * sum(_seconds(report, {"evaluation"}) for report in reports)


def finished(options: RankerConfig) -> dict[str, Any] | None:
    """Return what metrics.json holds of a ranker that was trained with these options.

    Returns:
        None where its training has not ended.

    Raises:
        InputError: it was trained with others.
    """
    folder = Path(options.output)
    if not (folder / RANKER).is_file() or not (folder / "metrics.json").is_file():
        return None
    report = read_json(folder / "metrics.json")
    before, now = report.get("options", {}), json.loads(json.dumps(asdict(options)))
    for key in now:
        if key not in MAY_CHANGE and key in before and before[key] != now[key]:
            expected = f"{before[key]!r}, as {folder}/ was trained"
            mend = "resume with the same settings"
            raise InputError(f"--resume: {key}", expected, repr(now[key]), mend)
    return report
