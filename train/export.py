"""Write a model's label vectors for a nearest-neighbour index: `python train/export.py --checkpoint DIR --output FOLDER`.

The folder gets `label_vectors.npy` (fp32 [L, D], memory-mappable, one row a label) and `label_names.txt`. With unit length,
as Renee's deployment has it (MLSys 2023, section 6), maximum inner product becomes cosine similarity, which every index
serves; rankings then differ from the exact ones of train/predict.py, because the lengths of the rows are gone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from report import command, say
from xmlkernels import InputError
from xmlkernels.data.files import replacing
from xmlkernels.predict import Predictor

_ROWS = 1 << 16  # rows turned into fp32 at a time


@dataclass(frozen=True)
class Options:
    checkpoint: str
    """A run's output folder, or the checkpoint folder in it."""
    output: str
    """Folder to write into; made when it is not there."""
    normalize: bool = True
    """Unit length for every row; --no-normalize keeps the trained lengths."""
    which: Literal["best", "last"] | None = None
    """The best checkpoint by validation, or the last one; by default the best, or the last while there is no best yet."""


def export(options: Options) -> None:
    predictor = Predictor.load(options.checkpoint, which=options.which)
    head = predictor.model.head
    if head.bias is not None:
        raise InputError(
            "--checkpoint",
            "a label table without bias",
            "one with a bias for each label",
            "an inner product cannot carry it; train without --bias",
        )
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "label_vectors.npy") as file:
        shape = tuple(head.weight.shape)
        np.lib.format.write_array_header_2_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for start in range(0, shape[0], _ROWS):
            rows = head.rows(start, start + _ROWS)
            file.write((torch.nn.functional.normalize(rows) if options.normalize else rows).numpy().tobytes())
    if predictor.label_names is not None:
        with replacing(folder / "label_names.txt") as file:
            file.write("".join(f"{name}\n" for name in predictor.label_names).encode())
    say(f"{folder}/: {shape[0]:,} label vectors of width {shape[1]}")


def main() -> None:
    import tyro

    export(tyro.cli(Options, prog="train/export.py", description=__doc__))


if __name__ == "__main__":
    command(main)
