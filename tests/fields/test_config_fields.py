"""Every field of Config has an effect: a run that ignored it would fail here.

The table is in the fields_*.py files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import fields_cascade
import fields_encoder
import fields_run
import fields_saving
import fields_table
import fields_training
import pytest
from config_runs import Case, Config, Runs

from xmlkernels.training.config import began_with, recorded

Held = tuple[Case | Callable[[Runs, Any], None], ...]
TABLE: dict[str, Held] = {
    **fields_run.FIELDS,
    **fields_saving.FIELDS,
    **fields_encoder.FIELDS,
    **fields_cascade.FIELDS,
    **fields_table.FIELDS,
    **fields_training.FIELDS,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("fields"))


def test_every_field_is_in_the_table() -> None:
    names = [field.name for field in fields(Config)]
    assert sorted(TABLE) == sorted(names), (
        "a new flag needs a line in tests/fields/: what differs when it is set"
    )


def test_defaults_are_those_of_runs_that_began_before() -> None:
    """A config.json that lacks a field is older than the field: its run had today's default."""
    before = json.loads((Path(__file__).parent / "defaults.json").read_text())
    now = recorded(Config())
    assert {name: now[name] for name in before} == before
    assert began_with({"model": "end_to_end"}) == now
    assert not now.keys() - before.keys(), "put the default of the new field into defaults.json"


@pytest.mark.parametrize(
    ("name", "number"), [(name, n) for name, held in TABLE.items() for n in range(len(held))]
)
def test_it_is_held(name: str, number: int, runs: Runs, tmp_path: Any) -> None:
    held = TABLE[name][number]
    if isinstance(held, Case):
        assert name in held.changes
        held.check(runs)
    else:
        held(runs, tmp_path)
