"""Files are told by their first bytes and their suffix: text is read, packed or not; anything else
is refused.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from xmlkernels.data import formats
from xmlkernels.errors import InputError
from xmlkernels.file_kinds import _XZ_MEMORY, is_json_lines
from xmlkernels.files import map_bytes

TEXT = "one fish\nzwei Fische\n赤い魚\n" * 400
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("named", [True, False])
def test_packed_text_is_read(tmp_path: Path, kind: str, named: bool) -> None:
    path = tmp_path / (f"texts.txt.{kind}" if named else "texts.txt")
    pack = PACKERS[kind]
    path.write_bytes(pack(TEXT.encode()) + pack(b"a second stream\n"))
    assert formats.read_lines(path, documents=True) == [*TEXT.splitlines(), "a second stream"]
    path.write_bytes(pack(b"2 3\n0:1\n2:1 1:1\n"))
    assert formats.read_labels(path).toarray().tolist() == [[1, 0, 0], [0, 1, 1]]


@pytest.mark.parametrize("kind", PACKERS)
def test_packed_text_that_is_cut_damaged_or_empty(tmp_path: Path, kind: str) -> None:
    path, name = tmp_path / f"x.{kind}", {"gz": "gzip", "bz2": "bzip2", "xz": "xz"}[kind]
    whole = PACKERS[kind](os.urandom(20000).hex().encode())
    for cut in (30, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:cut])
        with (
            pytest.raises(InputError, match=f"whole {name} file, got one that is cut short"),
            map_bytes(path),
        ):
            pass
    for at in range(20, len(whole), 997):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        with pytest.raises(InputError), map_bytes(path):
            pass
    path.write_bytes(PACKERS[kind](b""))
    with pytest.raises(InputError, match="an empty file"):
        formats.read_lines(path)


def test_a_dictionary_beyond_memory(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2 * _XZ_MEMORY}]
    path = tmp_path / "x.xz"
    path.write_bytes(lzma.compress(b"text\n", filters=filters))
    with pytest.raises(InputError, match="whole xz file, got damaged data .Memory usage limit"):
        formats.read_lines(path)


def foreign(folder: Path) -> dict[str, bytes]:
    """Files that are no text, and what a message calls them."""
    table = folder / "x.db"
    sqlite3.connect(table).execute("create table texts (text)").connection.commit()
    packed, zipped, array, matrix = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(table, "x.db")
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("x.txt", TEXT)
    np.save(array, np.arange(9))
    np.savez(matrix, data=np.arange(9))
    return {
        "Parquet": b"PAR1\x15\x04\x15" + bytes(40),
        "SQLite": table.read_bytes(),
        "tar archive": packed.getvalue(),
        "zip archive": zipped.getvalue(),
        "NumPy": array.getvalue(),
        ".npz and .xlsx": matrix.getvalue(),
        "PDF": b"%PDF-1.7\n" + bytes(range(256)),
        "zstd": b"\x28\xb5\x2f\xfd" + os.urandom(99),
        "7-Zip": b"7z\xbc\xaf\x27\x1c" + os.urandom(99),
        "lz4": b"\x04\x22\x4d\x18" + os.urandom(99),
        "old Office": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99),
        "Arrow": b"ARROW1\0\0" + os.urandom(99),
        "UTF-16": TEXT.encode("utf-16"),
        "UTF-32": TEXT.encode("utf-32"),
        "NUL": TEXT.encode("utf-16-le"),
        "broken characters": ("Привет, мир\n" * 50).encode("cp1251"),
        "Git LFS": b"version https://git-lfs.github.com/spec/v1\n",
        "gzip archive inside": gzip.compress(TEXT.encode()),
        "bzip2 archive inside": bz2.compress(TEXT.encode()),
        "xz archive inside": lzma.compress(TEXT.encode()),
    }


def test_what_is_no_text_is_refused_by_every_reader(tmp_path: Path) -> None:
    readers: list[Callable[[Path], object]] = [
        lambda path: formats.read_lines(path, documents=True),
        formats.read_lines,
        formats.read_label_lines,
        formats.read_labels,
        formats.read_sparse,
        formats.read_bow,
        formats.read_lf_json,
        formats.read_label_strings,
        formats.read_raw_texts,
        formats.read_filter_pairs,
    ]
    for what, content in foreign(tmp_path).items():
        for path, inside in (
            (tmp_path / "x.txt", content),
            (tmp_path / "x.txt.gz", gzip.compress(content)),
        ):
            path.write_bytes(
                gzip.compress(inside) if "inside" in what and path.suffix == ".txt" else inside
            )
            for read in readers:
                with pytest.raises(InputError, match=what):
                    read(path)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.txt", "text,labels\none fish,1 2\n", "table with the columns text, labels"),
        ("x.txt", '"id"\t"title"\t"tags"\n1\ta\tb\n', "table with the columns id, title, tags"),
        ("x.txt", "uid;content\n1;a\n", "table with the columns uid, content"),
        ("x.csv", "one fish\n", "a table (.csv)"),
        ("x.TSV.bz2", "one\tfish\n", "a table (.tsv)"),
        ("x.parquet", "one fish\n", "a .parquet file"),
        ("x.txt", "__label__a one fish\n", "fastText"),
        ("x.txt", '{"title": "a", "target_ind": [1]}\n', "JSON"),
        (
            "x.txt",
            '{"uid": "1", "content": "' + "word " * 9000 + '"}\n',
            "JSON",
        ),  # its first line is beyond what is looked at
        ("x.jsonl", '"a"\n', "JSON"),
        ("x.txt", "2 9\n0:1 3:0.5\n8:1e-3\n", "a sparse matrix"),
        ("x.txt", "2 9 4\n1,2 0:1 3:0.5\n0 8:1e-3\n", "a sparse matrix"),
    ],
)
def test_more_than_a_document_a_line(tmp_path: Path, name: str, content: str, told: str) -> None:
    path = tmp_path / name
    path.write_bytes(bz2.compress(content.encode()) if name.endswith("bz2") else content.encode())
    for read in (lambda path: formats.read_lines(path, documents=True), formats.read_raw_texts):
        with pytest.raises(InputError) as error:
            read(path)
        assert told in str(error.value) and str(path) in str(error.value)


def test_the_command_of_the_message_writes_the_texts(tmp_path: Path) -> None:
    import subprocess

    for divider in ",\t;|":
        path = tmp_path / "a table.csv"
        content = (
            f'id{divider}title{divider}text\n1{divider}one{divider}"a\nfish{divider} '
            f'red"\n2{divider}two{divider}b\n'
        )
        # As Excel writes it.
        path.write_bytes(content.replace("\n", "\r\n").encode("utf-8-sig"))
        with pytest.raises(InputError) as error:
            formats.read_lines(path, documents=True)
        command = str(error.value).split("`")[1]
        subprocess.run(command, shell=True, check=True, cwd=tmp_path, timeout=60)
        red = f"one a fish{divider} red".replace("\t", "")
        assert (tmp_path / "texts.txt").read_text() == f"{red}\ntwo b\n"


@pytest.mark.parametrize(
    "text",
    [
        "Text and labels, how they go together\n",
        "labels\n",
        "text\n",
        "a, b\nc, d\n",
        "mustard" * 60 + "\n",
        "PAR1 gene\n",
        "ORCHIDS\n",
        "BZh is how bzip2 begins\n",
        "PK\n",
        "{not json}\n",
        '{"a": 1}\n',
        "3 10\n1\n2\n",
        "7:30 in the morning\n",
        "x" * 20000 + "\n",
        "é" * 9000 + "\n",
        "caf\udce9\n",
    ],
)
def test_texts_that_only_look_like_something_else(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert formats.read_lines(path, documents=True) == text.replace("\udce9", "\ufffd").splitlines()


def test_names_of_json_lines() -> None:
    assert all(map(is_json_lines, ("x.json", "a.b/X.JSONL.GZ", "x.ndjson.xz", Path("x.jsonl.bz2"))))
    assert not any(map(is_json_lines, ("x.txt", "json", "x.json.txt")))
