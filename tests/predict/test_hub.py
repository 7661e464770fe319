"""Folders to be shared: the same answers from them, a model card, and the Hub by a fake of it."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xmlkernels as xk
from xmlkernels import InputError
from xmlkernels.predict.base import HUB_NAMES, read_names

TEXTS = ["w0 w1 w2", "w30 w31", "", "w7 w8 w9 w50 w51"]
KINDS = ("whole", "beside", "ranker", "forest")


def loaded(made: Path, name: str) -> Any:
    return xk.load(made / name, made / "whole" if name == "beside" else None)


@pytest.mark.parametrize("name", KINDS)
def test_a_shared_folder_answers_alike(made: Path, tmp_path: Path, name: str) -> None:
    own = loaded(made, name)
    folder = xk.save_pretrained(own, tmp_path / "shared", license="apache-2.0")
    shutil.move(folder, tmp_path / "moved")
    folder = tmp_path / "moved"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md", ".model"}
    # An encoder's configuration names two labels that are nobody's; ours are in labels.txt alone.
    assert not any("LABEL_2" in path.read_text() for path in files if path.suffix == ".json")
    assert "id2label" not in (folder / "config.json").read_text()
    first = folder / "tree0" if name == "forest" else folder
    assert (first / HUB_NAMES).is_file() and not list(folder.rglob("label_names.txt"))
    again = xk.from_pretrained(folder)
    assert again.label_names == own.label_names and again.calibration is not None
    assert list(again.predict(TEXTS, 5)) == list(own.predict(TEXTS, 5))
    # What it came from may be saved once more, also in its own place.
    xk.save_pretrained(again, tmp_path / "twice")
    assert list(xk.load(tmp_path / "twice").predict(TEXTS, 5)) == list(own.predict(TEXTS, 5))
    assert xk.save_pretrained(own, tmp_path / "twice").is_dir()
    with pytest.raises(InputError, match="the folder that it was loaded from"):
        xk.save_pretrained(again, folder)
    assert list(xk.load(folder).predict(TEXTS, 5)) == list(own.predict(TEXTS, 5))


def test_the_checkpoint_is_shared_without_its_optimizer(made: Path, tmp_path: Path) -> None:
    folder = xk.save_pretrained(loaded(made, "whole"), tmp_path / "shared")
    before = made / "whole" / "checkpoint" / "best" / "tensors.safetensors"
    after = folder / "best" / "tensors.safetensors"
    assert after.stat().st_size < 0.7 * before.stat().st_size


def test_the_card_says_what_the_model_is(made: Path, tmp_path: Path) -> None:
    report = json.loads((made / "whole" / "metrics.json").read_text())
    folder = xk.save_pretrained(loaded(made, "whole"), tmp_path / "shared", license="mit")
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: xmlkernels\n") and "license: mit\n" in card
    assert f"{report['test']['P@1']:.2f}" in card and report["dataset_hash"] in card
    assert f"{report['calibration']['test']['after']:.3f}" in card
    assert "xk.from_pretrained(" in card and '"epochs": 3' in card and str(made) not in card
    plain = (xk.save_pretrained(loaded(made, "ranker"), tmp_path / "r") / "README.md").read_text()
    assert "License: none is stated." in plain and "license:" not in plain and "| test |" in plain
    assert str(made) not in plain


def test_other_folders_are_left_alone(made: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="expected an empty folder, got one that holds mine.txt"):
        xk.save_pretrained(loaded(made, "ranker"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


class FakeApi:
    """What ModelHubMixin asks of HfApi; a repository is a folder of snapshots."""

    root: Path

    def __init__(self, **_: Any) -> None:
        pass

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        return type("Repository", (), {"repo_id": repo_id})

    def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> str:
        shutil.copytree(folder_path, self.root / repo_id)
        return f"https://hub/{repo_id}"


def test_pushed_and_found_again(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot of the Hub's cache holds links to its files."""
    import huggingface_hub
    import huggingface_hub.hub_mixin

    FakeApi.root = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", FakeApi)
    own = loaded(made, "beside")
    assert xk.push_to_hub(own, "me/words", license="mit", private=True) == "https://hub/me/words"
    pushed, snapshot = FakeApi.root / "me/words", tmp_path / "snapshot"
    assert "license: mit" in (pushed / "README.md").read_text()
    for path in pushed.rglob("*"):
        if path.is_file():
            link = snapshot / path.relative_to(pushed)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    asked: dict[str, Any] = {}

    def download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = xk.from_pretrained("me/words", revision="v1", offline=True, threads=1)
    assert asked["repo_id"] == "me/words" and asked["revision"] == "v1"
    assert asked["local_files_only"] and not any("bin" in name for name in asked["allow_patterns"])
    assert list(found.predict(TEXTS, 5)) == list(own.predict(TEXTS, 5))
    # The same by ModelHubMixin's own methods.
    monkeypatch.setattr(
        huggingface_hub.hub_mixin,
        "hf_hub_download",
        lambda filename, **_: str(snapshot / filename),
    )
    model = xk.HubModel.from_pretrained("me/words", revision="v2", force_download=True, threads=1)
    assert asked["revision"] == "v2" and asked["force_download"] and not asked["local_files_only"]
    assert isinstance(model, huggingface_hub.ModelHubMixin) and model.license is None
    assert list(model.predict(TEXTS, 5)) == list(own.predict(TEXTS, 5))
    address = xk.HubModel(own, "mit").save_pretrained(
        tmp_path / "both", push_to_hub=True, repo_id="me/again", private=True
    )
    assert address == "https://hub/me/again"
    assert "license: mit" in (FakeApi.root / "me/again" / "README.md").read_text()


