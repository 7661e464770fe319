"""NumPy files that lie: dtypes, shapes, sizes, pointers and indices, each told before anything is
allocated or converted.
"""

import io
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from scipy.sparse import csr_matrix, save_npz

from xmlkernels import InputError
from xmlkernels.data import formats
from xmlkernels.data.formats import arrays
from xmlkernels.data.formats.arrays import read_npy
from xmlkernels.data.formats.matrices import canonical_csr
from xmlkernels.memory import free_memory


def npy(header: str | dict[str, Any], content: bytes = b"", version: int = 1) -> bytes:
    text = header if isinstance(header, str) else repr(header)
    size = (len(text) + 1).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + text.encode() + b"\n" + content


def head(shape: tuple[int, ...], descr: Any = "<f4") -> dict[str, Any]:
    return {"descr": descr, "fortran_order": False, "shape": shape}


def floats(path: Path, rows: int | None = 2) -> np.ndarray:
    return read_npy(
        path, kinds="f", shape=(rows, None), expected="floats [2, width]", mend="make it again"
    )


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_comes_back(tmp_path: Path, dtype: str, order: str) -> None:
    array = np.asarray(np.arange(6).reshape(2, 3), dtype, order=order)
    np.save(tmp_path / "a.npy", array)
    found = floats(tmp_path / "a.npy")
    assert found.dtype == np.dtype(dtype).newbyteorder("=")
    assert found.flags.c_contiguous
    assert found.flags.writeable
    np.testing.assert_array_equal(found, array)
    np.save(tmp_path / "a.npy", np.zeros((2, 0), dtype))
    assert floats(tmp_path / "a.npy").shape == (2, 0)


