"""From a configuration to data and model."""

from pathlib import Path
from typing import Any

import torch

from config import Config, resolved_table
from encoders import source_of
from report import say
from xmlkernels import InputError
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.loader import Batches
from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.data.tokens import load_tokenizer
from xmlkernels.models.end_to_end import EndToEnd, Training
from xmlkernels.nn.encoder import Encoder, default_autocast, load_ngame
from xmlkernels.nn.full_head import FullHead


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


def training_batches(config: Config, dataset: Dataset) -> Batches:
    """The training split in batches, with the labels' own texts where the configuration asks for them.

    Raises:
        InputError: no training documents, or no label texts.
    """
    train = dataset.splits.get("train")
    if train is None or not len(train):
        raise InputError(f"dataset {dataset.folder}", "training documents", "none", "prepare it from a file that holds some")
    if config.label_text and dataset.label_tokens is None:
        got = f"{dataset.folder} without"
        raise InputError("--label-text", "a dataset with label texts", got, "prepare it with --label-text")
    return Batches(train, config.batch, seed=config.seed, label_tokens=dataset.label_tokens if config.label_text else None)


def build_model(config: Config, dataset: Dataset, steps: int, device: torch.device) -> EndToEnd:
    """Encoder, label table and their training, for a run of `steps` steps.

    Raises:
        InputError: the data do not fit the encoder, or it cannot be loaded.
    """
    torch.manual_seed(config.seed)
    encoder = _encoder(config, dataset, device)
    longest = max(int(split.tokens.lengths.max(initial=0)) for split in dataset.splits.values())
    if config.label_text and dataset.label_tokens is not None:
        longest = max(longest, int(dataset.label_tokens.lengths.max(initial=0)))
    if encoder.max_length is not None and longest > encoder.max_length:
        raise InputError(
            f"dataset {dataset.folder}", f"rows of at most {encoder.max_length} tokens, the positions of {config.encoder}",
            f"one of {longest}", f"prepare the data again with --max-length {encoder.max_length}",
        )  # fmt: skip
    head = FullHead(
        dataset.num_labels, encoder.width, dtype=resolved_table(config, device), bias=config.bias,
        optimizer=config.table_optimizer, momentum=config.momentum, state_dtype=config.state, decay=config.table_decay,
        decoupled=config.decoupled, kahan=config.kahan, skip_units=config.skip_tiles,
        seed=config.seed,
    )  # fmt: skip
    training = Training(
        config.encoder_lr, config.table_lr, config.encoder_decay, config.warmup, steps, config.clip, config.micro_batch
    )
    return EndToEnd(encoder, head, training).to(device)


def _encoder(config: Config, dataset: Dataset, device: torch.device) -> Encoder:
    autocast = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "auto": default_autocast(device)}[config.precision]
    options: dict[str, Any] = {
        "pooling": config.pooling, "bottleneck": config.bottleneck, "dropout": config.dropout,
        "autocast": autocast, "compile": config.compile,
    }  # fmt: skip
    if config.encoder == "tiny":
        encoder = Encoder.tiny(load_tokenizer(dataset.tokenizer_folder).vocab_size, seed=config.seed, **options)
    else:
        source = source_of(config.encoder)
        encoder = Encoder.from_pretrained(source, **options)
        if load_tokenizer(source).hash != dataset.tokenizer_hash:
            raise InputError(
                f"dataset {dataset.folder}", f"tokens made by the tokenizer of {config.encoder}", "tokens of another tokenizer",
                "prepare the data again with --tokenizer set to this encoder",
            )  # fmt: skip
    if config.init_state:
        load_ngame(encoder, config.init_state, config.init_prefix)
    return encoder


def dtype_name(dtype: torch.dtype | None) -> str:
    """fp32, bf16, fp16 or fp8; None is autocast switched off."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8"}.get(dtype or torch.float32, "fp32")
