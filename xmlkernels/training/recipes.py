"""Named complete configurations. A recipe is a starting point: every key can be overridden on the
command line.
"""

from dataclasses import replace
from typing import Any

from xmlkernels.training.config import Config
from xmlkernels.training.published import PUBLISHED

_BASE = Config()
_CASCADE = replace(
    _BASE,
    model="cascade",
    epochs=8,
    batch=32,
    encoder_lr=1e-4,
    encoder_decay=0.01,
    warmup_epochs=0.5,
    cooldown_epochs=3.0,
    embed_drops=(0.2, 0.2, 0.3),
    top_k=20,
)
_BOW = replace(
    _BASE,
    encoder="bow",
    bow_width=512,
    min_df=2,
    dropout=0.5,
    encoder_lr=0.03,
    encoder_decay=0.0,
    table="bf16",
    table_optimizer="adam",
    table_lr=1.5e-3,
    table_decay=0.0,
    bias=True,
    frequency_bias=True,
    centroid_norm=0.5,
    epochs=6,
    batch=256,
    warmup_epochs=0.3,
    loss_every=10,
    log_every=100,
    save_every=0,
)

# Of the ranker that `make demo` trains beside the run of its recipe: the best on validation of
# eleven settings.
DEMO_RANKER: dict[str, Any] = {"min_df": 1}

RECIPES: dict[str, tuple[str, Config]] = {
    "demo": (
        "Part of the built-in corpus, all-MiniLM-L6-v2, a few minutes on two cores (what `make "
        "demo` runs).",
        replace(
            _BASE,
            documents=8000,
            output="runs/demo",
            label_text=True,
            epochs=4,
            batch=32,
            max_length=48,
            save_every=0,
            table_lr=0.05,
            dropout=0.3,
            warmup=60,
            log_every=100,
            ema=0.98,
            ema_every=10,
            ema_tables=True,
        ),
    ),
    "docstrings": (
        "The whole built-in corpus, all-MiniLM-L6-v2.",
        replace(
            _BASE,
            output="runs/docstrings",
            label_text=True,
            epochs=8,
            batch=32,
            table_lr=0.05,
            dropout=0.3,
        ),
    ),
    "eurlex57k-titles": (
        "EURLEX57K from titles alone, all-MiniLM-L6-v2; prepare the dataset folder first. About "
        "1.5 hours on two cores.",
        replace(
            _BASE,
            dataset="cache/eurlex57k-titles",
            output="runs/eurlex57k-titles",
            label_text=True,
            epochs=8,
            batch=32,
            encoder_lr=3e-4,
            table_lr=0.03,
            dropout=0.3,
            table="fp32",
            table_decay=1e-5,
            warmup=300,
            evaluate_every=2,
        ),
    ),
    "tiny": (
        "A small random encoder on a small part of the built-in corpus: seconds, to see that "
        "everything works.",
        replace(
            _BASE,
            documents=1000,
            output="runs/tiny",
            encoder="tiny",
            epochs=2,
            batch=32,
            max_length=32,
            precision="fp32",
            encoder_lr=1e-3,
            warmup=10,
        ),
    ),
    "bow-docstrings": (
        "A bag of words on the whole built-in corpus: a minute on two cores.",
        replace(_BOW, output="runs/bow-docstrings"),
    ),
    "bow-eurlex57k-titles": (
        "A bag of words on EURLEX57K titles, for xmlkernels rank beside it (alone: --bow-width "
        "1024 --dropout 0.5 "
        "--table-lr 0.001 --bow-activation relu --no-label-text); prepare the dataset folder with "
        "--keep-texts first.",
        replace(
            _BOW,
            dataset="cache/eurlex57k-titles",
            output="runs/bow-eurlex57k-titles",
            label_text=True,
            dropout=0.4,
            table_lr=2e-3,
            bow_activation="none",
            epochs=4,
            evaluate_every=4,
        ),
    ),
    "bow-debian-deps": (
        "A bag of words on debian-deps; prepare the dataset folder with --keep-texts first.",
        replace(
            _BOW,
            dataset="cache/debian-deps",
            output="runs/bow-debian-deps",
            label_text=True,
            bow_activation="none",
        ),
    ),
    "cascade-tiny": (
        "A cascade of three levels on a small random encoder and a small part of the built-in "
        "corpus: seconds.",
        replace(
            _CASCADE,
            documents=1000,
            output="runs/cascade-tiny",
            encoder="tiny",
            epochs=8,
            batch=32,
            max_length=32,
            precision="fp32",
            encoder_lr=1e-3,
            tree_depths=(3, 6),
            topk=(4, 24),
            layers=("1", "2", "2"),
            embed_drops=(0.1, 0.1, 0.1),
            evaluate_batch=64,
        ),
    ),
    "cascade-docstrings": (
        "A cascade on the whole built-in corpus, all-MiniLM-L6-v2.",
        replace(
            _CASCADE,
            output="runs/cascade-docstrings",
            label_text=True,
            tree_depths=(6, 9),
            topk=(32, 64),
            rw_loss=(1.0, 4.0, 37.0),
        ),
    ),
    "cascade-eurlex57k": (
        "A cascade on EURLEX57K titles, all-MiniLM-L6-v2; prepare the dataset folder and make the "
        "tree first (xmlkernels tree "
        "DATASET --depths 6 9 --no-graph --common 0.1). About 1.6 hours on two cores.",
        # SGD on the tables, as end to end, where losses are sums. A cascade's are means over the
        # candidates of a batch: their number (32 x 1,580 labels) as rw_loss makes a sum. The
        # clusters have a twentieth of theirs (32 x 64, 32 x 384).
        replace(
            _CASCADE,
            dataset="cache/eurlex57k-titles",
            output="runs/cascade-eurlex57k",
            label_text=True,
            tree_depths=(6, 9),
            topk=(48, 192),
            layers=("4", "5", "6"),
            table="fp32",
            table_optimizer="sgd",
            rw_loss=(102.0, 614.0, 50560.0),
            epochs=8,
            encoder_lr=3e-4,
            encoder_decay=1e-3,
            head_lr_factor=100.0,
            warmup_epochs=0.2,
            cooldown_epochs=7.8,
            ema=0.995,
            ema_start=3.0,
            ema_every=10,
            ema_tables=True,
        ),
    ),
    **PUBLISHED,
}
