"""Let an unmodified Annif from PyPI ask a served model: load-vocab, suggest and eval.

    python tests/serve/annif_check.py [--venv FOLDER] [--documents 1000]

Makes an environment for Annif where FOLDER holds none (some 500 MB), serves the bag of words of
tests/fixtures/v1, and prints how many documents `annif eval` measured per second. It ends with 1
where a suggestion or a metric is not what this package says itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "tests", Path(__file__).parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import numpy as np
from served import V1, served

import xmlkernels as xk
from xmlkernels.data.dataset import Dataset

ANNIF = "annif==1.4.3"
VENV = ROOT / ".venv" / "annif-1.4.3"
PROJECT = """[mine]
name=xmlkernels
language=en
vocab=mine
backend=http
endpoint={url}annif/suggest
limit=10
"""
TEXTS = ["w3 w4 w5", "w30 w31", "w60 w61 w0"]


def made(venv: Path) -> Path:
    """Return the command `annif` of an environment, which is made where it is missing."""
    command = venv / "bin" / "annif"
    if not command.exists():
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, timeout=300)
        install = [str(venv / "bin" / "python"), "-m", "pip", "install", "-q", ANNIF]
        subprocess.run(install, check=True, timeout=1800)
        print(f"installed {ANNIF} in {time.monotonic() - started:.0f} s", flush=True)
    return command


def annif(command: Path, at: Path, *words: str, given: str = "") -> str:
    """Run a command of Annif in a folder, and return what it prints."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(command), *words],
        cwd=at, input=given, capture_output=True, text=True, timeout=900, env=clean,
    )  # fmt: skip
    assert done.returncode == 0, f"annif {words}: {done.stdout[-500:]}{done.stderr[-2000:]}"
    assert "failed" not in done.stderr, done.stderr[-2000:]
    return done.stdout


def corpus(path: Path, texts: list[str], labels: list[list[int]], uris: list[str]) -> None:
    """Write documents as Annif reads them: text, a tab, URIs."""
    lines = [
        f"{text}\t{' '.join(f'<{uris[label]}>' for label in own)}\n"
        for text, own in zip(texts, labels, strict=True)
    ]
    path.write_text("".join(lines), "utf-8")


def checked(command: Path, at: Path, documents: int) -> float:
    """Compare suggestions and metrics; return the documents per second of `annif eval`."""
    model = xk.load(V1 / "bow")
    split = Dataset.open(V1 / "dataset").splits["train"]
    texts = [text for text in split.texts if text.strip()]
    rows = [n for n, text in enumerate(split.texts) if text.strip()]
    true = [split.labels.indices[split.labels.indptr[n] : split.labels.indptr[n + 1]].tolist()
            for n in rows]  # fmt: skip
    with served(at, V1 / "bow", "--neighbours", 0) as server:
        (at / "projects.cfg").write_text(PROJECT.format(url=server.url))
        with urllib.request.urlopen(f"{server.url}annif/vocabulary.tsv", timeout=60) as words:
            (at / "mine.tsv").write_bytes(words.read())
        uris = [line.split("\t")[0].strip("<>") for line in (at / "mine.tsv").open()]
        annif(command, at, "load-vocab", "mine", "mine.tsv", "--language", "en")
        assert "True" in annif(command, at, "list-projects")
        for text, labels in zip(TEXTS, model.predict(TEXTS, 10), strict=True):
            lines = annif(command, at, "suggest", "mine", given=text).splitlines()
            found = [line.split("\t") for line in lines if line.startswith("<")]
            assert [row[0].strip("<>") for row in found] == [uris[x.id] for x in labels], found
            scores = [float(row[-1]) for row in found]
            assert np.allclose(scores, [x.probability for x in labels], atol=1e-3), found
        corpus(at / "corpus.tsv", texts, true, uris)
        annif(command, at, "eval", "mine", "corpus.tsv", "--limit", "10", "--metrics-file", "m")
        told = json.loads((at / "m").read_text())
        _, best = model.predict_arrays(texts, 5)
        right = [len({*ours.tolist()} & {*own}) for ours, own in zip(best, true, strict=True)]
        expected = sum(right) / (5 * len(right))
        assert abs(told["Precision@5"] - expected) < 1e-6, (told, expected)
        print(f"Precision@5 of {len(texts)} documents: {expected:.6f} there and here", flush=True)
        seconds = []
        many = [texts[n % len(texts)] for n in range(documents)]
        for count in (1, documents):
            corpus(at / "many.tsv", many[:count], [true[n % len(true)] for n in range(count)], uris)
            started = time.monotonic()
            annif(command, at, "eval", "mine", "many.tsv", "--limit", "10")
            seconds.append(time.monotonic() - started)
        assert server.stop() == 0
    return (documents - 1) / max(1e-9, seconds[1] - seconds[0])


def main() -> None:
    """Check, and print the rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=VENV)
    parser.add_argument("--documents", type=int, default=1000)
    options = parser.parse_args()
    command = made(options.venv)
    with tempfile.TemporaryDirectory() as folder:
        rate = checked(command, Path(folder), options.documents)
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"annif eval: {rate:.0f} documents/s beyond its start; load average {load}")


if __name__ == "__main__":
    main()
