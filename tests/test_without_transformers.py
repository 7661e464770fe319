"""A bag of words and the ranker do without transformers and tokenizers; an encoder says so."""

import subprocess
import sys
from pathlib import Path

import pytest

import xmlkernels as xk

ROOT = Path(__file__).resolve().parents[1]
# None in their place makes every import of them fail, as if they were not installed.
BLOCKED = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules["transformers"] = sys.modules["tokenizers"] = None
from xmlkernels.cli.main import main
def command(*words):
    try:
        main([*words])
    except SystemExit as ended:
        assert not ended.code, words
"""
RUN = """
import xmlkernels as xk

texts = [f"w{n % 7} w{n % 3} w{n % 5}" for n in range(60)]
labels = [[f"seven {n % 7}", f"three {n % 3}"] for n in range(60)]
data = xk.Dataset.from_texts("texts", (texts[:40], labels[:40]), test=(texts[40:], labels[40:]))
small = {"threads": 1, "bow_width": 16, "epochs": 2, "batch": 8, "min_df": 1, "max_features": 0}
xk.train(xk.RECIPES["bow"].replace(dataset="texts", output="run", label_text=True, **small))
(answer,) = xk.load("run").predict(["w0 w1"], k=2)
assert len(answer) == 2 and answer[0].name in data.label_names

with open("X.txt", "w") as x, open("Y.txt", "w") as y, open("bags.txt", "w") as bags:
    bags.write("40 12 7\\n")
    for n in range(40):
        x.write(texts[n] + "\\n")
        y.write(f"{n % 7}\\n")
        bags.write(f"{n % 7} {n % 3}:1 {5 + n % 5}:0.5\\n")
command("prepare", "--source", "bow", "--train-text", "bags.txt", "--output", "bags")
command("train", "bow", "--dataset", "bags", "--output", "bagrun", "--epochs", "1")
command("prepare", "--train-text", "X.txt", "--train-labels", "Y.txt", "--output", "lines")
command("tree", "lines", "--output", "tree", "--depths", "1")
command("rank", "--dataset", "texts", "--output", "ranker", "--one-vs-all", "--threads", "1")
command("predict", "--ranker", "ranker", "--text", "w0 w1")
assert len(next(iter(xk.load("ranker").predict(["w0 w1"], k=3)))) == 3
"""
LOADED = '\nprint(sorted(n for n in ("transformers", "tokenizers") if sys.modules.get(n)))\n'


def process(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_bag_of_words_and_the_ranker(tmp_path: Path) -> None:
    done = process(BLOCKED + RUN + LOADED, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "bagrun" / "metrics.json").is_file()
    assert (tmp_path / "tree" / "tree.safetensors").is_file()


MISSING = r"expected the package tokenizers, got no such package; pip install transformers"


@pytest.mark.parametrize(
    ("wanted", "where"),
    [
        ("xk.Encoder.from_pretrained('some/encoder')", "encoder some/encoder"),
        ("xk.Encoder.tiny(vocab_size=8)", "tiny encoder"),
        ("xk.Dataset.from_texts('d', (['a'], [[0]]), tokenizer='some/words')", "some/words"),
        ("xk.load('run')", "tokenizer"),
    ],
)
def test_what_needs_them_says_how_to_install_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wanted: str, where: str
) -> None:
    (tmp_path / "run").symlink_to(ROOT / "tests" / "fixtures" / "v1" / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(xk.InputError, match=MISSING) as told:
        eval(wanted, {"xk": xk})
    assert where in str(told.value)
