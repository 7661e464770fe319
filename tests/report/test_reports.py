"""The report of a run: what it says is what the files say, in one file that fetches nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from report_runs import EVIL
from scipy.sparse import csr_matrix, load_npz
from train_runs import make_dataset

from xmlkernels import InputError
from xmlkernels.cli import report as command
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.vectorizer import Vectorizer
from xmlkernels.ranker.features import Features
from xmlkernels.ranker.matcher import ClusterMatcher
from xmlkernels.report import numbers
from xmlkernels.report.page import page_of
from xmlkernels.report.run import Run, open_run

VOID = {"meta", "link", "br"}
PARTS = (
    "summary", "data", "curves", "metrics", "frequency", "shortlists", "calibration", "documents",
    "cost", "settings",
)  # fmt: skip


class Page(HTMLParser):
    """Tags that are balanced, what is on the page as text, and every address in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: Counter[str] = Counter()
        self.texts: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "src", "action", "data"):
                self.addresses.append(str(value))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.mark.parametrize("name", ["tiny", "cascade", "linear", "forest"])
def test_it_says_what_the_files_say(name: str, folders: dict[str, Path]) -> None:
    text = (folders[name] / "report.html").read_text("utf-8")
    page = Page(text)
    assert [x for x in page.ids if x in PARTS] == list(PARTS) and page.seen["h1"] == 1
    assert page.addresses and all(x[1:] in page.ids and x[0] == "#" for x in page.addresses)
    assert page.seen["script"] == 0 and not re.search(r"https?:|url\(|@import", text)
    report = json.loads((folders[name] / "metrics.json").read_text())
    found = {"linear": report["test"].get("both"), "forest": report["test"].get("all trees")}.get(
        name, report["test"]
    )
    for metric in ("P@1", "nDCG@5", "RP@5", "microF1@5"):
        assert f"{metric} {found[metric]:.2f} " in page.text, metric
    assert f"{report['annif']['F1 score (doc avg)']:.4f}" in page.text
    assert f"{EVIL}w" in page.text and "<img" not in text
    if name == "cascade":
        for level in found["levels"]:
            assert f" {level['shortlist_recall']:.2f} " in page.text


def test_what_a_ranker_took_and_what_its_clusters_keep(
    folders: dict[str, Path], dataset: Path
) -> None:
    data = Dataset.open(dataset)
    report = json.loads((folders["linear"] / "metrics.json").read_text())
    kept = report["shortlists"]["the clusters"]
    features = Vectorizer.load(folders["linear"] / "vectorizer").transform(
        data.splits["test"].texts
    )
    matcher = ClusterMatcher.load(folders["linear"] / "clusters")
    listed = matcher.shortlist(Features.join(None, features))
    pattern = csr_matrix((np.ones(listed.nnz), listed.indices, listed.indptr), listed.shape)
    true = data.splits["test"].labels
    assert kept["labels"] == listed.nnz / len(data.splits["test"])
    assert kept["recall"] == pytest.approx(100 * pattern.multiply(true).sum() / true.nnz)
    page = Page((folders["linear"] / "report.html").read_text("utf-8"))
    assert f"the clusters {kept['labels']:.2f} {kept['recall']:.2f}" in page.text
    assert f"{report['peak_rss_mb']:,.0f} MB of memory" in page.text
    assert f"scikit-learn {report['environment']['scikit-learn']}" in page.text
    forest = Page((folders["forest"] / "report.html").read_text("utf-8"))
    for told in ("tree 0", "tree 1", "TF-IDF", "clusters", "ranker", "evaluation", "MB of memory"):
        assert told in forest.text, told


def test_the_course_is_that_of_the_log(folders: dict[str, Path]) -> None:
    text = (folders["tiny"] / "report.html").read_text("utf-8")
    for title in ("Training loss", "Validation metrics", "Learning rates", "Memory"):
        assert f"<strong>{title}</strong>" in text, title
    lines = list(map(json.loads, (folders["tiny"] / "log.jsonl").read_text().splitlines()))
    trained = [line for line in lines if "split" not in line]
    assert max(x["encoder_lr"] for x in trained) > trained[-1]["encoder_lr"] > 0
    assert all(x["table_lr"] > 0 and x["memory_mb"] > 10 for x in trained)
    loss = re.search(r"<strong>Training loss</strong>.*?<polyline[^>]*points=\"([^\"]*)\"", text)
    assert loss is not None and len(loss[1].split()) == sum(x["loss"] is not None for x in trained)
    assert "no course to draw" in (folders["linear"] / "report.html").read_text("utf-8")


