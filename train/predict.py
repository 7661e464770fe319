"""Ask a trained model for labels: `python train/predict.py --checkpoint DIR (--text "…" | --input FILE) [--output FILE]`."""

import io
import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Annotated, Any, Literal

import numpy as np
import torch
from tyro.constructors import PrimitiveConstructorSpec

from checks import check_least
from config import resolved_device
from report import command
from xmlkernels import InputError
from xmlkernels.data.files import replacing
from xmlkernels.data.formats import DataWarning, iter_lines, write_npz
from xmlkernels.predict import Label, Predictor, score_matrix

# tyro would take the text "None" for no text.
VERBATIM: PrimitiveConstructorSpec[Any] = PrimitiveConstructorSpec(
    nargs=1,
    metavar="TEXT",
    instance_from_str=lambda words: words[0],
    is_instance=lambda value: value is None or isinstance(value, str),
    str_from_instance=lambda value: [] if value is None else [value],
)


@dataclass(frozen=True)
class Options:
    checkpoint: str
    """A run's output folder, or the checkpoint folder in it."""
    text: Annotated[str | None, VERBATIM] = None
    """One text to label; it may be empty."""
    input: str | None = None
    """A .txt file (one text a line), a .jsonl file (a string, or an object with "text" or "title" and "content", a line),
    or - for lines from standard input, each answered before the next is read."""
    output: str = ""
    """.jsonl: one line a text; .npz: a scipy CSR matrix of logits [texts, labels]. Printed when not given."""
    top_k: int = 10
    """Labels per text."""
    batch: int | None = None
    """Texts per pass: 64, or 1 for standard input; a larger one is faster there and answers later."""
    which: Literal["best", "last"] | None = None
    """The best checkpoint by validation, or the last one; by default the best, or the last while there is no best yet."""
    latency: bool = False
    """Label the texts one by one and tell how long one takes (median, 95th, 99th percentile) on standard error, after one
    call that is not counted."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, or auto."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""


def texts_of(options: Options) -> Iterator[str]:
    """The texts to label, read as they are used."""
    if options.text is not None:
        yield options.text
    elif options.input == "-":
        yield from lines_of(sys.stdin.buffer)
    elif str(options.input).endswith((".jsonl", ".json", ".jsonl.gz", ".json.gz")):
        for number, line in enumerate(iter_lines(str(options.input)), 1):
            yield text_of(line, f"{options.input}:{number}")
    else:
        yield from iter_lines(str(options.input))


def lines_of(stream: IO[bytes]) -> Iterator[str]:
    """Lines as soon as they are there; broken UTF-8 becomes U+FFFD, is counted and told once, at the end."""
    broken = first = 0
    try:
        for number, line in enumerate(iter(stream.readline, b""), 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError:
                text = line.decode("utf-8", errors="replace")
                broken, first = broken + 1, first or number
            yield text.rstrip("\r\n")
    finally:
        if broken:
            lines = "1 line" if broken == 1 else f"{broken} lines"
            warnings.warn(f"standard input: broken UTF-8 replaced in {lines} (first: line {first})", DataWarning, 2)


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
        if not taken:
            next(predictor.predict([text], k, batch_size=1, window=1, prefetch=0))  # the first call allocates and loads
        started = time.perf_counter()
        labels = next(predictor.predict([text], k, batch_size=1, window=1, prefetch=0))
        taken.append((time.perf_counter() - started) * 1e3)
        yield labels
    if taken:
        p50, p95, p99 = np.percentile(taken, (50, 95, 99))
        print(f"{len(taken)} texts one by one: median {p50:.1f} ms, 95% {p95:.1f} ms, 99% {p99:.1f} ms", file=sys.stderr)


def check(options: Options) -> None:
    """Refuses options that cannot be used, before the model is loaded."""
    if (options.text is None) == (options.input is None):
        got = "neither" if options.text is None else "both"
        raise InputError("arguments", "either --text or --input", got, 'give --text "…" or --input FILE')
    check_least(options, 1, "top_k", "batch")
    check_least(options, 0, "threads")
    if options.output and not options.output.endswith((".jsonl", ".npz")):
        raise InputError("--output", "a name that ends in .jsonl or .npz", options.output, "rename it")
    if options.latency and options.output.endswith(".npz"):
        raise InputError("--latency", "answers one by one", "--output .npz, which takes all at once", "write .jsonl")


def answers_of(options: Options, predictor: Predictor) -> Iterator[list[Label]]:
    texts = texts_of(options)
    if options.latency:
        return one_by_one(predictor, texts, options.top_k)
    if options.input == "-":
        # No thread: one that waits for a terminal would hold up the end.
        return predictor.predict(texts, options.top_k, batch_size=options.batch or 1, window=1, prefetch=0)
    return predictor.predict(texts, options.top_k, batch_size=options.batch or 64)


def run(options: Options) -> None:
    check(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = resolved_device(options.device)
    predictor = Predictor.load(options.checkpoint, which=options.which, device=device)
    if options.output.endswith(".npz"):
        values, rows = predictor.predict_arrays(texts_of(options), options.top_k, batch_size=options.batch or 64)
        write_npz(options.output, score_matrix(values, rows, predictor.model.labels), keep_zeros=True)
        return
    with written(options.output) as out:
        for number, labels in enumerate(answers_of(options, predictor)):
            found = [
                {"id": x.id, "name": x.name, "score": round(x.score, 4), "probability": round(x.probability, 6)} for x in labels
            ]
            if options.output or not sys.stdout.isatty():
                out.write(json.dumps({"text": number, "labels": found}, ensure_ascii=False) + "\n")
            else:
                out.write("\n".join(f"{x['probability']:8.4f}  {x['name']}" for x in found) + "\n\n")
            if not options.output:
                out.flush()


def main() -> None:
    import tyro

    run(tyro.cli(Options, prog="train/predict.py", description=__doc__))


if __name__ == "__main__":
    command(main)
