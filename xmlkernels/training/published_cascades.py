"""Cascades with published settings.

CascadeXML's own (README of its repository, v1) and LEVER's re-runs of it (table 18).

Where a source is silent the value is CascadeXML's default. The trees were never released: where
their depths are not published, the recipe says that they are ours.
"""

from dataclasses import replace
from typing import Any, NamedTuple

from xmlkernels.training.config import Config
from xmlkernels.training.data_sets import DATA_SETS
from xmlkernels.training.recipe import Recipe

GROUP = "published cascades (CascadeXML, LEVER), to reproduce them on GPUs; none was trained here"
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
_THREE = (0.3, 0.3, 0.4)
_FOUR = (0.2, 0.25, 0.35, 0.5)
_AMAZON = (0.2, 0.25, 0.4, 0.5)


class _Setting(NamedTuple):
    """What is published of one data set.

    Attributes:
        source: who published it.
        tokens: per document.
        changes: what differs from CASCADE.
        notes: what is not published, and what stands in its place.
        time: published training time.
        score: published P@1 of one model.
    """

    source: str
    tokens: int
    changes: dict[str, Any]
    notes: str = ""
    time: str = ""
    score: str = ""


_SETTINGS = {
    "wiki10-31k": _Setting(
        "CascadeXML",
        256,
        {"warmup_epochs": 2.0, "tree_depths": (9, 12), "topk": (64, 64), "embed_drops": _THREE},
        "The depths of the tree are ours.",
    ),
    "amazoncat-13k": _Setting(
        "none of its own",
        256,
        {"epochs": 8, "tree_depths": (7, 10), "topk": (32, 64), "embed_drops": _THREE},
        "No settings are published: those of Wiki10-31K, with a tree and shortlists of our own.",
    ),
    "amazon-670k": _Setting(
        "CascadeXML",
        128,
        {"topk": (128, 256, 400), "embed_drops": _AMAZON},
        time="17 minutes per epoch",
        score="48.5",
    ),
    "wiki-500k": _Setting(
        "CascadeXML",
        128,
        {"topk": (128, 256, 512), "embed_drops": _FOUR},
        time="50 minutes per epoch",
        score="77.0",
    ),
    "amazon-3m": _Setting(
        "none of its own",
        128,
        {"topk": (128, 256, 400), "embed_drops": _AMAZON, "table": "bf16", "state": "bf16"},
        "No settings are published: those of Amazon-670K, with table and states in bf16.",
        "90 minutes per epoch",
        "51.3",
    ),
    "lf-amazontitles-131k": _Setting(
        "LEVER",
        32,
        {"topk": (1024,) * 3, "embed_drops": _FOUR},
        "32 tokens are ours.",
        "3.6 hours on one V100",
        "36.28",
    ),
    "lf-amazon-131k": _Setting(
        "LEVER",
        128,
        {"tree_depths": (9, 12, 15), "topk": (64, 128, 256), "embed_drops": _AMAZON},
        time="4.6 hours on one V100",
        score="43.76",
    ),
    "lf-aol-270k": _Setting(
        "LEVER",
        32,
        {"epochs": 12, "batch": 96, "topk": (1024,) * 3, "embed_drops": _FOUR},
        "32 tokens are ours.",
        "42 hours on one V100",
        "41.20",
    ),
    "lf-wikiseealso-320k": _Setting(
        "LEVER",
        128,
        {"epochs": 12, "topk": (1024, 2048, 4096), "embed_drops": _FOUR},
        time="12 hours on one V100",
        score="30.21",
    ),
    "lf-wikipedia-500k": _Setting(
        "LEVER",
        128,
        {"epochs": 12, "batch": 256, "topk": (1024, 1024, 2048), "embed_drops": _FOUR},
        time="30 hours on one V100",
        score="77.00",
    ),
    "lf-wikihierarchy-1m": _Setting(
        "LEVER",
        128,
        {"epochs": 12, "batch": 96, "topk": (1024,) * 3, "embed_drops": _FOUR},
        "128 tokens are ours.",
        "9.9 hours on one V100",
        "94.88",
    ),
    "lf-amazontitles-1.3m": _Setting(
        "LEVER",
        32,
        {
            "epochs": 10,
            "batch": 48,
            "tree_depths": (13, 16),
            "topk": (1024, 2048),
            "embed_drops": (0.2, 0.3, 0.4),
        },
        "32 tokens are ours.",
        "70 hours on one V100",
        "47.14",
    ),
}


def _recipe(name: str, setting: _Setting) -> Recipe[Config]:
    data, dataset = DATA_SETS[name], f"cache/{name}"
    score = f"; published P@1 {setting.score}" if setting.score else ""
    time = f"Published: {setting.time}." if setting.time else "No time is published."
    return Recipe(
        f"cascade-{name}",
        GROUP,
        f"{data.title}, {setting.tokens} tokens, a cascade on BERT{score}.",
        "",
        time,
        f"The dataset folder {dataset} and {CASCADE.encoder}, a GPU. The label tree is built on "
        "first use.",
        replace(CASCADE, dataset=dataset, output=f"runs/cascade-{name}", **setting.changes),
        source=data.told,
        commands=(data.prepare(CASCADE.encoder, setting.tokens, dataset),),
        notes=f"Settings: {setting.source}. {setting.notes} {_DIFFERS}",
    )


_DIFFERS = (
    "Label rows are trained by row-sparse Adam; docs/cascade_flags.md says what else is not as in "
    "CascadeXML."
)
CASCADES = [_recipe(name, setting) for name, setting in _SETTINGS.items()]
