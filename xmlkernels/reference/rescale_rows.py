"""Reference of `rescale_rows_`."""

import torch
from torch import Tensor

from xmlkernels.reference.rounding import RESCALE, decode, encode

LARGEST_SCALE = 2.0**100


def rescale_rows_(weight: Tensor, row_scale: Tensor, counter: Tensor, row_offset: int = 0) -> Tensor:
    """See `xmlkernels.ops.rescale_rows_`."""
    scale, largest = row_scale.unbind(1)
    # largest / (224 scale) = m 2^e with m in [1/2, 1): so many doublings until it is 1 or less.
    m, e = torch.frexp(largest.nan_to_num() / (torch.finfo(weight.dtype).max / 2) / scale)
    doublings = torch.where(m > 0.5, e, e - 1).clamp(min=0)
    new = torch.ldexp(scale, doublings).clamp(max=LARGEST_SCALE).maximum(scale)
    change = new != scale
    rows = torch.arange(weight.shape[0], device=weight.device) + row_offset
    code, top = encode(decode(weight, row_scale), torch.stack([new, largest], 1), counter, rows, RESCALE)
    weight.copy_(torch.where(change[:, None], code.view(torch.uint8), weight.view(torch.uint8)).view(weight.dtype))
    row_scale.copy_(torch.stack([new, torch.where(change, top, largest)], 1))
    return change.sum().reshape(1)
