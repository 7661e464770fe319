"""What a checkpoint holds comes back: tensors, exact JSON, generators, optimizer states."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from xmlkernels.checkpoint import (
    load,
    save,
)
from xmlkernels.errors import InputError


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
