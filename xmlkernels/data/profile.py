"""The profile of a dataset: what it holds, and what in it looks wrong, in numbers and sentences.

`prepare` writes it as `profile.json` into the dataset folder, and training copies it into a run's.
Letters: N documents of a split, L labels.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from xmlkernels.data.manifest import PROFILE
from xmlkernels.files import replacing
from xmlkernels.records import Count, read_struct

KIND = {"format": "xmlkernels-profile", "version": 1}
Suspicious = Literal[
    "label_in_text", "one_label", "encoding", "duplicates", "overlap", "unlabelled", "empty",
    "unused_labels",
]  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """How a number is spread over documents: mean, smallest, percentiles and largest."""

    mean: float
    least: int
    p50: int
    p90: int
    p99: int
    most: int


@dataclass(frozen=True)
class SplitProfile:
    """One split.

    Attributes:
        documents: N.
        unlabelled: documents without a label.
        empty: documents whose text is empty or blank; 0 where there are no texts.
        duplicates: documents whose text an earlier one of the split has (in any letter case and
            spacing).
        labels: labels per document.
        words: words per text, as `terms.count_words` counts; None where there are no texts.
        characters: characters per text; None where there are no texts.
        tokens: tokens per document as they are kept; None without a tokenizer.
        cut: documents that reach the most tokens that are kept; None without a tokenizer.
    """

    documents: Count
    unlabelled: Count
    empty: Count
    duplicates: Count
    labels: Spread
    words: Spread | None = None
    characters: Spread | None = None
    tokens: Spread | None = None
    cut: Count | None = None


@dataclass(frozen=True)
class Decile:
    """A tenth of the labels, the tenth of the most frequent first.

    Attributes:
        labels: how many are in it.
        least, most: training documents of its rarest and of its most frequent label.
        mean: training documents per label.
        share: its part of all pairs (document, label) of training, 0 to 1.
    """

    labels: Count
    least: Count
    most: Count
    mean: float
    share: float


@dataclass(frozen=True)
class Overlap:
    """Texts that two splits share: `documents` of the split `second` are in `first`, too."""

    first: str
    second: str
    documents: Count


@dataclass(frozen=True)
class Suspicion:
    """Something that looks wrong.

    Attributes:
        kind: which check found it.
        told: what it is and what to do about it, a sentence or two.
        count: documents, or labels (label_in_text, unused_labels), that it is about.
        of: all that were looked at.
        examples: up to five label names, or beginnings of texts.
    """

    kind: Suspicious
    told: str
    count: Count
    of: Count
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Profile:
    """What `profile.json` holds.

    Attributes:
        format, version: of the file.
        name: of the dataset.
        labels: L.
        used: labels that a training document has.
        once: labels that exactly one training document has.
        splits: "train" and, where there are any, "val" and "test".
        deciles: ten of them, the most frequent labels first; fewer where L is below 10.
        overlaps: pairs of splits that share texts; empty where none do.
        suspicions: what looks wrong, the gravest first; empty where nothing does.
    """

    format: str
    version: int
    name: str
    labels: Count
    used: Count
    once: Count
    splits: dict[str, SplitProfile]
    deciles: list[Decile]
    overlaps: list[Overlap]
    suspicions: list[Suspicion]


def load_profile(path: str | Path) -> Profile:
    """Read a profile.

    Args:
        path: profile.json, or the dataset or run folder that holds it.

    Raises:
        InputError: no such file, or not a profile of this version.
    """
    path = Path(path)
    file = path / PROFILE if path.is_dir() else path
    return read_struct(file, Profile, mend="prepare the data again", kind=KIND)


def write_profile(folder: Path, profile: Profile) -> None:
    """Write profile.json into a folder, whole or not at all."""
    with replacing(folder / PROFILE) as file:
        text = json.dumps(asdict(profile), indent=1, ensure_ascii=True, allow_nan=False)
        file.write(text.encode() + b"\n")
