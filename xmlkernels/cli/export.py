"""Write what a trained model knows: `xmlkernels export --checkpoint DIR --output FOLDER`.

--what chooses one of six:

label_vectors: `label_vectors.npy` (fp32 [L, D], memory-mappable, one row per label) and
`label_names.txt`, for an index of nearest neighbours. With unit length, as Renee's deployment has
it (MLSys 2023, section 6), maximum inner product becomes cosine similarity, which every index
serves; rankings then differ from the exact ones of xmlkernels predict, because the lengths of the
rows are gone.

embeddings: `embeddings_SPLIT.npy` (fp32 [N, D]) of every split: the vectors that the label table
scores.

shortlists: `shortlist_SPLIT.npz` (scipy CSR [N, L] of logits) of every split: the labels that a
linear ranker has to choose from. Of a cascade they are candidates of its last level; pairs that a
filter bars are not among them.

onnx: the transformer of a model end to end as `encoder.onnx` (fp32, batch and length free) and its
tokenizer; onnxruntime must agree with torch to 1e-4, or nothing is written.

index: the label table of a model end to end, biases too, as a faiss index of inner products,
`labels.faiss`. Printed and kept in `index.json` is its recall@10 against the exact best ten labels,
on at most 1,000 documents of the test split, or of another where there is none.

quantized: the run again, for predictions, with a label table of a byte per weight (--format int8 or
e4m3) and a scale per row. xmlkernels serve and xmlkernels.load take the folder. Printed and kept in
`quantized.json`: bytes of the table before and after and, where the dataset is named or found, P@k
of both tables on the test split, or on another where there is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from xmlkernels import InputError
from xmlkernels.cli.arguments import parse
from xmlkernels.cli.console import say
from xmlkernels.data.dataset import Dataset, Split
from xmlkernels.data.formats.matrices import write_npz
from xmlkernels.data.inputs import check_dataset
from xmlkernels.devices import find_device
from xmlkernels.evaluation import embed_split, predict_split, score_matrix
from xmlkernels.files import replacing
from xmlkernels.locks import own_folder
from xmlkernels.metrics import evaluate
from xmlkernels.options import check_least
from xmlkernels.predict.exchange import (
    ENCODER,
    ENCODER_FACTS,
    INDEX,
    INDEX_FACTS,
    write_index,
    write_onnx,
)
from xmlkernels.predict.folders import dataset_folder
from xmlkernels.predict.model import Predictor
from xmlkernels.predict.quantize import write_quantized
from xmlkernels.training.config import Config, began_with
from xmlkernels.training.folder import read_json, write_json
from xmlkernels.training.inputs import open_dataset
from xmlkernels.training.owned import refuse_others

WRITTEN = (
    "label_vectors.npy",
    "label_names.txt",
    ENCODER,
    ENCODER_FACTS,
    INDEX,
    INDEX_FACTS,
    "quantized.json",
    *(
        name
        for split in ("train", "val", "test")
        for name in (f"embeddings_{split}.npy", f"shortlist_{split}.npz")
    ),
)
_ROWS = 1 << 16  # rows turned into fp32 at a time
QUANTIZED = "quantized.json"
DEPTH, SHOWN = 5, ("P@1", "P@3", "P@5")
_ASKED = 1000  # documents that an index is measured on


@dataclass(frozen=True)
class Options:
    """Which model, what of it, and where to."""

    checkpoint: str
    """A run's output folder, or the checkpoint folder in it."""
    output: str
    """Folder to write into; made when it is not there."""
    what: Literal["label_vectors", "embeddings", "shortlists", "onnx", "index", "quantized"] = (
        "label_vectors"
    )
    """See above."""
    normalize: bool = True
    """label_vectors: unit length for every row; --no-normalize keeps the trained lengths."""
    index: Literal["hnsw", "ivf", "flat"] = "hnsw"
    """index: a graph, an inverted file of √L lists, or every row, which is exact."""
    format: Literal["int8", "e4m3"] = "int8"
    """quantized: of the label table's weights. e4m3 is read by the ops as it is; int8 is more
    precise, and is turned into fp32 tile by tile."""
    dataset: str = ""
    """embeddings, shortlists, index, quantized: the dataset folder; by default the run's own."""
    top_k: int = 100
    """shortlists: labels per document."""
    batch: int = 256
    """embeddings, shortlists, index, quantized: documents per pass."""
    which: Literal["best", "last"] | None = None
    """The best checkpoint by validation, or the last one; by default the best, or the last while
    there is no best yet.
    """
    device: str = "cpu"
    """cpu, cuda, cuda:1, or auto."""


def export(options: Options) -> None:
    """Write the arrays that the options name."""
    check_least(options, 1, "top_k", "batch")
    refuse_others(options.output, run=False)
    with own_folder(options.output, writes=WRITTEN) as folder:
        predictor = Predictor.load(
            options.checkpoint, which=options.which, device=find_device(options.device)
        )
        if options.what == "label_vectors":
            label_vectors(options, predictor, folder)
        elif options.what == "onnx":
            facts = write_onnx(predictor, folder)
            worst = facts["largest_difference"]
            say(f"{folder}/{ENCODER}: width {facts['width']}, at most {worst:.1g} from torch")
        elif options.what == "index":
            index_of_labels(options, predictor, folder)
        elif options.what == "quantized":
            quantized(options, predictor, folder)
        else:
            documents(options, predictor, folder)


