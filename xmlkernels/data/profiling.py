"""Measure the profile of a dataset: one pass over the texts, arrays for everything else.

Letters: N documents of a split, L labels.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from xmlkernels.data.profile import (
    KIND,
    Decile,
    Overlap,
    Profile,
    SplitProfile,
    Spread,
    Suspicion,
)
from xmlkernels.terms import count_words, has_spaces
from xmlkernels.ticks import Ticks

log = logging.getLogger(__name__)

SHOWN = {"train": "training", "val": "validation", "test": "test"}
_DECILES, _EXAMPLES = 10, 5
_EXAMPLE = 60  # characters of a text that is shown
# A label is looked for in its texts where it has documents enough and a name that says something.
_FEWEST, _SHORTEST, _MOST_TEXTS = 10, 3, 0.9
_DOMINANT = 0.5  # of the documents
_ALIKE = 0.1  # duplicates, unlabelled and empty documents up to this share are only counted
# UTF-8 that was read as Latin-1 or Windows-1252: a lead byte of two or three, and what follows it.
_MOJIBAKE = re.compile(
    "\u00c3[\u0080-\u00bf\u0192-\u2122]|\u00e2[\u0080\u20ac][\u0080-\u2122]|\u00c2[\u00a0-\u00bf]"
)


@dataclass(frozen=True)
class Measured:
    """The documents of a split, as they are measured.

    Attributes:
        texts: N texts, or None.
        labels: CSR [N, L].
        lengths: tokens of each document, int [N], or None.
        longest: the most tokens that are kept.
    """

    texts: Sequence[str] | None
    labels: csr_matrix
    lengths: np.ndarray | None = None
    longest: int = 0


def measure(
    name: str, splits: Mapping[str, Measured], label_names: Sequence[str] | None
) -> Profile:
    """Measure a dataset.

    Half a million texts of a hundred words take some ten seconds of one core, and 20 bytes each
    beside the texts.

    Args:
        name: of the dataset.
        splits: "train", and "val" and "test" where there are any.
        label_names: of the L labels.
    """
    pages = {split: _Page(split, part, label_names) for split, part in splits.items()}
    train = splits["train"].labels
    counts = np.bincount(train.indices, minlength=train.shape[1])
    overlaps = list(_overlaps(pages))
    found = {split: _split(part, pages[split]) for split, part in splits.items()}
    told = [
        *_of_names(pages["train"], counts, label_names),
        *_of_documents(found, pages, overlaps),
        *_of_counts(counts, train.shape[0], label_names),
    ]
    return Profile(
        **KIND,  # type: ignore[arg-type]
        name=name,
        labels=int(train.shape[1]),
        used=int((counts > 0).sum()),
        once=int((counts == 1).sum()),
        splits=found,
        deciles=list(_deciles(counts)),
        overlaps=overlaps,
        suspicions=told,
    )


class _Page:
    """What one pass over the texts of a split finds.

    Attributes:
        words, characters: of each text, int64 [N].
        hashes: of each text without case and spacing, int64 [N].
        broken: numbers of texts with damaged characters.
        named: of each label, documents of the split whose text holds its name, int64 [L].
    """

    def __init__(self, split: str, part: Measured, names: Sequence[str] | None) -> None:
        count = 0 if part.texts is None else len(part.texts)
        self.texts = part.texts
        self.words, self.characters, self.hashes = (np.zeros(count, np.int64) for _ in range(3))
        self.broken: list[int] = []
        self.named = np.zeros(part.labels.shape[1], np.int64)
        wanted = None if names is None else [_wanted(name) for name in names]
        starts, columns = part.labels.indptr.tolist(), part.labels.indices.tolist()
        ticks = Ticks(log, f"profile of the {SHOWN.get(split, split)} texts", count, "documents")
        for row, text in enumerate(ticks.over(part.texts or ())):
            words = text.casefold().split()
            plain = " ".join(words)
            self.words[row], self.characters[row] = count_words(text), len(text)
            self.hashes[row] = hash(plain)
            if not text.isascii() and ("\ufffd" in text or _MOJIBAKE.search(text)):
                self.broken.append(row)
            if wanted is not None:
                padded = f" {plain} "
                for label in columns[starts[row] : starts[row + 1]]:
                    if wanted[label] and wanted[label] in padded:
                        self.named[label] += 1


def _wanted(name: str) -> str:
    """Return what to look for in a text: the name as words, "" for one that says too little."""
    plain = " ".join(name.casefold().split())
    if not has_spaces(plain):
        return plain if len(plain) > 1 else ""  # nothing stands before a word
    return f" {plain}" if len(plain) >= _SHORTEST and not plain.isdecimal() else ""


def _split(part: Measured, page: _Page) -> SplitProfile:
    degrees = np.diff(part.labels.indptr)
    tokens = part.lengths
    return SplitProfile(
        documents=int(part.labels.shape[0]),
        unlabelled=int((degrees == 0).sum()),
        empty=int((page.words == 0).sum()),
        duplicates=len(page.hashes) - len(np.unique(page.hashes)),
        labels=_spread(degrees),
        words=None if part.texts is None else _spread(page.words),
        characters=None if part.texts is None else _spread(page.characters),
        tokens=None if tokens is None else _spread(tokens),
        cut=None if tokens is None else int((tokens >= part.longest).sum()),
    )


def _spread(values: np.ndarray) -> Spread:
    if not len(values):
        return Spread(0.0, 0, 0, 0, 0, 0)
    # The value of a document, never one between two: lengths are whole numbers.
    p50, p90, p99 = np.percentile(values, (50, 90, 99), method="lower").tolist()
    mean = round(float(np.mean(values)), 3)
    return Spread(mean, int(values.min()), int(p50), int(p90), int(p99), int(values.max()))


def _deciles(counts: np.ndarray) -> Iterable[Decile]:
    ordered = np.sort(counts)[::-1]
    pairs = max(1, int(ordered.sum()))
    for part in np.array_split(ordered, min(_DECILES, len(ordered))):
        mean, share = round(float(part.mean()), 3), round(float(part.sum() / pairs), 6)
        yield Decile(len(part), int(part[-1]), int(part[0]), mean, share)


def _overlaps(pages: Mapping[str, _Page]) -> Iterable[Overlap]:
    names = [name for name in SHOWN if name in pages]
    for number, second in enumerate(names):
        for first in names[:number]:
            shared = int(np.isin(pages[second].hashes, pages[first].hashes).sum())
            if shared:
                yield Overlap(first, second, shared)


def _of_names(page: _Page, counts: np.ndarray, names: Sequence[str] | None) -> Iterable[Suspicion]:
    if names is None or page.texts is None:
        return
    looked = counts >= _FEWEST
    given = np.flatnonzero(looked & (page.named >= _MOST_TEXTS * counts))
    pairs = int(counts.sum())
    if not len(given) or 2 * page.named.sum() <= pairs:
        return
    given = given[np.argsort(-counts[given], kind="stable")]
    told = (
        f"{page.named.sum() / pairs:.0%} of the labels' names stand in the texts that have them, "
        f"and {len(given):,} labels are named in nine of ten of their texts: was the text made "
        "with the labels? What is predicted must not have them in it"
    )
    examples = [names[label][:_EXAMPLE] for label in given[:_EXAMPLES]]
    yield Suspicion("label_in_text", told, len(given), int(looked.sum()), examples)


def _of_documents(
    splits: Mapping[str, SplitProfile], pages: Mapping[str, _Page], overlaps: Sequence[Overlap]
) -> Iterable[Suspicion]:
    for shared in overlaps:
        of = splits[shared.second].documents
        told = (
            f"{shared.documents:,} of {of:,} {SHOWN[shared.second]} documents have the text of a "
            f"{SHOWN[shared.first]} document: what is measured on them is too good"
        )
        yield Suspicion("overlap", told, shared.documents, of)
    for name, page in pages.items():
        if page.broken and page.texts is not None:
            told = (
                f"{len(page.broken):,} {SHOWN[name]} texts hold damaged characters (U+FFFD, or "
                "UTF-8 read as another encoding): read the source again with its own encoding"
            )
            examples = [page.texts[row][:_EXAMPLE] for row in page.broken[:_EXAMPLES]]
            yield Suspicion("encoding", told, len(page.broken), len(page.texts), examples)
    for name, split in splits.items():
        yield from _shares(name, split)


def _shares(name: str, split: SplitProfile) -> Iterable[Suspicion]:
    shown, of = SHOWN[name], split.documents
    if split.unlabelled > _ALIKE * of:
        told = f"{split.unlabelled:,} of {of:,} {shown} documents have no label"
        yield Suspicion("unlabelled", told, split.unlabelled, of)
    if split.empty > _ALIKE * of:
        told = f"{split.empty:,} of {of:,} {shown} texts are empty: is the text another column?"
        yield Suspicion("empty", told, split.empty, of)
    if split.duplicates > _ALIKE * of:
        told = f"{split.duplicates:,} of {of:,} {shown} documents repeat the text of another"
        yield Suspicion("duplicates", told, split.duplicates, of)


def _of_counts(
    counts: np.ndarray, documents: int, names: Sequence[str] | None
) -> Iterable[Suspicion]:
    common = np.flatnonzero(counts >= max(2, _DOMINANT * documents))
    if len(common) and len(counts) > 2:
        common = common[np.argsort(-counts[common], kind="stable")]
        shown = [names[label][:_EXAMPLE] if names else str(label) for label in common[:_EXAMPLES]]
        told = (
            f"the label {shown[0]!r} is on {counts[common[0]]:,} of {documents:,} training "
            "documents: it says little of any of them, and counts in every metric"
        )
        yield Suspicion("one_label", told, int(counts[common[0]]), documents, shown)
    if (unused := int((counts == 0).sum())) > _ALIKE * len(counts):
        told = (
            f"{unused:,} of {len(counts):,} labels have no training document: nothing but their "
            "names can be learned"
        )
        yield Suspicion("unused_labels", told, unused, len(counts))


def lines_of(profile: Profile) -> list[str]:
    """Describe a profile in a few short lines, what looks wrong last."""
    sizes = [f"{split.documents:,} {SHOWN[name]}" for name, split in profile.splits.items()]
    train = profile.splits["train"]
    told = [
        f"documents: {', '.join(sizes)}; labels: {profile.labels:,}, {train.labels.mean:.1f} per "
        f"document ({train.labels.most:,} at most)"
    ]
    if train.words is not None:
        words = train.words
        told.append(f"words per text: {words.p50:,} in the middle, {words.p99:,} at 99 %")
    if train.tokens is not None:
        cut = f", {train.cut:,} cut" if train.cut else ""
        told.append(f"tokens per text: {train.tokens.p50:,} in the middle{cut}")
    deciles = ", ".join(f"{tenth.mean:,.3g}" for tenth in profile.deciles)
    told.append(
        f"documents per label, by tenths of the labels: {deciles}; {profile.once:,} labels have "
        "one document"
    )
    small = {
        "without a label": sum(split.unlabelled for split in profile.splits.values()),
        "with an empty text": sum(split.empty for split in profile.splits.values()),
        "with the text of another": sum(split.duplicates for split in profile.splits.values()),
    }
    if any(small.values()):
        counted = ", ".join(f"{count:,} {what}" for what, count in small.items() if count)
        told.append(f"documents {counted}")
    return told + [f"look: {one.told}" + _shown(one.examples) for one in profile.suspicions]


def _shown(examples: Sequence[str]) -> str:
    return f" ({', '.join(map(repr, examples[:3]))})" if examples else ""
