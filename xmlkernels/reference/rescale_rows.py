"""Reference of `rescale_rows_`."""

import torch
from torch import Tensor

from xmlkernels.reference.rounding import RESCALE, decode, encode

LARGEST_SCALE = 2.0**100


def rescale_rows_(
    weight: Tensor, row_scale: Tensor, counter: Tensor, row_offset: int = 0
) -> Tensor:
    """See `xmlkernels.ops.rescale_rows_`."""
    scale, largest = row_scale.unbind(1)
    half = torch.finfo(weight.dtype).max / 2
    # largest / 224 = m 2^e with m in [1/2, 1): the least power of two at or above it. Scales are
    # powers of two, too.
    m, e = torch.frexp(largest.nan_to_num() / half)
    least = torch.ldexp(torch.ones_like(m), torch.where(m > 0.5, e, e - 1)).clamp(max=LARGEST_SCALE)
    new = torch.where(largest > half * scale, least.maximum(scale), scale)
    change = new != scale
    rows = torch.arange(weight.shape[0], device=weight.device) + row_offset
    code, top = encode(
        decode(weight, row_scale), torch.stack([new, largest], 1), counter, rows, RESCALE
    )
    weight.copy_(
        torch.where(change[:, None], code.view(torch.uint8), weight.view(torch.uint8)).view(
            weight.dtype
        )
    )
    row_scale.copy_(torch.stack([new, torch.where(change, top, largest)], 1))
    return change.sum().reshape(1)
