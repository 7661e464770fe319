"""Make a dataset folder from a table or from raw files: `xmlkernels prepare --output DIR …`.

`--data my.csv` reads a table of texts and labels (CSV, TSV, JSON lines, Parquet, fastText, Annif;
docs/guide/own-data.md has all): columns are found by their names, --text and --labels name others.
`xmlkernels train auto --data my.csv` prepares and trains at once.

--tokenizer takes a Hugging Face name, a local folder, or "minilm", the installed all-MiniLM-L6-v2,
as --encoder of `xmlkernels train` does. It must be the tokenizer of the encoder to be trained.
Without it the folder holds the texts alone, which is all that a bag of words and the ranker read.

Raw files: a text file has one document per line. Its label file has one row per document: label
ids, divided by spaces or commas, that count from 0 (line 1 of the label names is label 0); a blank
line has no label. Or it has a header, the numbers of documents and labels, and `id:1` per label.
Three documents with the labels 0 and 4, 3, 1 and 2:

    0 4         3 6
    3      or   0:1 4:1
    1 2         3:1
                1:1 2:1

Names in place of ids ("State aid, EU law") are read with --source attentionxml.
"""

from collections.abc import Sequence
from dataclasses import replace

from xmlkernels.cli.arguments import parse
from xmlkernels.cli.console import telling_apart
from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.installed import source_of
from xmlkernels.training.stops import done


def main(words: Sequence[str]) -> None:
    """Make the dataset folder that the arguments describe."""
    config = parse(PrepareConfig, "xmlkernels prepare", __doc__ or "", words=words)
    tokenizer = None if config.tokenizer is None else source_of(config.tokenizer, "--tokenizer")
    with telling_apart() as tell:
        dataset = prepare(replace(config, tokenizer=tokenizer), tell)
    done()
    print(f"{config.output}: {dataset.num_labels:,} labels, content {dataset.content_hash[:16]}")
