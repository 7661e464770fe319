"""Named complete configurations. A recipe is a starting point: every key can be overridden on the command line."""

from dataclasses import replace

from config import Config

_BASE = Config()

RECIPES: dict[str, tuple[str, Config]] = {
    "demo": (
        "Part of the built-in corpus, all-MiniLM-L6-v2, a few minutes on two cores (what `make demo` runs).",
        replace(
            _BASE, documents=8000, output="runs/demo", label_text=True, epochs=4, batch=32, max_length=48, save_every=0,
            table_lr=0.05, dropout=0.3, warmup=60, log_every=100,
        ),
    ),
    "docstrings": (
        "The whole built-in corpus, all-MiniLM-L6-v2.",
        replace(_BASE, output="runs/docstrings", label_text=True, epochs=8, batch=32, table_lr=0.05, dropout=0.3),
    ),
    "eurlex57k-titles": (
        "EURLEX57K from titles alone, all-MiniLM-L6-v2; prepare the dataset folder first. About 1.5 hours on two cores.",
        replace(
            _BASE, dataset="cache/eurlex57k-titles", output="runs/eurlex57k-titles", label_text=True, epochs=8, batch=32,
            encoder_lr=3e-4, table_lr=0.03, dropout=0.3, table="fp32", table_decay=1e-5, warmup=300, evaluate_every=2,
        ),
    ),
    "tiny": (
        "A small random encoder on a small part of the built-in corpus: seconds, to see that everything works.",
        replace(
            _BASE, documents=1000, output="runs/tiny", encoder="tiny", epochs=2, batch=32, max_length=32, precision="fp32",
            encoder_lr=1e-3, warmup=10,
        ),
    ),
}  # fmt: skip
