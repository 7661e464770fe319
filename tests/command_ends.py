"""Stop commands, or let the disk refuse what they write.

    python tests/command_ends.py FOLDER

Each case is a child that is forked after the imports, which take seconds. Prints a line of JSON per
case: {"case": …, "wrong": what is not as it must be, or ""}.
"""

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from train_runs import make_dataset, make_tree, tiny, weights

from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.cli import console, ensemble, export, neighbours, predict, prepare, rank
from xmlkernels.cli import train as train_command
from xmlkernels.cli import tree as tree_command
from xmlkernels.data import dataset_writer
from xmlkernels.locks import LOCK, own_folder
from xmlkernels.training import loop, run_state, session, stops, tree
from xmlkernels.training.loop import train

COMMANDS = {"tree": tree_command, "ranker": rank} | {
    module.__name__.rpartition(".")[2]: module
    for module in (ensemble, export, neighbours, predict, prepare)
}

PATIENCE = 120  # seconds for what takes one or two on an idle machine

# What a kill leaves of the files in an output folder. Other commands leave the unfinished copy of
# the whole output.
LEFT = {
    "tree": ("tree/.tree.safetensors.0123456789ab.part", "tree/.report.json.0123456789ab.part"),
    "ranker": (
        "ranker/.ranker.safetensors.0123456789ab.part",
        "ranker/.metrics.json.0123456789ab.part",
        "ranker/vectorizer/.idf.safetensors.0123456789ab.part",
    ),
    "export": (
        "vectors/.embeddings_train.npy.0123456789ab.part",
        "vectors/.shortlist_val.npz.0123456789ab.part",
    ),
}


