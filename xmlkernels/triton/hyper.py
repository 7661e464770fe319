"""Places of the numbers in `hyper`, fp32 [7]; `xmlkernels.ops.Hyper` says what each one means."""

import triton.language as tl

LR = tl.constexpr(0)
DECAY = tl.constexpr(1)
BETA1 = tl.constexpr(2)
BETA2 = tl.constexpr(3)
EPSILON = tl.constexpr(4)
SCALE = tl.constexpr(5)
DX_SCALE = tl.constexpr(6)
