"""Serving: a model that is loaded before a fork, threads of its own, and what a server must be able
to rely on.
"""

import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranker_runs import options
from scipy.sparse import csr_matrix
from train_runs import ROOT, finished_run, make_dataset, run, tiny

from xmlkernels import InputError
from xmlkernels.checkpoint import CheckpointFolder, save
from xmlkernels.cli import console, predict
from xmlkernels.models.base import Model
from xmlkernels.models.end_to_end import EndToEnd
from xmlkernels.models.restore import check_finite
from xmlkernels.nn.bow import BowEncoder
from xmlkernels.nn.full_head import FullHead
from xmlkernels.predict.forest import Forest
from xmlkernels.predict.model import Predictor
from xmlkernels.predict.ranked import RankedPredictor
from xmlkernels.threads import torch_threads
from xmlkernels.training import ranker

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
    ranker.train_ranker(options(dataset, output, checkpoint=str(tokens)))
    return output


# ---- preload, then fork ----

# What gunicorn --preload does: one process loads, its children answer. `threads` counts before
# anything of ours is loaded but after the imports, whose BLAS pools know how to fork.
SERVER = """
import multiprocessing, os, sys, warnings
import numpy, scipy.linalg, sklearn.feature_extraction.text, torch, transformers
from xmlkernels.predict.model import Predictor
from xmlkernels.predict.forest import Forest
from xmlkernels.predict.ranked import RankedPredictor

# Of Python 3.12: a process of several threads forks.
warnings.simplefilter("ignore", DeprecationWarning)
tokens, bags, ranked, by_tree = sys.argv[1:]
torch.set_num_threads(2)  # on a machine of one core there would be no pool to start
before = len(os.listdir("/proc/self/task"))
forest = Forest([RankedPredictor.load(ranked, tokens)])
loaded = [Predictor.load(tokens), Predictor.load(bags), forest]
print("threads started", len(os.listdir("/proc/self/task")) - before, torch.get_num_threads())

def worker(queue, predictor):
    queue.put(len([labels[0].id for labels in predictor.predict(["w3 w4 w5"] * 200, k=2)]))

# On one thread even a parent that has answered may fork.
asked = Predictor.load(bags, threads=1)
answers = len(list(asked.predict(["w3 w4 w5"] * 3, prefetch=0)))
print("threads started", answers, len(os.listdir("/proc/self/task")) - before)

context = multiprocessing.get_context("fork")
for predictor in [*loaded, asked]:
    queue = context.Queue()
    child = context.Process(target=worker, args=(queue, predictor), daemon=True)
    child.start()
    child.join(60)
    if child.exitcode is None:
        child.kill()
        print("hangs")
    else:
        print("answers", queue.get())

torch.set_num_threads(1)
list(RankedPredictor.load(by_tree).predict(["w3 w4"], k=2))
print("threads of torch after a ranker's loops", torch.get_num_threads())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_loaded_model_answers_in_a_forked_child(tokens: Path, bags: Path, ranked: Path) -> None:
    by_tree = ROOT / "tests" / "fixtures" / "v1" / "ranker_tree"
    command = [sys.executable, "-c", SERVER, *map(str, (tokens, bags, ranked, by_tree))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    told = ["threads started 0 2", "threads started 3 0", *["answers 200"] * 4]
    told += ["threads of torch after a ranker's loops 1"]
    assert done.stdout.splitlines() == told, done.stdout + done.stderr[-2000:]


# ---- threads ----


def used_threads(predictor: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    whole = Model.score

    def watched(self: Model, *args: Any, **more: Any) -> Any:
        seen.append(torch.get_num_threads())
        return whole(self, *args, **more)

    monkeypatch.setattr(Model, "score", watched)
    list(predictor.predict(["w3 w4 w5"] * 3, k=2))
    return seen


def test_a_predictor_has_threads_of_its_own(
    tokens: Path, ranked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch_threads(2):
        assert used_threads(Predictor.load(tokens, threads=1), monkeypatch) == [1]
        assert used_threads(Predictor.load(tokens), monkeypatch) == [2]
        assert used_threads(Predictor.load(tokens, threads=3), monkeypatch) == [3]
        together = RankedPredictor.load(ranked, tokens, threads=1)
        assert together.threads == 1
        assert used_threads(together, monkeypatch) == [1]
        assert torch.get_num_threads() == 2  # the caller's own number


def test_the_threads_are_the_callers_again_between_two_answers(tokens: Path) -> None:
    with torch_threads(2):
        answers = Predictor.load(tokens, threads=1).predict(
            ["w3", "w4"], batch_size=1, window=1, prefetch=0
        )
        assert next(answers) and torch.get_num_threads() == 2
        assert next(answers) and torch.get_num_threads() == 2


@pytest.mark.parametrize("threads", [-1, 1.5, "2", True])
def test_threads_that_cannot_be(tokens: Path, ranked: Path, threads: Any) -> None:
    for load in (
        lambda: Predictor.load(tokens, threads=threads),
        lambda: RankedPredictor.load(ranked, threads=threads),
    ):
        with pytest.raises(InputError, match="threads: expected a whole number, 0 or more"):
            load()


def test_the_number_of_threads_is_put_back_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


# ---- models that have diverged ----


def spoilt(run: Path, to: Path, name: str, value: float) -> Path:
    """A copy of a run whose best checkpoint has this value in one place of one tensor."""
    shutil.copytree(run, to)
    folder = CheckpointFolder(to / "checkpoint")
    tensors, state = folder.load("best")
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[3] = value
    save(to / "checkpoint" / "best", tensors, state)
    return to


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused(
    tokens: Path, bags: Path, tmp_path: Path, value: float
) -> None:
    words = "encoder.model.embeddings.word_embeddings.weight"
    for whole, name in ((tokens, "head.weight"), (tokens, words), (bags, "encoder.table")):
        bad = spoilt(whole, tmp_path / f"{whole.name}-{name}", name, value)
        with pytest.raises(
            InputError,
            match=f"best: expected weights.*NaN or infinity in 1 .* first {name}.*diverged",
        ):
            Predictor.load(bad)
        assert next(Predictor.load(bad, which="last").predict(["w3"]))  # the way back


def test_an_fp8_table_knows_its_nan() -> None:
    model = EndToEnd(BowEncoder(4, 2), FullHead(2, 2, dtype="fp8"))
    table = model.head.weight.view(torch.uint8)
    model.head.weight.copy_(torch.tensor([[1.0, -448.0], [448.0, 0.0]]))
    check_finite(model, "here")
    for nan in (0x7F, 0xFF):
        table[1, 0] = nan
        with pytest.raises(InputError, match="here.*NaN or infinity in 1 of them, .*head.weight"):
            check_finite(model, "here")


def test_scores_that_overflow_are_refused_and_the_command_says_so(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every weight is finite, no score is: the last layer norm takes what comes to 1e38 and
    more.
    """
    bad = spoilt(
        tokens, tmp_path / "bad", "encoder.model.encoder.layer.1.output.LayerNorm.bias", 3e38
    )
    folder = CheckpointFolder(bad / "checkpoint")
    tensors, state = folder.load("best")
    tensors["head.weight"] = torch.full_like(tensors["head.weight"], 100.0)
    save(bad / "checkpoint" / "best", tensors, state)
    with pytest.raises(InputError, match="scores that are finite numbers"):
        list(Predictor.load(bad).predict(["w3 w4"]))
    with pytest.raises(SystemExit) as left:
        console.command(lambda: predict.run(predict.Options(str(bad), text="w3 w4")))
    out, err = capsys.readouterr()
    assert left.value.code == 2 and out == "" and err.startswith("error: ") and "diverged" in err