def documents(options: Options, predictor: Predictor, folder: Path) -> None:
    """Write the embeddings or the shortlists of every split."""
    dataset = dataset_of(options, predictor)
    for name, split in dataset.splits.items():
        more: dict[str, Any] = {"batch_size": options.batch, "inputs": predictor.inputs}
        if options.what == "embeddings":
            found = embed_split(predictor.model, split, **more)
            with replacing(folder / f"embeddings_{name}.npy") as file:
                np.save(file, found)
            say(
                f"{folder}/embeddings_{name}.npy: {found.shape[0]:,} documents, width "
                f"{found.shape[1]}"
            )
        else:
            scores = score_matrix(
                *predict_split(predictor.model, split, options.top_k, **more), dataset.num_labels
            )
            write_npz(folder / f"shortlist_{name}.npz", scores, keep_zeros=True)
            say(
                f"{folder}/shortlist_{name}.npz: {scores.shape[0]:,} documents, {scores.nnz:,} "
                "labels"
            )


def index_of_labels(options: Options, predictor: Predictor, folder: Path) -> None:
    """Write the label table as an index, and say how much of the exact answers it finds."""
    split = measured_on(dataset_of(options, predictor))
    vectors = embed_split(
        predictor.model, split, batch_size=options.batch, inputs=predictor.inputs
    )[:_ASKED]
    facts = write_index(predictor, folder, vectors, kind=options.index)
    (name,) = (key for key in facts if key.startswith("recall"))
    say(f"{folder}/{INDEX}: {facts['labels']:,} labels, {name} {facts[name]:.4f}")


def measured_on(dataset: Dataset) -> Split:
    """Return the test split, or another where there is none."""
    return next(dataset.splits[x] for x in ("test", "val", "train") if x in dataset.splits)


def quantized(options: Options, predictor: Predictor, folder: Path) -> None:
    """Write the run with a table of a byte per weight, and say what it saves and what it loses."""
    if (folder / "checkpoint").exists():
        mend = "name another, or remove it"
        raise InputError("--output", "a folder without a run", f"{folder}/checkpoint", mend)
    try:
        dataset = dataset_of(options, predictor)
    except InputError as error:
        if options.dataset:
            raise
        dataset = None
        say(f"P@k is not measured: {error}")
    facts = write_quantized(predictor, folder, options.format)
    before, after = facts["bytes_before"] / 2**20, facts["bytes_after"] / 2**20
    say(f"{folder}/checkpoint: label table of {after:.1f} MiB in place of {before:.1f} MiB")
    if dataset is not None:
        split = measured_on(dataset)
        facts |= {"dataset": dataset.name, "split": split.name}
        other = Predictor.load(folder, device=find_device(options.device))
        for name, model in (("before", predictor), ("after", other)):
            _, rows = predict_split(
                model.model, split, DEPTH, batch_size=options.batch, inputs=model.inputs
            )
            found = evaluate(rows, split.labels)
            facts[name] = {key: found[key] for key in SHOWN}
        told = [f"{x} {facts['before'][x]:.2f} → {facts['after'][x]:.2f}" for x in SHOWN]
        say(f"{', '.join(told)} on {split.name} of {dataset.name}")
    write_json(folder / QUANTIZED, facts)


def dataset_of(options: Options, predictor: Predictor) -> Dataset:
    """Open the dataset whose documents are exported.

    Raises:
        InputError: none is named and none found, or one that the model does not know.
    """
    path = Path(options.checkpoint)
    settings = next(
        (p for p in (path / "config.json", path.parent / "config.json") if p.exists()), None
    )
    if named := options.dataset or dataset_folder(path):
        dataset = Dataset.open(named)
    elif settings is not None:
        dataset = open_dataset(replace(Config(), **began_with(read_json(settings))))
    else:
        raise InputError(
            "--dataset",
            "a dataset folder",
            "none, and no config.json beside the checkpoint",
            "name one",
        )
    check_dataset(dataset, predictor.labels, predictor.inputs)
    return dataset


def label_vectors(options: Options, predictor: Predictor, folder: Path) -> None:
    """Write the rows of the label table, and the names of the labels."""
    model = predictor.model
    try:
        model.label_rows(0, 0)
    except InputError as error:
        raise InputError("--checkpoint", error.expected, error.got, error.mend) from None
    shape = model.labels, model.width
    with replacing(folder / "label_vectors.npy") as file:
        np.lib.format.write_array_header_2_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": shape}
        )
        for start in range(0, shape[0], _ROWS):
            rows = model.label_rows(start, min(start + _ROWS, shape[0]))
            file.write(
                (torch.nn.functional.normalize(rows) if options.normalize else rows)
                .cpu()
                .numpy()
                .tobytes()
            )
    if predictor.label_names is not None:
        with replacing(folder / "label_names.txt") as file:
            file.write("".join(f"{name}\n" for name in predictor.label_names).encode())
    say(f"{folder}/: {shape[0]:,} label vectors of width {shape[1]}")


def main(words: Sequence[str]) -> None:
    """Export what the arguments name."""
    export(parse(Options, "xmlkernels export", __doc__ or "", words=words))
