"""Public data sets that have recipes: where they come from, and the command that prepares each."""

from typing import NamedTuple

REPOSITORY = "The Extreme Classification Repository"
_ATTENTION_XML = "the raw texts of AttentionXML's authors"
_LEVER = "the data of LEVER's authors"
# What each kind of raw files gives to xmlkernels prepare; the names are those of the downloads.
_LF = (
    "--source lf --train-text trn.json.gz --test-text tst.json.gz --label-text lbl.json.gz "
    "--train-filter filter_labels_train.txt --test-filter filter_labels_test.txt"
)
_JSON = "--source lf --train-text trn.json.gz --test-text tst.json.gz"
_RAW = (
    "--source attentionxml --train-text train_raw_texts.txt --train-labels train_labels.txt "
    "--test-text test_raw_texts.txt --test-labels test_labels.txt"
)


class DataSet(NamedTuple):
    """One data set.

    Attributes:
        title: its name as papers write it.
        labels: their number; train and test: documents.
        source: who gives it away.
        files: flags of xmlkernels prepare for its raw files.
        propensity: which constants PSP is computed with.
        only: flag of the part of a text that is used; "" for all.
    """

    title: str
    labels: int
    train: int
    test: int
    source: str
    files: str
    propensity: str
    only: str = ""

    @property
    def told(self) -> str:
        """Sizes and source, in a sentence."""
        sizes = (
            f"{self.train:,} / {self.test:,} documents, {self.labels:,} labels"
            if self.labels
            else "sizes as in LEVER"
        )
        return f"{self.title} ({sizes}), {self.source}."

    def prepare(self, tokenizer: str, tokens: int, folder: str) -> str:
        """Return the command that prepares it.

        Args:
            tokenizer: Hugging Face name of the encoder.
            tokens: kept per document.
            folder: the dataset folder to make.
        """
        flags = [
            self.files,
            self.only,
            f"--propensity {self.propensity}",
            f"--tokenizer {tokenizer} --max-length {tokens} --output {folder}",
        ]
        return " ".join(["xmlkernels prepare", *filter(None, flags)])


_TITLE = "--fields title"
DATA_SETS: dict[str, DataSet] = {
    "wiki10-31k": DataSet("Wiki10-31K", 30_938, 14_146, 6_616, _ATTENTION_XML, _RAW, "default"),
    "amazoncat-13k": DataSet(
        "AmazonCat-13K", 13_330, 1_186_239, 306_782, _ATTENTION_XML, _RAW, "default"
    ),
    "amazontitles-670k": DataSet(
        "AmazonTitles-670K", 670_091, 485_176, 150_875, REPOSITORY, _JSON, "amazon", _TITLE
    ),
    "amazon-670k": DataSet(
        "Amazon-670K", 670_091, 490_449, 153_025, _ATTENTION_XML, _RAW, "amazon"
    ),
    "amazontitles-3m": DataSet(
        "AmazonTitles-3M", 2_812_281, 1_712_536, 739_665, REPOSITORY, _JSON, "amazon", _TITLE
    ),
    "amazon-3m": DataSet(
        "Amazon-3M", 2_812_281, 1_717_899, 742_507, _ATTENTION_XML, _RAW, "amazon"
    ),
    "wiki-500k": DataSet(
        "Wiki-500K", 501_070, 1_779_881, 769_421, _ATTENTION_XML, _RAW, "wikipedia"
    ),
    "lf-amazontitles-131k": DataSet(
        "LF-AmazonTitles-131K", 131_073, 294_805, 134_835, REPOSITORY, _LF, "amazon", _TITLE
    ),
    "lf-amazon-131k": DataSet(
        "LF-Amazon-131K", 131_073, 294_805, 134_835, REPOSITORY, _LF, "amazon"
    ),
    "lf-wikiseealso-320k": DataSet(
        "LF-WikiSeeAlso-320K", 312_330, 693_082, 177_515, REPOSITORY, _LF, "wikipedia"
    ),
    "lf-wikipedia-500k": DataSet(
        "LF-Wikipedia-500K", 501_070, 1_813_391, 783_743, REPOSITORY, _LF, "wikipedia"
    ),
    "lf-amazontitles-1.3m": DataSet(
        "LF-AmazonTitles-1.3M", 1_305_265, 2_248_619, 970_237, REPOSITORY, _LF, "amazon", _TITLE
    ),
    "lf-aol-270k": DataSet("LF-AOL-270K", 0, 0, 0, _LEVER, _LF, "default"),
    "lf-wikihierarchy-1m": DataSet("LF-WikiHierarchy-1M", 0, 0, 0, _LEVER, _LF, "wikipedia"),
}
