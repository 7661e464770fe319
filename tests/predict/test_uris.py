"""What the documents call their labels goes with a model, where a second file gave the names."""

from pathlib import Path
from typing import Any

import pytest
from train_runs import run, tiny

import xmlkernels as xk
from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.data.tables.options import Tables
from xmlkernels.serve.annif import Uris
from xmlkernels.serve.why import find_neighbours
from xmlkernels.training.linear import LinearConfig, train_linear
from xmlkernels.training.relabel import LabelsConfig, relabel

IDS = ["http://x/boil", "http://x/egg", "http://x/fry"]
NAMES = ["boiled", "eggs", "fried"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of URIs with names, and a ranker and a run that were trained on it."""
    at = tmp_path_factory.mktemp("uris")
    rows = ("boil an egg\t<http://x/boil> <http://x/egg>", "fry it\t<http://x/fry>") * 8
    (at / "t.tsv").write_text("\n".join(rows) + "\n")
    names = (f"<{uri}>\t{name}\n" for uri, name in zip(IDS, NAMES, strict=True))
    (at / "names.tsv").write_text("".join(names))
    tables = Tables(data=at / "t.tsv", label_file=at / "names.tsv")
    prepare(PrepareConfig(tables=tables, output=at / "set"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(at)
        train_linear(LinearConfig("set", output="ranker", min_df=1, threads=1))
        run(tiny(Path("set"), Path("run"), encoder="bow", min_df=1, table="bf16", epochs=1))
    return at


@pytest.mark.parametrize("name", ["ranker", "run", "shared ranker", "shared run"])
def test_the_uris_are_those_of_the_documents(name: str, made: Path, tmp_path: Path) -> None:
    kind = name.removeprefix("shared ")
    folder = made / kind
    if kind != name:
        folder = xk.save_pretrained(xk.load(folder), tmp_path / "shared")
    predictor = xk.load(folder)
    assert (predictor.label_names, predictor.label_ids) == (NAMES, IDS)
    uris = Uris(predictor, "urn:mine:")
    assert [uris.of(label) for label in range(3)] == IDS
    assert "<http://x/egg>\teggs\n" in list(uris.vocabulary())


@pytest.mark.parametrize("name", ["ranker", "run"])
def test_neighbours_are_found_from_another_folder(name: str, made: Path) -> None:
    """The settings name the dataset relative to where the training was started."""
    found = find_neighbours(xk.load(made / name), made / name, "", 100)
    assert found.reason == ""


def test_labels_that_are_added_have_no_uri(made: Path, tmp_path: Path) -> None:
    (tmp_path / "new.jsonl").write_text('{"name": "toasted", "text": "toast it"}\n')
    options: dict[str, Any] = {"add": str(tmp_path / "new.jsonl"), "sample": 4}
    relabel(LabelsConfig(str(made / "run"), output=str(tmp_path / "more"), **options))
    assert xk.load(tmp_path / "more").label_ids == [*IDS, "toasted"]
