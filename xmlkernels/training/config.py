"""The settings of one training run: one flat dataclass, saved with the run; checks.py refuses what
cannot be used.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from xmlkernels import InputError, dist

BEST_BY = tuple(f"{kind}@{k}" for kind in ("P", "nDCG", "PSP", "PSnDCG", "R") for k in range(1, 6))


@dataclass(frozen=True)
class Config:
    """One run. Every field is a flag: `python train/run.py RECIPE --epochs 3`. Lists are words:
    `--topk 64 128`.
    """

    model: Literal["end_to_end", "cascade"] = "end_to_end"
    """end_to_end scores every label in every step (Renee); cascade goes down a label tree to a
    shortlist (CascadeXML).
    """

    # ---- data ----
    dataset: str = "docstrings"
    """A folder made by xmlkernels prepare, or "docstrings": the built-in corpus, made on first
    use.
    """
    documents: int = 0
    """Built-in corpus only: take a deterministic part of about this many documents; 0 takes all."""
    cache: str = "cache"
    """Where the built-in corpus is kept, by content: it is rebuilt when code, tokenizer or packages
    change.
    """
    output: str = "runs/run"
    """Folder for config.json, log.jsonl, metrics.json, predictions.npz and checkpoint/."""
    label_text: bool = False
    """Add each label's text as a document whose only target is itself (Renee's augmentation)."""
    max_length: int = 64
    """Built-in corpus only: tokens per document; a dataset folder fixes its own."""

    # ---- encoder ----
    encoder: str = "minilm"
    """Hub name or local folder of any Hugging Face encoder; "minilm" is the installed
    all-MiniLM-L6-v2; "tiny" is a small random one; "bow" is a bag of words, fast on a CPU and good
    for short texts."""
    pooling: Literal["mean", "cls"] = "mean"
    """Over the encoder's last layer: the mean of the tokens, or the class token, wherever the
    tokenizer sets it.
    """
    bottleneck: int = 0
    """Width of a bias-free linear layer after pooling; 0 is none."""
    dropout: float = 0.2
    """Dropout on the embedding (end to end, and the bag of words of either model; a cascade's
    levels have --embed-drops).
    """
    freeze: int = 0
    """Layers of the encoder that stay as they are, from the first on, with the embeddings below
    them.
    """
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the encoder's autocast; auto: bf16 where the device multiplies it
    natively.
    """
    compile: bool = False
    """Run the encoder through torch.compile."""
    init_state: str = ""
    """A state dict to start the encoder from (NGAME's first module, say); keys lose `init_prefix`,
    all must fit.
    """
    init_prefix: str = "embedding_labels.encoder.transformer.0.auto_model."
    """What the keys of `init_state` begin with before the encoder's own names; other keys are left
    alone.
    """

    # ---- bag of words (--encoder bow) ----
    bow_width: int = 512
    """Width of the embedding."""
    ngrams: int = 2
    """Words in a row that make a term, at most: 1 takes single words alone."""
    min_df: int = 2
    """Training documents that a term must be in."""
    max_features: int = 0
    """Terms kept, the most frequent ones; 0 keeps all."""
    bow_activation: Literal["relu", "none"] = "relu"
    """After the sum of word vectors; none is a linear model of low rank."""
    word_dropout: float = 0.0
    """Share of a text's terms left out in each step."""
    word_std: float = 1.0
    """Standard deviation of the first word vectors. Their table is trained by Adam with
    --encoder-lr and --encoder-decay.
    """

    # ---- cascade (--model cascade) ----
    tree: str = ""
    """A label tree of xmlkernels tree; by default one is built on first use, from --tree-depths,
    and kept in --cache.
    """
    tree_depths: tuple[int, ...] = (10, 13, 16)
    """The tree built on first use has 2**d clusters for each d: `10 13 16`."""
    topk: tuple[int, ...] = ()
    """Clusters kept after each level of clusters, coarse to fine; by default 128, 256, 512, …"""
    layers: tuple[str, ...] = ()
    """Encoder layers that each level reads, coarse to fine, labels last: `5,6 8 10 12`; by default
    those of CascadeXML, scaled to the depth of the encoder."""
    embed_drops: tuple[float, ...] = ()
    """Dropout of each level, coarse to fine, labels last; by default `.2 .25 .4 .5` for four
    levels, `.3 .3 .4` for three.
    """
    rw_loss: tuple[float, ...] = ()
    """Weight of each level's loss; by default 1 each. A loss is a mean over the level's candidates,
    so a level with many counts for little beside one with few: weights in proportion to the
    candidates (`1 6 25` for 64, 384 and 1,600) make them equal. With --table-optimizer sgd the
    tables move in proportion to it, too."""
    scheme: Literal["auto", "level", "weighted", "path"] = "auto"
    """Score of a label: its own probability, times its cluster's, or the product from the coarsest
    cluster on. auto: the one that is best on the validation split, chosen anew in each validation
    (weighted without one)."""
    positives_bound: int = 32
    """Clusters beyond --topk that a training document with many true ones may keep; those beyond
    are lost, and counted.
    """
    reference_loss: bool = False
    """Count pads in the mean of the loss as CascadeXML's code does; for comparisons."""
    head_lr_factor: float = 10.0
    """Learning rate of the tables and of the linear layer before the coarsest one, in units of
    --encoder-lr.
    """
    schedule: Literal["three_phase", "warmup_cosine"] = "three_phase"
    """Warm-up, plateau and cool-down with Adam's beta1 moving against them; or warm-up and cosine
    to 0.
    """
    cooldown_epochs: float = 3.0
    """Length of the last of the three phases."""
    label_device: str = "auto"
    """Where the label table and its optimizer's state stand, and are trained: cpu, cuda:1, …; auto:
    with the model. For tables that its card has no room for."""

    # ---- label table ----
    table: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    """Number format of the label table; auto: bf16 where the device multiplies it natively, else
    fp32, as with adamw_dense. fp8 is e4m3 with a power-of-two scale per row."""
    bias: bool = False
    """One fp32 bias per label; off in Renee. A table with one cannot serve a maximum-inner-product
    index.
    """
    frequency_bias: bool = False
    """Start each bias at its label's frequency; with Adam the first steps are else spent on
    learning that labels are rare.
    """
    centroid_norm: float = 0.0
    """Start each row as a vector of this length from the mean of all documents to that of its
    label's; 0 draws it. It helps labels of few documents, and needs an encoder whose first vectors
    say something: a bag of words, or a trained one."""
    table_optimizer: Literal["auto", "sgd", "adam", "adamw_dense"] = "auto"
    """auto: sgd end to end, adam in a cascade: there on the rows that a step touches, with one
    second moment for a row. adamw_dense, for a cascade of few labels: AdamW on every row in every
    step, at the cost of a gradient as large as the table and of two moments of that size."""
    momentum: float = 0.9
    """Momentum of the table's SGD; 0 keeps no state at all."""
    state: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the table's optimizer state."""
    table_decay: float = 1e-4
    """Weight decay of the full table; a cascade's tables take a tenth of --encoder-decay."""
    table_epsilon: float = 1e-8
    """Epsilon of the tables' Adam, beside the corrected root: it belongs to gradients of the loss,
    in a cascade of its mean.
    """
    decoupled: bool = False
    """Weight decay shrinks the table instead of entering its gradient."""
    kahan: bool = False
    """Kahan compensation for bf16 and fp16 tables, instead of stochastic rounding."""
    skip_tiles: float = 0.0
    """Skip groups of 128 labels without positives whose weights a step would change by less than so
    many units of the table's format (its spacing at 2^-6); an approximation that saves up to half
    of the table's step. 0 is off."""

    # ---- training ----
    epochs: int = 10
    """Passes over the training documents."""
    batch: int = 32
    """Documents of a step; several processes share them. The recipe's --table-lr belongs to it,
    see there."""
    micro_batch: int = 0
    """Documents per encoder pass of a process (gradient caching); 0 passes the whole batch at once.
    Renee's `--accum A` is `--micro-batch` = batch / A: the same step within rounding. Its
    classifier micro-batches are not needed."""
    accumulate: int = 1
    """Encoder passes of `batch` documents per update: `--batch 64 --accumulate 4` is `--batch 256
    --micro-batch 64`.
    """
    encoder_lr: float = 2e-4
    """Learning rate of the encoder; of a cascade the tables' too, times --head-lr-factor."""
    table_lr: float = 0.02
    """Learning rate of the full table. It belongs to --batch, for the loss is a sum over documents:
    with SGD a batch twice as large makes a step twice as long and half as many of them, which moves
    the table as far. Where that makes the loss grow, lower it in proportion. (A rate for a mean
    loss is this times the batch.)"""
    encoder_decay: float = 0.01
    """Weight decay of the encoder."""
    encoder_epsilon: float = 0.0
    """Epsilon of the encoder's Adam, beside the corrected root; 0: 1e-6 end to end, 1e-8 in a
    cascade (its losses are means, its gradients small) and for word vectors."""
    warmup: int = 200
    """Steps of warm-up. Step t of W, from 1, has t/W of the rate; Renee's has (t - 1)/W, and its
    first moves nothing.
    """
    warmup_epochs: float = 0.0
    """The same in epochs; where it is not 0 it stands in place of `warmup`."""
    clip: float = 0.0
    """Largest norm of the encoder's gradient; 0 is off."""
    ema: float = 0.0
    """Decay of a running mean of encoder and linear layers that predictions use; 1 is their plain
    mean (SWA); 0 is off.
    """
    ema_start: float = 0.0
    """Epochs before that mean begins."""
    ema_every: int = 1
    """Updates from one value that the mean takes in to the next; --ema is its decay from one to the
    next.
    """
    ema_tables: bool = False
    """The tables have a mean, too: 4 bytes more for each of their values, 6 below fp32."""
    loss_every: int = 10
    """Compute the exact loss over all labels every so many steps; 1 always, 0 never."""
    seed: int = 0
    """Of first weights, order of documents and dropout."""

    # ---- evaluation, saving ----
    evaluate_every: int = 1
    """Epochs between looks at the validation split."""
    best_by: str = "P@1"
    """Validation metric that chooses the best checkpoint: P, nDCG, PSP, PSnDCG or R, @1 to @5; the
    first of equals is kept. Without a validation split the last step is kept."""
    top_k: int = 100
    """Labels kept per document in predictions.npz."""
    evaluate_batch: int = 256
    """Documents of a pass of evaluation."""
    save_every: int = 500
    """Steps between checkpoints; one is written after every epoch too. 0: only where validation is
    the best so far, and at the end."""
    keep: int = 1
    """Checkpoints before the last that are kept beside it and the best one: where the last turns
    out damaged, the run goes on from the one before. The disk holds so many more, and another one
    while one is written."""
    log_every: int = 50
    """Steps between lines of log.jsonl."""
    resume: bool = False
    """Go on from the last checkpoint in `output`, bit for bit (with as many processes as
    before).
    """
    overwrite: bool = False
    """Replace the run that `output` holds."""
    beyond_memory: bool = False
    """Start all the same where the planner says that the run needs more memory than there is."""
    device: str = "auto"
    """Where the model is trained: cpu, cuda, cuda:1; auto: cuda where there is one."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    timeout: float = dist.PATIENCE
    """Of several processes: seconds without a sign of life from one after which the others end and
    name it. Each gives one a second, also in long work that it does alone; only a call that keeps
    Python's lock is silent, which is why this is long."""

    def replace(self, **changes: Any) -> "Config":
        """Return a copy with other values: `config.replace(epochs=3)`.

        Raises:
            InputError: a setting that there is not.
        """
        known = [field.name for field in fields(self)]
        if wrong := [name for name in changes if name not in known]:
            near = difflib.get_close_matches(wrong[0], known, 1)
            mend = f"did you mean {near[0]}?" if near else "see the fields of xmlkernels.Config"
            raise InputError(wrong[0], "a setting of Config", "none of that name", mend)
        return replace(self, **changes)


def recorded(config: Config) -> dict[str, Any]:
    """The settings as config.json holds them."""
    return dict(json.loads(json.dumps(asdict(config))))


def began_with(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of config.json, also of a run that began before some of them existed: it had
    what is now their default.
    """
    before = recorded(Config()) | dict(settings)
    if "model" not in settings and before["table_optimizer"] == "sgd":
        before["table_optimizer"] = "auto"  # there was no auto, and sgd was the default
    return before


def layers_of(config: Config) -> tuple[tuple[int, ...], ...]:
    """`--layers` as numbers; empty where the encoder's depth decides.

    Raises:
        InputError: a word that is not one or two numbers.
    """
    out = []
    for word in config.layers:
        numbers = word.split(",")
        if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
            raise InputError(
                "--layers",
                "one or two layer numbers for each level, as 5,6 8 10 12",
                repr(word),
                "correct it",
            )
        out.append(tuple(int(number) for number in numbers))
    return tuple(out)
