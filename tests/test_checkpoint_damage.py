"""Damaged, foreign and mixed checkpoints are refused by name."""

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import value, whole
from damage import flip, without_checksums

from xmlkernels.checkpoint import (
    CheckpointFolder,
    load,
    save,
)
from xmlkernels.errors import InputError


def test_bad_checkpoints_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    with pytest.raises(InputError, match="no such file"):
        load(folder)

    def broken(change: Callable[[], object], match: str) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        save(folder, value(1), {"number": 1})
        without_checksums(folder)
        assert whole(folder) == 1
        change()
        with pytest.raises(InputError, match=match):
            load(folder)

    weights, state = folder / "tensors.safetensors", folder / "state.json"

    def edit(**entries: object) -> None:
        state.write_text(json.dumps({**json.loads(state.read_text()), **entries}))

    broken(lambda: os.truncate(weights, weights.stat().st_size - 4), "whole safetensors")
    broken(lambda: os.truncate(weights, 5), "whole safetensors")
    broken(weights.unlink, "tensors.safetensors.*no such file")
    broken(state.unlink, "state.json.*no such file")
    broken(lambda: os.truncate(state, 40), "state.json: expected JSON, got")
    broken(lambda: edit(version=3), "version 2, got 3")
    broken(lambda: edit(version=2), "a key 'files', got none")
    broken(lambda: edit(format="other"), 'format xmlkernels checkpoint, got "other"')
    broken(lambda: edit(identity="0"), "another checkpoint")
    scalar = {"shape": [], "dtype": "int64"}
    broken(
        lambda: edit(tensors={"w": {"shape": [150, 2], "dtype": "float32"}, "n": scalar}),
        "1 differ",
    )
    broken(
        lambda: edit(tensors={"w": {"shape": [300], "dtype": "float32"}}),
        "whole safetensors file, got .*1,200 of them",
    )
    broken(
        lambda: edit(tensors={"w": {"shape": [2**40, 2**40], "dtype": "float32"}}),
        "whole safetensors file, got",
    )
    broken(
        lambda: edit(tensors={"w": {"shape": [300], "dtype": "float33"}}),
        "a format that torch knows, got 'float33'",
    )
    broken(
        lambda: os.truncate(weights, 1 << 40), "whole safetensors file, got 1,099,511,627,776 bytes"
    )
    broken(
        lambda: state.write_text('{"format": "xmlkernels checkpoint", "version": 1}'),
        "a key 'identity', got none",
    )
    broken(lambda: state.write_text("[]"), "format xmlkernels checkpoint, got a list")
    broken(
        lambda: edit(tensors={"w": {"shape": [-1], "dtype": "float32"}}),
        r"tensors.w.shape\[0\]: expected .*>= 0, got -1",
    )
    broken(lambda: edit(alias={"x": 3}), r"alias.x: expected a text, got 3")
    broken(lambda: edit(alias={"x": "nowhere"}), "an alias of a tensor, got 'nowhere'")
    broken(lambda: edit(state=[]), r"state: expected an object, got a list of 0")
    broken(lambda: edit(state={"x": {"__float__": "much"}}), "nan, inf or -inf, got 'much'")
    broken(lambda: state.write_text("[" * 100_000), "at most 100 levels")
    broken(lambda: state.write_bytes(b"\xff\xfe"), "JSON in UTF-8")


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """200 anywhere in either file, headers and checksums too; the same for damage by whole bytes,
    and for mixed files.
    """
    folder, random_ = tmp_path / "c", random.Random(0)
    tensors = {
        **value(1),
        "same": torch.ones(3),
        "half": torch.ones(5).bfloat16(),
        "empty": torch.empty(0, 4),
    }
    tensors["alias"] = tensors["same"]
    save(folder, tensors, {"number": 1, "rates": [0.5, None, math.nan]})
    assert whole(folder) == 1
    for name in ("tensors.safetensors", "state.json"):
        content = (folder / name).read_bytes()
        for bit in random_.sample(range(8 * len(content)), 200):
            flip(folder / name, bit)
            with pytest.raises(InputError):
                load(folder)
            (folder / name).write_bytes(content)
        for damaged in (content[:-1], content + b" ", b"\0" * len(content), b""):
            (folder / name).write_bytes(damaged)
            with pytest.raises(InputError):
                load(folder)
            (folder / name).write_bytes(content)
    assert whole(folder) == 1
    save(tmp_path / "other", tensors, {"number": 1, "rates": [0.5, None, 1.0]})
    shutil.copy(tmp_path / "other" / "state.json", folder)
    with pytest.raises(InputError, match="another checkpoint"):
        load(folder)


def test_only_what_is_read_is_compared(tmp_path: Path) -> None:
    save(tmp_path / "c", value(1), {"number": 1})
    path = tmp_path / "c" / "tensors.safetensors"
    flip(path, 8 * path.stat().st_size - 1)  # in w, whose values come last
    assert load(tmp_path / "c", keep=lambda name: name == "n")[0]["n"] == 1
    with pytest.raises(InputError, match="tensor w: expected the content of checksum"):
        load(tmp_path / "c")


def test_checksums_of_some_are_no_checkpoint(tmp_path: Path) -> None:
    """Otherwise damage could make a checkpoint look like one from before there were any."""
    save(tmp_path / "c", value(1), {"number": 1})
    path = tmp_path / "c" / "state.json"
    head = json.loads(path.read_text())
    for told in head["tensors"].values():
        told["xxh3_129"] = told.pop("xxh3_128")
        path.write_text(json.dumps(head))
        with pytest.raises(InputError, match="checksum"):
            load(tmp_path / "c")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_decides_who_may_read(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        both = CheckpointFolder(tmp_path / "run")
        both.save_last(value(1), {"number": 1})
        both.save_best()
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) == 4 and {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}
