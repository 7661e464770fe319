"""Fit probabilities and thresholds on validation: `xmlkernels calibrate RUN`.

Training does it at its end where there is a validation split; this command does it again, with
other bands, another method or precision, or for what an older version trained. RUN is the output
folder of a run, of a ranker, or of `linear --trees N`. Its metrics.json gets the measures, and
`calibration.safetensors` the curves, which xmlkernels.load, predict and ensemble --calibrated use.

Printed are the expected calibration error of the five best labels of a document, before and after;
precision and recall of the labels that reach their band's threshold; and P@k of the ranking by
score and by calibrated probability. predict ranks by score unless it is asked otherwise. Then how
good the labels are that reach the probability with the highest micro-F1 on validation.
"""

from collections.abc import Sequence
from typing import Any

from xmlkernels.cli.arguments import parse
from xmlkernels.cli.console import print_every, print_rows, say
from xmlkernels.training.calibrating import CalibrateConfig, calibrate


def main(words: Sequence[str]) -> None:
    """Calibrate the folder that the arguments name."""
    what = __doc__ or ""
    options = parse(CalibrateConfig, "xmlkernels calibrate", what, positional=True, words=words)
    print_calibration(calibrate(options))
    say(f"written to {options.folder}/")


def print_calibration(report: dict[str, Any]) -> None:
    """Print the measures of a calibration, a row per split."""
    rows = []
    for split in ("validation", "test"):
        if split in report:
            one = report[split]
            precision = "none" if one["precision"] is None else f"{100 * one['precision']:.1f}"
            rows.append(
                [
                    split,
                    f"{one['before']:.4f}",
                    f"{one['after']:.4f}",
                    precision,
                    f"{100 * one['recall']:.1f}",
                    *(f"{one['ranked_by_score'][f'P@{k}']:.2f}" for k in (1, 5)),
                    *(f"{one['ranked'][f'P@{k}']:.2f}" for k in (1, 5)),
                ]
            )
    wanted = f"{100 * report['wanted_precision']:g}%"
    names = ["split", "ECE before", "after", f"precision ({wanted} wanted)", "recall"]
    names += ["P@1 by score", "P@5", "P@1 by probability", "P@5"]
    methods = [band["method"] for band in report["bands"]]
    title = f"calibration in {len(methods)} bands ({', '.join(methods)})"
    print_rows(title, names, rows, words=False)
    split = "test" if "test" in report else "validation"
    title = f"{split}: labels of a probability of {report['f1_probability']:.4g} or more"
    print_every(f"{title}, the highest micro-F1 on validation", report[split]["f1"])
