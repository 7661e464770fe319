"""Train a model and a ranker on part of the built-in corpus, compare them, answer three questions.

The task: which functions will the function that does this need to call? Both are compared with a
baseline of nearest neighbours. What an earlier call finished is used again. `make demo` runs this.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from xmlkernels import InputError
from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.cli.arguments import parse
from xmlkernels.cli.console import print_comparison, say, typed
from xmlkernels.data.dataset import Dataset
from xmlkernels.metrics import evaluate, inverse_propensity
from xmlkernels.predict.base import TextPredictor
from xmlkernels.predict.ranked import RankedPredictor
from xmlkernels.ranker.knn import KNNBaseline
from xmlkernels.training.config import Config, recorded
from xmlkernels.training.environment import commit
from xmlkernels.training.folder import MAY_CHANGE, read_json, write_json
from xmlkernels.training.inputs import open_dataset
from xmlkernels.training.loop import train
from xmlkernels.training.ranker import train_ranker
from xmlkernels.training.ranker_config import RankerConfig
from xmlkernels.training.recipes import DEMO_RANKER, RECIPES

QUERIES = (
    "Open a file and return its lines as a list of strings.",
    "Compute the mean and the standard deviation of an array along an axis.",
    "Parse a date string and return a datetime object.",
)


def run() -> None:
    """Run the demo."""
    config: Config = RECIPES["demo"].config
    say(
        "Which functions does a function call? Texts: first paragraphs of docstrings of Python "
        "packages; labels: the calls."
    )
    dataset = open_dataset(config)
    report, stands = trained(config, dataset)
    options = RankerConfig(
        str(dataset.folder),
        f"{config.output}-ranker",
        checkpoint=config.output,
        device=config.device,
        **DEMO_RANKER,
    )
    ranked = with_ranker(options, dataset, stands=stands)
    baseline = nearest_neighbours(dataset, Path(config.output) / "baseline.json", stands=stands)
    print_comparison(
        f"test split of the built-in corpus, hash {dataset.content_hash[:12]}; model: end to end, "
        "all-MiniLM-L6-v2",
        {"TF-IDF neighbours": baseline, "model": report["test"], "model + ranker": ranked},
    )
    answer(RankedPredictor.load(options.output, config.output))
    say(
        f"\nAsk both more: {typed('predict')} --checkpoint {config.output} --ranker "
        f'{options.output} --text "…"'
    )


def trained(config: Config, dataset: Dataset) -> tuple[dict[str, Any], bool]:
    """Return the report of a run of this configuration, and whether it was finished before.

    A finished one is used again, an unfinished one goes on, anything else is replaced.
    """
    folder = Path(config.output)
    if not (folder / "config.json").exists():
        return train(replace(config, overwrite=True)), False
    try:
        before = read_json(folder / "config.json")
        if not same_settings(before, config):
            say(f"{folder}/ holds a run of other settings: training again")
        elif (folder / "metrics.json").exists():
            report = read_json(folder / "metrics.json")
            if (
                same_code(report.get("commit"), commit())
                and report.get("dataset_hash") == dataset.content_hash
            ):
                say(
                    f"{folder}/ holds this run already: nothing to train (remove it to train again)"
                )
                return report, True
            say(f"{folder}/ holds a run of other code or data: training again")
        elif can_go_on(folder, dataset):
            say(f"{folder}/ holds this run unfinished: going on with it")
            return train(replace(config, resume=True)), False
        else:
            say(f"{folder}/ holds an unfinished run of other code or data: training again")
    except InputError as error:
        say(f"{folder}/ cannot be used again ({error}): training again")
    return train(replace(config, overwrite=True)), False


def same_settings(before: Mapping[str, Any], config: Config) -> bool:
    """Return whether config.json agrees with a configuration in all that shapes the result."""
    now = recorded(config)
    return before.keys() == now.keys() and all(
        before[key] == now[key] for key in now if key not in MAY_CHANGE
    )


def same_code(before: str | None, now: str) -> bool:
    """Return whether two runs are of one commit; -dirty twice need not be the same twice."""
    return before == now and not now.endswith("-dirty")


def can_go_on(folder: Path, dataset: Dataset) -> bool:
    """Return whether an unfinished run's last checkpoint, if any, is of this commit and data."""
    checkpoints = CheckpointFolder(folder / "checkpoint")
    if not checkpoints.exists("last"):
        return True
    _, state = checkpoints.load("last", keep=lambda name: False)
    return bool(
        state["dataset"] == dataset.content_hash and state.get("commits", [None])[-1] == commit()
    )


def with_ranker(options: RankerConfig, dataset: Dataset, *, stands: bool) -> dict[str, float]:
    """Return the metrics of model and ranker together on the test split.

    Args:
        options: of the ranker.
        dataset: of the run.
        stands: whether the run was finished before: then a ranker trained for it may be used again.
    """
    kept = Path(options.output) / "metrics.json"
    if stands and kept.exists():
        found = read_json(kept)
        try:
            if found.get("dataset_hash") == dataset.content_hash and found.get("options") == plain(
                options
            ):
                # Is it of this very run, and whole?
                RankedPredictor.load(options.output, options.checkpoint)
                say(f"{options.output}/ holds the ranker of this run already")
                return dict(found["test"]["both"])
        except InputError as error:
            say(f"{options.output}/ cannot be used again ({error}): training again")
    say(
        f"a linear ranker of [embedding, TF-IDF] on the model's {options.shortlist} best labels "
        "(xmlkernels rank); --min-df "
        f"{options.min_df} was chosen on validation for this recipe, the ranker's share is chosen "
        "there now"
    )
    return dict(train_ranker(options)["test"]["both"])


def plain(options: RankerConfig) -> dict[str, Any]:
    """Return the options as a ranker's metrics.json holds them."""
    return dict(json.loads(json.dumps(asdict(options))))


def nearest_neighbours(dataset: Dataset, kept: Path, *, stands: bool) -> dict[str, float]:
    """Return the metrics of the baseline on the same documents, and keep them with the run.

    Args:
        dataset: of the run.
        kept: the file of an earlier measurement.
        stands: whether the run was finished before: then its baseline of the same data may be used
            again.
    """
    if stands and kept.exists():
        found = read_json(kept)
        if found.get("dataset_hash") == dataset.content_hash:
            say(
                f"TF-IDF baseline: measured beside this run ({found['seconds']:.0f} s), on the "
                "same documents"
            )
            return dict(found["metrics"])
    started = time.perf_counter()
    fit, test = dataset.splits["train"], dataset.splits["test"]
    _, rows = KNNBaseline(fit.texts, fit.labels).predict(test.texts, 5)
    metrics = evaluate(
        np.asarray(rows), test.labels, inverse_propensity(fit.labels, *dataset.propensity)
    )
    seconds = time.perf_counter() - started
    write_json(kept, {"dataset_hash": dataset.content_hash, "seconds": seconds, "metrics": metrics})
    say(f"TF-IDF baseline: measured now ({seconds:.0f} s), on the same documents")
    return metrics


def answer(predictor: TextPredictor) -> None:
    """Print the labels of the three questions."""
    for query, labels in zip(QUERIES, predictor.predict(QUERIES, k=5), strict=True):
        say(f"\n{query}")
        say("   " + "   ".join(f"{label.name} {label.probability:.2f}" for label in labels))


@dataclass(frozen=True)
class Options:
    """None: the demo is the same for everyone."""


def main(words: Sequence[str]) -> None:
    """Run the demo, which takes no arguments."""
    parse(Options, "xmlkernels demo", __doc__ or "", words=words)
    run()