# ---- scores ----


def test_a_score_is_log_odds(tokens: Path, ranked: Path) -> None:
    plain = Predictor.load(tokens)
    plain.calibration = None  # which gives probabilities of its own
    for predictor in (plain, Forest([RankedPredictor.load(ranked, tokens)] * 2)):
        for label in next(iter(predictor.predict(["w3 w4 w5"], 5))):
            assert math.log(label.probability / (1 - label.probability)) == pytest.approx(
                label.score, abs=1e-5
            )


def test_a_forest_keeps_the_order_of_labels_that_are_all_but_certain(
    ranked: Path, tokens: Path
) -> None:
    """Their probabilities are 1 in float64; two such labels used to tie at 708."""
    one, other = (RankedPredictor.load(ranked, tokens) for _ in range(2))
    for predictor, z in (
        (one, [720.0, 900, 800, -900, -800]),
        (other, [730.0, 910, 810, -910, -810]),
    ):
        scores = csr_matrix(([*z], [3, 4, 5, 6, 7], [0, 5]), (1, predictor.labels))
        predictor.scores = lambda *args, scores=scores, **more: scores  # type: ignore[method-assign]
    assert [label.id for label in next(Forest([one, other]).predict(["w3"], 5))] == [4, 5, 3, 7, 6]
