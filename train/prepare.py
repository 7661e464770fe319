"""Raw files → a dataset folder: `python train/prepare.py --help`.

--tokenizer takes a Hugging Face name, a local folder, or "minilm": the installed all-MiniLM-L6-v2, as train/run.py's
--encoder does. The tokenizer must be the one of the encoder that will be trained. --source bow needs none.
"""

if __name__ == "__main__":  # before torch is loaded
    import waiting

    waiting.choose()

import sys
from dataclasses import replace

from arguments import parse
from encoders import source_of
from report import command
from xmlkernels.data.prepare import PrepareConfig, prepare


def tell(line: str) -> None:
    """Progress goes to standard error; standard output gets the one line of the result."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    config = parse(PrepareConfig, "train/prepare.py", __doc__ or "")
    tokenizer = None if config.tokenizer is None else source_of(config.tokenizer, "--tokenizer")
    dataset = prepare(replace(config, tokenizer=tokenizer), tell)
    print(f"{config.output}: {dataset.num_labels:,} labels, content {dataset.content_hash[:16]}")


if __name__ == "__main__":
    command(main)
