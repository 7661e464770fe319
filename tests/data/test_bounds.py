"""Packed files that unpack to all the memory there is, and lines without an end."""

import bz2
import gzip
import io
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from xmlkernels import InputError, file_kinds
from xmlkernels.cli.texts import lines_of
from xmlkernels.data import formats
from xmlkernels.data.formats import text_lines

BOMB = 1 << 28  # unpacked; packed it has some hundred thousand bytes
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 6),
    "bzip2": lambda data: bz2.compress(data, 1),
    "xz": lambda data: lzma.compress(data, preset=0),
}
READERS: dict[str, Callable[[Path], object]] = {
    "sparse": lambda path: formats.read_sparse(path, header=False),
    "label lines": formats.read_label_lines,
    "bag of words": formats.read_bow,
    "filter pairs": formats.read_filter_pairs,
    "texts": formats.read_lines,
    "JSON lines": formats.read_lf_json,
    "count": formats.count_lf_records,
}


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bombs")
    for kind, pack in PACK.items():
        (folder / kind).write_bytes(pack(b"\n" * (BOMB if kind == "gzip" else BOMB >> 1)))
    return {kind: folder / kind for kind in PACK}


def peak(work: Callable[[], object], message: str) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message):
            work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", PACK)
def test_a_packed_file_that_unpacks_to_far_more_than_text_does(
    bombs: dict[str, Path], kind: str
) -> None:
    path = bombs[kind]
    expected = (
        rf"{kind}: expected text, which unpacks to at most 100 times its {kind} file, got [\d,]+ "
        r"bytes out of"
    )
    most = file_kinds.FREE_BYTES + 110 * path.stat().st_size
    assert peak(lambda: formats.read_label_lines(path), expected) < 2.2 * most < BOMB


@pytest.mark.parametrize("reader", ["filter pairs", "texts", "count"])
def test_every_reader_ends_at_the_bound(
    bombs: dict[str, Path], reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_kinds, "FREE_BYTES", 1 << 20)
    monkeypatch.setattr(file_kinds, "MOST_RATIO", 2)
    with pytest.raises(InputError, match="expected text, which unpacks to at most"):
        READERS[reader](bombs["gzip"])


def test_text_that_packs_well_is_read(tmp_path: Path) -> None:
    """Zeros and ones of 1,000 rows to one: beyond the ratio, and below the bytes that are free."""
    (tmp_path / "Y.txt.gz").write_bytes(gzip.compress(b"0,1\n" * 1_000_000, 9))
    assert (tmp_path / "Y.txt.gz").stat().st_size * file_kinds.MOST_RATIO < 4_000_000
    assert formats.read_label_lines(tmp_path / "Y.txt.gz").shape == (1_000_000, 2)


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz"])
@pytest.mark.parametrize("reader", ["texts", "JSON lines", "count"])
def test_a_line_without_an_end(
    tmp_path: Path, name: str, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_lines, "LONGEST_LINE", 1000)
    good = b'{"uid": 1, "title": "' + b"a" * 900 + b'"}\n'
    content = good + b"x" * 100_000
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(
        InputError,
        match=rf"{name}:2: expected a line of at most 1,000 characters, got a longer one",
    ):
        READERS[reader](tmp_path / name)


def test_lines_up_to_the_bound_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_lines, "LONGEST_LINE", 4)
    content = "abcd\r\nä\u2028öü\n\r1234\rend".encode()
    (tmp_path / "x.txt").write_bytes(content)
    assert formats.read_lines(tmp_path / "x.txt") == ["abcd", "ä\u2028öü", "", "1234", "end"]


def test_a_line_without_an_end_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xmlkernels.cli.texts.LONGEST_LINE", 1000)
    lines = lines_of(io.BufferedReader(io.BytesIO(b"good\n" + b"x" * 100_000)))  # type: ignore[arg-type]
    assert next(lines) == "good"
    with pytest.raises(InputError, match="standard input:2: expected a line of at most"):
        next(lines)


def test_a_file_never_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.txt").mkdir()
    with pytest.raises(
        InputError, match="x.txt: expected a file, or a name for a new one, got a folder"
    ):
        formats.write_lines(tmp_path / "x.txt", ["a"])
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]