class Child:
    """A command in a process of its own; what it prints goes to a file."""

    def __init__(
        self, place: Path, work: Callable[[], Any], before: Callable[[], Any] = lambda: None
    ) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.told = place.parent / f"{place.name}.told"
        self.pid = os.fork()
        if self.pid == 0:
            status = 70
            try:
                with open(self.told, "w") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                before()
                console.command(work)
                status = 0
            except SystemExit as end:
                status = int(end.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    def alive(self) -> bool:
        return os.waitpid(self.pid, os.WNOHANG)[0] == 0

    def end(self, status: int, *words: str) -> None:
        end = time.monotonic() + PATIENCE
        while (ended := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"still ran after {PATIENCE} s: {self.told.read_text()}")
            time.sleep(0.01)
        code = os.waitstatus_to_exitcode(ended[1])
        told = self.told.read_text()
        assert code == status, f"status {code}: {told}"
        assert "Traceback" not in told and told.count("error: ") == (status in (1, 2)), told
        assert all(word in told for word in words), (words, told)


def wait_until(true: Callable[[], bool], child: Child) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end and child.alive(), child.told.read_text()
        time.sleep(0.01)


def wait_for(path: Path, child: Child) -> None:
    wait_until(path.exists, child)


def nothing_left(folder: Path) -> None:
    left = [
        str(p)
        for p in folder.rglob("*")
        if p.name.endswith((".part", LOCK, ".old")) or ".new-" in p.name
    ]
    assert not left, left


def sleeping(marker: Path) -> Callable[..., Any]:
    def sleep(*_: Any, **__: Any) -> None:
        marker.touch()
        time.sleep(60)

    return sleep


def cases(dataset: Path, folder: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    more: dict[str, Any] = {
        "encoder": "bow",
        "min_df": 1,
        "save_every": 0,
        "evaluate_batch": 1,
        "table": "bf16",
    }
    whole = folder / "whole"
    Child(whole, lambda: train(tiny(dataset, whole, **more))).end(0)

    def endless(place: Path, **options: Any) -> Any:
        return tiny(
            dataset,
            place / "run",
            **(more | {"epochs": 100_000, "evaluate_every": 50_000} | options),
        )

    def stopped(number: signal.Signals) -> Callable[[Path], None]:
        def case(place: Path) -> None:
            child = Child(place, lambda: train(endless(place)))
            wait_for(place / "run" / "log.jsonl", child)
            time.sleep(0.1)
            os.kill(child.pid, number)
            os.kill(child.pid, number)  # twice at once, as a terminal and torchrun send it: once
            state_at = f"({number.name})"
            child.end(
                128 + number,
                f"{number.name}: ends after this step",
                "go on from it with --resume",
                state_at,
            )
            steps = CheckpointFolder(place / "run" / "checkpoint").load()[1]["steps"]
            assert (
                f"stopped at step {steps:,}, whose checkpoint is written" in child.told.read_text()
            )
            nothing_left(place)

        return case

    for number in stops.SIGNALS:
        yield f"a run stopped by {number.name}", stopped(number)

    def second(place: Path) -> None:
        def deaf() -> None:
            run_state.RunState.stop_if_asked = lambda self: None  # type: ignore[method-assign]

        child = Child(place, lambda: train(endless(place)), deaf)
        wait_for(place / "run" / "log.jsonl", child)
        os.kill(child.pid, signal.SIGTERM)
        # A second one counts a second after the first was heard, however late that is.
        wait_until(lambda: "ends after this step" in child.told.read_text(), child)
        time.sleep(stops._ONCE + 0.3)
        assert child.alive(), "the first one asks"
        os.kill(child.pid, signal.SIGTERM)
        child.end(143)

    yield "a second signal", second

    def nohup(place: Path) -> None:
        child = Child(
            place,
            lambda: train(endless(place)),
            lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        )
        wait_for(place / "run" / "log.jsonl", child)
        os.kill(child.pid, signal.SIGHUP)
        time.sleep(0.3)
        assert child.alive()
        os.kill(child.pid, signal.SIGTERM)
        child.end(143)

    yield "nohup", nohup

    def opening(place: Path) -> None:
        def slow() -> None:
            session.build_model = sleeping(place / "marker")

        child = Child(place, lambda: train(endless(place)), slow)
        wait_for(place / "marker", child)
        os.kill(child.pid, signal.SIGTERM)
        child.end(143, "stopped by SIGTERM; no checkpoint was written yet: start the run again\n")
        assert not (place / "run").exists()

    yield "a run stopped while it opens its model", opening

    def evaluating(place: Path) -> None:
        def slow() -> None:
            watched = stops._Watched.epoch

            def epoch(self: Any, *args: Any, **options: Any) -> Iterator[Any]:
                for batch in watched(self, *args, **options):
                    (place / "marker").touch()
                    time.sleep(0.1)
                    yield batch

            stops._Watched.epoch = epoch  # type: ignore[method-assign]

        config = tiny(dataset, place / "run", **more)
        child = Child(place, lambda: train(config), slow)
        wait_for(place / "marker", child)
        os.kill(child.pid, signal.SIGINT)
        child.end(130, "stopped at step 10, whose checkpoint is written")
        state = CheckpointFolder(place / "run" / "checkpoint").load()[1]
        assert (state["epoch"], state["position"], state["best"]) == (0, 10, {}), (
            "before the validation"
        )
        Child(place, lambda: train(replace(config, resume=True))).end(0)
        for which in ("last", "best"):
            assert weights(place / "run", which) == weights(whole, which)
        assert (place / "run" / "predictions.npz").read_bytes() == (
            whole / "predictions.npz"
        ).read_bytes()

    yield "a run stopped in its validation", evaluating

    def leaving(place: Path) -> None:
        def slow() -> None:
            loop.own_folder = stop_after  # type: ignore[assignment]

        @contextmanager
        def stop_after(*args: Any, **options: Any) -> Iterator[None]:
            with own_folder(*args, **options):
                yield
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)

        Child(place, lambda: train(tiny(dataset, place / "run", **more)), slow).end(
            143, f"stopped by SIGTERM; the run had finished: {place}/run/metrics.json holds"
        )
        assert (place / "run" / "metrics.json").exists()
        nothing_left(place)

    yield "a run stopped when it has finished", leaving

    def full(place: Path) -> None:
        saves = iter(range(100))

        def limit() -> None:
            save = run_state.RunState.save

            def then(self: Any, *, best: bool = False) -> None:
                if next(saves) == 1:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, -1))
                save(self, best=best)

            run_state.RunState.save = then  # type: ignore[method-assign]

        config = replace(tiny(dataset, place / "run", **more), save_every=4)
        child = Child(place, lambda: train(config), limit)
        left = "is whole: go on from it with --resume"
        child.end(
            1,
            "checkpoint/last/tensors.safetensors could not be written: File too large",
            "the checkpoint of step 4 in ",
            left,
        )
        assert CheckpointFolder(place / "run" / "checkpoint").load()[1]["steps"] == 4
        nothing_left(place)
        for left in (".last.new-0123abcd", ".best.new-0123abcd"):  # what kills leave behind
            (place / "run" / "checkpoint" / left).mkdir()
        for name in ("metrics.json", "predictions.npz", "config.json"):
            (place / "run" / f".{name}.0123456789ab.part").touch()
        Child(place, lambda: train(replace(config, resume=True))).end(0)
        nothing_left(place)
        assert weights(place / "run", "last") == weights(whole, "last")

    yield "a run whose disk is full", full

    scores, labels = str(whole / "predictions.npz"), ["--checkpoint", str(whole)]
    (folder / "texts.txt").write_text("w1 w2\n" * 400)
    raw = dataset.parent
    arguments: dict[str, tuple[list[str], str]] = {
        "tree": ([str(dataset), "--depths", "1", "2", "--no-plot"], "tree"),
        "ranker": (["--dataset", str(dataset), "--one-vs-all"], "ranker"),
        "ensemble": ([scores, scores, "--dataset", str(dataset)], "sum.npz"),
        "neighbours": (["--dataset", str(dataset)], "near.npz"),
        "export": ([*labels, "--what", "embeddings"], "vectors"),
        "predict": ([*labels, "--input", str(folder / "texts.txt")], "answers.jsonl"),
        "prepare": (
            [
                "--train-text",
                f"{raw}/trn_X.txt",
                "--train-labels",
                f"{raw}/trn_X_Y.txt",
                "--tokenizer",
                f"{raw}/tokenizer",
            ],
            "set",
        ),
    }

    def refused(name: str) -> Callable[[Path], None]:
        words, output = arguments[name]

        def called(
            place: Path,
            where: str,
            status: int,
            *told: str,
            before: Callable[[], Any] = lambda: None,
        ) -> None:
            def main() -> None:
                COMMANDS[name].main([*words, "--output", str(place / where)])

            Child(place, main, before).end(status, *told)

        def small() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (400, -1))

        def case(place: Path) -> None:
            place.mkdir()
            (place / "file").write_text("mine")
            (place / "dangling").mkdir()
            (place / "dangling" / output).symlink_to(place / "nowhere" / output)
            called(place, f"file/{output}", 2, "--output: expected ")
            nothing_left(place)
            if name != "prepare":  # which makes a link's folder
                called(place, f"dangling/{output}", 2, "--output: expected ")
            called(place, output, 1, "could not be written", before=small)
            nothing_left(place)
            (place / "real").mkdir()
            (place / "link").symlink_to("real")
            # What kills leave behind.
            for left in LEFT.get(name, (f".{output}.0123456789ab.part",)):
                (place / "real" / left).parent.mkdir(parents=True, exist_ok=True)
                (place / "real" / left).touch()
            called(place, f"link/{output}", 0)
            assert (place / "real" / output).exists()
            assert (place / "link").is_symlink()
            assert (place / "file").is_file()
            nothing_left(place)

        return case

    for name in COMMANDS:
        yield f"{name}: a file in the way, a full disk, links", refused(name)

    tiny_words = ["--dataset", str(dataset), "--device", "cpu", "--min-df", "1"]
    arguments |= {
        "train": (["bow", *tiny_words, "--epochs", "1"], "run"),
        "linear": (["linear", "--dataset", str(dataset)], "words"),
    }

    def told_of(name: str, module: Any, function: str) -> Callable[[Path], None]:
        """A signal comes when the work is written: nothing is left to stop."""
        words, output = arguments[name]

        def case(place: Path) -> None:
            def stop(*_: Any, **__: Any) -> None:
                if (place / output).exists():  # `prepare` tells more before
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(60)

            main = COMMANDS.get(name, train_command).main
            child = Child(
                place,
                lambda: main([*words, "--output", str(place / output)]),
                lambda: setattr(module, function, stop),
            )
            child.end(0)
            assert "SIGTERM" not in child.told.read_text()
            assert (place / output).exists()
            nothing_left(place)

        return case

    for name, module, function in (
        ("train", train_command, "print_metrics"),
        ("linear", train_command, "print_ranker"),
        ("ranker", rank, "print_ranker"),
        ("ensemble", ensemble, "print_comparison"),
        ("neighbours", neighbours, "print_comparison"),
        ("prepare", prepare, "print"),
    ):
        yield f"{name}: stopped while it tells of its work", told_of(name, module, function)

    def building(place: Path) -> None:
        def slow() -> None:
            dataset_writer.write_labels = sleeping(place / "marker")

        words = [*arguments["prepare"][0], "--output", str(place / "a" / "set")]
        child = Child(place, lambda: prepare.main(words), slow)
        wait_for(place / "marker", child)
        os.kill(child.pid, signal.SIGHUP)
        child.end(129, "(SIGHUP)\n")
        assert not (place / "a").exists()

    yield "prepare stopped", building

    def clustering(place: Path) -> None:
        def slow() -> None:
            tree.cluster = sleeping(place / "marker")

        words = [*arguments["tree"][0], "--output", str(place / "tree")]
        child = Child(place, lambda: tree_command.main(words), slow)
        wait_for(place / "marker", child)
        os.kill(child.pid, signal.SIGTERM)
        child.end(143, "(SIGTERM)\n")
        assert not (place / "tree").exists()

    yield "tree stopped", clustering


def main(folder: Path) -> None:
    dataset = make_dataset(folder / "raw", keep_texts=True)
    make_tree(dataset, folder / "tree")
    for number, (name, case) in enumerate(cases(dataset, folder)):
        place, wrong = folder / f"case{number}", ""
        try:
            case(place)
        except AssertionError as error:
            wrong = f"{error}" or f"{error!r} at line {error.__traceback__.tb_next.tb_lineno}"  # type: ignore[union-attr]
        print(json.dumps({"case": name, "wrong": wrong}), flush=True)
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
