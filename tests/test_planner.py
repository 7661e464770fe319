"""The memory told before a run is what its tensors then take."""

import re
from dataclasses import replace

import pytest
import torch
from cascade_common import make_batch, make_model, make_tree

from xmlkernels import InputError
from xmlkernels.models.running_mean import MeanSettings
from xmlkernels.nn.bow import BowEncoder
from xmlkernels.nn.cascade_heads import CascadeHeads
from xmlkernels.nn.encoder import Encoder
from xmlkernels.nn.full_head import FullHead
from xmlkernels.optim import encoder_optimizer
from xmlkernels.planner import Table, activation_bytes, encoder_parts, plan, shortlist_bytes, told


def size(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"momentum": 0.0, "bias": True},
        {"optimizer": "adam", "state_dtype": "bf16"},
        {"momentum": 0.9, "state_dtype": "fp16", "kahan": True},
    ],
)
def test_a_full_table_takes_what_was_told(dtype: str, options: dict[str, object]) -> None:
    if options.get("kahan") and dtype == "fp8":
        options = options | {"kahan": False}
    head = FullHead(70, 12, dtype=dtype, **options)  # type: ignore[arg-type]
    settings = {"state" if key == "state_dtype" else key: value for key, value in options.items()}
    table = Table("labels", 70, 12, dtype, **settings)  # type: ignore[arg-type]
    assert table.weight_bytes() == size(head.weight, head.bias, head.row_scale)
    assert table.state_bytes() == size(head.momentum, head.second, head.kahan)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_tables_of_a_cascade_take_what_was_told(dtype: str, optimizer: str) -> None:
    heads = CascadeHeads(
        (5, 40),
        (9,),
        16,
        layers=((1,), (2,)),
        topk=(2,),
        dtype=dtype,
        optimizer=optimizer,
        state_dtype="bf16",
    )
    for r, level in enumerate(heads.levels):
        own = "bf16" if dtype == "fp8" and r == 0 else dtype
        table = Table(
            "level", (5, 40)[r], 16, own, optimizer, 0.9, "bf16", row_wise=True, bias=True
        )
        assert table.weight_bytes() == size(level.weight, level.bias, level.row_scale)
        assert table.state_bytes() == size(level.momentum, level.second)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_running_means_take_what_was_told(dtype: str) -> None:
    model = make_model(
        2,
        tree=make_tree(2),
        mean=MeanSettings(0.5, tables=True),
        dtype=dtype,
        layers=((1,), (2,)),
        topk=[2],
    )
    tables = [
        Table(str(r), n, 16, dtype, bias=True, mean=True) for r, n in enumerate(model.tree.sizes)
    ]
    parts = plan(model.encoder, tables, documents=1, tokens=1, mean=True)
    model.step(make_batch(model.tree, 3))
    assert model.average is not None
    with model.average.used():
        rounded = [
            w
            for m, w in zip(model.average.means, model.average._rounded, strict=True)
            if m is not w
        ]
        told = parts["its running mean"] + sum(parts[f"mean of {r}"] for r in range(2))
        assert told == size(*model.average.means, *rounded) and bool(rounded) == (dtype == "bf16")
    assert (
        plan(model.encoder, [replace(t, mean=False) for t in tables], documents=1, tokens=1).get(
            "mean of 0"
        )
        == 0
    )


def test_an_encoder_takes_what_was_told() -> None:
    encoder = Encoder.tiny(50)
    encoder.model.embeddings.requires_grad_(False)  # type: ignore[union-attr, operator]
    optimizer = encoder_optimizer(encoder, 1e-3, 0.0)
    ids = torch.ones(2, 3, dtype=torch.int64)
    encoder(ids, ids).sum().backward()
    optimizer.step()
    parts = encoder_parts(encoder)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    assert parts["encoder"] == size(*encoder.parameters(), *encoder.buffers())
    assert parts["its gradients"] == size(*trained) < size(*encoder.parameters())
    states = [v for p in trained for k, v in optimizer.state.get(p, {}).items() if k != "step"]
    assert parts["its optimizer"] == size(*states)


def test_a_bag_of_words_counts_its_table_and_its_states() -> None:
    encoder = BowEncoder(100, 8, optimizer="adam")
    assert encoder_parts(encoder)["encoder"] >= size(
        encoder.table, encoder.momentum, encoder.second, encoder.bias
    )
    assert activation_bytes(encoder, 16, 0) == 16 * 8 * 4


def test_activations_grow_with_every_size() -> None:
    small, deep, wide = Encoder.tiny(50), Encoder.tiny(50, layers=4), Encoder.tiny(50, width=64)
    assert activation_bytes(small, 8, 10) == 34 * 2 * 32 * 2 * 8 * 10
    assert (
        activation_bytes(deep, 8, 10)
        == activation_bytes(wide, 8, 10)
        == 2 * activation_bytes(small, 8, 10)
    )
    half = Encoder.tiny(50, autocast=torch.bfloat16)
    assert activation_bytes(half, 8, 20) == activation_bytes(small, 8, 10)


def test_the_line_names_every_part_and_the_total() -> None:
    tables = [
        Table("clusters", 1 << 10, 64, "bf16"),
        Table("label table", 1 << 20, 64, "fp8", momentum=0.0),
    ]
    parts = plan(Encoder.tiny(50), tables, documents=4, tokens=8, candidates=(1024, 640))
    line = told(parts)
    assert parts["shortlists"] == shortlist_bytes(4, (1024, 640)) == 4 * 1664 * 12
    assert parts["label table"] == (1 << 20) * (64 + 8) and parts["states of label table"] == 0
    assert "label table 72.0 MiB" in line and "label table 72.0 MiB, states" not in line
    assert "the rest" in line and "shortlists" not in line
    total = re.match(r"memory of the model: about ([\d.]+) MiB = ", line)
    assert total is not None and float(total.group(1)) == pytest.approx(
        sum(parts.values()) / 2**20, abs=0.06
    )


def test_an_unknown_format_is_told() -> None:
    with pytest.raises(
        InputError, match="number format: expected one of fp32, bf16, fp16, fp8, got 'int8'"
    ):
        Table("labels", 4, 4, "int8").weight_bytes()
