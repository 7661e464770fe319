"""GPU kernels in Triton, one file per op. `xmlkernels.ops` imports them on the first call with CUDA
tensors.
"""
