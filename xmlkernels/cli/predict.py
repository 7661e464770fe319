"""Label texts with a trained model: `xmlkernels predict RUN --text "…"`.

RUN is the output folder of whatever was trained: a run, a ranker, a forest in one folder or in
several. A ranker that was trained beside a run needs that, too, as --checkpoint.
"""

import io
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import IO, Annotated, Any, Literal

import numpy as np
import torch
from tyro.constructors import PrimitiveConstructorSpec

from xmlkernels import InputError
from xmlkernels.cli.arguments import parse, read_threshold
from xmlkernels.cli.filters import Barred, read_labels
from xmlkernels.cli.texts import Texts, paired
from xmlkernels.data.formats import write_npz
from xmlkernels.data.text_parts import TextParts
from xmlkernels.devices import find_device
from xmlkernels.evaluation import score_matrix
from xmlkernels.files import replacing
from xmlkernels.locks import own_place
from xmlkernels.options import check_least, flag
from xmlkernels.predict.base import Label, TextPredictor
from xmlkernels.predict.calibration import CHOSEN
from xmlkernels.predict.folders import load
from xmlkernels.predict.model import Predictor

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
    """What to label, with which model, and where the answers go."""

    checkpoint: str = ""
    """A run's output folder, or the checkpoint folder in it."""
    ranker: tuple[str, ...] = ()
    """An output folder of xmlkernels rank; several are a forest, the mean of their
    probabilities.
    """
    model: tuple[str, ...] = ()
    """Either of them: the same as RUN without the flag."""
    # ---- texts ----
    text: Annotated[str | None, VERBATIM] = None
    """One text to label; it may be empty."""
    input: str | None = None
    """A .txt file (one text per line) or a .jsonl file (per line a string, or an object with "text"
    or "title" and "content", whose "id" or "uid" is given back), both also packed as .gz, .bz2 or
    .xz; - reads lines from standard input and answers each before the next is read."""
    ranker_text: Annotated[str | None, VERBATIM] = None
    """With --text: what a ranker's TF-IDF is made of, where the ranker was trained with
    --train-text beside a checkpoint.
    """
    ranker_input: str | None = None
    """The same with --input: a file with as many texts."""
    filter: str = ""
    """A file of lines `text label`, both counted from 0: pairs that are never predicted, like
    prepare's --test-filter.
    """
    allow: str = ""
    """A file of labels, one per line, by name or by number: texts get these alone, the best of
    them, whatever a shortlist holds."""
    exclude: str = ""
    """A file of labels, one per line: never predicted, for any text."""
    # ---- answers ----
    output: str = ""
    """.jsonl: one line per text; .npz: a scipy CSR matrix of scores [texts, labels]. Printed when
    not given. A score is log-odds, ln p / (1 - p), of a model, a ranker and a forest alike."""
    top_k: int = 10
    """Labels per text."""
    threshold: str = ""
    """Leave out labels below it: a probability; "calibrated", the thresholds that calibration
    stored for its precision; or "f1", its probability with the highest micro-F1."""
    propensity: float = 0.0
    """Above 0 rare labels rise: the best labels are ranked by probability times inverse propensity
    to this power. 0.05 to 0.1 cost little P@k."""
    batch: int | None = None
    """Texts per pass: 64, or 1 for standard input, where more are faster but answered later."""
    # ---- model and machine ----
    which: Literal["best", "last"] | None = None
    """The best checkpoint by validation, or the last one; by default the best, or the last while
    there is no best yet.
    """
    latency: bool = False
    """Label the texts one by one and say on standard error how long one takes (median, 95th and
    99th percentile), after one call that is not counted."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, or auto."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""


def texts_of(options: Options, parts: TextParts) -> tuple[Texts, Any]:
    """Return the texts to label, and what the model reads: them, or pairs with a ranker's texts."""
    texts = Texts(options.text, options.input, parts)
    if options.ranker_text is None and options.ranker_input is None:
        return texts, iter(texts)
    return texts, paired(texts, Texts(options.ranker_text, options.ranker_input, TextParts()))


