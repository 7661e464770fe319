"""The settings of one training run: one flat dataclass, saved with the run."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Config:
    """One run of the end-to-end model. Every field is a flag: `python train/run.py RECIPE --epochs 3`."""

    # ---- data ----
    dataset: str = "docstrings"
    """A folder made by train/prepare.py, or "docstrings": the built-in corpus, made on first use."""
    documents: int = 0
    """Built-in corpus only: take a deterministic part of about this many documents; 0 takes all."""
    cache: str = "cache"
    """Where the built-in corpus is kept, by content: it is rebuilt when code, tokenizer or packages change."""
    output: str = "runs/run"
    """Folder for config.json, log.jsonl, metrics.json, predictions.npz and checkpoint/."""
    label_text: bool = False
    """Add each label's text as a document whose only target is itself (Renee's augmentation)."""
    max_length: int = 64
    """Built-in corpus only: tokens per document; a dataset folder fixes its own."""

    # ---- encoder ----
    encoder: str = "minilm"
    """Hub name or local folder of any Hugging Face encoder; "minilm" is the installed all-MiniLM-L6-v2; "tiny" is a small
    random one."""
    pooling: Literal["mean", "cls"] = "mean"
    bottleneck: int = 0
    """Width of a bias-free linear layer after pooling; 0 is none."""
    dropout: float = 0.2
    """On the embedding."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the encoder's autocast; auto: bf16 where the device multiplies it natively."""
    compile: bool = False
    """Run the encoder through torch.compile."""
    init_state: str = ""
    """A state dict to start the encoder from (NGAME's first module, say); keys lose `init_prefix`, all must fit."""
    init_prefix: str = "embedding_labels.encoder.transformer.0.auto_model."

    # ---- label table ----
    table: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the label table; auto: bf16 where the device multiplies it natively, else fp32."""
    bias: bool = False
    table_optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.9
    """Of the table's SGD; 0 keeps no state at all."""
    state: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the table's optimizer state."""
    table_decay: float = 1e-4
    decoupled: bool = False
    """Weight decay shrinks the table instead of entering its gradient."""
    kahan: bool = False
    """Kahan compensation for tables below fp32, instead of stochastic rounding."""

    # ---- training ----
    epochs: int = 10
    batch: int = 32
    micro_batch: int = 0
    """Documents per encoder pass (gradient caching); 0 passes the whole batch at once."""
    encoder_lr: float = 2e-4
    table_lr: float = 0.02
    """The loss is summed over the batch, so this belongs to `batch`: change both in proportion."""
    encoder_decay: float = 0.01
    warmup: int = 200
    """Steps of linear warm-up; a cosine to 0 follows."""
    clip: float = 0.0
    """Largest norm of the encoder's gradient; 0 is off."""
    loss_every: int = 10
    """Compute the exact loss over all labels every so many steps; 1 always, 0 never."""
    seed: int = 0

    # ---- evaluation, saving ----
    evaluate_every: int = 1
    """Epochs between looks at the validation split."""
    best_by: str = "P@1"
    """Validation metric that chooses the best checkpoint."""
    top_k: int = 100
    """Labels kept per document in predictions.npz."""
    evaluate_batch: int = 256
    save_every: int = 500
    """Steps between checkpoints; one is written after every epoch too."""
    log_every: int = 50
    """Steps between lines of log.jsonl."""
    resume: bool = False
    """Go on from the last checkpoint in `output`, bit for bit."""
    overwrite: bool = False
    """Replace the run that `output` holds."""
    device: str = "auto"
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
