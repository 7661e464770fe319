"""`xmlkernels.load`: whatever a training command wrote gives the predictor that belongs to it."""

from pathlib import Path

import numpy as np
import pytest

import xmlkernels as xk
from xmlkernels.cli import predict

V1 = Path(__file__).resolve().parents[1] / "fixtures" / "v1"
TEXTS = ["w0 w1", "w30 w31 w4"]


def same_answers(loaded: xk.Predictor | xk.RankedPredictor | xk.Forest, other: object) -> None:
    ours, theirs = (
        [[(x.id, x.score) for x in labels] for labels in predictor.predict(TEXTS, k=3)]  # type: ignore[attr-defined]
        for predictor in (loaded, other)
    )
    assert ours == theirs and len(ours) == len(TEXTS)


@pytest.mark.parametrize("folder", [V1 / "run", str(V1 / "bow"), V1 / "cascade" / "checkpoint"])
def test_a_run(folder: Path | str) -> None:
    loaded = xk.load(folder)
    assert type(loaded) is xk.Predictor
    same_answers(loaded, xk.Predictor.load(folder))


def test_a_ranker_with_its_run_and_one_without() -> None:
    beside, alone = xk.load(V1 / "ranker_model", V1 / "run"), xk.load(V1 / "ranker_tree", threads=1)
    assert type(beside) is type(alone) is xk.RankedPredictor
    same_answers(beside, xk.RankedPredictor.load(V1 / "ranker_model", V1 / "run"))
    same_answers(alone, xk.RankedPredictor.load(V1 / "ranker_tree"))


def test_several_rankers_are_a_forest() -> None:
    forest = xk.load([V1 / "ranker_tree", V1 / "ranker_tree"])
    assert type(forest) is xk.Forest and len(forest.rankers) == 2
    single = xk.load(V1 / "ranker_tree")
    values, rows = forest.predict_arrays(TEXTS, 3)
    expected, labels = single.predict_arrays(TEXTS, 3)
    assert (rows == labels).all()
    np.testing.assert_allclose(values, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((V1 / "nowhere",), "output folder of a run or of a ranker, got no such folder"),
        ((V1 / "README.md",), "output folder of a run or of a ranker, got a file"),
        ((V1 / "dataset",), "got a folder without checkpoint/ and ranker.safetensors"),
        (([V1 / "ranker_tree", V1 / "run"],), "run: expected rankers alone, got a run"),
        (([],), "rankers of the same labels and texts, got none"),
        ((V1 / "run", V1 / "run"), "run: expected a ranker beside a checkpoint, got a run"),
        ((V1 / "ranker_model",), "expected the checkpoint that it was made with, got none"),
        ((V1 / "ranker_tree", V1 / "run"), "no checkpoint: it was made without one"),
    ],
)
def test_what_is_none_of_them(arguments: tuple[object, ...], told: str) -> None:
    with pytest.raises(xk.InputError, match=told):
        xk.load(*arguments)  # type: ignore[arg-type]


def test_which_needs_a_checkpoint_to_choose_from() -> None:
    with pytest.raises(xk.InputError, match="which: expected a checkpoint to choose from"):
        xk.load(V1 / "ranker_tree", which="last")


def test_predict_takes_the_folder_of_any_model(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*words: str) -> str:
        predict.main([*words, "--text", "w0 w1", "--top-k", "4"])
        return capsys.readouterr().out

    trees = [str(made / "forest" / f"tree{n}") for n in range(2)]
    forest = told("--ranker", *trees)
    assert told(str(made / "forest")) == told("--ranker", str(made / "forest")) == forest
    assert told(*trees) == told("--model", *trees) == forest
    beside = told("--checkpoint", str(made / "whole"), "--ranker", str(made / "beside"))
    assert told(str(made / "beside"), "--checkpoint", str(made / "whole")) == beside
    last = told("--checkpoint", str(made / "whole"), "--which", "last")
    assert told(str(made / "whole"), "--which", "last") == last != forest


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), 'RUN: expected .* got none; name it: xmlkernels predict RUN --text "…"'),
        ((V1 / "nowhere",), "expected the output folder of a run or of a ranker, got no such"),
        (("--ranker", V1 / "nowhere"), "expected the output folder of a run or of a ranker, got"),
        (("--checkpoint", V1 / "nowhere"), "nowhere: expected the output folder of a run, got no"),
        (("--checkpoint", V1 / "dataset"), "dataset: expected the output folder of a run, got a"),
        (("--checkpoint", V1 / "ranker_tree"), "got one of a ranker; give it without the flag"),
        (("--ranker", V1 / "run"), "expected a ranker's output folder, got that of a run; it n"),
        ((V1 / "run", "--ranker", V1 / "ranker_tree"), "arguments: expected one model, got"),
    ],
)
def test_folders_that_predict_cannot_take(words: tuple[object, ...], told: str) -> None:
    with pytest.raises(xk.InputError, match=told):
        predict.main([*map(str, words), "--text", "w0"])
