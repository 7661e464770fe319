"""The native parser takes random input under ASan and UBSan; a planted fault is found."""

import os
import shutil
from pathlib import Path

import pytest
from fuzz_native import ENGINES, HOST, build, compilers, fuzz

REQUIRED = os.environ.get("XMLKERNELS_REQUIRE_NATIVE") == "1"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_few_seconds(engine: str, tmp_path: Path) -> None:
    if not compilers(engine) and not (REQUIRED and engine == "driver"):
        pytest.skip(f"no compiler here for {engine}")
    assert build(engine, tmp_path / "program")
    end = fuzz(engine, tmp_path / "program", tmp_path, 3, 0)
    assert end.status == 0 and end.input is None and "Done " in end.told, end.told


# Each is one edit of the parser, and what then finds it.
FAULTS = {
    "a read beyond the text": (
        "while (p < end && !stops_[static_cast<unsigned char>(*p)]) ++p;",
        "while (!stops_[static_cast<unsigned char>(*p)]) ++p;",
        "heap-buffer-overflow",
    ),
    "an overflow": (
        "(p - start < 18 || value <= (most - digit) / 10) ? value * 10 + digit : most",
        "value * 10 + digit",
        "signed integer overflow",
    ),
    "a row out of order": (
        "canonical = canonical && index > previous && value != 0.0f;",
        "canonical = canonical && value != 0.0f;",
        "wrong: order",
    ),
}


@pytest.mark.skipif(not compilers("driver"), reason="no compiler here")
@pytest.mark.parametrize(
    "name",
    [
        name if not at else pytest.param(name, marks=pytest.mark.slow)
        for at, name in enumerate(FAULTS)
    ],
)
def test_a_planted_fault_is_found(name: str, tmp_path: Path) -> None:
    before, after, told = FAULTS[name]
    host = tmp_path / "host"
    shutil.copytree(HOST, host)
    text = (host / "sparse_row.h").read_text()
    assert text.count(before) == 1
    (host / "sparse_row.h").write_text(text.replace(before, after))
    assert build("driver", tmp_path / "program", host)
    end = fuzz("driver", tmp_path / "program", tmp_path, 20, 0)
    assert end.status != 0 and told in end.told, end.told
    assert end.input is not None and end.input.stat().st_size
