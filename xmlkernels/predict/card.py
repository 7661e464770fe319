"""The model card of a saved predictor: what it is, its figures, its data, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xmlkernels.predict.base import TextPredictor
from xmlkernels.predict.forest import Forest
from xmlkernels.predict.model import Predictor
from xmlkernels.predict.ranked import RankedPredictor
from xmlkernels.records import MOST_BYTES, parse_json

_SHOWN = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "PSP@5")
_PLACES = ("dataset", "output", "cache", "checkpoint", "tree", "train_text", "validation_text",
           "test_text", "features", "resume", "overwrite")  # fmt: skip


def model_card(predictor: TextPredictor, license: str | None = None) -> str:
    """Return a README.md with the Hub's header, of what training wrote beside the model.

    Args:
        predictor: of `xmlkernels.load`.
        license: as the Hub names it; None says that none is stated.
    """
    report, settings = _found(predictor)
    kind, labels = _kind(predictor), f"{predictor.labels:,}"
    head = ["---", "library_name: xmlkernels", "pipeline_tag: text-classification"]
    head += [f"license: {license}"] if license else []
    head += ["tags:", "- extreme-multi-label-classification", "- xmlkernels", "---"]
    data = f"{report['dataset']}" if "dataset" in report else "not recorded"
    if "dataset_hash" in report:
        data += f", content hash `{report['dataset_hash']}`"
    lines = [
        *head,
        "",
        f"# {kind} for {labels} labels",
        "",
        "Gives the best labels of a text. Trained by xmlkernels.",
        "",
        "```python",
        "import xmlkernels as xk",
        "",
        'predictor = xk.from_pretrained("this repository, or its folder")',
        'for labels in predictor.predict(["a text to label"], k=5):',
        "    print([(label.name, label.probability) for label in labels])",
        "```",
        "",
        f"- Data: {data}.",
        f"- License: {license or 'none is stated'}.",
    ]
    if "commit" in report:
        lines.append(f"- Source tree: `{report['commit']}`.")
    lines += ["", *_metrics(report)]
    if settings:
        told = {name: value for name, value in settings.items() if name not in _PLACES}
        lines += ["## Settings of the training", "", "```json", json.dumps(told, indent=1), "```"]
    return "\n".join(lines) + "\n"


def _kind(predictor: TextPredictor) -> str:
    if isinstance(predictor, Forest):
        return f"Forest of {len(predictor.rankers)} linear rankers"
    if isinstance(predictor, RankedPredictor):
        return "Linear ranker" + (" beside a model" if predictor.model is not None else "")
    assert isinstance(predictor, Predictor)
    return {"cascade": "Cascade"}.get(predictor.model.config()["kind"], "End-to-end model")


def _found(predictor: TextPredictor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return metrics.json and the settings of the training; {} where they are not there."""
    folder = predictor.folder
    if isinstance(predictor, Forest):
        parts = {ranker.folder.parent for ranker in predictor.rankers if ranker.folder is not None}
        folder = parts.pop() if len(parts) == 1 else None
    if folder is None:
        return {}, {}
    base = folder.parent.parent if isinstance(predictor, Predictor) else folder
    report = _json(base / "metrics.json")
    return report, _json(base / "config.json") or dict(report.get("options", {}))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        return {}
    found = parse_json(path.read_bytes(), str(path), "train it again", strict=False)
    return found if isinstance(found, dict) else {}


def _metrics(report: Mapping[str, Any]) -> list[str]:
    """Return a table of the figures on validation and test, and the calibration error."""
    rows: dict[str, Mapping[str, Any]] = {}
    for split in ("validation", "test"):
        found = report.get(split, {})
        if "P@1" in found:
            rows[split] = found
        elif found:  # of a ranker: by what was scored, the last of them the whole
            rows[split] = list(found.values())[-1]
    if not rows:
        return []
    lines = ["## Figures", "", f"| percent | {' | '.join(_SHOWN)} |", "|---" * 7 + "|"]
    for name, found in rows.items():
        cells = [f"{found[key]:.2f}" if key in found else "" for key in _SHOWN]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    calibration = report.get("calibration", {})
    for split in ("test", "validation"):
        if split in calibration:
            before, after = (calibration[split][key] for key in ("before", "after"))
            told = f"Expected calibration error on {split}: {after:.3f}"
            lines += ["", f"{told} ({before:.3f} before calibration)."]
            break
    return [*lines, ""]
