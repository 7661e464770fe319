"""Settings of a cascade: what is refused before any work, and the table that maps CascadeXML's
flags to them.
"""

import re
from dataclasses import fields, replace
from typing import Any

import pytest
from train_runs import ROOT, Config, check

from xmlkernels import InputError
from xmlkernels.models.training import CascadeTraining
from xmlkernels.options import flag as flag_of
from xmlkernels.options import names_in
from xmlkernels.training.config import CASCADE as GROUP

CASCADE = {"model": "cascade", "tree_depths": (3, 6)}


@pytest.mark.parametrize(
    ("changes", "given", "expected"),
    [
        (
            {"topk": (4,)},
            (),
            "--topk: expected 2 numbers, one for each level of clusters, as --tree-depths 3 6 has "
            "them, got 1",
        ),
        (
            {"tree_depths": (5,), "topk": (4, 4)},
            (),
            "--topk: expected 1 number, one for each level",
        ),
        ({"topk": (4, 0)}, (), "--topk: expected numbers of 1 or more"),
        (
            {"layers": ("1", "2")},
            (),
            "--layers: expected 3 numbers, one for each level, labels included",
        ),
        (
            {"layers": ("1", "2", "x")},
            (),
            "--layers: expected one or two layer numbers for each level, as 5,6 8 10 12, got 'x'",
        ),
        ({"layers": ("1", "2", "1,2,3")}, (), "--layers: expected one or two layer numbers"),
        ({"embed_drops": (0.1, 0.1)}, (), "--embed-drops: expected 3 numbers"),
        ({"embed_drops": (0.1, 0.1, 1.0)}, (), "--embed-drops: expected numbers from 0 to below 1"),
        ({"embed_drops": (0.1, 0.1, float("nan"))}, (), "--embed-drops: expected a finite number"),
        ({"rw_loss": (1.0,)}, (), "--rw-loss: expected 3 numbers"),
        ({"rw_loss": (1.0, 1.0, -1.0)}, (), "--rw-loss: expected weights of 0 or more"),
        ({"rw_loss": (0.0, 0.0, 0.0)}, (), "--rw-loss: expected a weight above 0"),
        ({"tree_depths": ()}, (), "--tree-depths: expected one to four ascending exponents"),
        ({"tree_depths": (6, 3)}, (), "--tree-depths: expected one to four ascending exponents"),
        ({"tree_depths": (1, 2, 3, 4, 5)}, (), "--tree-depths: expected one to four"),
        (
            {"tree": "x", "tree_depths": (3, 6)},
            ("tree_depths",),
            "--tree: expected no --tree-depths beside it",
        ),
        ({"scheme": "best"}, (), "--scheme: expected one of auto, level, weighted, path"),
        ({"schedule": "linear"}, (), "--schedule: expected one of three_phase, warmup_cosine"),
        (
            {"schedule": "warmup_cosine"},
            ("cooldown_epochs",),
            "--cooldown-epochs: expected --schedule three_phase",
        ),
        ({"head_lr_factor": 0.0}, (), "--head-lr-factor: expected more than 0"),
        ({"ema": 1.5}, (), "--ema: expected from 0 to 1"),
        ({"ema_start": 1.0}, (), "--ema-start: expected --ema beside it"),
        ({"ema_every": 2}, (), "--ema-every: expected --ema beside it"),
        ({"ema_tables": True}, (), "--ema-tables: expected --ema beside it"),
        ({"ema": 0.9, "ema_every": 0}, (), "--ema-every: expected 1 or more"),
        (
            {"ema": 0.9, "ema_tables": True, "table": "fp8"},
            (),
            "--ema-tables: expected no --ema-tables with --table fp8",
        ),
        ({"positives_bound": -1}, (), "--positives-bound: expected 0 or more"),
        ({"accumulate": 0}, (), "--accumulate: expected 1 or more"),
        (
            {"accumulate": 2, "micro_batch": 4},
            (),
            "--accumulate: expected no --micro-batch beside it",
        ),
        ({"warmup_epochs": 1.0}, ("warmup",), "--warmup: expected no --warmup-epochs beside it"),
        ({"freeze": -1}, (), "--freeze: expected 0 or more"),
        ({"bottleneck": 8}, (), "--bottleneck: expected --model end_to_end"),
        ({"kahan": True, "table": "bf16"}, (), "--kahan: expected --model end_to_end"),
        ({"bias": True}, (), "--bias: expected --model end_to_end"),
        ({}, ("table_lr",), "--table-lr: expected --model end_to_end"),
        ({}, ("dropout",), "--dropout: expected --embed-drops, one for each level"),
        ({}, ("momentum",), "--momentum: expected --table-optimizer sgd"),
        (
            {"model": "end_to_end"},
            ("topk",),
            "--topk: expected --model cascade, got --model end_to_end",
        ),
        ({"model": "end_to_end"}, ("tree",), "--tree: expected --model cascade"),
    ],
)
def test_settings_of_a_cascade_are_refused(
    changes: dict[str, Any], given: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(InputError) as told:
        check(replace(Config(), **CASCADE | changes), given)
    assert expected in str(told.value)


def test_depths_from_one_cluster_on() -> None:
    for depths in ((0,), (0, 3), (29, 30), (1, 2, 3, 4)):
        check(replace(Config(), model="cascade", tree_depths=depths))
    with pytest.raises(InputError, match="--tree-depths"):
        check(replace(Config(), model="cascade", tree_depths=(30, 31)))


def test_the_last_phase_is_a_fifth_of_the_run_unless_told() -> None:
    """CascadeXML: 3 of 15 epochs. Of 100 updates the plateau ends in update 78 (from 0)."""
    settings = CascadeTraining(encoder_lr=1.0, total=100, warmup=10)
    assert settings.rates(78)[0] == 1 > settings.rates(79)[0]
    assert settings.rates(99)[0] == pytest.approx(1e-3)
    told = CascadeTraining(encoder_lr=1.0, total=100, warmup=10, cooldown=30)
    assert told.rates(68)[0] == 1 > told.rates(69)[0]


def test_the_table_of_flags_names_real_ones() -> None:
    """docs/cascade_flags.md: every flag of ours exists, and every field of a cascade stands
    there.
    """
    ours = {f"--{field.name.replace('_', '-')}" for field in fields(Config)}
    here = [
        line.split("|")[2]
        for line in (ROOT / "docs" / "cascade_flags.md").read_text().splitlines()
        if line.startswith("| `")
    ]
    rows = [cell for cell in here if "`xmlkernels " not in cell and "torchrun" not in cell]
    named = {word for cell in rows for word in re.findall(r"--[a-z][a-z-]+", cell)}
    assert named and not named - ours
    everywhere = (ROOT / "docs" / "cascade_flags.md").read_text()
    assert not [
        flag for flag in map(flag_of, names_in(Config, GROUP)) if f"`{flag}" not in everywhere
    ]
