"""Ask a trained model for labels: `python train/predict.py --checkpoint DIR (--text "…" | --input FILE) [--output FILE]`."""

import io
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch

from report import command
from xmlkernels import InputError
from xmlkernels.data.files import replacing
from xmlkernels.data.formats import iter_lines, write_npz
from xmlkernels.predict import Label, Predictor, score_matrix


@dataclass(frozen=True)
class Options:
    checkpoint: str
    """A run's output folder, or the checkpoint folder in it."""
    text: str = ""
    """One text to label."""
    input: str = ""
    """A .txt file (one text a line), a .jsonl file (a string, or an object with "text" or "title" and "content", a line),
    or - for lines from standard input."""
    output: str = ""
    """.jsonl: one line a text; .npz: a scipy CSR matrix of logits [texts, labels]. Printed when not given."""
    top_k: int = 10
    batch: int = 64
    which: str = "best"
    """"best" (by validation) or "last"."""
    latency: bool = False
    """Label the texts one by one and tell how long one takes (median, 95th, 99th percentile) on standard error."""
    device: str = "cpu"
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""


def texts_of(options: Options) -> Iterator[str]:
    """The texts to label, read as they are used."""
    if bool(options.text) == bool(options.input):
        got = "both" if options.text else "neither"
        raise InputError("arguments", "either --text or --input", got, 'give --text "…" or --input FILE')
    if options.text:
        yield options.text
    elif options.input == "-":
        yield from (line.rstrip("\r\n") for line in sys.stdin)
    elif options.input.endswith((".jsonl", ".json", ".jsonl.gz", ".json.gz")):
        for number, line in enumerate(iter_lines(options.input), 1):
            yield text_of(line, f"{options.input}:{number}")
    else:
        yield from iter_lines(options.input)


def text_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            where, "a JSON string or object", f"{line[:40]!r} ({error.msg})", "write one JSON value a line"
        ) from None
    if isinstance(value, str):
        return value
    parts = (
        [value[key] for key in ("text", "title", "content") if isinstance(value.get(key), str)]
        if isinstance(value, dict)
        else []
    )
    if not parts:
        raise InputError(where, 'a string, or an object with "text" or "title"', line[:40], "name the text's key so")
    return " ".join(parts)


@contextmanager
def written(path: str) -> Iterator[IO[str]]:
    """Standard output, or a file that appears only when it is whole."""
    if not path:
        yield sys.stdout
        return
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8")
        yield text
        text.flush()
        text.detach()  # `replacing` still has to sync the stream below


def one_by_one(predictor: Predictor, texts: Iterator[str], k: int) -> Iterator[list[Label]]:
    """Predictions as a server would make them, one text a call, and at the end how long a call took."""
    taken = []
    for text in texts:
        started = time.perf_counter()
        labels = next(predictor.predict([text], k, batch_size=1))
        taken.append((time.perf_counter() - started) * 1e3)
        yield labels
    if taken:
        p50, p95, p99 = np.percentile(taken, (50, 95, 99))
        print(f"{len(taken)} texts one by one: median {p50:.1f} ms, 95% {p95:.1f} ms, 99% {p99:.1f} ms", file=sys.stderr)


def run(options: Options) -> None:
    if options.top_k < 1:
        raise InputError("--top-k", "1 or more", str(options.top_k), "ask for at least one label")
    if options.output and not options.output.endswith((".jsonl", ".npz")):
        raise InputError("--output", "a name that ends in .jsonl or .npz", options.output, "rename it")
    if options.threads:
        torch.set_num_threads(options.threads)
    predictor = Predictor.load(options.checkpoint, which=options.which, device=options.device)
    texts = texts_of(options)
    if options.output.endswith(".npz"):
        values, rows = predictor.predict_arrays(texts, options.top_k, batch_size=options.batch)
        write_npz(options.output, score_matrix(np.asarray(values), rows, predictor.model.head.labels))
        return
    answers = (
        one_by_one(predictor, texts, options.top_k)
        if options.latency
        else predictor.predict(texts, options.top_k, batch_size=options.batch)
    )
    with written(options.output) as out:
        for number, labels in enumerate(answers):
            found = [
                {"id": x.id, "name": x.name, "score": round(x.score, 4), "probability": round(x.probability, 6)} for x in labels
            ]
            if options.output or not sys.stdout.isatty():
                out.write(json.dumps({"text": number, "labels": found}, ensure_ascii=False) + "\n")
            else:
                out.write("\n".join(f"{x['probability']:8.4f}  {x['name']}" for x in found) + "\n\n")
            out.flush()


def main() -> None:
    import tyro

    run(tyro.cli(Options, prog="train/predict.py", description=__doc__))


if __name__ == "__main__":
    command(main)
