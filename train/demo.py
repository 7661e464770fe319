"""What `make demo` runs: train on part of the built-in corpus, compare with a nearest-neighbour baseline, answer queries.

The task: which functions will the function that does this need to call?
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from config import Config
from recipes import RECIPES
from report import command, print_comparison, say
from run import train
from session import commit, open_dataset
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.knn import KNNBaseline
from xmlkernels.metrics import evaluate, inverse_propensity
from xmlkernels.predict import Predictor

QUERIES = (
    "Open a file and return its lines as a list of strings.",
    "Compute the mean and the standard deviation of an array along an axis.",
    "Parse a date string and return a datetime object.",
)


def main() -> None:
    _, config = RECIPES["demo"]
    say("Which functions does a function call? Texts: first paragraphs of docstrings of Python packages; labels: the calls.")
    report = standing(config) or train(config)
    dataset = open_dataset(config)
    baseline = nearest_neighbours(dataset)
    print_comparison(
        f"test split of the built-in corpus, hash {dataset.content_hash[:12]}",
        {"end-to-end, all-MiniLM-L6-v2": report["test"], "TF-IDF nearest neighbours": baseline},
    )
    answer(Predictor.load(config.output))
    say(f'\nAsk it more: .venv/bin/python train/predict.py --checkpoint {config.output} --text "…"')


def standing(config: Config) -> dict[str, Any] | None:
    """The report of a finished run of this configuration and commit, if there is one."""
    folder = Path(config.output)
    if not (folder / "metrics.json").exists():
        return None
    report: dict[str, Any] = json.loads((folder / "metrics.json").read_text("utf-8"))
    same = json.loads((folder / "config.json").read_text("utf-8")) == asdict(config) and report["commit"] == commit()
    if same:
        say(f"{folder}/ holds this run already: nothing to train (remove it to train again)")
    return report if same else None


def nearest_neighbours(dataset: Dataset) -> dict[str, float]:
    """Metrics of the baseline on the same documents."""
    started = time.perf_counter()
    fit, test = dataset.splits["train"], dataset.splits["test"]
    _, rows = KNNBaseline(fit.texts, fit.labels).predict(test.texts, 5)
    metrics = evaluate(np.asarray(rows), test.labels, inverse_propensity(fit.labels, *dataset.propensity))
    say(f"TF-IDF baseline: {time.perf_counter() - started:.0f} s")
    return metrics


def answer(predictor: Predictor) -> None:
    for query, labels in zip(QUERIES, predictor.predict(QUERIES, k=5), strict=True):
        say(f"\n{query}")
        say("   " + "   ".join(f"{label.name} {label.probability:.2f}" for label in labels))


if __name__ == "__main__":
    command(main)
