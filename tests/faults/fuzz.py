"""Damage files of every kind and report how their readers end.

    python tests/faults/fuzz.py --files 20000 [--kind "label tree"] [--seed 0]

A reader may refuse a file in one sentence, or take it and return what is consistent. Anything else
is bad: another exception, a signal, more than 20 seconds of processor time, more than 768 MB beyond
what the process had before. Prints counts by kind and end, and a line per bad end; exits with 1
where there is one.

With --case it runs one case of a report in this process, with its traceback, and keeps the damaged
folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # threads do not survive a fork
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from harness import damage, make_good, run
from kinds import all_kinds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=20_000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", help="only these kinds")
    parser.add_argument("--case", type=int, help="only this case of the one --kind")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = [kind for kind in all_kinds() if not options.kind or kind.name in options.kind]
    if options.case is not None:
        work, (kind,) = Path(tempfile.mkdtemp()), kinds
        make_good(kind, work)
        folder, done = damage(kind, options.case, options.seed, work)
        print(folder, done)
        kind.consume(folder)
        return 0
    with tempfile.TemporaryDirectory() as work:
        report = run(kinds, options.files, options.seed, Path(work))
    print(report)
    return bool(report.bad)


if __name__ == "__main__":
    sys.exit(main())
