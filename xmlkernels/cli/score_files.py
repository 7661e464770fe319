"""Score files of other tools and of this one, as log-odds: what `xmlkernels ensemble` sums."""

from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.data.formats import read_npz, read_sparse, write_npz, write_sparse
from xmlkernels.errors import InputError
from xmlkernels.evaluation import score_matrix
from xmlkernels.files import check_file
from xmlkernels.predict.calibration import CALIBRATION, Calibration

TEXT = (".txt", ".txt.gz")


def read_log_odds(
    path: str, kind: str, documents: int, labels: int, *, is_calibrated: bool
) -> csr_matrix:
    """Read a score file as log-odds, CSR fp64 [documents, labels].

    Args:
        path: the file.
        kind: "logit" or "probability", what it holds.
        documents, labels: N and L.
        is_calibrated: by the calibration in the file's folder.

    Raises:
        InputError: as of `read_scores`; a probability outside 0 to 1; no calibration.
    """
    # A logit of 0 is a score; a probability of 0 says what an absent one does.
    matrix = read_scores(path, documents, labels, keep_zeros=kind == "logit")
    odds = log_odds(matrix, kind, path)
    if is_calibrated:
        odds = calibrated(path, matrix, odds)
    return csr_matrix((odds, matrix.indices, matrix.indptr), matrix.shape)


def write_scores(path: str, values: np.ndarray, rows: np.ndarray, labels: int) -> None:
    """Write the best labels of documents, as a .npz or a text file by its name."""
    kept = score_matrix(values.astype(np.float32), rows, labels)
    if path.endswith(".npz"):
        write_npz(path, kept, keep_zeros=True)
        return
    kept.data[kept.data == 0] = np.finfo(np.float32).tiny
    write_sparse(path, kept)


def read_scores(path: str, documents: int, labels: int, *, keep_zeros: bool = True) -> csr_matrix:
    """Read a score file as CSR float32 [documents, labels].

    With `keep_zeros`, zeros stored in an .npz file stay: they are scores.
    CascadeXML's .npz files have a last column for padding: it is dropped where it is empty.

    Raises:
        InputError: a file that cannot be read, or one of another shape.
    """
    check_file(path)
    if not path.endswith((".npz", *TEXT)):
        raise InputError(
            path,
            "a score file that ends in .npz, .txt or .txt.gz",
            "another",
            "rename or convert it",
        )
    if path.endswith(".npz"):
        matrix = read_npz(path, rows=documents, keep_zeros=keep_zeros)
    else:
        matrix = read_sparse(path, rows=documents)
    if matrix.shape[1] == labels + 1 and not matrix.data[matrix.indices == labels].any():
        matrix = matrix[:, :labels]
    if matrix.shape[1] != labels:
        mend = "name the scores of this dataset"
        raise InputError(
            path, f"{labels} columns, the labels of the dataset", str(matrix.shape[1]), mend
        )
    return matrix


def log_odds(matrix: csr_matrix, kind: str, path: str) -> np.ndarray:
    """Return the stored scores as finite log-odds, float64 [nnz].

    Raises:
        InputError: a probability outside 0 to 1.
    """
    values: np.ndarray = matrix.data.astype(np.float64)
    if kind == "logit":
        return values
    bad = np.flatnonzero((values < 0) | (values > 1))
    if bad.size:
        row = int(np.searchsorted(matrix.indptr, bad[0], "right")) - 1
        where = f"{path}, row {row}, label {matrix.indices[bad[0]]}"
        raise InputError(
            where,
            "a probability from 0 to 1",
            f"{values[bad[0]]:g}",
            "say --scores logit if they are logits",
        )
    return to_log_odds(values)


def to_log_odds(probability: np.ndarray) -> np.ndarray:
    """Return ln p/(1-p), finite also at 0 and 1."""
    p = np.clip(probability, np.finfo(np.float64).tiny, 1 - np.finfo(np.float64).epsneg)
    return np.asarray(np.log(p) - np.log1p(-p))


def calibrated(path: str, matrix: csr_matrix, odds: np.ndarray) -> np.ndarray:
    """Return calibrated log-odds of the scores of a file.

    Raises:
        InputError: no calibration in the file's folder, or one of other labels.
    """
    folder = Path(path).parent
    inner = folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder
    if not (inner / CALIBRATION).is_file():
        mend = f"run xmlkernels calibrate {folder}"
        raise InputError(str(inner), f"a {CALIBRATION}", "no such file", mend)
    found = Calibration.load(inner, matrix.shape[1])
    return found.log_odds(odds, matrix.indices.astype(np.int64))