def test_calibration_and_documents_by_hand(folders: dict[str, Path], dataset: Path) -> None:
    opened = open_run(folders["tiny"])
    found = numbers.calibration(opened, opened.values)
    true = opened.split.labels.toarray().astype(bool)
    pairs = [
        (1 / (1 + np.exp(-float(value))), true[number, label])
        for number in range(len(true))
        for value, label in zip(opened.values[number, :10], opened.rows[number, :10], strict=True)
    ]
    for place in range(10):
        inside = [(p, y) for p, y in pairs if min(int(p * 10), 9) == place]
        assert found.count[place] == len(inside)
        if inside:
            assert found.said[place] == pytest.approx(np.mean([p for p, _ in inside]))
            assert found.right[place] == pytest.approx(np.mean([y for _, y in inside]))
    held = [(c, abs(a - b)) for c, a, b in zip(found.count, found.said, found.right, strict=True)]
    assert found.error == pytest.approx(sum(c * d for c, d in held if c) / len(pairs))
    best, worst = numbers.best_and_worst(opened)
    gains = [one.gain for one in (*worst, *best)]
    assert min(gains) == worst[0].gain and max(gains) == best[0].gain
    scores = load_npz(folders["tiny"] / "predictions.npz").toarray()[worst[0].number]
    assert worst[0].predicted[0][0] == int(scores.argmax())
    assert worst[0].true == opened.split.labels[worst[0].number].indices.tolist()
    page = Page((folders["tiny"] / "report.html").read_text("utf-8"))
    assert opened.split.texts[worst[0].number] in page.text
    depths = numbers.recall_by_depth(opened)
    assert depths[max(depths)] == pytest.approx(
        100 * np.mean([true[n, rows].sum() / 2 for n, rows in enumerate(opened.rows)])
    )


def test_later_elsewhere_and_of_another_dataset(
    folders: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    before = (folders["linear"] / "report.html").read_text("utf-8")
    copy, moved = tmp_path / "linear", tmp_path / "data"
    shutil.copytree(folders["linear"], copy)
    (copy / "report.html").unlink()
    command.main([str(copy)])
    assert (copy / "report.html").read_text("utf-8") == before
    shutil.copytree(dataset, moved)
    text = (copy / "metrics.json").read_text().replace(str(dataset), str(tmp_path / "gone"))
    (copy / "metrics.json").write_text(text)
    with pytest.raises(
        InputError, match="expected the dataset of the run.*name its folder by --da"
    ):
        command.main([str(copy)])
    command.main([str(copy), "--dataset", str(moved)])
    other = make_dataset(tmp_path / "other", keep_texts=True)
    with pytest.raises(InputError, match=r"hash .*name the run's own by --dataset"):
        command.main([str(copy), "--dataset", str(other)])
    with pytest.raises(
        InputError, match="metrics.json: .*name the output folder of a finished run"
    ):
        command.main([str(tmp_path)])


def test_without_profile_texts_or_split(folders: dict[str, Path], dataset: Path) -> None:
    opened = open_run(folders["tiny"])

    def changed(**more: object) -> Run:
        return Run(**{**{k: getattr(opened, k) for k in Run.__dataclass_fields__}, **more})

    page = Page(page_of(changed(split=None)))
    assert "nothing to measure" in page.text and "metrics" not in page.ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xmlkernels.report.background.PROFILE", "no such file")
        patch.setattr(type(opened.split), "some_texts", lambda *_: {})
        page = Page(page_of(opened))
    assert "There is no data profile" in page.text and "keeps no texts" in page.text


def test_a_few_texts_are_read(dataset: Path) -> None:
    split = Dataset.open(dataset).splits["test"]
    assert split.some_texts({0, 7}) == {0: split.texts[0], 7: split.texts[7]}
    assert split.some_texts(set()) == {}
