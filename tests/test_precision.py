"""The formats that suit a device."""

import pytest
import torch

from xmlkernels.precision import default_autocast, default_table_dtype


def test_defaults_follow_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, half, table in (
        ({"avx512_bf16": True}, torch.bfloat16, "bf16"),
        ({"amx_bf16": True}, torch.bfloat16, "bf16"),
        ({"avx512_bf16": False, "avx2": True}, None, "fp32"),
        ({"architecture": "aarch64"}, None, "fp32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert default_autocast("cpu") == half
        assert default_table_dtype(torch.device("cpu")) == table


@pytest.mark.parametrize(
    ("supported", "half", "table"), [(True, torch.bfloat16, "bf16"), (False, torch.float16, "fp32")]
)
def test_defaults_follow_the_card(
    supported: bool, half: torch.dtype, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert default_autocast(torch.device("cuda", 0)) == half
    assert default_table_dtype("cuda") == table
