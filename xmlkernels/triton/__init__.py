"""GPU kernels in Triton, one file per op, imported by an op's first call with CUDA tensors."""
