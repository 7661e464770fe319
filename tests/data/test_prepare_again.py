"""A dataset folder is kept or made again by the content of its inputs."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from raw_sets import text_files
from tiny_tokenizer import make_tokenizer
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.data.tokens import Tokenizer
from xmlkernels.errors import InputError
from xmlkernels.locks import own_place

pytestmark = pytest.mark.filterwarnings("ignore::xmlkernels.files.DataWarning")


def test_same_inputs_are_used_again(
    config: PrepareConfig, tmp_path: Path, tokenizer_folder: Path
) -> None:
    prepare(config)
    before, told = (config.output / "manifest.json").stat(), []  # type: ignore[var-annotated]
    copies = text_files(tmp_path / "elsewhere")
    again = replace(config, **copies, overwrite=True, tokenizer=str(make_tokenizer(tmp_path / "t")))  # type: ignore[arg-type]
    prepare(again, told.append)
    assert told == [f"{config.output}: made from the same inputs before, used again"]
    assert (config.output / "manifest.json").stat().st_ino == before.st_ino


def other_tokenizer(config: PrepareConfig, tmp_path: Path) -> PrepareConfig:
    return replace(config, tokenizer=str(make_tokenizer(tmp_path / "case", lower=False)))


def other_content(config: PrepareConfig, tmp_path: Path) -> PrepareConfig:
    (tmp_path / "raw" / "tst_X.txt").write_text("w10 w11\nw13\n")
    return config


CHANGES = [
    other_tokenizer,
    other_content,
    *(
        lambda config, _, options=options: replace(config, **options)
        for options in (
            {"max_length": 6},
            {"keep_texts": True},
            {"unlabelled": "drop"},
            {"propensity_a": 0.6},
            {"validation_share": 0.2},
            {"name": "n"},
            {"label_text": None},
            {"merge_duplicates": True},
        )
    ),
]


@pytest.mark.parametrize("change", CHANGES)
def test_other_inputs_need_overwrite(config: PrepareConfig, tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    first = prepare(config)
    changed = change(config, tmp_path)
    with pytest.raises(InputError, match="--overwrite"):
        prepare(changed)
    assert Dataset.open(config.output, verify=True).key == first.key
    second = prepare(replace(changed, overwrite=True))
    assert second.key != first.key and Dataset.open(config.output, verify=True).key == second.key
    assert [path.name for path in config.output.parent.iterdir()] == ["small"]


def test_damaged_dataset(config: PrepareConfig) -> None:
    prepare(config)
    path = config.output / "train" / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match="tokens.bin.*make it again with --overwrite"):
        prepare(config)
    prepare(replace(config, overwrite=True))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\x07")
    prepare(replace(config, overwrite=True))
    assert path.read_bytes() == data


def test_foreign_folder_is_never_touched(config: PrepareConfig) -> None:
    config.output.mkdir(parents=True)
    (config.output / "thesis.tex").write_text("ten years")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="got other files; choose another --output"):
            prepare(replace(config, overwrite=overwrite))
    (config.output / "thesis.tex").rename(config.output.parent / "kept")
    assert prepare(config).num_labels == 4, "an empty folder is a free place"
    with pytest.raises(InputError, match="got a file"):
        prepare(replace(config, output=config.output.parent / "kept", overwrite=True))


@pytest.mark.parametrize(
    "manifest", ["theirs", '{"name": "an app"}', "", '{"format": "xmlkernels-dataset"}']
)
def test_a_bare_manifest_costs_the_files_beside_it_nothing(
    config: PrepareConfig, manifest: str
) -> None:
    config.output.mkdir(parents=True)
    (config.output / "manifest.json").write_text(manifest)
    (config.output / "thesis.tex").write_text("ten years")
    with pytest.raises(InputError, match="other files in it: .*nothing was deleted"):
        prepare(replace(config, overwrite=True))
    assert (config.output / "thesis.tex").read_text() == "ten years"
    (config.output / "thesis.tex").unlink()
    if "dataset" not in manifest:
        with pytest.raises(InputError, match="other files in it: manifest.json"):
            prepare(replace(config, overwrite=True))


def test_a_damaged_manifest_is_replaced_with_its_dataset_but_no_foreign_file(
    config: PrepareConfig,
) -> None:
    prepare(config)
    (config.output / "manifest.json").write_text("{ cut sho")
    (config.output / "train" / "notes").write_text("mine")
    with pytest.raises(InputError, match="other files in it: train/notes"):
        prepare(replace(config, overwrite=True))
    (config.output / "train" / "notes").unlink()
    prepare(replace(config, overwrite=True))
    assert Dataset.open(config.output, verify=True).num_labels == 4


def test_what_a_killed_process_left_is_cleared_or_put_back(config: PrepareConfig) -> None:
    first = prepare(config)
    hidden = config.output.with_name(".small.0123456789ab.old")
    config.output.rename(hidden)  # killed between the two renames
    config.output.with_name(".small.0123456789ab.part").mkdir()
    assert prepare(config).content_hash == first.content_hash and not hidden.exists()
    hidden.mkdir()  # killed before it could remove the old one
    prepare(replace(config, max_length=4, overwrite=True))
    assert [path.name for path in config.output.parent.iterdir()] == ["small"]


def test_one_cache_for_two_at_once(config: PrepareConfig) -> None:
    """The second waits, says so, and uses what the first has made; where none is to wait it is
    refused.
    """
    told: list[str] = []
    (first := config.output.parent).mkdir(parents=True)
    with own_place(config.output):
        with pytest.raises(InputError, match=f"--output: .*held by process {os.getpid()}"):
            prepare(config)

        def tell(line: str) -> None:
            told.append(line)
            if "waiting" in line:
                go.set()

        go = threading.Event()
        waiting = threading.Thread(target=prepare, args=(config, tell), kwargs={"wait": True})
        waiting.start()
        assert go.wait(60)
        made = prepare(replace(config, output=first / "other", name="small"))
        (first / "other").rename(config.output)  # as the first one does at its end
    waiting.join(60)
    assert any("used again" in line for line in told)
    assert Dataset.open(config.output).content_hash == made.content_hash


@pytest.mark.parametrize("standing", [False, True])
def test_nothing_half_written(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch, standing: bool
) -> None:
    if standing:
        prepare(config)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tokenizer, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(replace(config, max_length=4, overwrite=True))
    assert [path.name for path in config.output.parent.glob("*")] == (["small"] if standing else [])
    if standing:
        assert Dataset.open(config.output, verify=True).max_length == 5


def test_folder_of_another_process(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What appeared at the place while this run was building stays."""

    def appear(self: Tokenizer, folder: Path) -> None:
        config.output.mkdir()
        (config.output / "manifest.json").write_text("theirs")

    monkeypatch.setattr(Tokenizer, "save", appear)
    with pytest.raises(InputError, match="a folder made meanwhile"):
        prepare(config)
    assert (config.output / "manifest.json").read_text() == "theirs"
    assert [path.name for path in config.output.parent.iterdir()] == ["small"]
