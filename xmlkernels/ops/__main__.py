"""Say whether the native libraries are loaded, and if not, why: `python -m xmlkernels.ops`."""

import torch

from xmlkernels import native
from xmlkernels.ops import missing

if __name__ == "__main__":
    print(
        f"xmlkernels: native library: {'loaded' if missing is None else 'not loaded, ' + missing}"
    )
    if torch.version.cuda is not None:
        cuda = native.missing_cuda
        print(f"xmlkernels: CUDA library: {'loaded' if cuda is None else 'not loaded, ' + cuda}")
