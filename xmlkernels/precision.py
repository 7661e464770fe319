"""Number formats by name, and the formats that suit a device."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TABLE_DTYPES = DTYPES | {"fp8": torch.float8_e4m3fn}


def default_autocast(device: torch.device | str) -> torch.dtype | None:
    """Choose the half precision that pays on a device; None means fp32.

    CPU: bf16 where the CPU has AVX512-BF16 or AMX-BF16 instructions. Elsewhere it is emulated and
    slower than fp32.

    CUDA: bf16 from compute capability 8.0 on. Below it fp16, which needs a loss scaler.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if kind == "cpu":
        found = torch.cpu.get_capabilities()
        return torch.bfloat16 if found.get("avx512_bf16") or found.get("amx_bf16") else None
    return None


def default_table_dtype(device: torch.device | str) -> str:
    """Choose a table's format: bf16 where the device multiplies it natively, else fp32."""
    return "bf16" if default_autocast(device) == torch.bfloat16 else "fp32"
