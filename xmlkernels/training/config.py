"""The settings of one training run: one flat dataclass, saved with the run.

The metadata of a field hold its group, what its value must be and what it has an effect with;
checks.py refuses what cannot be used.
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from xmlkernels import InputError, dist
from xmlkernels.metrics.ranking import NAMES as EVALUATED
from xmlkernels.options import COUNT, NAME, OFF_AT_0, POSITIVE, SHARE, Rule, of, replaced

OVER_LABELS = ("macroP", "macroR", "macroF1", "coverage")
BEST_BY = tuple(f"{kind}@{k}" for kind in (*EVALUATED, *OVER_LABELS) for k in range(1, 6))


DATA, ENCODER, TABLE, TRAINING = "data", "encoder", "label table", "training"
BOW, CASCADE = "bag of words (--encoder bow)", "cascade (--model cascade)"
SAVING = "evaluation, saving"


def _depths(value: tuple[int, ...]) -> bool:
    ascending = all(a < b for a, b in itertools.pairwise(value))
    return 1 <= len(value) <= 4 and ascending and value[0] >= 0 and value[-1] <= 30


_SECONDS = Rule("1 or more seconds", "choose a longer one", lambda value: value >= 1)
_SEED = Rule("an integer from 0 to 2**63 - 1", "choose another", lambda value: 0 <= value < 2**63)
_UP_TO_1 = Rule("from 0 to 1", "correct it", lambda value: 0 <= value <= 1)
_DEPTHS = Rule(
    "one to four ascending exponents from 0 to 30",
    "name them coarse to fine, as 10 13 16",
    _depths,
)
_KEPT = Rule(
    "numbers of 1 or more",
    "keep at least one cluster",
    lambda value: all(k >= 1 for k in value),
)
_SHARES = Rule(
    "numbers from 0 to below 1",
    "correct them",
    lambda value: all(0 <= p < 1 for p in value),
)
_WEIGHTS = Rule(
    "weights of 0 or more",
    "correct them",
    lambda value: all(w >= 0 for w in value),
)


@dataclass(frozen=True)
class Config:
    """One run.

    Every field is a flag: `xmlkernels train RECIPE --epochs 3`. Lists are words: `--topk 64 128`.
    """

    model: Literal["end_to_end", "cascade"] = "end_to_end"
    """end_to_end scores every label in every step (Renee); cascade goes down a label tree to a
    shortlist (CascadeXML).
    """

    dataset: str = of(DATA, "docstrings", NAME)
    """A folder made by xmlkernels prepare, or "docstrings": the built-in corpus, made on first
    use.
    """
    documents: int = of(DATA, 0, OFF_AT_0)
    """Built-in corpus only: take a deterministic part of about this many documents; 0 takes all."""
    cache: str = of(DATA, "cache", NAME)
    """Where the built-in corpus is kept, by content: it is rebuilt when code, tokenizer or packages
    change.
    """
    output: str = of(DATA, "runs/run", NAME)
    """Folder for config.json, log.jsonl, metrics.json, predictions.npz and checkpoint/."""
    label_text: bool = of(DATA, False)
    """Add each label's text as a document whose only target is itself (Renee's augmentation)."""
    max_length: int = of(DATA, 64, COUNT)
    """Built-in corpus only: tokens per document; a dataset folder fixes its own."""

    encoder: str = of(ENCODER, "minilm", NAME)
    """Hub name or local folder of any Hugging Face encoder; "minilm" is the installed
    all-MiniLM-L6-v2; "tiny" is a small random one; "bow" is a bag of words, fast on a CPU and good
    for short texts."""
    pooling: Literal["mean", "cls"] = of(ENCODER, "mean", only="transformer")
    """Over the encoder's last layer: the mean of the tokens, or the class token, wherever the
    tokenizer sets it.
    """
    bottleneck: int = of(ENCODER, 0, OFF_AT_0, only="end_to_end transformer")
    """Width of a bias-free linear layer after pooling; 0 is none."""
    dropout: float = of(ENCODER, 0.2, SHARE)
    """Dropout on the embedding (end to end, and the bag of words of either model; a cascade's
    levels have --embed-drops).
    """
    freeze: int = of(ENCODER, 0, OFF_AT_0, only="transformer")
    """Layers of the encoder that stay as they are, from the first on, with the embeddings below
    them.
    """
    precision: Literal["auto", "fp32", "bf16", "fp16"] = of(ENCODER, "auto", only="transformer")
    """Number format of the encoder's autocast; auto: bf16 where the device multiplies it
    natively.
    """
    compile: bool = of(ENCODER, False, only="transformer")
    """Run the encoder through torch.compile."""
    shard_encoder: Literal["off", "on"] = of(ENCODER, "off", only="transformer")
    """Of several processes each holds a part of the encoder's weights, gradients and optimizer
    state, and gathers a layer where it is passed (torch's FSDP2): for encoders that no device has
    room for. off: each holds the whole encoder. on is refused where there is one process."""
    init_state: str = of(ENCODER, "", only="transformer")
    """A state dict to start the encoder from (NGAME's first module, say); keys lose `init_prefix`,
    all must fit.
    """
    init_prefix: str = of(
        ENCODER, "embedding_labels.encoder.transformer.0.auto_model.", only="transformer"
    )
    """What the keys of `init_state` begin with before the encoder's own names; other keys are left
    alone.
    """

    bow_width: int = of(BOW, 512, COUNT, only="bow")
    """Width of the embedding."""
    ngrams: int = of(BOW, 2, COUNT, only="bow")
    """Words in a row that make a term, at most: 1 takes single words alone."""
    min_df: int = of(BOW, 2, COUNT, only="bow")
    """Training documents that a term must be in."""
    max_features: int = of(BOW, 0, OFF_AT_0, only="bow")
    """Terms kept, the most frequent ones; 0 keeps all."""
    bow_activation: Literal["relu", "none"] = of(BOW, "relu", only="bow")
    """After the sum of word vectors; none is a linear model of low rank."""
    word_dropout: float = of(BOW, 0.0, SHARE, only="bow")
    """Share of a text's terms left out in each step."""
    word_std: float = of(BOW, 1.0, POSITIVE, only="bow")
    """Standard deviation of the first word vectors. Their table is trained by Adam with
    --encoder-lr and --encoder-decay.
    """

    tree: str = of(CASCADE, "", only="cascade")
    """A label tree of xmlkernels tree; by default one is built on first use, from --tree-depths,
    and kept in --cache.
    """
    tree_depths: tuple[int, ...] = of(CASCADE, (10, 13, 16), _DEPTHS, only="cascade")
    """The tree built on first use has 2**d clusters for each d: `10 13 16`."""
    topk: tuple[int, ...] = of(CASCADE, (), _KEPT, only="cascade")
    """Clusters kept after each level of clusters, coarse to fine; by default 128, 256, 512, …"""
    layers: tuple[str, ...] = of(CASCADE, (), only="cascade transformer")
    """Encoder layers that each level reads, coarse to fine, labels last: `5,6 8 10 12`; by default
    those of CascadeXML, scaled to the depth of the encoder."""
    embed_drops: tuple[float, ...] = of(CASCADE, (), _SHARES, only="cascade")
    """Dropout of each level, coarse to fine, labels last; by default `.2 .25 .4 .5` for four
    levels, `.3 .3 .4` for three.
    """
    rw_loss: tuple[float, ...] = of(CASCADE, (), _WEIGHTS, only="cascade")
    """Weight of each level's loss; by default 1 each. A loss is a mean over the level's candidates,
    so a level with many counts for little beside one with few: weights in proportion to the
    candidates (`1 6 25` for 64, 384 and 1,600) make them equal. With --table-optimizer sgd the
    tables move in proportion to it, too."""
    scheme: Literal["auto", "level", "weighted", "path"] = of(CASCADE, "auto", only="cascade")
    """Score of a label: its own probability, times its cluster's, or the product from the coarsest
    cluster on. auto: the one that is best on the validation split, chosen anew in each validation
    (weighted without one)."""
    positives_bound: int = of(CASCADE, 32, OFF_AT_0, only="cascade")
    """Clusters beyond --topk that a training document with many true ones may keep; those beyond
    are lost, and counted.
    """
    reference_loss: bool = of(CASCADE, False, only="cascade")
    """Count pads in the mean of the loss as CascadeXML's code does; for comparisons."""
    head_lr_factor: float = of(CASCADE, 10.0, POSITIVE, only="cascade")
    """Learning rate of the tables and of the linear layer before the coarsest one, in units of
    --encoder-lr.
    """
    schedule: Literal["three_phase", "warmup_cosine"] = of(CASCADE, "three_phase", only="cascade")
    """Warm-up, plateau and cool-down with Adam's beta1 moving against them; or warm-up and cosine
    to 0.
    """
    cooldown_epochs: float = of(CASCADE, 3.0, OFF_AT_0, only="cascade")
    """Length of the last of the three phases."""
    label_device: str = of(CASCADE, "auto", only="cascade")
    """Where the label table and its optimizer's state stand, and are trained: cpu, cuda:1, …; auto:
    with the model. For tables that its card has no room for."""

    table: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = of(TABLE, "auto")
    """Number format of the label table; auto: bf16 where the device multiplies it natively, else
    fp32, as with adamw_dense. fp8 is e4m3 with a power-of-two scale per row."""
    bias: bool = of(TABLE, False, only="end_to_end")
    """One fp32 bias per label; off in Renee. A table with one cannot serve a maximum-inner-product
    index.
    """
    frequency_bias: bool = of(TABLE, False, only="end_to_end")
    """Start each bias at its label's frequency; with Adam the first steps are else spent on
    learning that labels are rare.
    """
    centroid_norm: float = of(TABLE, 0.0, OFF_AT_0, only="end_to_end")
    """Start each row as a vector of this length from the mean of all documents to that of its
    label's; 0 draws it. It helps labels of few documents, and needs an encoder whose first vectors
    say something: a bag of words, or a trained one."""
    table_optimizer: Literal["auto", "sgd", "adam", "adamw_dense"] = of(TABLE, "auto")
    """auto: sgd end to end, adam in a cascade: there on the rows that a step touches, with one
    second moment for a row. adamw_dense, for a cascade of few labels: AdamW on every row in every
    step, at the cost of a gradient as large as the table and of two moments of that size."""
    momentum: float = of(TABLE, 0.9, SHARE)
    """Momentum of the table's SGD; 0 keeps no state at all."""
    state: Literal["fp32", "bf16", "fp16"] = of(TABLE, "fp32")
    """Number format of the table's optimizer state."""
    table_decay: float = of(TABLE, 1e-4, OFF_AT_0, only="end_to_end")
    """Weight decay of the full table; a cascade's tables take a tenth of --encoder-decay."""
    table_epsilon: float = of(TABLE, 1e-8, POSITIVE)
    """Epsilon of the tables' Adam, beside the corrected root: it belongs to gradients of the loss,
    in a cascade of its mean.
    """
    decoupled: bool = of(TABLE, False, only="end_to_end")
    """Weight decay shrinks the table instead of entering its gradient."""
    kahan: bool = of(TABLE, False, only="end_to_end")
    """Kahan compensation for bf16 and fp16 tables, instead of stochastic rounding."""
    table_compute: Literal["auto", "fp16", "bf16"] = of(TABLE, "auto")
    """Number format of the products in the tables' steps: mixed precision with fp32 master weights,
    as Renee's --fp16xfc. The table is fp32 (as --table auto is then); rows are rounded to nearest,
    gradients and updates are fp32. auto: the table's own."""
    impl: Literal["fused", "reference"] = of(TABLE, "fused")
    """How the tables are trained: fused, by this package's own kernels; reference, in plain PyTorch
    with dense targets and autograd, to verify that and to compare speed with. The numbers are the
    same within rounding; reference takes fp32 tables alone (auto is then fp32), and the memory of
    the logits and of the table's gradient."""
    shard_labels: Literal["auto", "on", "off"] = of(TABLE, "auto")
    """Of several processes each holds some rows of the label table, and of a cascade's levels of
    clusters, trains them and scores by them; auto: with several processes. off: each holds a copy
    of the whole. on is refused where there is one process."""
    skip_tiles: float = of(TABLE, 0.0, OFF_AT_0, only="end_to_end")
    """Skip groups of 128 labels without positives whose weights a step would change by less than so
    many units of the table's format (its spacing at 2^-6); an approximation that saves up to half
    of the table's step. 0 is off."""

    table_store: str = of(TABLE, "ram", NAME)
    """Where the label table stands with its optimizer's state: ram, the memory of its device; host,
    the host's memory beside a card; file:FOLDER, files in a folder of a local disk, for tables
    larger than memory. The last two are streamed to the device by tiles, in every step and for
    every batch of an evaluation; of a cascade, the rows of the clusters that the batch shortlists.
    The weights are the same bit for bit; sums over labels are, within rounding."""

    epochs: int = of(TRAINING, 10, COUNT)
    """Passes over the training documents."""
    batch: int = of(TRAINING, 32, COUNT)
    """Documents of a step; several processes share them. The recipe's --table-lr belongs to it,
    see there."""
    micro_batch: int = of(TRAINING, 0, OFF_AT_0, only="transformer")
    """Documents per encoder pass of a process (gradient caching); 0 passes the whole batch at once.
    Renee's `--accum A` is `--micro-batch` = batch / A: the same step within rounding. Its
    classifier micro-batches are not needed."""
    accumulate: int = of(TRAINING, 1, COUNT, only="transformer")
    """Encoder passes of `batch` documents per update: `--batch 64 --accumulate 4` is `--batch 256
    --micro-batch 64`.
    """
    encoder_lr: float = of(TRAINING, 2e-4, OFF_AT_0)
    """Learning rate of the encoder; of a cascade the tables' too, times --head-lr-factor."""
    table_lr: float = of(TRAINING, 0.02, OFF_AT_0, only="end_to_end")
    """Learning rate of the full table. It belongs to --batch, for the loss is a sum over documents:
    with SGD a batch twice as large makes a step twice as long and half as many of them, which moves
    the table as far. Where that makes the loss grow, lower it in proportion. (A rate for a mean
    loss is this times the batch.)"""
    encoder_decay: float = of(TRAINING, 0.01, OFF_AT_0)
    """Weight decay of the encoder."""
    encoder_epsilon: float = of(TRAINING, 0.0, OFF_AT_0)
    """Epsilon of the encoder's Adam, beside the corrected root; 0: 1e-6 end to end, 1e-8 in a
    cascade (its losses are means, its gradients small) and for word vectors."""
    warmup: int = of(TRAINING, 200, OFF_AT_0)
    """Steps of warm-up. Step t of W, from 1, has t/W of the rate; Renee's has (t - 1)/W, and its
    first moves nothing.
    """
    warmup_epochs: float = of(TRAINING, 0.0, OFF_AT_0)
    """The same in epochs; where it is not 0 it stands in place of `warmup`."""
    clip: float = of(TRAINING, 0.0, OFF_AT_0, only="transformer")
    """Largest norm of the encoder's gradient; 0 is off."""
    ema: float = of(TRAINING, 0.0, _UP_TO_1, only="transformer")
    """Decay of a running mean of encoder and linear layers that predictions use; 1 is their plain
    mean (SWA); 0 is off.
    """
    ema_start: float = of(TRAINING, 0.0, OFF_AT_0, only="transformer")
    """Epochs before that mean begins."""
    ema_every: int = of(TRAINING, 1, COUNT, only="transformer")
    """Updates from one value that the mean takes in to the next; --ema is its decay from one to the
    next.
    """
    ema_tables: bool = of(TRAINING, False, only="transformer")
    """The tables have a mean, too: 4 bytes more for each of their values, 6 below fp32."""
    loss_every: int = of(TRAINING, 10, OFF_AT_0)
    """Compute the exact loss over all labels every so many steps; 1 always, 0 never."""
    seed: int = of(TRAINING, 0, _SEED)
    """Of first weights, order of documents and dropout."""

    evaluate_every: int = of(SAVING, 1, COUNT)
    """Epochs between looks at the validation split."""
    best_by: str = of(SAVING, "P@1")
    """Validation metric that chooses the best checkpoint: P, nDCG, PSP, PSnDCG, R, RP, sampleF1,
    microF1, macroP, macroR, macroF1 or coverage, @1 to @5; the first of equals is kept. Without a
    validation split the last step is kept."""
    top_k: int = of(SAVING, 100, COUNT)
    """Labels kept per document in predictions.npz."""
    report: bool = of(SAVING, True)
    """Write report.html at the end: metrics with intervals, curves, rare labels, calibration,
    documents that went best and worst. `xmlkernels report RUN` writes it later, too."""
    show: Literal["short", "all"] = of(SAVING, "short")
    """Metrics printed at the end: short: in tables; all: every one with a sentence that says what
    it is, those of `annif eval` among them. metrics.json has all."""
    evaluate_batch: int = of(SAVING, 256, COUNT)
    """Documents of a pass of evaluation."""
    save_every: int = of(SAVING, 500, OFF_AT_0)
    """Steps between checkpoints; one is written after every epoch too. 0: only where validation is
    the best so far, and at the end."""
    keep: int = of(SAVING, 1, OFF_AT_0)
    """Checkpoints before the last that are kept beside it and the best one: where the last turns
    out damaged, the run goes on from the one before. The disk holds so many more, and another one
    while one is written."""
    background_save: Literal["auto", "on", "off"] = of(SAVING, "auto")
    """Write checkpoints while training goes on, from a copy in memory as large as the checkpoint;
    auto: where at most half of the free memory goes to it. off: training waits for the disk."""
    save_failure: Literal["end", "continue"] = of(SAVING, "end")
    """Where the disk refuses a checkpoint (full, broken): end the run, which --resume takes up from
    the one before; or continue it without, and try again when the next one is due."""
    log_every: int = of(SAVING, 50, COUNT)
    """Steps between lines of log.jsonl."""
    tensorboard: bool = of(SAVING, False)
    """Write the lines of log.jsonl as event files, too: `tensorboard --logdir OUTPUT` shows
    them. Needs `pip install "xmlkernels[tensorboard]"`."""
    resume: bool = of(SAVING, False)
    """Go on from the last checkpoint in `output`, bit for bit (with as many processes as
    before).
    """
    overwrite: bool = of(SAVING, False)
    """Replace the run that `output` holds."""
    beyond_memory: bool = of(SAVING, False)
    """Start all the same where the planner says that the run needs more memory than there is."""
    device: str = of(SAVING, "auto")
    """Where the model is trained: cpu, cuda, cuda:1; auto: cuda where there is one."""
    cuda_graph: Literal["auto", "on", "off"] = of(SAVING, "auto")
    """Launch the passes of a step (encoder, tables, the way back) as one CUDA graph for each shape,
    with documents padded to multiples of 32 tokens. auto: on a card, where shapes repeat: not for
    bags of words, --micro-batch, --compile, --impl reference, --table-compute, a --label-device of
    its own, or several processes; on is refused there."""
    threads: int = of(SAVING, 0, OFF_AT_0)
    """CPU threads; 0 leaves torch's choice."""
    timeout: float = of(SAVING, dist.PATIENCE, _SECONDS)
    """Of several processes: seconds without a sign of life from one after which the others end and
    name it. Each gives one a second, also in long work that it does alone. So they do where one
    lives, but does nothing for as long in a step or an evaluation while the others wait for it."""

    def replace(self, **changes: Any) -> "Config":
        """Return a copy with other values: `config.replace(epochs=3)`.

        Raises:
            InputError: a setting that there is not.
        """
        return replaced(self, changes)


def recorded(config: Config) -> dict[str, Any]:
    """Return the settings as config.json holds them."""
    return dict(json.loads(json.dumps(asdict(config))))


def began_with(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the settings of config.json.

    A run that began before a setting existed had what is now its default.
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
