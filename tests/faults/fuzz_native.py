"""Give the native parser of sparse text random input, under ASan and UBSan.

    python tests/faults/fuzz_native.py --seconds 600 [--seed 0] [--folder FOLDER] [--engine driver]

By libFuzzer where a clang++ has it, otherwise by a small driver of this project that g++ builds,
which follows coverage too. Both call the same `LLVMFuzzerTestOneInput`. Prints a line of JSON;
exits with 1 where the parser failed, and names the input, which stays in the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent / "native"
HOST = Path(__file__).resolve().parents[2] / "csrc" / "host"
FLAGS = ("-std=c++20", "-g", "-O1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
SANITIZERS = "address,undefined"
ENGINES = ("libfuzzer", "driver")
SLACK = 300  # seconds for a build, or for the end of a run, on a busy machine
# Rows of every kind, behind four bytes of options.
ROWS = (
    b"1:1 2:0.5\n3:-1e-3\n\n",
    b"0,2 1:1 5:2 # a comment\n1 3:1\n",
    b"1 2 3\n4\n\n\n",
    b"1,2,3\n0\n",
    b"qid:7 1:1 1:2\n5:1e39 2:nan\n",
    b"8:1 0:1 3:0\n-1:1\n99999999999999999999:1\n",
    b"7:0.12345678901234567 6:+1 5:1e-400",
)
HEADS = tuple(
    bytes((first, 4, 2, last)) for first, last in ((0, 0), (1, 0), (2, 0), (6, 0), (72, 0), (1, 7))
)


@dataclass(frozen=True)
class End:
    """How a run ended: `engine`, exit `status`, its last words, and the `input` that ended it."""

    engine: str
    status: int
    told: str
    input: Path | None


def compilers(engine: str) -> list[str]:
    """Return the commands that may build for an engine, the best first."""
    clang = ("clang++", *(f"clang++-{version}" for version in range(22, 13, -1)))  # Debian's names
    names = [os.environ.get("CXX", ""), *(clang if engine == "libfuzzer" else ("g++",))]
    return [found for name in names if name and (found := shutil.which(name))]


def build(engine: str, output: Path, host: Path = HOST) -> bool:
    """Build the parser of `host` for an engine; return whether a compiler here could."""
    target = [HERE / "sparse_text.cpp", host / "sparse_text.cpp"]
    for compiler in compilers(engine):
        common = [compiler, *FLAGS, "-D_GLIBCXX_ASSERTIONS", f"-I{host}", "-pthread"]
        if engine == "libfuzzer":
            steps = [[*common, f"-fsanitize=fuzzer,{SANITIZERS}", *target, "-o", output]]
        else:
            sanitized = [*common, f"-fsanitize={SANITIZERS}"]
            objects = [output.with_name(f"{output.name}-{i}.o") for i in range(2)]
            traced = "-fsanitize-coverage=trace-pc"
            steps = [
                [*sanitized, traced, "-c", source, "-o", made]
                for source, made in zip(target, objects, strict=True)
            ]
            steps.append([*sanitized, HERE / "driver.cpp", *objects, "-o", output])
        if all(_succeeds(step) for step in steps):
            return True
    return False


def _succeeds(step: Sequence[str | Path]) -> bool:
    done = subprocess.run(list(map(str, step)), capture_output=True, text=True, timeout=SLACK)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
    return done.returncode == 0


def fuzz(engine: str, program: Path, folder: Path, seconds: float, seed: int) -> End:
    """Run a program for so many seconds, on a corpus in `folder`."""
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, (head, rows) in enumerate((head, rows) for head in HEADS for rows in ROWS):
        (corpus / f"{number:03}").write_bytes(head + rows)
    prefix = folder / "failed-"
    words = [f"-max_total_time={seconds:g}", f"-seed={seed + 1}", f"-artifact_prefix={prefix}"]
    if engine == "libfuzzer":
        words = [words[0].replace(f"{seconds:g}", f"{max(1, round(seconds))}"), *words[1:]]
        words += ["-timeout=20", "-rss_limit_mb=2048", "-max_len=4096"]
    done = subprocess.run(
        [str(program), *words, str(corpus)],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds + SLACK,
    )
    failed = sorted(folder.glob("failed-*"))
    told = (done.stdout + done.stderr).strip()[-3000:]
    return End(engine, done.returncode, told, failed[0] if failed else None)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="a new one, which is kept")
    parser.add_argument("--engine", choices=ENGINES, help="by default the first that is here")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="fuzz-native-"))
    folder.mkdir(parents=True, exist_ok=True)
    for engine in [options.engine] if options.engine else ENGINES:
        if not build(engine, folder / engine):
            continue
        end = fuzz(engine, folder / engine, folder, options.seconds, options.seed)
        runs = re.findall(r"Done (\d+) runs", end.told)
        line = {"engine": engine, "runs": int(runs[-1]) if runs else 0, "status": end.status}
        print(json.dumps(line | {"input": str(end.input or "")}))
        if end.status:
            print(end.told, file=sys.stderr)
        elif not options.folder:
            shutil.rmtree(folder)
        return int(end.status != 0)
    print("error: no compiler here builds it: install clang++ or g++", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
