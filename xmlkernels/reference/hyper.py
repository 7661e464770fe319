"""Places of the numbers in `hyper`, fp32 [7]; `xmlkernels.ops.Hyper` says what each one means."""

LR, DECAY, BETA1, BETA2, EPSILON, SCALE, DX_SCALE = range(7)
