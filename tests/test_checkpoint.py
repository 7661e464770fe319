"""What a checkpoint holds comes back: tensors, exact JSON, generators, optimizer states."""

import gc
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_groups import same
from safetensors.torch import load_file, save_file
from torch import nn

from xmlkernels.checkpoint import (
    load,
    save,
    writing,
)
from xmlkernels.checkpoint.on_disk import TensorRows
from xmlkernels.checkpoint.shards import rows_of_whole
from xmlkernels.checksums import checksum
from xmlkernels.errors import InputError
from xmlkernels.rows import FileRows


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    tensors = {
        "fp32": base,
        "same": base,
        "transposed": base.t(),
        "rows": base[2:4],
        "strided": base[:, ::2],
        "parameter": nn.Parameter(torch.randn(3)),
        "bf16": torch.randn(3).bfloat16(),
        "fp8": torch.randn(8).to(torch.float8_e4m3fn),
        "nan": torch.tensor([math.nan, math.inf, -0.0]),
        "empty": torch.empty(0, 5),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "bool": torch.tensor([True, False]),
        "bytes": torch.arange(256, dtype=torch.uint8),
    }
    save(tmp_path / "c", tensors, {})
    found, state = load(tmp_path / "c")
    assert state == {} and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert (
            found[name].numpy(force=True).tobytes()
            == tensor.detach().contiguous().numpy().tobytes()
            if (tensor.dtype in (torch.float32, torch.int64, torch.bool, torch.uint8))
            else torch.equal(found[name].float(), tensor.float())
        ), name
    assert found["same"] is found["fp32"]
    stored = os.path.getsize(tmp_path / "c" / "tensors.safetensors")
    assert stored < 4 * (24 + 24 + 8 + 12 + 6 + 64) + 4096  # the alias takes no room
    found["fp32"].zero_()  # training on what was loaded must not reach into the file
    again, _ = load(tmp_path / "c")
    assert torch.equal(again["fp32"], base)


@pytest.mark.parametrize("spaces", [0, 3])
def test_whole_tensors_are_those_that_the_library_reads(tmp_path: Path, spaces: int) -> None:
    """Of every format, also where values are not aligned."""
    tensors = {str(kind): torch.randn(9, 3).to(kind) for kind in writing.KINDS}
    tensors |= {"é": torch.tensor(3), "none": torch.empty(0, 4), "bytes": torch.ones(1).bool()}
    path = tmp_path / "theirs"
    save_file(tensors, path)
    content = path.read_bytes()
    header = content[8:][: int.from_bytes(content[:8], "little")] + b" " * spaces
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[-values(tensors) :])
    expected, own = load_file(path), TensorRows(path, "t")
    assert expected.keys() == tensors.keys()
    for name, tensor in expected.items():
        found = own.whole(name)
        assert same(found, tensor), name
        assert found.untyped_storage().nbytes() == found.numel() * found.itemsize, name


def values(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


def test_rows_of_no_bytes_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a damaged header says that they are so many that one after another would hang."""
    (tmp_path / "t").touch()
    held, read = FileRows(tmp_path / "t", (2**34, 2, 0), torch.float32), []
    monkeypatch.setattr(held, "read", lambda start, out: read.append((start, out.shape)))
    for behind in (True, False):
        found, summed = rows_of_whole(held, None, [2**34, 2, 0], behind=behind)
        assert found.shape == (2**34, 2, 0) and summed == checksum(b"")
    assert read == [(0, (2**34, 2, 0))] * 2


def test_loading_leaves_nothing_behind(tmp_path: Path) -> None:
    """For torch, safetensors 0.8 leaves two numbers for each tensor that it gives."""
    tensors = {f"t{number}": torch.zeros(300) for number in range(100)}
    save(tmp_path / "c", tensors, {})

    def held() -> int:
        load(tmp_path / "c")
        gc.collect()
        return sys.getallocatedblocks()

    before = [held() for _ in range(3)][-1]
    assert max(held() for _ in range(3)) - before < 100


def test_state_is_exact_and_strict_json(tmp_path: Path) -> None:
    state = {
        "inf": [math.inf, -math.inf],
        "big": 2**200 + 1,
        "third": 1 / 3,
        "tiny": 5e-324,
        "text": "é\n\ud7ff",
        "none": None,
        "flag": True,
        "numpy": np.int64(2**62),
        "tuple": (1, {"x": 2.0}),
        "state": {},
    }
    save(tmp_path / "c", {}, {**state, "nan": math.nan})
    _, found = load(tmp_path / "c")
    assert math.isnan(found.pop("nan"))
    assert found == {**state, "tuple": [1, {"x": 2.0}]}
    assert isinstance(found["numpy"], int) and isinstance(found["flag"], bool)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    json.loads((tmp_path / "c" / "state.json").read_text(encoding="utf-8"), parse_constant=refuse)
    for bad, place in [
        ({"a": {1: 2}}, "state.a"),
        ({"a": [0, {1}]}, r"state.a\[1\]"),
        ({"t": torch.ones(1)}, "state.t"),
    ]:
        with pytest.raises(InputError, match=place):
            save(tmp_path / "c", {}, bad)
    assert load(tmp_path / "c")[1]["big"] == 2**200 + 1
