"""Serve a model over HTTP: `xmlkernels serve FOLDER`.

FOLDER is the output folder of a run or of a ranker; several rankers are a forest. POST /predict
labels texts, / is a page to try it, /docs lists all requests, /metrics is for Prometheus, and
/annif/suggest speaks the protocol of Annif's backend `http`. Concurrent requests are answered in
batches. SIGTERM and SIGINT end the server in order: what was accepted is answered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xmlkernels import InputError
from xmlkernels.cli.arguments import parse
from xmlkernels.cli.console import say
from xmlkernels.devices import find_device
from xmlkernels.installed import need_serving
from xmlkernels.options import check_least
from xmlkernels.predict.folders import load
from xmlkernels.training.stops import asked, held

_BACKLOG = 1024  # connections that wait to be taken
_STOP = "ends when what was accepted is answered; a second signal ends at once"


@dataclass(frozen=True)
class Options:
    """Which model, where, and how much at once."""

    folder: tuple[str, ...]
    """The output folder of a run, of a ranker, or of several rankers."""
    # ---- model ----
    checkpoint: str = ""
    """With a ranker: the run that it was trained beside."""
    which: Literal["best", "last"] | None = None
    """The best checkpoint by validation, or the last one."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, or auto."""
    threads: int = 0
    """CPU threads of the model; 0 leaves the choice to torch and numba."""
    name: str = ""
    """What the model and its Annif project are called; by default as the folder."""
    # ---- where ----
    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 is all of this machine."""
    port: int = 8000
    """The port; 0 takes a free one, and says which."""
    # ---- how much at once ----
    max_batch: int = 64
    """Texts that the model is asked for together."""
    max_wait_ms: float = 0.0
    """Milliseconds that a batch waits for more requests. With 0 a batch is what has come while the
    last one was computed."""
    queue: int = 256
    """Requests that are waiting or being answered at most; others get 429."""
    max_texts: int = 256
    """Texts per request at most."""
    max_bytes: int = 4 << 20
    """Bytes of a request's body at most."""
    k: int = 10
    """Labels per text, where a request does not say."""
    max_k: int = 1000
    """Labels per text at most."""
    # ---- Annif ----
    uri_prefix: str = "urn:xmlkernels:label:"
    """What the URI of a label begins with, followed by its number, where its name is no URI."""
    # ---- why ----
    dataset: str = ""
    """The dataset folder whose training documents the page shows as neighbours; by default the one
    that the model was trained on, where it is still there and kept its texts."""
    neighbours: int = 50_000
    """Training documents that are searched for neighbours at most; 0 switches it off."""


def check(options: Options) -> None:
    """Refuse options that cannot be used, before the model is loaded."""
    if not options.folder:
        raise InputError("FOLDER", "the output folder of a run or of a ranker", "none", "name one")
    check_least(options, 1, "max_batch", "queue", "max_texts", "max_bytes", "k", "max_k")
    check_least(options, 0, "threads", "max_wait_ms", "neighbours")
    if not 0 <= options.port < 1 << 16:
        raise InputError("--port", "a number from 0 to 65535", str(options.port), "correct it")
    if options.k > options.max_k:
        mend = "choose a smaller one, or a larger --max-k"
        raise InputError("--k", f"{options.max_k} at most (--max-k)", str(options.k), mend)
    if options.name and "/" in options.name:
        raise InputError("--name", "a name without /", options.name, "it is part of a URL")


def run(options: Options) -> None:
    """Load the model and serve it until a signal asks for the end.

    Raises:
        InputError: an option, a folder or a port that cannot be used.
    """
    check(options)
    need_serving("xmlkernels serve")
    from xmlkernels.serve.app import Settings, application
    from xmlkernels.serve.server import bound
    from xmlkernels.serve.server import run as serve
    from xmlkernels.serve.why import find_neighbours

    with bound(options.host, options.port) as listener:  # before the work: a port in use
        folders = [Path(path) for path in options.folder]
        predictor = load(
            options.folder[0] if len(folders) == 1 else options.folder,
            options.checkpoint or None,
            which=options.which,
            device=find_device(options.device),
            threads=options.threads,
        )
        # What the first request would otherwise wait for: compiled loops and names by number.
        next(predictor.predict([("", "") if predictor.takes_pairs else ""], 1, prefetch=0))
        predictor.numbers.find("")
        near = find_neighbours(predictor, folders[0], options.dataset, options.neighbours)
        settings = Settings(
            name=options.name or folders[0].resolve().name,
            k=options.k,
            max_k=options.max_k,
            max_batch=options.max_batch,
            max_wait=options.max_wait_ms / 1e3,
            queue=options.queue,
            max_texts=options.max_texts,
            max_bytes=options.max_bytes,
            uri_prefix=options.uri_prefix,
            changed=folders[0].stat().st_mtime,
        )
        with held(_STOP):
            app = application(predictor, settings, near)
            if near.reason:
                say(f"no neighbours on the page: {near.reason}")
            listener.listen(_BACKLOG)  # whoever reads the next line may connect at once
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            say(f"serving {settings.name} ({predictor.labels:,} labels) at http://{shown}:{port}/")
            serve(app, listener, asked)
    say("ended in order")


def main(words: Sequence[str]) -> None:
    """Serve the model that the arguments name."""
    run(parse(Options, "xmlkernels serve", __doc__ or "", positional=True, words=words))
