"""Cascades with published settings: CascadeXML's own (README of its repository, v1) and LEVER's
re-runs of it (table 18).

Where a source says nothing, the value is CascadeXML's default; depths of trees that were never
released are said to be ours.
"""

from dataclasses import replace
from typing import Any

from xmlkernels.training.config import Config

# One encoder, cosine phases over (warm-up, plateau, last three epochs), heads at ten times the
# encoder's rate.
CASCADE = Config(
    model="cascade",
    encoder="bert-base-uncased",
    pooling="cls",
    encoder_lr=1e-4,
    encoder_decay=0.05,
    epochs=15,
    batch=64,
    warmup_epochs=1.0,
    top_k=20,
    save_every=5000,
    log_every=500,
    loss_every=50,
)
_FOUR, _THREE = (0.2, 0.25, 0.35, 0.5), (0.3, 0.3, 0.4)

# name: what it is, then what differs from CASCADE. The data: xmlkernels prepare --max-length as
# told.
_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "wiki10-31k": (
        "Wiki10-31K, 256 tokens (CascadeXML; the depths of its tree are ours).",
        {"warmup_epochs": 2.0, "tree_depths": (9, 12), "topk": (64, 64), "embed_drops": _THREE},
    ),
    "amazoncat-13k": (
        "AmazonCat-13K, 256 tokens (no published settings: those of Wiki10-31K with a tree and "
        "shortlists of our own).",
        {"epochs": 8, "tree_depths": (7, 10), "topk": (32, 64), "embed_drops": _THREE},
    ),
    "amazon-670k": (
        "Amazon-670K, 128 tokens (CascadeXML).",
        {"topk": (128, 256, 400), "embed_drops": (0.2, 0.25, 0.4, 0.5)},
    ),
    "wiki-500k": (
        "Wiki-500K, 128 tokens (CascadeXML).",
        {"topk": (128, 256, 512), "embed_drops": _FOUR},
    ),
    "amazon-3m": (
        "Amazon-3M, 128 tokens (no published settings: those of Amazon-670K, table and states in "
        "bf16).",
        {
            "topk": (128, 256, 400),
            "embed_drops": (0.2, 0.25, 0.4, 0.5),
            "table": "bf16",
            "state": "bf16",
        },
    ),
    "lf-amazontitles-131k": (
        "LF-AmazonTitles-131K (LEVER; 32 tokens are ours).",
        {"topk": (1024,) * 3, "embed_drops": _FOUR},
    ),
    "lf-amazon-131k": (
        "LF-Amazon-131K, 128 tokens (LEVER).",
        {"tree_depths": (9, 12, 15), "topk": (64, 128, 256), "embed_drops": (0.2, 0.25, 0.4, 0.5)},
    ),
    "lf-aol-270k": (
        "LF-AOL-270K (LEVER).",
        {"epochs": 12, "batch": 96, "topk": (1024,) * 3, "embed_drops": _FOUR},
    ),
    "lf-wikiseealso-320k": (
        "LF-WikiSeeAlso-320K, 128 tokens (LEVER).",
        {"epochs": 12, "topk": (1024, 2048, 4096), "embed_drops": _FOUR},
    ),
    "lf-wikipedia-500k": (
        "LF-Wikipedia-500K, 128 tokens (LEVER).",
        {"epochs": 12, "batch": 256, "topk": (1024, 1024, 2048), "embed_drops": _FOUR},
    ),
    "lf-wikihierarchy-1m": (
        "LF-WikiHierarchy-1M (LEVER).",
        {"epochs": 12, "batch": 96, "topk": (1024,) * 3, "embed_drops": _FOUR},
    ),
    "lf-amazontitles-1.3m": (
        "LF-AmazonTitles-1.3M (LEVER; 32 tokens are ours).",
        {
            "epochs": 10,
            "batch": 48,
            "tree_depths": (13, 16),
            "topk": (1024, 2048),
            "embed_drops": (0.2, 0.3, 0.4),
        },
    ),
}

PUBLISHED = {
    f"cascade-{name}": (
        f"{told} Prepare the dataset folder first.",
        replace(CASCADE, dataset=f"cache/{name}", output=f"runs/cascade-{name}", **settings),
    )
    for name, (told, settings) in _SETTINGS.items()
}
