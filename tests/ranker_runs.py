"""What the tests of rankers share: options of xmlkernels rank for the small dataset of
train_runs.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from xmlkernels.ranker.linear import Settings
from xmlkernels.training import ranker

SMALL: dict[str, Any] = {"min_df": 1, "longest": 1, "shortlist": 12, "top_k": 8}


def options(folder: Path, output: Path, **changes: Any) -> ranker.RankerConfig:
    """Small ones, without those that would do nothing beside the changes; settings of the solver
    are taken too.
    """
    idle = set() if changes.get("checkpoint") else {"shortlist"}
    if changes.get("features") or not changes.get("tfidf", True):
        idle |= {"min_df", "longest"}
    small = {name: value for name, value in SMALL.items() if name not in idle}
    training = Settings(
        **{
            name: changes.pop(name)
            for name in {field.name for field in fields(Settings)} & changes.keys()
        }
    )
    return ranker.RankerConfig(str(folder), str(output), training=training, **(small | changes))
