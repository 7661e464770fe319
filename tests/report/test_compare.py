"""Runs side by side: metrics of each, differences on the same documents, settings and cost."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from train_runs import RECIPES, make_dataset

from xmlkernels import InputError
from xmlkernels.cli import compare as command
from xmlkernels.report.comparison import compare
from xmlkernels.training.linear import LinearConfig, train_linear


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A ranker, and a worse one that has seen fewer words."""
    base = tmp_path_factory.mktemp("runs")
    dataset = make_dataset(base / "raw", keep_texts=True)
    plain = RECIPES["linear"].replace(
        dataset=str(dataset), output=str(base / "a"), min_df=1, threads=1, report=False
    )
    assert isinstance(plain, LinearConfig)
    train_linear(plain)
    train_linear(replace(plain, output=str(base / "b"), max_features=8))
    return str(base / "a"), str(base / "b")


def test_metrics_settings_and_cost(runs: tuple[str, str]) -> None:
    found = compare(runs)
    for folder, metrics in zip(runs, found.metrics, strict=True):
        held = json.loads((Path(folder) / "metrics.json").read_text())
        assert metrics["P@1"] == pytest.approx(held["test"]["ranker"]["P@1"])
        assert metrics["RP@5"] == pytest.approx(held["test"]["ranker"]["RP@5"])
    one = found.differences[0]["P@1"]
    assert one.difference == pytest.approx(found.metrics[1]["P@1"] - found.metrics[0]["P@1"])
    assert one.low <= one.difference <= one.high < 0 and one.p < 0.01
    assert found.settings == {"max_features": [0, 8]}
    assert found.documents == 50 and all(x > 0 for x in found.cost["seconds"])
    assert {x.p for x in compare((runs[0], runs[0])).differences[0].values()} == {1.0}


def test_the_command(
    runs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main([*runs, "--json"])
    told = json.loads(capsys.readouterr().out)
    found = compare(runs)
    assert told["metrics"] == found.metrics and told["paired"]["seed"] == 0
    assert told["differences"][0]["P@5"]["p"] == found.differences[0]["P@5"].p
    dataset = Path(json.loads((Path(runs[0]) / "metrics.json").read_text())["options"]["dataset"])
    shutil.copytree(dataset, tmp_path / "moved")
    command.main([*runs, "--dataset", str(tmp_path / "moved")])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    told = f"P@1 {found.metrics[0]['P@1']:.2f} {found.metrics[1]['P@1']:.2f}"
    assert f"{told} The share of documents whose best prediction is right." in shown
    assert f"P@1 {found.differences[0]['P@1'].difference:+.2f} " in shown
    assert "max_features 0 8" in shown and "seconds" in shown
    command.main([runs[0], runs[0], "--dataset", str(tmp_path / "moved")])
    shown = capsys.readouterr().out
    assert "no setting differs" in shown and "settings that differ" not in shown
    tables = [line for line in shown.splitlines() if line.startswith(("│", "┃"))]
    assert tables and not any(re.search("[│┃] +[│┃]$", line) for line in tables)
    other = make_dataset(tmp_path / "raw", keep_texts=True, label_text=None)
    with pytest.raises(InputError, match=r"predictions for .*those for another \(hash"):
        command.main([*runs, "--dataset", str(other)])
    with pytest.raises(InputError, match="expected two runs or more, got 1"):
        command.main([runs[0]])