@contextmanager
def written(path: str) -> Iterator[IO[str]]:
    """Open standard output, or a file that appears only when it is whole."""
    if not path:
        # Names in any script: as UTF-8 into files and pipes, and on a terminal with escapes for
        # what it cannot show.
        if isinstance(sys.stdout, io.TextIOWrapper):
            how: dict[str, str] = (
                {"errors": "backslashreplace"} if sys.stdout.isatty() else {"encoding": "utf-8"}
            )
            sys.stdout.reconfigure(**how)  # type: ignore[arg-type]
        yield sys.stdout
        return
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8")
        yield text
        text.flush()
        text.detach()  # `replacing` still has to sync the stream below


def limits_of(options: Options, predictor: TextPredictor) -> dict[str, Any]:
    """Read --allow and --exclude, where given, as `TextPredictor.predict` takes them."""
    files = {"allow": options.allow, "exclude": options.exclude}
    return {name: read_labels(path, predictor) for name, path in files.items() if path}


def one_by_one(
    predictor: TextPredictor, texts: Iterator[Any], k: int, limits: dict[str, Any]
) -> Iterator[list[Label]]:
    """Predict as a server would, one text per call, and say at the end how long a call took."""
    taken: list[float] = []
    how: dict[str, Any] = {"batch_size": 1, "window": 1, "prefetch": 0, **limits}
    for text in texts:
        if not taken:  # the first call allocates and loads
            next(predictor.predict([text], k, **how))
        started = time.perf_counter()
        labels = next(predictor.predict([text], k, **how))
        taken.append((time.perf_counter() - started) * 1e3)
        yield labels
    if taken:
        p50, p95, p99 = np.percentile(taken, (50, 95, 99))
        times = f"median {p50:.1f} ms, 95% {p95:.1f} ms, 99% {p99:.1f} ms"
        print(f"{len(taken)} texts one by one: {times}", file=sys.stderr)


def check(options: Options) -> None:
    """Refuse options that cannot be used, before the model is loaded."""
    if (options.text is None) == (options.input is None):
        got = "neither" if options.text is None else "both"
        raise InputError(
            "arguments", "either --text or --input", got, 'give --text "…" or --input FILE'
        )
    if not options.checkpoint and not options.ranker and not options.model:
        mend = 'name it: xmlkernels predict RUN --text "…"'
        raise InputError("RUN", "the output folder of a run or of a ranker", "none", mend)
    if options.ranker and options.model:
        got = f"{options.model[0]} and --ranker {options.ranker[0]}"
        raise InputError("arguments", "one model", got, "leave one of them out")
    for name, other in (("ranker_text", "text"), ("ranker_input", "input")):
        if getattr(options, name) is not None and (
            getattr(options, other) is None or not (options.ranker or options.model)
        ):
            expected = f"--ranker and {flag(other)} with it"
            raise InputError(flag(name), expected, "no such two", "leave it out, or give them")
    if options.ranker_input == "-":
        mend = "name a file of the same documents' texts"
        raise InputError("--ranker-input", "a file", "standard input", mend)
    if options.which and not options.checkpoint and not options.model:
        mend = "leave it out: it would do nothing"
        raise InputError("--which", "--checkpoint with it", "none", mend)
    check_least(options, 1, "top_k", "batch")
    check_least(options, 0, "threads")
    if options.output and not options.output.endswith((".jsonl", ".npz")):
        expected = "a name that ends in .jsonl or .npz"
        raise InputError("--output", expected, options.output, "rename it")
    if options.latency and options.output.endswith(".npz"):
        got = "--output .npz, which takes all at once"
        raise InputError("--latency", "answers one by one", got, "write .jsonl")
    threshold_of(options)
    if not 0 <= options.propensity < math.inf:
        got = str(options.propensity)
        raise InputError("--propensity", "a finite number from 0", got, "correct it")
    if options.output.endswith(".npz") or options.latency:
        got = "--latency" if options.latency else "--output .npz, which keeps all scores"
        cut = {"--threshold": options.threshold, "--propensity": options.propensity}
        for name, is_given in cut.items():
            if is_given:
                raise InputError(name, "labels that are listed", got, "leave one of them out")


