"""A model whose label table takes a byte per weight, for serving.

Letters: L labels, D width of an embedding.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from xmlkernels.errors import InputError
from xmlkernels.nn.quantized import INT8, quantize_rows
from xmlkernels.nn.table import blocks, rows_of, scaled_rows
from xmlkernels.predict.model import Predictor
from xmlkernels.predict.rewritten import write_model

Format = Literal["int8", "e4m3"]


def write_quantized(predictor: Predictor, folder: Path, format: Format) -> dict[str, Any]:
    """Write a run's folder with the label table in a byte per weight and a scale per row.

    e4m3 has a power of two as scale, and is what a model trained with `--table fp8` has; int8 has
    the largest weight of the row over 127. Biases stay fp32, as do encoder and clusters what they
    are.

    Args:
        predictor: of a run, its table in memory.
        folder: gets a folder `checkpoint`.
        format: of the weights.

    Returns:
        `bytes_before` and `bytes_after` of the label table with scales and biases, and
        `largest_error`, of a weight against the largest of its row.

    Raises:
        InputError: the table has a byte per weight already, or was left in its file.
    """
    model = predictor.model
    *_, (name, _) = model.tables().items()
    tensors = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    weight = tensors[f"{name}.weight"]
    if weight.is_meta:
        mend = "export on a machine with more memory"
        raise InputError("--checkpoint", "a label table that fits in memory", "a larger one", mend)
    if weight.dtype.itemsize == 1:
        got = f"one of {'int8' if weight.dtype == torch.int8 else 'e4m3'}"
        mend = "serve it as it is, or export the run that it was made of"
        raise InputError("--checkpoint", "a label table of fp32, bf16 or fp16", got, mend)
    before = _bytes(tensors, name)
    made = torch.empty(weight.shape, dtype=torch.int8 if format == INT8 else torch.float8_e4m3fn)
    scales, worst = [], 0.0
    for first, end in blocks(weight):
        rows = rows_of(weight, None, first, end)
        made[first:end], scale = quantize_rows(rows) if format == INT8 else scaled_rows(rows)
        scales.append(scale)
        factor = scale[:, None] if format == INT8 else scale[:, :1]
        error = (made[first:end].float() * factor - rows).abs().amax(1)
        worst = max(worst, float((error / rows.abs().amax(1).clamp(min=2.0**-100)).max()))
    tensors[f"{name}.weight"] = made
    tensors[f"{name}.{'scale' if format == INT8 else 'row_scale'}"] = torch.cat(scales)
    config = model.config()
    if format != INT8:
        tensors[f"{name}.rescaled"] = torch.zeros(1, dtype=torch.int64)
    config["head"] = config["head"] | {"dtype": INT8 if format == INT8 else "fp8"}
    identity = write_model(
        predictor, folder, tensors, config, names=predictor.label_names, ids=predictor.label_ids
    )
    if predictor.calibration is not None:
        replace(predictor.calibration, identity=identity).save(folder / "checkpoint")
    return {
        "format": format,
        "labels": model.labels,
        "width": model.width,
        "bytes_before": before,
        "bytes_after": _bytes(tensors, name),
        "largest_error": worst,
    }


def _bytes(tensors: dict[str, Tensor], name: str) -> int:
    """Count the bytes of a table with its scales and biases."""
    buffers = ("weight", "bias", "scale", "row_scale")
    held = [tensors[f"{name}.{x}"] for x in buffers if f"{name}.{x}" in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
