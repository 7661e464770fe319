"""Train a classifier over all labels: `python train/run.py RECIPE [--key value …]`.

The same as `xmlkernels train`, from a clone. On N GPUs of a machine:
`torchrun --nproc-per-node N train/run.py RECIPE …`. The loop itself is xmlkernels/training/loop.py;
end_to_end.py and cascade.py beside this file are whole training scripts to read.
"""

import sys

from xmlkernels.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]], prog="train/run.py")
