"""Train a linear ranker over shortlists: `xmlkernels rank --dataset DIR --output FOLDER …`.

For every label a sparse classifier of [embedding || TF-IDF] is trained on the documents whose
shortlist holds the label. With --checkpoint RUN the shortlists and embeddings are a model's, and
the result is compared with the plain model: the model alone, the ranker alone on the model's
shortlists, and both together, the share of each chosen on validation. Without it the ranker works
on TF-IDF alone: with --tree on the shortlists of linear classifiers of the tree's clusters, with
--one-vs-all on all labels. Transformers are needed for the model of --checkpoint only.

TF-IDF is made from the texts kept in the dataset, from text files (--train-text …, which may say
more than the texts that the model was trained on), or read from a folder of features. The folder
gets ranker.safetensors, predictions.npz (logits of the test split), metrics.json, label_names.txt,
vectorizer/, with --tree clusters/, and with --checkpoint inputs/ (embeddings and shortlists, to be
used again). `xmlkernels predict --ranker FOLDER` labels new texts with it.
"""

from collections.abc import Sequence
from typing import Any

from xmlkernels.cli.arguments import parse
from xmlkernels.cli.console import (
    print_comparison,
    print_every,
    print_every_label,
    say,
    typed,
)
from xmlkernels.training.ranker import SHOWN, train_ranker
from xmlkernels.training.ranker_config import RankerConfig
from xmlkernels.training.stops import done


def main(words: Sequence[str]) -> None:
    """Train the ranker that the arguments describe."""
    report = train_ranker(parse(RankerConfig, "xmlkernels rank", __doc__ or "", words=words))
    done()
    print_ranker(report)


def print_ranker(report: dict[str, Any]) -> None:
    """Print the metrics of a trained ranker, its folder, and the command that asks it."""
    rows = {
        f"{split}, {what}": numbers
        for split in SHOWN.values()
        for what, numbers in report.get(split, {}).items()
    }
    if rows:
        a, b = report["propensity"]
        dataset = f"{report['dataset']} (hash {report['dataset_hash'][:12]})"
        print_comparison(f"{dataset}, propensity constants A={a}, B={b}", rows)
    if report["options"]["show"] == "all":
        for name, numbers in rows.items():
            print_every(name, numbers)
        print_every_label(report)
    say(f"written to {report['options']['output']}/")
    bags = report.get("bags_of_words", False)
    say(next_command(report["options"], report.get("rankers", ()), bags=bags))


def next_command(
    options: dict[str, Any], rankers: Sequence[str] = (), *, bags: bool = False
) -> str:
    """Return how to ask the ranker for labels; one of ready features cannot be asked.

    Args:
        options: of its training.
        rankers: the folders of a forest; none where the output is one ranker's.
        bags: whether its dataset holds bags of words in place of texts.
    """
    if options["features"] or bags:
        return (
            "a ranker of ready features scores the splits of its dataset alone: predictions.npz "
            "has those of the test split"
        )
    model = f"--checkpoint {options['checkpoint']} " if options["checkpoint"] else ""
    own = ' --ranker-text "…"' if model and options["train_text"] else ""
    folders = " ".join(rankers) or options["output"]
    return f'ask it: {typed("predict")} {model}--ranker {folders} --text "…"{own}'
