"""The faults of mutants.py still apply: their texts, their files and their tests exist."""

import ast
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from mutants import EQUIVALENT, describe, judge, planted, stages
from mutants_by_hand import BY_HAND, FIELDS, Fault
from mutants_drawn import TESTS, drawn

from xmlkernels.training.config import Config

ROOT = Path(__file__).resolve().parents[1]
STAGES = sorted({stage for fault in BY_HAND for stage in stages(fault)}.union(*TESTS.values()))


@pytest.mark.parametrize("fault", BY_HAND, ids=describe)
def test_a_fault_written_by_hand_changes_the_code(fault: Fault) -> None:
    faulty = planted(ROOT, fault)
    assert faulty is not None, f"{fault.path} must contain this once: {fault.old!r}"
    sound = ast.parse((ROOT / fault.path).read_text("utf-8"))
    assert ast.dump(ast.parse(faulty)) != ast.dump(sound)


def test_no_fault_is_there_twice() -> None:
    assert len(set(map(describe, BY_HAND))) == len(BY_HAND) >= 59


@pytest.mark.parametrize("line", EQUIVALENT)
def test_equivalent_faults_still_apply(line: str) -> None:
    path, _, change = line.partition(": ")
    old = ast.literal_eval(change.partition(" -> ")[0])
    assert " ".join((ROOT / path).read_text("utf-8").split()).count(old) == 1


@pytest.mark.parametrize("path", TESTS)
def test_files_that_faults_are_drawn_from_exist(path: str) -> None:
    assert (ROOT / path).is_file()


def test_drawn_faults_change_the_code() -> None:
    faults = drawn(ROOT, 40, seed=0)
    assert len(faults) == 40 and len({fault.path for fault in faults}) > 10
    for fault in faults:
        faulty = planted(ROOT, fault)
        assert faulty is not None, describe(fault)
        ast.parse(faulty)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_selects_tests(stage: str) -> None:
    """Files exist; words of -k occur in them, or name a field of the settings."""
    words = shlex.split(stage)
    chosen = words[words.index("-k") + 1] if "-k" in words else ""
    files = [ROOT / word for word in words if word.endswith(".py")]
    assert files and all(file.is_file() for file in files), stage
    if FIELDS in words:
        names = " ".join(field.name for field in fields(Config))
    else:
        texts = "\n".join(file.read_text("utf-8") for file in files)
        names = " ".join(re.findall(r"^def (test_\w+)", texts, re.MULTILINE))
    unknown = [word for word in re.findall(r"\w+", chosen) if word not in names]
    assert not set(unknown) - {"and", "or", "not"}, stage


@pytest.mark.parametrize(
    ("code", "output", "outcome"),
    [
        (0, "3 passed", "survived"),
        (1, "FAILED tests/test_a.py::test_b", "killed"),
        (2, "ERROR tests/test_a.py", "killed"),  # the fault breaks an import
        (4, "ImportError while loading conftest", "killed"),
        (4, "ERROR: file or directory not found: tests/test_a.py", "stale"),
        (4, "ERROR: not found: tests/test_a.py::test_b", "stale"),
        (5, "no tests ran", "stale"),
        (-11, "", "killed"),
    ],
)
def test_a_stage_without_tests_kills_nothing(code: int, output: str, outcome: str) -> None:
    assert judge(code, output)[0] == outcome
