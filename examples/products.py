"""Made-up product titles with their labels, for the examples: small, and learnable."""

import random

KINDS = ["lamp", "chair", "table", "shelf", "mirror", "clock", "basket", "vase", "rug", "stool"]
MATERIALS = [
    "oak",
    "glass",
    "steel",
    "wool",
    "bamboo",
    "marble",
    "leather",
    "cotton",
    "brass",
    "paper",
]
USES = {"reading": "bright", "garden": "weatherproof", "travel": "folding", "nursery": "rounded"}


def make(count: int, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """Return `count` titles, and for each its labels: its kind, its material and its use."""
    draw = random.Random(seed)
    titles, labels = [], []
    for _ in range(count):
        kind, material, use = draw.choice(KINDS), draw.choice(MATERIALS), draw.choice([*USES])
        words = [USES[use], material, kind, draw.choice(["small", "large", "new", "classic"])]
        titles.append(" ".join(draw.sample(words, len(words))))
        labels.append([f"kind: {kind}", f"material: {material}", f"use: {use}"])
    return titles, labels