def threshold_of(options: Options) -> Any:
    """Return --threshold as `TextPredictor.predict` takes it."""
    return read_threshold(options.threshold, *CHOSEN)


def loaded(options: Options) -> TextPredictor:
    """Load the model, or the ranker with its model.

    Raises:
        InputError: it needs other texts than the options name.
    """
    device = find_device(options.device)
    more: dict[str, Any] = {"which": options.which, "device": device, "threads": options.threads}
    if not options.ranker and not options.model:
        return Predictor.load(options.checkpoint, **more)
    folders = options.ranker or options.model
    named = folders[0] if len(folders) == 1 else folders
    predictor = load(named, options.checkpoint or None, **more)
    if options.ranker and isinstance(predictor, Predictor):
        mend = f'it needs no flag: xmlkernels predict {named} --text "…"'
        raise InputError(f"--ranker {named}", "a ranker's output folder", "that of a run", mend)
    given = options.ranker_text is not None or options.ranker_input is not None
    if given != predictor.takes_pairs:
        name = "--ranker-text" if options.text is not None else "--ranker-input"
        if predictor.takes_pairs:
            expected = "the texts of its TF-IDF, which was not made of the model's"
            mend = "give both, equal ones too"
        else:
            expected, mend = "no texts", "leave it out: this ranker has no texts of its own"
        raise InputError(name, expected, "some" if given else "none", mend)
    return predictor


def answers_of(
    options: Options, predictor: TextPredictor, texts: Any, barred: Barred
) -> Iterator[list[Label]]:
    """Yield the answers to `texts`, without the pairs of --filter."""
    k, limits = barred.needed(options.top_k), limits_of(options, predictor)
    if not options.latency:
        limits |= {"threshold": threshold_of(options), "propensity": options.propensity}
    if options.latency:
        answers = one_by_one(predictor, texts, k, limits)
    elif options.input == "-":
        # No thread: one that waits for a terminal would delay the end.
        how: dict[str, Any] = {"batch_size": options.batch or 1, "window": 1, "prefetch": 0}
        answers = predictor.predict(texts, k, **how, **limits)
    else:
        answers = predictor.predict(texts, k, batch_size=options.batch or 64, **limits)
    return barred.kept(answers, options.top_k)


def run(options: Options) -> None:
    """Label the texts that the options name."""
    check(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    # The output before the work: one that cannot be written, or is in use, is refused at once.
    with own_place(options.output) if options.output else nullcontext():
        answer(options, loaded(options))


def answer(options: Options, predictor: TextPredictor) -> None:
    """Write or print the labels of the texts."""
    texts, given = texts_of(options, predictor.parts)
    barred = Barred.read(options.filter, predictor.labels)
    if options.output.endswith(".npz"):
        size = options.batch or 64
        values, rows = predictor.predict_arrays(
            given,
            barred.needed(options.top_k),
            batch_size=size,
            **limits_of(options, predictor),
        )
        values, rows = barred.kept_arrays(values, rows, options.top_k)
        write_npz(options.output, score_matrix(values, rows, predictor.labels), keep_zeros=True)
        return
    with written(options.output) as out:
        for number, labels in enumerate(answers_of(options, predictor, given, barred)):
            own = texts.ids.popleft()
            found = [
                {
                    "id": x.id,
                    "name": x.name,
                    "score": round(x.score, 4),
                    "probability": round(x.probability, 6),
                }
                for x in labels
            ]
            if options.output or not sys.stdout.isatty():
                named = {"text": number} | ({} if own is None else {"id": own})
                out.write(json.dumps(named | {"labels": found}, ensure_ascii=False) + "\n")
            else:
                out.write("" if own is None else f"{own}\n")
                out.write(
                    "\n".join(f"{x['probability']:8.4f}  {x['name']}" for x in found) + "\n\n"
                )
            if not options.output:
                out.flush()


def main(words: Sequence[str]) -> None:
    """Label the texts that the arguments name."""
    options = parse(Options, "xmlkernels predict", __doc__ or "", words=_with_model(words))
    run(options)


def _with_model(words: Sequence[str]) -> list[str]:
    """Return the arguments with --model before the folders that come first."""
    return ["--model", *words] if words and not words[0].startswith("-") else list(words)
