"""Raw files → a dataset folder: `python train/prepare.py --help`."""

from __future__ import annotations

import sys
import warnings

import tyro

from xmlkernels.data.formats import DataWarning
from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.errors import InputError


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def tell_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: object = None, line: str | None = None
) -> None:
    """A data file's warning is for its owner: it needs no line of our source."""
    plain = issubclass(category, DataWarning)
    tell(f"note: {message}" if plain else warnings.formatwarning(message, category, filename, lineno, line).rstrip())


def main() -> int:
    """Exit code 0, or 2 after one sentence about what the user can mend."""
    config = tyro.cli(PrepareConfig)
    with warnings.catch_warnings():
        warnings.simplefilter("always", DataWarning)
        warnings.showwarning = tell_warning
        try:
            dataset = prepare(config, tell)
        except InputError as error:
            tell(str(error))
            return 2
    print(f"{config.output}: {dataset.num_labels:,} labels, content {dataset.content_hash[:16]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
