"""A training step neither waits for the device nor takes memory by what the data say.

Shown on torch's meta device, which has shapes and no values: there the code runs that runs on a
card (values are checked on the CPU alone), and whatever would read a value, or ask for a size that
a value decides, raises. So nothing in a step keeps a CUDA graph from being captured.
"""

import contextlib
from typing import Any

import cascade_common
import end_to_end_common
import kinds_under_test
import pytest
import torch

from xmlkernels.data.batches.bags import BagBatch
from xmlkernels.models.base import Model
from xmlkernels.models.end_to_end import EndToEnd
from xmlkernels.models.running_mean import MeanSettings
from xmlkernels.models.training import Training
from xmlkernels.nn.bow import BowEncoder
from xmlkernels.nn.full_head import FullHead

LABELS = kinds_under_test.LABELS


def bags() -> EndToEnd:
    encoder = BowEncoder(60, 8, word_dropout=0.1, dropout=0.1, optimizer="adam")
    return EndToEnd(encoder, FullHead(LABELS, 8, bias=True), Training(0.01, 0.1, 0.01, 0, 9))


def bag_batch() -> BagBatch:
    tokens = end_to_end_common.make_batch(6, labels=LABELS)
    offset = torch.arange(7) * 2
    rest = tokens.pos_row, tokens.pos_sample, tokens.index, LABELS
    return BagBatch(torch.arange(12), offset, torch.ones(12), *rest)


def full(**options: Any) -> Model:
    return kinds_under_test.full_table(EndToEnd, **options).train()


def cascade(**options: Any) -> Model:
    return kinds_under_test.cascade(drops=0.1, **options)


MODELS = {
    "full": full,
    "full, fp8 and bias": lambda: full(dtype="fp8", bias=True),
    "full, bf16, clipped, averaged": lambda: full(
        dtype="bf16", clip=1.0, mean=MeanSettings(0.9, tables=True)
    ),
    "full, bags": bags,
    "cascade": cascade,
    "cascade, sgd": lambda: cascade(optimizer="sgd"),
    "cascade, fp8": lambda: cascade(dtype="fp8"),
    "cascade, adamw_dense": lambda: cascade(optimizer="adamw_dense"),
    "cascade, reference_loss": lambda: cascade(reference_loss=True),
}


def without_values(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="meta")


def to_meta(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a model's values away, and give its optimizer the parameters that are left."""
    optimizer, scaler = model.optimizer, model.scaler
    assert optimizer is not None and scaler is not None
    names = {parameter: name for name, parameter in model.named_parameters()}
    model.to("meta")
    now = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [now[names[parameter]] for parameter in group["params"]]
    # Torch's own fused step takes no meta tensors. On a card it reads `found_inf` on the device.
    monkeypatch.setattr(optimizer, "step", lambda: None)
    # Nor has torch an autocast there; all of these encoders are in fp32.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.mark.parametrize("name", MODELS)
def test_step_reads_no_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name]()
    if isinstance(model.encoder, BowEncoder):
        batch: Any = bag_batch()
    elif name.startswith("full"):
        batch = end_to_end_common.make_batch(6, labels=LABELS)
    else:
        batch = cascade_common.make_batch(kinds_under_test.TREE, 6)
    fields = {
        key: tuple(map(moved, value)) if isinstance(value, tuple) else moved(value)
        for key, value in vars(batch).items()
    }
    to_meta(model, monkeypatch)
    for need_loss in (True, False):
        loss = model.step(type(batch)(**fields), need_loss=need_loss)
        assert loss.is_meta and loss.shape == (int(need_loss),)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.steps == 2


def moved(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(moved, value))
    return without_values(value) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.all()),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
    ],
)
def test_meta_tensor_raises_where_a_card_would_wait(wait: Any) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        wait(torch.empty(3, device="meta"))
