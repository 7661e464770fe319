"""The arrays of a scipy .npz file as a matrix, checked before scipy sees them.

scipy's own checks come after its conversions, which run over indices in C without looking at them,
and leave out falling row pointers whose last is 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import bsr_matrix, coo_matrix, csc_matrix, csr_matrix, dia_matrix

from xmlkernels.data.formats.arrays import DEFLATE_RATIO, Head, Members, check_memory
from xmlkernels.errors import InputError

LAYOUTS = {
    "csr": {"data": 1, "indices": 1, "indptr": 1},
    "csc": {"data": 1, "indices": 1, "indptr": 1},
    "bsr": {"data": 3, "indices": 1, "indptr": 1},
    "coo": {"data": 1, "row": 1, "col": 1},
    "coo of coords": {"data": 1, "coords": 2},  # what scipy means to write one day
    "dia": {"data": 2, "offsets": 1},
}
"""The arrays of each layout, and how many dimensions they have."""
FREE_ROWS_BYTES = 64 << 20
"""Row pointers of this many bytes may be made for a file of any size."""


def read_stored(
    members: Members, name: str, mend: str, *, rows: int | None, cols: int | None
) -> Any:
    """Read the matrix of the members in the layout it was written in, with every index checked.

    Args:
        rows, cols: the shape it must have; None takes any.

    Raises:
        InputError: an array is missing or of another kind, a shape or size does not fit, an index
            lies outside.
    """
    layout = _layout(members, name, mend)
    shape = _shape(members, name, mend)
    for what, got, expected in (("rows", shape[0], rows), ("columns", shape[1], cols)):
        if expected is not None and got != expected:
            raise InputError(
                name, f"{expected} {what}", f"{got}", "name the file that belongs here"
            )
    heads = {key: members.head(key) for key in LAYOUTS[layout]}
    _check_heads(heads, layout, shape, name, mend)
    if layout != "csr":
        # The other layouts say nothing of empty rows: pointers of all rows are made from the
        # shape's word alone.
        needed = 8 * (shape[0] + 1)
        most = FREE_ROWS_BYTES + DEFLATE_RATIO * sum(head.bytes for head in heads.values())
        if needed > most:
            raise InputError(
                name,
                f"a shape that its {heads['data'].shape[0]} entries need",
                f"{shape[0]:,} rows",
                mend,
            )
    # The arrays and the canonical copy of them, row pointers included.
    check_memory(name, sum(head.bytes for head in heads.values()) + 8 * (shape[0] + 1), copies=2)
    arrays = {key: members.read(key) for key in heads}
    return _MAKE[layout](arrays, shape, name, mend)


def checked(matrix: Any, where: str) -> Any:
    """Return a matrix in memory, of any layout, if every index is inside it.

    scipy converts without looking.

    Raises:
        InputError: pointers fall, an index lies outside, or arrays do not fit the shape.
    """
    if matrix.format not in LAYOUTS:
        return matrix
    arrays = {key: np.asarray(getattr(matrix, key)) for key in LAYOUTS[matrix.format]}
    heads = {key: Head(array.shape, array.dtype, False) for key, array in arrays.items()}
    mend = "make it again with scipy.sparse"
    _check_heads(heads, matrix.format, matrix.shape, where, mend)
    return _MAKE[matrix.format](arrays, matrix.shape, where, mend)


def _layout(members: Members, name: str, mend: str) -> str:
    head, expected = members.head("format"), "a layout: csr, csc, bsr, coo or dia"
    if head.dtype.kind not in "SU" or head.shape != () or head.dtype.itemsize > 64:
        raise InputError(f"{name}, format", expected, str(head), mend)
    text = members.read("format").item()
    layout = text.decode("ascii", "replace") if isinstance(text, bytes) else str(text)
    if layout not in LAYOUTS or len(layout) > 3:
        raise InputError(f"{name}, format", expected, repr(layout), mend)
    return "coo of coords" if layout == "coo" and "coords" in members else layout


def _shape(members: Members, name: str, mend: str) -> tuple[int, int]:
    head = members.head("shape")
    if head.dtype.kind not in "iu" or len(head.shape) != 1 or head.shape[0] > 64:
        raise InputError(f"{name}, shape", "a matrix of two dimensions", str(head), mend)
    if head.shape != (2,):
        raise InputError(name, "a matrix of two dimensions", f"{head.shape[0]}", mend)
    shape = [int(size) for size in members.read("shape")]
    if not all(0 <= size < 2**62 for size in shape):
        raise InputError(f"{name}, shape", "rows and columns from 0", str(shape), mend)
    return shape[0], shape[1]


def _check_heads(
    heads: dict[str, Head], layout: str, shape: tuple[int, int], name: str, mend: str
) -> None:
    for key, head in heads.items():
        where, kinds = f"{name}, {key}", "biuf" if key == "data" else "iu"
        if head.dtype.kind not in kinds or head.dtype.itemsize > 16:
            what = "real numbers" if key == "data" else "whole numbers"
            mend_it = "convert it to float32" if key == "data" else mend
            raise InputError(where, what, f"dtype {head.dtype}", mend_it)
        if len(head.shape) != LAYOUTS[layout][key]:
            raise InputError(where, f"{LAYOUTS[layout][key]} dimensions", str(head), mend)
    count = heads["data"].shape[0]
    for key in ("indices", "row", "col", "offsets"):
        if key in heads and heads[key].shape[0] != count:
            raise InputError(
                f"{name}, {key}", f"{count}, as data has", str(heads[key].shape[0]), mend
            )
    if "coords" in heads and heads["coords"].shape != (2, count):
        raise InputError(f"{name}, coords", f"shape {[2, count]}", str(heads["coords"]), mend)
    if layout in ("csr", "csc", "bsr"):
        block = heads["data"].shape[1:] if layout == "bsr" else (1, 1)
        if min(block) < 1 or shape[0] % block[0] or shape[1] % block[1]:
            raise InputError(
                f"{name}, data",
                f"blocks that divide the shape {list(shape)}",
                f"blocks {list(block)}",
                mend,
            )
        major = shape[1] if layout == "csc" else shape[0] // block[0]
        if heads["indptr"].shape[0] != major + 1:
            got = str(heads["indptr"].shape[0])
            raise InputError(
                f"{name}, indptr", f"{major + 1} pointers, for the shape {list(shape)}", got, mend
            )


def _within(array: np.ndarray, low: int, high: int, where: str, what: str, mend: str) -> None:
    """Raise InputError unless every number is from `low` to `high` - 1."""
    if not array.size:
        return
    least, most = int(array.min()), int(array.max())
    if least < low or most >= high:
        at = int(array.argmin() if least < low else array.argmax())
        allowed = f"from {low} to {high - 1}" if high > low else "(there is none)"
        raise InputError(f"{where}, entry {at}", f"{what} {allowed}", str(array[at]), mend)


def _check_pointers(
    arrays: dict[str, np.ndarray], minor: int, name: str, mend: str
) -> dict[str, np.ndarray]:
    """Check that pointers rise from 0 to at most the number of entries, indices are below `minor`.

    Entries behind the last pointer are removed.
    """
    pointers, where = arrays["indptr"], f"{name}, indptr"
    if pointers[0] != 0:
        raise InputError(where, "pointers from 0", str(pointers[0]), mend)
    falls = np.flatnonzero(pointers[1:] < pointers[:-1])
    if falls.size:
        at = int(falls[0])
        raise InputError(
            f"{where}, entry {at + 1}",
            f"at least {pointers[at]}, as before it",
            str(pointers[at + 1]),
            mend,
        )
    if int(pointers[-1]) > len(arrays["indices"]):
        got = str(pointers[-1])
        raise InputError(
            where, f"pointers up to {len(arrays['indices'])}, the number of entries", got, mend
        )
    count = int(pointers[-1])
    indices = arrays["indices"][:count]
    _within(indices, 0, minor, f"{name}, indices", "indices", mend)
    return {
        "data": arrays["data"][:count],
        "indices": _signed(indices),
        "indptr": _signed(pointers),
    }


def _signed(array: np.ndarray) -> np.ndarray:
    """Return int32 or int64, which scipy knows; the values fit, as was checked."""
    return array if array.dtype in (np.int32, np.int64) else array.astype(np.int64)


def compressed(
    arrays: dict[str, np.ndarray], shape: tuple[int, int], name: str, mend: str
) -> csr_matrix:
    """Return CSR of `data`, `indices` and `indptr`.

    Raises:
        InputError: Where they do not fit each other or the shape.
    """
    _check_heads(
        {key: Head(a.shape, a.dtype, False) for key, a in arrays.items()}, "csr", shape, name, mend
    )
    found = _check_pointers(arrays, shape[1], name, mend)
    return csr_matrix((found["data"], found["indices"], found["indptr"]), shape)


def _by_columns(
    arrays: dict[str, np.ndarray], shape: tuple[int, int], name: str, mend: str
) -> csc_matrix:
    found = _check_pointers(arrays, shape[0], name, mend)
    return csc_matrix((found["data"], found["indices"], found["indptr"]), shape)


def _by_blocks(
    arrays: dict[str, np.ndarray], shape: tuple[int, int], name: str, mend: str
) -> bsr_matrix:
    found = _check_pointers(arrays, shape[1] // arrays["data"].shape[2], name, mend)
    return bsr_matrix((found["data"], found["indices"], found["indptr"]), shape)


def _by_entries(
    arrays: dict[str, np.ndarray], shape: tuple[int, int], name: str, mend: str
) -> coo_matrix:
    for key, size in zip(("row", "col"), shape, strict=True):
        _within(arrays[key], 0, size, f"{name}, {key}", "indices", mend)
    return coo_matrix((arrays["data"], (_signed(arrays["row"]), _signed(arrays["col"]))), shape)


def _by_coords(
    arrays: dict[str, np.ndarray], shape: tuple[int, int], name: str, mend: str
) -> coo_matrix:
    row, col = arrays["coords"]
    return _by_entries({"data": arrays["data"], "row": row, "col": col}, shape, name, mend)


def _by_diagonals(
    arrays: dict[str, np.ndarray], shape: tuple[int, int], name: str, mend: str
) -> dia_matrix:
    offsets = arrays["offsets"]
    _within(offsets, -max(0, shape[0] - 1), shape[1], f"{name}, offsets", "diagonals", mend)
    if len(np.unique(offsets)) != len(offsets):
        raise InputError(f"{name}, offsets", "each diagonal once", "one twice", mend)
    return dia_matrix((arrays["data"], _signed(offsets)), shape)


_MAKE = {
    "csr": compressed,
    "csc": _by_columns,
    "bsr": _by_blocks,
    "coo": _by_entries,
    "coo of coords": _by_coords,
    "dia": _by_diagonals,
}
