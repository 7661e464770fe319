"""Damage files and report how their readers end.

    python tests/faults/count_faults.py --count 7500 [--kind "label tree"] [--seed 0]

With --case it runs one case of a report in this process, with its traceback, and keeps the damaged
folder.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from harness import damage, make_good, run
from kinds import all_kinds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
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
        report = run(kinds, options.count, options.seed, Path(work))
    print(report)
    return bool(report.bad)


if __name__ == "__main__":
    sys.exit(main())
