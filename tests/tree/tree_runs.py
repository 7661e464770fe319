"""Label trees made by the command."""

from __future__ import annotations

from collections import Counter

LABELS, SUBJECTS = 24, 4


def as_bag(text: str) -> str:
    counts = Counter(int(word[1:]) for word in text.split())
    return " ".join(f"{word}:{count}" for word, count in sorted(counts.items()))
