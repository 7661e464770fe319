"""`xmlkernels train auto`: from a table to a model that answers with names, with every choice."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
import xmlkernels as xk
from own_tables import LABELS, as_jsonl, write
from xmlkernels import InputError
from xmlkernels.cli import train
from xmlkernels.data.profile import Profile, load_profile
from xmlkernels.data.tables.options import Tables
from xmlkernels.training import choosing
from xmlkernels.training.auto import AutoConfig, prepared, shares
from xmlkernels.training.choosing import Choice, Machine, choose
from xmlkernels.training.clock import Deadline
from xmlkernels.training.config import Config
from xmlkernels.training.timing import LinearCost
from xmlkernels.training.trying import NAMES, PAIRS


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("auto")


@pytest.fixture(scope="module")
def table(place: Path) -> Path:
    return write(place, "a.csv")


@pytest.fixture(scope="module")
def profile(place: Path, table: Path) -> Profile:
    config = AutoConfig(Tables(table), cache=str(place / "cache"))
    return load_profile(prepared(config, (), None, 128, lambda line: None).folder)


def words(place: Path, table: Path, *more: str) -> list[str]:
    return ["auto", "--data", str(table), "--cache", str(place / "cache"), *more]


def test_a_table_becomes_a_model_that_answers_with_names(
    place: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = place / "linear"  # the dataset of the tables is in --cache
    train.main(words(place, table, "--output", str(output), "--min-df", "2", "--threads", "1"))
    told = capsys.readouterr().out
    assert "as --min-df says" in told and "--recipe" in told and "documents per label" in told
    record = json.loads((output / "choices.json").read_text())
    values = {one["flag"]: one["value"] for one in record["choices"]}
    assert values["--recipe"] == "linear" and values["--min-df"] == "2"
    options = json.loads((output / "metrics.json").read_text())["options"]
    assert options["min_df"] == 2
    # validation chose between words and pairs of them
    assert "trying words alone" in told and "trying words and pairs" in told
    assert told.count("report: ") == 1, "trials have none"
    assert "note: 4 test documents are too few for their metrics to mean anything" in told
    report = (output / "report.html").read_text("utf-8")
    assert record["machine"] in report and all(one["flag"] in report for one in record["choices"])
    assert values["--longest"] == {1: "1 word", 2: "1 to 2 words"}[options["longest"]]
    assert load_profile(output) == load_profile(record["dataset"])
    (answer,) = xk.load(output).predict(["the fruit3 and nuts"], k=2)
    assert answer[0].name in LABELS
    # Another run is not replaced, and goes on as it was chosen, whatever would be chosen now.
    with pytest.raises(InputError, match="go on with it by --resume, replace it by --overwrite"):
        train.main(words(place, table, "--output", str(output)))
    assert capsys.readouterr().out == ""
    train.main(words(place, table, "--output", str(output), "--resume", "--threads", "1"))
    told = capsys.readouterr().out
    assert "is trained already" in told and "trying" not in told
    assert json.loads((output / "metrics.json").read_text())["options"] == options
    # Again: the dataset of the same content is used, and the profile is shown all the same.
    train.main(words(place, table, "--output", str(output), "--plan"))
    told = capsys.readouterr().out
    assert "used again" in told and "documents per label" in told and "TF-IDF" not in told


def test_a_recipe_that_is_named_is_trained_with_its_flags(place: Path, table: Path) -> None:
    output = place / "bow"
    more = ["--recipe", "bow", "--epochs", "2", "--bow-width", "16", "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch:
        # 10 minutes until the training begins, and none after its first step
        looks = itertools.count()
        patch.setattr(Deadline, "left", lambda self: 600.0 if next(looks) < 1 else 0.0)
        train.main(words(place, table, "--output", str(output), *more))
    ended = json.loads((output / "metrics.json").read_text())
    assert ended["time_over"]["epochs"] == 1 and ended["steps"] == 1
    train.main(words(place, table, "--output", str(output), "--resume", "--minutes", "5"))
    assert "time_over" not in json.loads((output / "metrics.json").read_text())
    config = json.loads((output / "config.json").read_text())
    assert (config["encoder"], config["epochs"], config["bow_width"]) == ("bow", 2, 16)
    assert config["min_df"] == 1  # few documents
    assert (output / "profile.json").is_file() and (output / "choices.json").is_file()
    (answer,) = xk.load(output).predict(["the fruit3"], k=1)
    assert answer[0].name in LABELS


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--epoch", "3"), "--epoch: expected a flag of this command, .*did you mean --epochs?"),
        (("--dataset", "d"), "--dataset: .*did you mean --data?"),
        (
            ("--bow-width", "3"),
            "--bow-width: expected a flag of linear, which was chosen, .*or choose --recipe bow",
        ),
        (("--minutes", "0"), "--minutes: expected more than 0"),
    ],
)
def test_flags_that_do_not_fit(
    more: tuple[str, ...], sentence: str, place: Path, table: Path
) -> None:
    with pytest.raises(xk.InputError, match=sentence):
        train.main(words(place, table, "--output", str(place / "no"), *more))
    assert not (place / "no").exists()


def test_an_output_that_cannot_be_written_is_told_before_the_data_are_read(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--output: expected a folder"):
        train.main(words(tmp_path, table, "--output", str(tmp_path / "file")))
    assert capsys.readouterr().out == "" and not (tmp_path / "cache").exists()


def test_there_is_no_auto_without_a_table() -> None:
    with pytest.raises(xk.InputError, match="--data: expected a table of texts and labels"):
        train.main(["auto"])


# ---- what is chosen ----


def larger(profile: Profile, documents: int, labels: int = 1000) -> Profile:
    split = replace(profile.splits["train"], documents=documents)
    return replace(profile, labels=labels, splits=profile.splits | {"train": split})


SMALL = Machine(2, 16 << 30)
QUICK = Machine(2, 16 << 30, "NVIDIA H200")


def chosen(
    profile: Profile, machine: Machine = SMALL, given: dict[str, str] | None = None,
    named: bool = False, **more: Any,
) -> choosing.Chosen:  # fmt: skip
    each = 2e-4 * profile.splits["train"].documents  # seconds of a tree
    costs = {1: LinearCost(each / 4, each), 2: LinearCost(each, 2 * each)}
    config = AutoConfig(Tables(Path("t.csv")), **more)
    return choose(config, profile, machine, given or {}, costs, named=named)


def of(found: choosing.Chosen, what: str) -> Choice:
    return next(choice for choice in found.choices if choice.what == what)


def test_the_recipe_follows_from_documents_time_and_labels(
    profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seconds for an epoch: what the planner says of a machine is its own tests'.
    class Planned:
        def __init__(self, recipe: str, config: Config) -> None:
            each = {"minilm": 300.0, "cascade": 200.0, "bow": 20.0}[recipe]
            self.hours, self.plan = each * config.epochs / 3600, self
            self.config, self.autocast, self.table = config, None, "bf16"

        def lacks(self) -> dict[str, tuple[int, int]]:
            return {}

    def forecast(self: Any, recipe: str, **changes: Any) -> Planned:
        return Planned(recipe, choosing.RECIPES[recipe].config.replace(**changes))

    monkeypatch.setattr(choosing._Seen, "forecast", forecast)
    many = larger(profile, 100_000)
    assert chosen(profile).recipe.name == "linear"
    assert chosen(many).recipe.name == "linear"
    assert "more than --minutes 10" in of(chosen(many), "recipe").why
    patient = chosen(many, minutes=60.0)
    assert (patient.recipe.name, patient.tokenizer) == ("minilm", "minilm")
    assert patient.recipe.config.epochs == 8 and patient.max_length == 32
    assert chosen(larger(profile, 100_000, 400_000), minutes=60.0).recipe.name == "cascade"
    assert chosen(larger(profile, 90_000_000)).recipe.name == "bow"
    assert chosen(many, given={"encoder": "roberta-base"}).tokenizer == "roberta-base"
    assert chosen(many, recipe="minilm").recipe.config.epochs == 1
    assert chosen(many, recipe="bow", minutes=1.0).recipe.config.epochs == 2
    assert chosen(many, max_length=77, recipe="minilm").max_length == 77
    monkeypatch.setattr(choosing, "find_spec", lambda name: None)
    assert "not installed" in of(chosen(many, minutes=60.0), "recipe").why


def test_time_decides_what_is_tried_and_how_many_trees(profile: Profile) -> None:
    many = larger(profile, 100_000)
    found = {minutes: chosen(many, minutes=minutes) for minutes in (10.0, 2.8, 2.0, 1.0)}
    options = {minutes: one.recipe.config for minutes, one in found.items()}
    # words cost 25 s, words and pairs 60 s, each tree more 40 s; of words alone 20 s
    assert [options[m].trees for m in options] == [3, 2, 1, 2]
    assert [len(found[m].kinds) for m in found] == [2, 2, 2, 1]
    assert of(found[2.0], "time").value == "about 85 s"
    # where labels have few documents, their names are tried as texts
    rare = larger(profile, 100_000, 50_000)
    assert NAMES in chosen(rare, named=True).kinds and NAMES not in chosen(rare).kinds
    assert NAMES not in chosen(many, named=True).kinds
    assert NAMES not in chosen(rare, named=True, given={"label_text": ""}).kinds
    assert PAIRS not in chosen(many, given={"longest": "2"}).kinds
    assert chosen(profile).recipe.config.min_df == 1 and options[10.0].min_df == 2
    assert chosen(profile).recipe.config.trees == 1  # five labels have no tree
    alone = replace(many, splits={"train": many.splits["train"]})
    assert len(chosen(alone).kinds) == 1
    assert "no validation" in of(chosen(alone), "reads").why


def test_a_run_is_planned_for_its_data(profile: Profile) -> None:
    found = chosen(larger(profile, 50_000), recipe="minilm")
    assert 1 <= found.recipe.config.epochs <= 8
    assert {choice.flag for choice in found.choices} >= {
        "--recipe", "--encoder", "--max-length", "--epochs", "--batch", "--table", "--precision",
    }  # fmt: skip


def test_a_tenth_is_held_back_where_nothing_else_splits(place: Path, table: Path) -> None:
    config = AutoConfig(Tables(table))
    assert shares(config, ()) == (0.1, 0.1)
    assert shares(replace(config, tables=Tables(table, test_share=0.2)), ("test_share",)) == (
        0.1,
        0.2,
    )
    assert shares(replace(config, tables=Tables(table, test=table)), ()) == (0.1, 0.0)
    assert shares(replace(config, tables=Tables(table, split_column="x")), ()) == (0.0, 0.0)
    assert shares(replace(config, validation_share=0.3), ()) == (0.3, 0.1)
    folder = place / "named"
    folder.mkdir()
    for name in ("train", "validation", "test"):
        (folder / f"{name}.jsonl").write_text(as_jsonl())
    assert shares(AutoConfig(Tables(folder)), ()) == (0.0, 0.0)


def test_unlabelled_documents_are_left_out_of_training(place: Path) -> None:
    path = place / "u.jsonl"
    lines = [f'{{"text": "t{n}", "labels": {["[]", "[1]"][n % 2]}}}\n' for n in range(60)]
    path.write_text("".join(lines))
    for unlabelled, left in (("drop-train", 0), ("keep", 1)):
        config = AutoConfig(Tables(path), cache=str(place / "cache"), unlabelled=unlabelled)
        dataset = prepared(config, (), None, 128, lambda line: None)
        assert bool(load_profile(dataset.folder).splits["train"].unlabelled) == left
