"""Serving: a model that is loaded before a fork, threads of its own, and what a server must be able to rely on."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranker_runs import options
from train_runs import ROOT, finished_run, make_dataset, run, tiny

from xmlkernels import InputError
from xmlkernels.models.end_to_end import EndToEnd
from xmlkernels.predict import Predictor
from xmlkernels.ranked import RankedPredictor
from xmlkernels.threads import torch_threads

import ranker  # isort: skip  # train_runs has put train/ on the path

WORDS = 90  # of the small dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("raw"), keep_texts=True)


@pytest.fixture(scope="module")
def tokens(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(dataset, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def bags(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table that torch fills and copies on several threads: 32,768 values is where it begins."""
    output = tmp_path_factory.mktemp("runs") / "bow"
    run(tiny(dataset, output, encoder="bow", bow_width=1024, min_df=1, epochs=1))
    return output


@pytest.fixture(scope="module")
def ranked(dataset: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("rankers") / "model"
    ranker.train(options(dataset, output, checkpoint=str(tokens)))
    return output


# ---- preload, then fork ----

# What gunicorn --preload does: one process loads, its children answer. `threads` counts before anything of ours is loaded
# but after the imports, whose BLAS pools know how to fork.
SERVER = """
import multiprocessing, os, sys, warnings
import numpy, scipy.linalg, sklearn.feature_extraction.text, torch, transformers
from xmlkernels.predict import Predictor
from xmlkernels.ranked import Forest, RankedPredictor

warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: a process of several threads forks
tokens, bags, ranked = sys.argv[1:]
torch.set_num_threads(2)  # on a machine of one core there would be no pool to start
before = len(os.listdir("/proc/self/task"))
loaded = [Predictor.load(tokens), Predictor.load(bags), Forest([RankedPredictor.load(ranked, tokens)])]
print("threads started", len(os.listdir("/proc/self/task")) - before, torch.get_num_threads())

def worker(queue, predictor):
    queue.put(len([labels[0].id for labels in predictor.predict(["w3 w4 w5"] * 200, k=2)]))

context = multiprocessing.get_context("fork")
for predictor in loaded:
    queue = context.Queue()
    child = context.Process(target=worker, args=(queue, predictor), daemon=True)
    child.start()
    child.join(60)
    if child.exitcode is None:
        child.kill()
        print("hangs")
    else:
        print("answers", queue.get())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_loaded_model_answers_in_a_forked_child(tokens: Path, bags: Path, ranked: Path) -> None:
    command = [sys.executable, "-c", SERVER, str(tokens), str(bags), str(ranked)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["threads started 0 2", *["answers 200"] * 3], done.stdout + done.stderr[-2000:]


# ---- threads ----



def used_threads(predictor: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    seen: list[int] = []
    whole = getattr(EndToEnd, name)

    def watched(self: EndToEnd, *args: Any, **more: Any) -> Any:
        seen.append(torch.get_num_threads())
        return whole(self, *args, **more)

    monkeypatch.setattr(EndToEnd, name, watched)
    list(predictor.predict(["w3 w4 w5"] * 3, k=2))
    return seen


def test_a_predictor_has_threads_of_its_own(
    tokens: Path, ranked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch_threads(2):
        assert used_threads(Predictor.load(tokens, threads=1), monkeypatch, "predict") == [1]
        assert used_threads(Predictor.load(tokens), monkeypatch, "predict") == [2]
        assert used_threads(Predictor.load(tokens, threads=3), monkeypatch, "predict") == [3]
        together = RankedPredictor.load(ranked, tokens, threads=1)
        assert together.threads == 1
        assert used_threads(together, monkeypatch, "predict_and_embed") == [1]
        assert torch.get_num_threads() == 2  # the caller's own number


def test_the_threads_are_the_callers_again_between_two_answers(tokens: Path) -> None:
    with torch_threads(2):
        answers = Predictor.load(tokens, threads=1).predict(["w3", "w4"], batch_size=1, window=1, prefetch=0)
        assert next(answers) and torch.get_num_threads() == 2
        assert next(answers) and torch.get_num_threads() == 2


@pytest.mark.parametrize("threads", [-1, 1.5, "2", True])
def test_threads_that_cannot_be(tokens: Path, ranked: Path, threads: Any) -> None:
    for load in (lambda: Predictor.load(tokens, threads=threads), lambda: RankedPredictor.load(ranked, threads=threads)):
        with pytest.raises(InputError, match="threads: expected a whole number, 0 or more"):
            load()


def test_the_number_of_threads_is_put_back_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
