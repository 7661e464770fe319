"""Write a loaded model or ranker again with other weights, as a folder that predictions come from.

Letters: L labels.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.checkpoint.folder import load as load_checkpoint
from xmlkernels.checksums import of_files
from xmlkernels.data.manifest import IDS
from xmlkernels.files import replacing
from xmlkernels.predict.base import NAMES, RANKER
from xmlkernels.predict.calibration import Calibration
from xmlkernels.predict.model import BESIDE, Predictor, checkpoint_identity
from xmlkernels.predict.source import CLUSTERS, VECTORIZER, ranker_identity
from xmlkernels.ranker.blend import Reranker
from xmlkernels.ranker.matcher import ClusterMatcher


def write_model(
    predictor: Predictor,
    folder: Path,
    tensors: dict[str, Tensor],
    config: Mapping[str, Any],
    *,
    names: Sequence[str] | None,
    ids: Sequence[str] | None,
) -> str:
    """Write the checkpoint, and beside it what reads texts and the labels' names.

    Whoever resumes a training finds no dataset in it: the folder is for predictions.

    Args:
        predictor: loaded from a folder, from which its tokenizer or vocabulary is copied.
        folder: gets a folder `checkpoint`.
        tensors, config: of the model.
        names, ids: of its labels, [L]; None where they have none.

    Returns:
        The identity of the checkpoint.
    """
    assert predictor.folder is not None
    before, inner = predictor.folder.parent, folder / "checkpoint"
    inner.mkdir()
    for name in ("tokenizer", "vocabulary"):
        if (before / name).is_dir():
            shutil.copytree(before / name, inner / name)
    write_lines(inner, names, ids)
    state = load_checkpoint(predictor.folder, lambda name: False)[1]
    told = {"model": dict(config), "inputs": state["inputs"], "beside": of_files(inner, BESIDE)}
    checkpoints = CheckpointFolder(inner)
    checkpoints.save_last(tensors, told)
    checkpoints.save_best()
    return checkpoint_identity(inner, "best")


def write_ranker(
    reranker: Reranker,
    matcher: ClusterMatcher | None,
    calibration: Calibration | None,
    folder: Path,
) -> Reranker:
    """Write a ranker, its clusters and its calibration into a folder that holds all the rest.

    Returns:
        The ranker as it was written: it vouches for the files beside it.
    """
    if matcher is not None:
        matcher.save(folder / CLUSTERS)
    beside = of_files(folder, [NAMES, IDS, VECTORIZER, CLUSTERS])
    facts = reranker.ranker.facts | {"beside": beside}
    whole = replace(reranker, ranker=replace(reranker.ranker, facts=facts))
    whole.save(folder / RANKER)
    if calibration is not None:
        replace(calibration, identity=ranker_identity(whole)).save(folder)
    return whole


def write_lines(folder: Path, names: Sequence[str] | None, ids: Sequence[str] | None) -> None:
    """Write the names of labels, and their ids; nothing where there are none."""
    for name, lines in ((NAMES, names), (IDS, ids)):
        if lines is not None:
            with replacing(folder / name) as file:
                file.write("".join(f"{line}\n" for line in lines).encode())
