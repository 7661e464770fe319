"""`--pooling cls` where the class token stands last, as XLNet's tokenizer sets it: trained, saved
and served.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_runs
import transformers
from train_runs import LABELS, cascade, evaluator, make_dataset, make_tree, run, tiny

from xmlkernels import InputError
from xmlkernels.checkpoint import CheckpointFolder, save
from xmlkernels.data.dataset import Dataset
from xmlkernels.data.tokens import load_tokenizer
from xmlkernels.nn.encoder import Encoder
from xmlkernels.predict.model import Predictor

from tiny_tokenizer import WORDS, make_tokenizer  # isort: skip  # train_runs has put tests/data on the path

LAST = "$A [SEP] [CLS]"


def xlnet() -> Any:
    torch.manual_seed(0)
    config = transformers.XLNetConfig(
        vocab_size=len(WORDS) + 4, d_model=32, n_layer=2, n_head=4, d_inner=64, dropout=0.0
    )
    return transformers.XLNetModel(config)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a tiny XLNet and its tokenizer."""
    folder = tmp_path_factory.mktemp("xlnet")
    xlnet().save_pretrained(folder)
    return make_tokenizer(folder, template=LAST)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train_runs, "make_tokenizer", lambda folder: make_tokenizer(folder, template=LAST)
        )
        return make_dataset(tmp_path_factory.mktemp("raw"))


def test_the_tokenizer_says_where_its_class_token_stands(tmp_path: Path) -> None:
    for name, options, expected in (
        ("bert", {}, "first"),
        ("xlnet", {"template": LAST}, "last"),
        ("none", {"specials": False}, None),
        ("other", {"template": "$A [SEP]"}, None),
    ):
        assert load_tokenizer(make_tokenizer(tmp_path / name, **options)).class_position == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("pad_left", [False, True])
def test_the_last_real_token_is_read_whichever_side_is_padded(pad_left: bool) -> None:
    encoder = Encoder(xlnet(), pooling="cls", class_token="last").eval()
    ids = torch.zeros(3, 6, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, count in enumerate((6, 4, 2)):
        where = slice(6 - count, 6) if pad_left else slice(0, count)
        ids[row, where] = torch.arange(5, 5 + count) + row
        mask[row, where] = 1
    with torch.no_grad():
        out = encoder(ids, mask)
        for row in range(3):
            real = ids[row][mask[row] == 1][None]
            hidden = encoder.model(
                input_ids=real, attention_mask=torch.ones_like(real)
            ).last_hidden_state
            torch.testing.assert_close(out[row], hidden[0, -1], rtol=1e-4, atol=1e-5)


def test_the_position_is_saved_and_older_descriptions_mean_the_first() -> None:
    last = Encoder(xlnet(), pooling="cls", class_token="last")
    assert Encoder.from_config(last.encoder_config()).class_token == "last"
    bert = Encoder.tiny(50, pooling="cls")
    assert "class_token" not in bert.encoder_config()
    assert Encoder.from_config(bert.encoder_config()).class_token == "first"
    with pytest.raises(InputError, match="class_token: expected 'first' or 'last', got 'middle'"):
        Encoder.tiny(50, class_token="middle")


def test_a_run_from_before_goes_on_as_it_began(
    model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint says nothing of a class token, and was trained on the first one."""
    config = tiny(dataset, tmp_path / "run", encoder=str(model), pooling="cls", epochs=1)
    seen: list[str] = []
    whole = evaluator.Evaluator.finish
    monkeypatch.setattr(
        evaluator.Evaluator,
        "finish",
        lambda self: seen.append(self.model.encoder.class_token) or whole(self),
    )
    run(config)
    folder = CheckpointFolder(tmp_path / "run" / "checkpoint")
    tensors, state = folder.load("last")
    assert state["model"]["encoder"].pop("class_token") == "last"
    save(tmp_path / "run" / "checkpoint" / "last", tensors, state)
    run(replace(config, resume=True))
    assert seen == ["last", "first"]


@pytest.mark.parametrize("kind", ["end_to_end", "cascade"])
def test_both_models_are_trained_and_served_on_the_last_token(
    kind: str, model: Path, dataset: Path, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"encoder": str(model), "pooling": "cls", "epochs": 2, "dropout": 0.0}
    if kind == "end_to_end":
        config = tiny(dataset, tmp_path / "run", **more)
    else:
        tree = make_tree(dataset, tmp_path / "tree.safetensors")
        config = cascade(dataset, tmp_path / "run", tree, **(more | {"dropout": 0.2}))
    report = run(config)
    predictor = Predictor.load(tmp_path / "run")
    encoder: Any = predictor.model.encoder
    assert encoder.class_token == "last" and encoder.pooling == "cls"
    texts = ["w3 w4 w5", "w9"]
    vectors = predictor.predict_and_embed(texts, 3)[2]
    for text, vector in zip(texts, vectors, strict=True):
        ids = torch.from_numpy(load_tokenizer(model).encode_batch([text], 16)[0].astype(np.int64))[
            None
        ]
        with torch.no_grad():
            states = encoder.model(
                input_ids=ids, attention_mask=torch.ones_like(ids)
            ).last_hidden_state
        assert ids[0, -1] == 2  # [CLS]
        np.testing.assert_allclose(vector, states[0, -1].numpy(), rtol=1e-3, atol=1e-4)
    assert 0 <= report["test"]["P@1"] <= 100 and Dataset.open(dataset).num_labels == LABELS