def test_a_hub_model_is_a_folder_too(made: Path, tmp_path: Path) -> None:
    own = loaded(made, "whole")
    model = xk.HubModel(own, license="mit")
    assert model.save_pretrained(tmp_path / "shared") is None
    assert model.save_pretrained(tmp_path / "shared") is None  # its own is replaced
    assert "license: mit" in (tmp_path / "shared" / "README.md").read_text()
    again = xk.HubModel.from_pretrained(tmp_path / "shared", threads=1)
    assert again.predictor.threads == 1
    assert list(again.predict(TEXTS, 3)) == list(own.predict(TEXTS, 3))
    assert list(again.predict_batches([TEXTS], 3)) == list(own.predict_batches([TEXTS], 3))
    assert np.array_equal(again.embed(TEXTS), own.embed(TEXTS))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="expected an empty folder"):
        model.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "config.json").read_text() == "{}"
    for name in ("config", "model_card_kwargs"):
        with pytest.raises(InputError, match=f"{name}: expected None: the model has its own"):
            model.save_pretrained(tmp_path / "new", **{name: {"a": 1}})
    with pytest.raises(InputError, match="me/nothing: expected a folder or a model on the Hub"):
        xk.HubModel.from_pretrained("me/nothing", local_files_only=True)


def test_without_the_extra_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "import xmlkernels as xk\n"
        "for ask in (lambda: xk.HubModel(None), lambda: xk.HubModel.from_pretrained('a/b'),\n"
        "            lambda: xk.push_to_hub(None, 'a/b'), lambda: xk.from_pretrained('a/b')):\n"
        "    try: ask()\n"
        "    except xk.InputError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all('pip install "xmlkernels[hub]"' in line for line in lines)


def test_no_such_model_is_one_sentence() -> None:
    with pytest.raises(InputError, match="me/nothing: expected a folder or a model on the Hub"):
        xk.from_pretrained("me/nothing", offline=True)


def test_a_million_names_are_read_in_two_seconds(tmp_path: Path) -> None:
    labels = 1_000_000
    (tmp_path / HUB_NAMES).write_text("".join(f"a label of number {n}\n" for n in range(labels)))
    began = time.process_time()
    names = read_names(tmp_path, labels)
    assert time.process_time() - began < 2 and names is not None and len(names) == labels