@pytest.mark.parametrize(
    "content, message",
    [
        (
            npy(head((2, 3)), b"\0" * 23),
            "expected 24 bytes of values, as its header says, got 23 bytes",
        ),
        (
            npy(head((2, 3)), b"\0" * 25),
            "expected 24 bytes of values, as its header says, got 25 bytes",
        ),
        (
            npy(head((2, 10**12))),
            "expected 8,000,000,000,000 bytes of values, as its header says, got 0 bytes",
        ),
        (npy(head((2, 2**62))), "expected an array that can be, got shape"),
        (npy(head((2, -1))), "expected an array that can be, got shape"),
        (npy(head((3, 1)), b"\0" * 12), r"expected floats \[2, width\], got float32 \[3, 1\]"),
        (npy(head((6,)), b"\0" * 24), r"expected floats \[2, width\], got float32 \[6\]"),
        (npy(head((2, 1), "<i4"), b"\0" * 8), r"expected floats \[2, width\], got int32"),
        (npy(head((2, 1), "|O"), b"\0" * 16), "a pickle"),
        (npy(head((2, 1), [("a", "<f4")]), b"\0" * 8), "expected an array of numbers, got dtype"),
        (npy(head((2, 1), "|V0")), "expected an array of numbers, got dtype"),
        (npy(head((2, 1), 5)), "a header that cannot be read"),
        (npy("{'descr': __import__('os').system('true')}"), "a header that cannot be read"),
        (npy("(" * 500), "a header that cannot be read"),
        (npy("{'shape': (1,}", version=2), "a header that cannot be read"),
        (npy("x" * 20_000), "a header that cannot be read"),
        (npy(head((2, 3)), version=9), "a header that cannot be read"),
        (b"\x93NUMPY\x01", "a header that cannot be read"),
        (b"text\n", "a header that cannot be read"),
    ],
)
def test_npy_that_lies(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        floats(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def write_npz(path: Path, **changes: Any) -> Path:
    """The npz of a 3 × 3 matrix; a change may be an array or the bytes of an .npy."""
    parts: dict[str, Any] = {"format": b"csr", "shape": [3, 3], "data": np.ones(3)}
    parts |= {"indices": [1, 0, 2], "indptr": [0, 1, 1, 3]}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, value in (parts | changes).items():
            if value is None:
                continue
            out = io.BytesIO()
            np.save(out, np.asarray(value))
            file.writestr(
                f"{name}.npy",
                value if isinstance(value, bytes) and value[:1] == b"\x93" else out.getvalue(),
            )
    return path


COO = {"format": b"coo", "indices": None, "indptr": None, "row": [0, 2, 2], "col": [1, 0, 2]}
CSC = {"format": b"csc", "indices": [2, 0, 2], "indptr": [0, 1, 2, 3]}
BSR = {
    "format": b"bsr",
    "shape": [4, 4],
    "data": np.ones((2, 2, 2)),
    "indices": [0, 1],
    "indptr": [0, 1, 2],
}
DIA = {
    "format": b"dia",
    "data": np.ones((2, 3)),
    "offsets": [0, 1],
    "indices": None,
    "indptr": None,
}


@pytest.mark.parametrize(
    "changes, message",
    [
        (CSC | {"indices": [2, 0, 3]}, "indices, entry 2: expected indices from 0 to 2, got 3"),
        (
            CSC | {"indices": [2, 10**9, -5]},
            "indices, entry 2: expected indices from 0 to 2, got -5",
        ),
        (CSC | {"indptr": [0, 3, 2, 0]}, "indptr, entry 2: expected at least 3"),
        (CSC | {"indptr": [0, 1, 2]}, "indptr: expected 4 pointers"),
        (COO | {"row": [0, 2, 3]}, "row, entry 2: expected indices from 0 to 2, got 3"),
        (COO | {"col": [0, -1, 2]}, "col, entry 1: expected indices from 0 to 2, got -1"),
        (COO | {"col": [0, 1]}, "col: expected 3, as data has, got 2"),
        (
            COO | {"col": np.array([0, 2**63, 1], np.uint64)},
            "col, entry 1: expected indices from 0 to 2",
        ),
        (
            COO | {"row": None, "col": None, "coords": [[0, 1, 5], [0, 0, 0]]},
            "row, entry 2: expected indices",
        ),
        (COO | {"row": None, "col": None, "coords": [[0, 1, 5]]}, "coords: expected shape"),
        (BSR | {"indices": [0, 2]}, "indices, entry 1: expected indices from 0 to 1, got 2"),
        (BSR | {"indptr": [0, 2, 0]}, "indptr, entry 2: expected at least 2"),
        (BSR | {"shape": [5, 4]}, "expected blocks that divide the shape"),
        (BSR | {"data": np.ones((2, 0, 2))}, "expected blocks that divide the shape"),
        (DIA | {"offsets": [0, 3]}, "offsets, entry 1: expected diagonals from -2 to 2, got 3"),
        (DIA | {"offsets": [1, 1]}, "offsets: expected each diagonal once"),
        ({"indptr": [1, 1, 1, 3]}, "indptr: expected pointers from 0, got 1"),
        (
            {"indptr": [0, 1, 1, 4]},
            "indptr: expected pointers up to 3, the number of entries, got 4",
        ),
        ({"indptr": [0.0, 1.0, 1.0, 3.0]}, "indptr: expected whole numbers, got dtype float64"),
        ({"indptr": [[0, 1, 1, 3]]}, "indptr: expected 1 dimensions"),
        ({"data": ["a", "b", "c"]}, "data: expected real numbers"),
        ({"shape": [3]}, "expected a matrix of two dimensions, got 1"),
        ({"shape": [3, 3, 3]}, "expected a matrix of two dimensions, got 3"),
        ({"shape": 9}, "shape: expected a matrix of two dimensions"),
        ({"shape": [-3, 3]}, "shape: expected rows and columns from 0"),
        ({"shape": [3.0, 3.0]}, "shape: expected a matrix of two dimensions"),
        ({"format": b"lil"}, "format: expected a layout"),
        ({"format": b"coo of coords"}, "format: expected a layout"),
        ({"format": 5}, "format: expected a layout"),
        ({"indices": None}, "the array 'indices' is missing"),
    ],
)
def test_npz_that_lies(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_npz(tmp_path / "m.npz", **changes)
    with pytest.raises(InputError, match=message) as raised:
        formats.read_npz(path)
    assert str(path) in str(raised.value)


COORDS = COO | {"row": None, "col": None, "coords": [[0, 1], [2, 2]], "data": [1, 2]}


@pytest.mark.parametrize("changes", [{}, CSC, COO, BSR, DIA, COORDS])
def test_the_same_files_without_the_lie_are_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = write_npz(tmp_path / "m.npz", **changes)
    np.testing.assert_array_equal(
        formats.read_npz(path).toarray(), scipy.sparse.load_npz(path).toarray()
    )


def peak(work: Any) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_small_files_that_ask_for_gigabytes_get_nothing(tmp_path: Path) -> None:
    giga = {"indptr": npy(head((10**9,), "<i8")), "shape": [10**9 - 1, 3]}
    cases = [
        write_npz(tmp_path / "claims.npz", **giga),  # 845 bytes, 7.45 GiB
        write_npz(
            tmp_path / "rows.npz", **(COO | {"shape": [5 * 10**11, 3]})
        ),  # 849 bytes, 3.6 TiB
        write_npz(tmp_path / "rows2.npz", **(COO | {"shape": [10**8, 3]})),
        write_npz(
            tmp_path / "nnz.npz",
            data=npy(head((10**9,), "<f8")),
            indices=npy(head((10**9,), "<i8")),
        ),
    ]
    # A member whose directory entry claims what its header claims, though deflate cannot hold so
    # much.
    bomb = write_npz(tmp_path / "zip.npz", data=npy(head((10**8,), "<f8")))
    raw = bytearray(bomb.read_bytes())
    at = raw.find(b"PK\x01\x02", raw.find(b"data.npy", raw.find(b"PK\x01\x02")) - 60)
    raw[at + 24 : at + 28] = (8 * 10**8 + 80).to_bytes(4, "little")
    (tmp_path / "zip.npz").write_bytes(raw)
    for path in [*cases, bomb]:
        assert path.stat().st_size < 2000
        assert peak(lambda: formats.read_npz(path)) < 4 << 20, path.name  # noqa: B023
    # A manifest beside it may say the same number of rows.
    assert peak(lambda: formats.read_npz(cases[2], rows=10**8)) < 4 << 20


def test_arrays_beyond_the_free_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 1 << 20
    empty = {"data": np.zeros(0), "indices": np.zeros(0, int), "indptr": np.zeros(rows + 1, int)}
    zeros = write_npz(tmp_path / "z.npz", shape=[rows, 2], **empty)
    np.save(tmp_path / "z.npy", np.zeros((2, rows), np.float32))
    assert zeros.stat().st_size < 20_000  # honest: deflate shrinks zeros a thousand times
    assert formats.read_npz(zeros).shape == (rows, 2)
    assert floats(tmp_path / "z.npy").shape == (
        2,
        rows,
    )
    monkeypatch.setattr(arrays, "free_memory", lambda: 1 << 20)
    with pytest.raises(
        InputError, match="expected arrays for the 1,048,576 bytes of memory that are free, got"
    ):
        formats.read_npz(zeros)
    with pytest.raises(
        InputError, match="expected arrays for the 1,048,576 bytes of memory that are free, got"
    ):
        floats(tmp_path / "z.npy")


def test_free_memory_is_that_of_this_machine() -> None:
    free = arrays.free_memory()
    assert free is None or 0 < free < 1 << 50


def test_the_cache_of_files_counts_as_free(tmp_path: Path) -> None:
    """A group's memory fills with the files it has read; the system gives that back when it is
    asked for.
    """
    group = tmp_path / "sys/fs/cgroup"
    (tmp_path / "proc/self").mkdir(parents=True)
    group.mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.current").write_text("999000\n")
    assert free_memory(tmp_path) == 1000
    (group / "memory.stat").write_text("anon 99000\ninactive_file 600000\nactive_file 300000\n")
    assert free_memory(tmp_path) == 901_000
    (tmp_path / "proc/self/cgroup").write_text("5:memory:/job\n")
    job = group / "memory/job"
    job.mkdir(parents=True)
    (job / "memory.limit_in_bytes").write_text("500000\n")
    (job / "memory.usage_in_bytes").write_text("400000\n")
    (job / "memory.stat").write_text(
        "active_file 1\ntotal_inactive_file 100000\ntotal_active_file 50000\n"
    )
    assert free_memory(tmp_path) == 250_000


def test_a_matrix_is_read_without_a_copy(tmp_path: Path) -> None:
    """scipy copies arrays that are small parts of a base."""
    count = 1 << 20
    indptr = np.arange(0, count + 1, 4)
    good = csr_matrix(
        (np.ones(count, np.float32), np.tile(np.arange(4, dtype=np.int32), count // 4), indptr)
    )
    save_npz(tmp_path / "m.npz", good, compressed=False)
    tracemalloc.start()
    read = formats.read_npz(tmp_path / "m.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = read.data.nbytes + read.indices.nbytes + read.indptr.nbytes
    assert (read != good).nnz == 0 and peak < 1.9 * size


def test_zip_files_that_lie(tmp_path: Path) -> None:
    good = write_npz(tmp_path / "m.npz")
    raw = good.read_bytes()

    def refused(content: bytes, message: str) -> None:
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(InputError, match=message):
            formats.read_npz(tmp_path / "bad.npz")

    twice = tmp_path / "twice.npz"
    twice.write_bytes(raw)
    with zipfile.ZipFile(twice, "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("data.npy", b"x")
    refused(twice.read_bytes(), "expected each array once")
    squeezed = tmp_path / "lzma.npz"
    with zipfile.ZipFile(squeezed, "w", zipfile.ZIP_LZMA) as file:
        file.writestr("format.npy", b"x")
    refused(squeezed.read_bytes(), "another compression")
    for at in range(0, len(raw), 7):  # a byte changed anywhere: the same matrix, or a sentence
        changed = bytearray(raw)
        changed[at] ^= 0x41
        (tmp_path / "flip.npz").write_bytes(changed)
        try:
            found = formats.read_npz(tmp_path / "flip.npz")
        except InputError:
            continue
        np.testing.assert_array_equal(found.toarray(), formats.read_npz(good).toarray())


def test_a_checksum_is_compared(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    scipy.sparse.save_npz(path, csr_matrix(np.eye(3)), compressed=False)
    raw = bytearray(path.read_bytes())
    at = raw.find(np.ones(1).tobytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match="Bad CRC-32"):
        formats.read_npz(path)


@pytest.mark.parametrize("layout", ["csr", "csc", "coo", "bsr"])
def test_a_damaged_matrix_in_memory_is_refused_before_it_is_converted(layout: str) -> None:
    matrix = scipy.sparse.csr_matrix(np.eye(4, dtype=np.float32)).asformat(layout)
    if layout == "coo":
        matrix.row[0] = 10**6
    else:
        matrix.indices[0] = 10**6
    with pytest.raises(
        InputError, match=r"the matrix, .*: expected indices from 0 to \d, got 1000000"
    ):
        canonical_csr(matrix, "the matrix")
