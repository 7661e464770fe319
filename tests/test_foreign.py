"""Foreign folders: their code never runs, their pickles are never read, nobody is asked, and a
sentence says so.
"""

import builtins
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from train_runs import make_dataset, run, tiny

from xmlkernels import InputError
from xmlkernels.cli import predict
from xmlkernels.data.prepare import PrepareConfig, prepare
from xmlkernels.data.tokens import load_tokenizer
from xmlkernels.nn.encoder import Encoder
from xmlkernels.predict.model import Predictor

V1 = Path(__file__).parent / "fixtures" / "v1"
CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import BertConfig as Config, BertModel as Model, PreTrainedTokenizerFast as Words
"""


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object) -> str:
        raise AssertionError("standard input was asked")

    monkeypatch.setattr(builtins, "input", ask)
    monkeypatch.setattr(sys, "stdin", None)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


def edit(path: Path, **entries: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.fixture
def folder(tmp_path: Path, marker: Path) -> Path:
    """An encoder with its tokenizer, and a module that shows when it is run."""
    shutil.copytree(V1 / "encoder", tmp_path / "foreign")
    (tmp_path / "foreign" / "foreign_code.py").write_text(CODE.format(marker=str(marker)))
    return tmp_path / "foreign"


def map_config(folder: Path) -> None:
    named = {
        "AutoConfig": "foreign_code.Config",
        "AutoModel": "foreign_code.Model",
        "AutoTokenizer": "foreign_code.Words",
    }
    edit(folder / "config.json", auto_map=named, model_type="mine")


def map_known(folder: Path) -> None:
    """transformers has the class too, and would take its own without a word, other answers or
    not.
    """
    edit(folder / "config.json", auto_map={"AutoModel": "foreign_code.Model"})


def map_inside(folder: Path) -> None:
    edit(
        folder / "config.json",
        text_config={"auto_map": {"AutoModel": "someone/else--foreign_code.Model"}},
    )


def map_tokenizer(folder: Path) -> None:
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["foreign_code.Words", None]},
        tokenizer_class="Words",
    )


def map_list(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", auto_map=["foreign_code.Words", None])


@pytest.mark.parametrize("change", [map_config, map_known, map_inside, map_tokenizer, map_list])
def test_code_of_an_encoder_or_tokenizer_never_runs(
    folder: Path, marker: Path, change: Callable[[Path], None]
) -> None:
    change(folder)
    for load in (Encoder.from_pretrained, load_tokenizer):
        with pytest.raises(InputError, match="for no other code runs, got auto_map"):
            load(folder)
    assert not marker.exists() and "foreign_code" not in sys.modules


def pickled(folder: Path, name: str = "pytorch_model.bin") -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / name)
    (folder / "model.safetensors").unlink()


def shards(folder: Path, names: dict[str, str] | list[str]) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    whole = names or dict.fromkeys(weights, "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": whole})
    )


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (pickled, "weights in model.safetensors, got pytorch_model.bin, a file that can hold code"),
        (lambda folder: pickled(folder, "model.pt"), "got model.pt, a file that can hold code"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (
            lambda folder: shards(folder, {"w": "pytorch_model.bin"}),
            "safetensors files of the folder, got 'pytorch_model.bin'",
        ),
        (
            lambda folder: shards(folder, {"w": "../a.safetensors"}),
            "safetensors files of the folder, got '../a",
        ),
        (lambda folder: shards(folder, {"w": "b.safetensors"}), "b.safetensors: expected a file"),
        (
            lambda folder: shards(folder, ["a.safetensors"]),
            "weight_map: expected the file of each weight, got list",
        ),
        (
            lambda folder: edit(folder / "config.json", transformers_weights="x.bin"),
            "transformers_weights.*'x.bin'",
        ),
        (adapter, "a whole model, got an adapter"),
        (
            lambda folder: (folder / "config.json").write_text("[]"),
            "config.json: expected an object",
        ),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff"), "JSON in UTF-8"),
        (
            lambda folder: edit(folder / "config.json", hidden_size="many"),
            "a model that transformers can load",
        ),
        (
            lambda folder: edit(folder / "config.json", num_attention_heads=0),
            "a model that transformers can load",
        ),
    ],
)
def test_what_cannot_be_read_without_risk_is_refused(
    folder: Path, change: Callable[[Path], None], match: str
) -> None:
    change(folder)
    with pytest.raises(InputError, match=match):
        Encoder.from_pretrained(folder)


def test_pickles_beside_safetensors_are_left_alone(folder: Path) -> None:
    """Most models of the hub hold both."""
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    plain = Encoder.from_pretrained(folder)
    shards(folder, {})
    parts = Encoder.from_pretrained(folder)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), parts.parameters(), strict=True)
    )


def test_hub_names_are_loaded_by_the_same_rules(
    folder: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's side is a folder here: what transformers is asked for is what counts."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    asked: list[dict[str, Any]] = []
    for kind in (AutoConfig, AutoModel, AutoTokenizer):
        real = kind.from_pretrained

        def fetch(name: str, *arguments: Any, real: Any = real, **options: Any) -> Any:
            asked.append(options)
            return real(str(folder) if name == "someone/model" else name, *arguments, **options)

        monkeypatch.setattr(kind, "from_pretrained", fetch)
    Encoder.from_pretrained("someone/model")
    load_tokenizer("someone/model")
    assert all(options["trust_remote_code"] is False for options in asked) and len(asked) >= 3
    assert [options.get("use_safetensors") for options in asked].count(True) == 1
    map_config(folder)
    with pytest.raises(InputError, match="custom code.*no other code runs"):
        Encoder.from_pretrained("someone/model")
    edit(folder / "config.json", model_type="bert")
    with pytest.raises(InputError, match="no other code runs"):
        Encoder.from_pretrained("someone/model")
    map_tokenizer(folder)
    with pytest.raises(InputError, match="code"):
        load_tokenizer("someone/model")
    assert not marker.exists()


def test_commands_refuse_foreign_code(
    folder: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset(tmp_path / "raw")
    (tmp_path / "x.txt").write_text("w0\n")
    (tmp_path / "y.txt").write_text("1 1\n0:1\n")
    map_config(folder)
    map_tokenizer(folder)
    with pytest.raises(InputError, match="no other code runs"):
        run(tiny(dataset, tmp_path / "run", encoder=str(folder)))
    with pytest.raises(InputError, match="no other code runs"):
        texts = {"train_text": tmp_path / "x.txt", "train_labels": tmp_path / "y.txt"}
        prepare(PrepareConfig(output=tmp_path / "prepared", tokenizer=str(folder), **texts))
    shutil.copytree(V1 / "run", tmp_path / "old")
    shutil.copy(folder / "foreign_code.py", tmp_path / "old" / "checkpoint" / "tokenizer")
    shutil.copy(folder / "tokenizer_config.json", tmp_path / "old" / "checkpoint" / "tokenizer")
    with pytest.raises(InputError, match="no other code runs"):
        predict.run(predict.Options(str(tmp_path / "old"), text="w0"))
    assert not marker.exists()
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "prepared").exists()


def test_a_checkpoint_builds_the_class_of_transformers(tmp_path: Path, marker: Path) -> None:
    """Runs from before began with repositories whose class transformers has, and kept the name of
    their code.
    """
    shutil.copytree(V1 / "run", tmp_path / "old")
    path = tmp_path / "old" / "checkpoint" / "best" / "state.json"
    head = json.loads(path.read_text())
    head["state"]["model"]["encoder"]["model"]["auto_map"] = {"AutoModel": "foreign_code.Model"}
    path.write_text(json.dumps(head))
    shutil.copy(V1 / "encoder" / "config.json", path.parent)
    path.with_name("foreign_code.py").write_text(CODE.format(marker=str(marker)))
    texts = ["w0 w1", "w30"]
    ours, theirs = (
        Predictor.load(p).predict_arrays(texts, 3) for p in (tmp_path / "old", V1 / "run")
    )
    assert all((a == b).all() for a, b in zip(ours, theirs, strict=True)) and not marker.exists()
    head["state"]["model"]["encoder"]["model"]["model_type"] = "mine"
    path.write_text(json.dumps(head))
    with pytest.raises(InputError, match="encoder configuration"):
        Predictor.load(tmp_path / "old")


def test_a_file_of_weights_alone_is_no_encoder(folder: Path) -> None:
    save_file({"w": torch.ones(1)}, folder / "w.safetensors")
    with pytest.raises(InputError, match="w.safetensors"):
        Encoder.from_pretrained(folder / "w.safetensors")
