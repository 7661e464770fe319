"""A small table of one's own, written as other programs write it."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet

from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.data.tables.options import Tables

LABELS = ("fish", "fruit", "meat", "nuts", "veg")
ROWS = [
    (f'the {LABELS[n % 5]}{n} with "{LABELS[n * 7 % 5]}", ok', [LABELS[n % 5], LABELS[n * 3 % 4]])
    for n in range(40)
]
TEXTS = [text for text, _ in ROWS]


def as_csv(divider: str = ",", joined: str = ";") -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=divider)
    writer.writerow(["id", "text", "tags"])
    writer.writerows([n, text, joined.join(own)] for n, (text, own) in enumerate(ROWS))
    return out.getvalue()


def as_jsonl() -> str:
    return "".join(json.dumps({"text": text, "labels": own}) + "\n" for text, own in ROWS)


def as_json() -> str:
    return json.dumps([{"text": text, "labels": own} for text, own in ROWS], indent=1)


def as_fasttext() -> str:
    marked = ([f"__label__{label}" for label in own] for _, own in ROWS)
    return "".join(f"{' '.join(m)} {t}\n" for m, t in zip(marked, TEXTS, strict=True))


def as_parquet(path: Path) -> None:
    table = pyarrow.table({"text": TEXTS, "labels": [own for _, own in ROWS]})
    pyarrow.parquet.write_table(table, path)


TEXT_FILES: dict[str, Callable[[], str]] = {
    "a.csv": as_csv,
    "semicolons.csv": lambda: as_csv(";", "|"),
    "a.tsv": lambda: as_csv("\t"),
    "pandas.csv": lambda: as_csv().replace(",tags", ",labels"),
    "a.jsonl": as_jsonl,
    "a.json": as_json,
    "lines.json": as_jsonl,
    "a.txt": as_fasttext,
    "windows.csv": lambda: "\ufeff" + as_csv(),
}


def write(folder: Path, name: str) -> Path:
    """Write one of TEXT_FILES, or a.parquet; .gz and .zst are packed."""
    path = folder / name
    packed = path.suffix if path.suffix in (".gz", ".zst") else ""
    plain = name.removesuffix(packed)
    if plain == "a.parquet":
        as_parquet(path)
        return path
    content = TEXT_FILES[plain]().encode()
    if packed == ".gz":
        content = gzip.compress(content)
    elif packed == ".zst":
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(content)
        content = sink.getvalue().to_pybytes()
    path.write_bytes(content)
    return path


def made(output: Path, data: Path, validation_share: float = 0.0, **tables: object):
    """A dataset of a table, and what was told."""
    told: list[str] = []
    config = PrepareConfig(
        output,
        validation_share=validation_share,
        tables=Tables(data, **tables),  # type: ignore[arg-type]
    )
    return prepare(config, told.append), told
