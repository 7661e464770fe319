"""Models in others' formats: the encoder as ONNX, the label table as a faiss index.

Letters: B documents, T tokens, D width of an embedding, L labels, k labels of a document.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from xmlkernels.data.inputs import TokenInputs
from xmlkernels.errors import InputError
from xmlkernels.files import replacing
from xmlkernels.nn.encoder import Encoder
from xmlkernels.predict.model import Predictor

ENCODER, ENCODER_FACTS = "encoder.onnx", "encoder.json"
INDEX, INDEX_FACTS = "labels.faiss", "index.json"
Kind = Literal["hnsw", "ivf", "flat"]
PARITY = 1e-4  # the largest difference of an embedding that is taken for rounding
_LINKS, _SEARCHED = 32, 128  # neighbours of a node of HNSW, and nodes looked at
_ROWS = 1 << 16  # rows turned into fp32 at a time


class _Encoder(nn.Module):
    """An encoder as a graph of two inputs."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        vector: Tensor = self.encoder(input_ids, attention_mask)
        return vector


def write_onnx(predictor: Predictor, folder: Path) -> dict[str, Any]:
    """Write the encoder of a model end to end as ONNX, in fp32, with its tokenizer.

    Inputs are `input_ids` and `attention_mask`, int64 [B, T] of any B and T; the output `vector` is
    fp32 [B, D], what the label table meets. onnxruntime then runs it on batches of other sizes, and
    must agree with torch.

    Returns:
        What `encoder.json` holds: width, most tokens, and the largest difference from torch.

    Raises:
        InputError: another kind of model, a package is missing, or onnxruntime disagrees.
    """
    encoder, inputs = predictor.model.encoder, predictor.inputs
    if not isinstance(encoder, Encoder) or not isinstance(inputs, TokenInputs):
        mend = "its vectors are TF-IDF rows times a table: serve it with xmlkernels serve"
        raise InputError("--what onnx", "a transformer", "a bag of words", mend)
    if predictor.model.kind != "end_to_end":
        got, mend = "a cascade, whose levels read several layers", "export a run of end to end"
        raise InputError("--what onnx", "a model end to end", got, mend)
    try:
        import onnx
        import onnxruntime  # type: ignore[import-untyped]
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        mend = 'pip install "xmlkernels[onnx]"'
        raise InputError(
            "--what onnx", "onnx, onnxruntime and onnxscript", str(error), mend
        ) from None
    encoder.autocast = None
    transformer: Any = encoder.model
    transformer.set_attn_implementation("eager")  # whose graph has no branches on the mask
    draw = torch.Generator().manual_seed(0)
    most = min(inputs.max_length, encoder.max_length or inputs.max_length)
    with replacing(folder / ENCODER) as file:
        sample = _drawn(inputs, 2, max(2, most // 2), draw)
        file.write(_exported(_Encoder(encoder).eval(), sample, encoder.max_length))
    onnx.checker.check_model(str(folder / ENCODER))
    session = onnxruntime.InferenceSession(
        str(folder / ENCODER), providers=["CPUExecutionProvider"]
    )
    worst = 0.0
    for size, length in ((1, 2), (3, most), (7, max(2, most // 3))):
        ids, mask = _drawn(inputs, size, length, draw)
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            worst = max(worst, float(np.abs(found - encoder(ids, mask).numpy()).max()))
    if not worst <= PARITY:
        (folder / ENCODER).unlink()
        got = f"{worst:.2g}"
        raise InputError(ENCODER, f"differences up to {PARITY:g}", got, "report this encoder")
    inputs.save(folder)
    facts = {
        "inputs": ["input_ids", "attention_mask"],
        "output": "vector",
        "width": encoder.width,
        "max_length": inputs.max_length,
        "largest_difference": worst,
    }
    _json(folder / ENCODER_FACTS, facts)
    return facts


def _drawn(
    inputs: TokenInputs, size: int, length: int, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw token ids and masks int64 [size, length]; the last document is half padding."""
    shape = (size, length)
    ids = torch.randint(inputs.tokenizer.vocab_size, shape, generator=draw)
    mask = torch.ones(shape, dtype=torch.int64)
    mask[-1, (length + 1) // 2 :] = 0
    return ids, mask


def _exported(module: nn.Module, sample: tuple[Tensor, Tensor], positions: int | None) -> bytes:
    """Return the ONNX of a module, batch and length free."""
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    length = torch.export.Dim("length", min=2, max=positions or 1 << 20)
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                module,
                sample,
                input_names=["input_ids", "attention_mask"],
                output_names=["vector"],
                dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length}),
                dynamo=True,
                verbose=False,
            )
    finally:
        quiet.setLevel(level)
    whole: bytes = program.model_proto.SerializeToString()
    return whole


def write_index(
    predictor: Predictor,
    folder: Path,
    queries: np.ndarray,
    *,
    kind: Kind = "hnsw",
    k: int = 10,
) -> dict[str, Any]:
    """Write the label table as a faiss index of inner products, and measure its recall.

    A row of the index is the label's row and, where there are biases, its bias: ask it for an
    embedding with a 1 behind it.

    Args:
        predictor: a model end to end.
        folder: for `labels.faiss` and `index.json`.
        queries: fp32 [N, D], embeddings of documents, for the measure.
        kind: a graph (HNSW), an inverted file of √L lists, or every row.
        k: depth of the recall.

    Returns:
        What `index.json` holds: kind, rows, width, whether there is a bias, and recall@k against
        the exact best k.

    Raises:
        InputError: another kind of model, or faiss is missing.
    """
    model = predictor.model
    if model.kind != "end_to_end":
        got, mend = "a cascade, whose scores are no inner products", "export a run of end to end"
        raise InputError("--what index", "a model end to end", got, mend)
    try:
        import faiss
    except ImportError:
        mend = 'pip install "xmlkernels[index]"'
        raise InputError("--what index", "the package faiss", "none", mend) from None
    head: Any = model.head
    bias = head.bias
    width = model.width + (bias is not None)
    metric = faiss.METRIC_INNER_PRODUCT
    exact = faiss.IndexFlatIP(width)
    for start in range(0, model.labels, _ROWS):
        end = min(start + _ROWS, model.labels)
        rows = head.rows(start, end).cpu().float()
        if bias is not None:
            rows = torch.cat([rows, bias[start:end, None].cpu().float()], dim=1)
        exact.add(np.ascontiguousarray(rows.numpy()))
    index: Any = exact
    table = exact.reconstruct_n(0, model.labels)
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, _LINKS, metric)
        index.hnsw.efConstruction = index.hnsw.efSearch = _SEARCHED
        index.add(table)
    elif kind == "ivf":
        lists = max(1, min(round(model.labels**0.5), model.labels // 40))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, metric)
        index.cp.min_points_per_centroid = 1
        index.train(table)
        index.add(table)
        index.nprobe = max(1, lists // 8)
    asked = queries
    if bias is not None:
        asked = np.concatenate([queries, np.ones((len(queries), 1), np.float32)], axis=1)
    k = min(k, model.labels)
    best, found = exact.search(asked, k)[1], index.search(asked, k)[1]
    same = (best[:, :, None] == found[:, None, :]).any(2)
    with replacing(folder / INDEX) as file:
        file.write(faiss.serialize_index(index).tobytes())
    facts = {
        "kind": kind,
        "labels": model.labels,
        "width": width,
        "bias": bias is not None,
        "documents": len(queries),
        f"recall@{k}": float(same.mean()),
    }
    _json(folder / INDEX_FACTS, facts)
    return facts


def _json(path: Path, facts: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write((json.dumps(facts, indent=1) + "\n").encode())
