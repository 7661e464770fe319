"""The bag-of-words encoder: forward and training against float64 autograd and torch's own
optimizers.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xmlkernels import InputError
from xmlkernels.nn.bow import BowEncoder
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.table import RowOptimizer

V, D, B = 67, 21, 9


def bags(seed: int = 0, words: int = V, size: int = B) -> tuple[Tensor, Tensor, Tensor]:
    """Bags of 0 to 11 words, some twice in a bag; the last third of the vocabulary never occurs."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 12, (size,), generator=g)
    lengths[0] = 0
    offset = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    token = torch.randint(0, 2 * words // 3, (int(offset[-1]),), generator=g)
    return token, offset, torch.rand(int(offset[-1]), generator=g) + 0.1


def dense(token: Tensor, offset: Tensor, weight: Tensor, words: int = V) -> Tensor:
    """The same bags as a matrix, float64 [B, V]."""
    out = torch.zeros(len(offset) - 1, words, dtype=torch.float64)
    for b in range(len(offset) - 1):
        here = slice(int(offset[b]), int(offset[b + 1]))
        out[b].index_add_(0, token[here], weight[here].double())
    return out


def make(**options: Any) -> BowEncoder:
    return BowEncoder(V, D, **{"optimizer": "sgd", "seed": 3, **options})


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_forward(activation: str) -> None:
    encoder = make(activation=activation)
    nn.init.normal_(encoder.bias)
    inputs = bags()
    z = dense(*inputs) @ encoder.table.weight.double() + encoder.bias.double()
    expected = torch.relu(z) if activation == "relu" else z
    found = encoder(*inputs)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    assert found.shape == (B, D)
    assert encoder.width == D
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert (found[0] - expected[0].float()).abs().max() < 1e-6, "the empty bag is the bias alone"
    assert (encoder.autocast, encoder.max_length) == (None, None)


def test_initial_table() -> None:
    encoder = BowEncoder(3000, 200, std=0.5, seed=1)
    assert abs(float(encoder.table.weight.std()) - 0.5) < 0.005
    assert abs(float(encoder.table.weight.mean())) < 0.005
    first = encoder.table.weight
    assert torch.equal(first, BowEncoder(3000, 200, std=0.5, seed=1).table.weight)
    assert not torch.equal(first, BowEncoder(3000, 200, std=0.5, seed=2).table.weight)
    assert not BowEncoder(5, 4, std=0).table.weight.any()


def torch_optimizer(name: str, table: nn.Parameter, lr: float) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.SparseAdam([table], lr, (0.9, 0.99), 1e-12)
    if name == "adagrad":
        return torch.optim.Adagrad([table], lr, eps=1e-12)
    return torch.optim.SGD([table], lr)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam"])
def test_training_is_autograd_and_torchs_optimizer(name: str) -> None:
    """Five steps beside a float64 EmbeddingBag with sparse gradients, loss sum(c *
    encoder(bags)).
    """
    encoder = make(optimizer=RowOptimizer(name, betas=(0.9, 0.99), epsilon=1e-12))
    start = encoder.table.weight.clone()
    twin = nn.Parameter(encoder.table.weight.double())
    bias = nn.Parameter(encoder.bias.detach().double())
    optimizer = torch_optimizer(name, twin, 0.1)
    touched = set()
    for number in range(5):
        token, offset, weight = bags(number)
        factor = torch.randn(B, D, generator=torch.Generator().manual_seed(number))
        encoder.bias.grad = None
        (encoder(token, offset, weight) * factor).sum().backward()
        encoder.update(0.1)
        bag = nn.functional.embedding_bag(
            token,
            twin,
            offset,
            mode="sum",
            per_sample_weights=weight.double(),
            include_last_offset=True,
            sparse=True,
        )
        optimizer.zero_grad()
        bias.grad = None
        (torch.relu(bag + bias) * factor.double()).sum().backward()
        optimizer.step()
        assert encoder.bias.grad is not None and bias.grad is not None
        torch.testing.assert_close(encoder.bias.grad.double(), bias.grad, rtol=1e-4, atol=1e-4)
        touched |= set(token.tolist())
    torch.testing.assert_close(encoder.table.weight.double(), twin.detach(), rtol=1e-4, atol=1e-4)
    rest = sorted(set(range(V)) - touched)
    assert len(rest) > 15 and torch.equal(encoder.table.weight[rest], start[rest])
    assert int(encoder.table.counter[1]) == 5


def rowwise_by_hand(
    name: str, table: Tensor, steps: list[tuple[Tensor, Tensor]], lr: float, decay: float
) -> Tensor:
    """Row-wise Adagrad and Adam as their docstrings say, in float64: each step is (gradient [V, D],
    words that occur).
    """
    m, v = torch.zeros(V, D).double(), torch.zeros(V, 1).double()
    for t, (grad, rows) in enumerate(steps, 1):
        square = (grad[rows] ** 2).mean(1, keepdim=True)
        table[rows] *= 1 - lr * decay
        if name == "adagrad":
            v[rows] += square
            table[rows] -= lr * grad[rows] / (v[rows].sqrt() + 1e-8)
            continue
        m[rows] = 0.9 * m[rows] + 0.1 * grad[rows]
        v[rows] = 0.99 * v[rows] + 0.01 * square
        table[rows] -= lr * (m[rows] / (1 - 0.9**t)) / ((v[rows] / (1 - 0.99**t)).sqrt() + 1e-8)
    return table


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("name", ["adagrad", "adam"])
def test_row_wise_states_and_decay(name: str, decay: float) -> None:
    optimizer = RowOptimizer(name, betas=(0.9, 0.99), row_wise=True, decay=decay, decoupled=True)
    encoder = make(optimizer=optimizer, activation="none")
    start, steps = encoder.table.weight.double(), []
    for number in range(6):
        token, offset, weight = bags(number)
        factor = torch.randn(B, D, generator=torch.Generator().manual_seed(number))
        (encoder(token, offset, weight) * factor).sum().backward()
        encoder.update(0.05)
        steps.append((dense(token, offset, weight).T @ factor.double(), token.unique()))
    torch.testing.assert_close(
        encoder.table.weight.double(),
        rowwise_by_hand(name, start, steps, 0.05, decay),
        rtol=1e-4,
        atol=1e-4,
    )
    assert encoder.table.second is not None and encoder.table.second.shape == (V,)


def test_momentum_of_sgd() -> None:
    encoder = make(optimizer=RowOptimizer("sgd", momentum=0.5), activation="none")
    table, m = encoder.table.weight.double(), torch.zeros(V, D).double()
    for _ in range(3):
        token, offset, weight = bags()
        encoder(token, offset, weight).sum().backward()
        encoder.update(0.1)
        rows = token.unique()
        m[rows] = 0.5 * m[rows] + (dense(token, offset, weight).T @ torch.ones(B, D).double())[rows]
        table[rows] -= 0.1 * m[rows]
    torch.testing.assert_close(encoder.table.weight.double(), table, rtol=1e-4, atol=1e-4)


def test_parts_of_a_batch_add_up() -> None:
    """Micro-batches: several forward passes, several backwards, one update; a pass without a
    gradient counts for nothing.
    """
    whole, parts = make(optimizer="adam"), make(optimizer="adam")
    token, offset, weight = bags(size=12)
    whole(token, offset, weight).square().sum().backward()
    whole.update(0.1)
    with torch.no_grad():
        parts(token, offset, weight)
    parts(token, offset, weight)  # kept, and never given a gradient
    for first, last in ((0, 5), (5, 6), (6, 12)):
        here = slice(int(offset[first]), int(offset[last]))
        parts(
            token[here], offset[first : last + 1] - offset[first], weight[here]
        ).square().sum().backward()
    parts.update(0.1)
    torch.testing.assert_close(parts.table.weight, whole.table.weight, rtol=1e-5, atol=1e-6)
    assert int(parts.table.counter[1]) == 1


def test_nothing_to_do() -> None:
    encoder = make(optimizer="adam")
    before = copy.deepcopy(encoder.state_dict())
    encoder.update(0.1)
    with torch.no_grad():
        encoder(*bags())
    encoder.update(0.1)
    encoder(*bags())
    encoder.update(0.1)
    prediction = BowEncoder(V, D)
    prediction(*bags()).sum().backward()
    assert prediction._passed == [], "without an optimizer nothing waits for one"
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_non_finite_gradient_changes_nothing() -> None:
    encoder = make(optimizer="adam")
    before = copy.deepcopy(encoder.state_dict())
    encoder(*bags()).backward(torch.full((B, D), torch.nan))
    encoder.update(0.1)
    for name in ("table", "momentum", "second"):
        assert torch.equal(encoder.state_dict()[name], before[name]), name
    encoder(*bags()).sum().backward()
    encoder.update(0.1)
    table = encoder.table.weight
    assert torch.isfinite(table).all() and not torch.equal(table, before["table"])


def test_bf16_table_follows_the_fp32_one() -> None:
    """Small steps that rounding to nearest would lose: unbiased rounding keeps their sum."""
    half, full = make(dtype="bf16", activation="none"), make(activation="none")
    full.table.weight.copy_(half.table.weight.float())
    token, offset, weight = bags()
    expected = dense(token, offset, weight) @ half.table.weight.double()
    torch.testing.assert_close(half(token, offset, weight).double(), expected, rtol=0.02, atol=0.05)
    start = full.table.weight.clone()
    for encoder in (half, full):
        for _ in range(200):
            encoder._passed.clear()
            encoder(token, offset, weight).sum().backward()
            encoder.update(2e-4)
    half, full = half.table.weight, full.table.weight
    moved, expected = (half.float() - start).sum(), (full - start).sum()
    assert half.dtype == torch.bfloat16 and abs(float(moved / expected) - 1) < 0.05


def test_dropouts_belong_to_training() -> None:
    token, offset, weight = torch.arange(V).repeat(400), torch.arange(401) * V, torch.ones(400 * V)
    plain = make(activation="none", std=0.1)
    dropped = make(activation="none", std=0.1, word_dropout=0.4)
    expected = plain(token[:V], offset[:2], weight[:V])[0].detach()
    found = dropped(token, offset, weight).detach()
    assert float(found.std(0).mean()) > 0.1
    assert float((found.mean(0) - expected).abs().max()) < 0.2
    assert torch.equal(dropped.eval()(token[:V], offset[:2], weight[:V])[0], expected)
    hidden = make(dropout=0.5, activation="none")
    share = (hidden(token, offset, weight) == 0).float().mean()
    assert 0.45 < float(share) < 0.55 and not (hidden.eval()(token, offset, weight) == 0).any()


def test_word_dropout_trains_the_words_that_stayed() -> None:
    encoder = make(activation="none", word_dropout=0.5)
    before = encoder.table.weight.clone()
    token, offset = torch.arange(V), torch.tensor([0, V])
    bag = encoder(token, offset, torch.ones(V)).detach() - encoder.bias
    kept = encoder._passed[0][3]
    torch.testing.assert_close(bag[0], kept @ before)
    encoder(token, offset, torch.ones(V)).sum().backward()
    stayed = encoder._passed[-1][3] > 0
    encoder.update(0.1)
    torch.testing.assert_close(encoder.table.weight[stayed], before[stayed] - 0.2)
    assert torch.equal(encoder.table.weight[~stayed], before[~stayed])
    assert 10 < int(stayed.sum()) < V - 10


def test_configuration_and_state() -> None:
    encoder = make(optimizer="adam", dropout=0.3, word_dropout=0.1, activation="none", dtype="bf16")
    encoder(*bags()).sum().backward()
    encoder.update(0.1)
    again = BowEncoder.from_config(encoder.encoder_config())
    kept = {k: v for k, v in encoder.state_dict().items() if k not in ("momentum", "second")}
    again.load_state_dict(kept)
    assert torch.equal(again.eval()(*bags()), encoder.eval()(*bags()))
    assert again.encoder_config() == encoder.encoder_config()
    assert encoder.state_dict().keys() == {"bias", "table", "momentum", "second", "counter"}
    resumed = make(optimizer="adam", dropout=0.3, word_dropout=0.1, activation="none", dtype="bf16")
    resumed.load_state_dict(encoder.state_dict())
    for one in (resumed, encoder):
        torch.manual_seed(1)
        one.train()(*bags(5)).sum().backward()
        one.update(0.1)
    assert all(torch.equal(v, encoder.state_dict()[k]) for k, v in resumed.state_dict().items())


def test_vectors_of_the_levels() -> None:
    encoder = make(dropout=0.5)
    for levels in (3, ((5, 6), (8,), (10,))):
        found = encoder.layer_vectors(levels, *bags())
        assert len(found) == 3 and all(torch.equal(vector, found[0]) for vector in found)


def test_it_learns_with_a_label_table() -> None:
    """Labels that are words: a few steps bring every positive label to the top."""
    torch.manual_seed(0)
    encoder = BowEncoder(40, 32, optimizer="adam")
    head = FullHead(40, 32, optimizer="adam", bias=True)
    bias = torch.optim.Adam(encoder.parameters(), 0.02)
    token, offset, weight = torch.arange(40), torch.arange(41), torch.ones(40)
    for _ in range(60):
        x = encoder(token, offset, weight)
        dx, _ = head.step(x.detach(), token, token.to(torch.int32), lr=0.02, need_loss=False)
        bias.zero_grad()
        x.backward(dx)
        bias.step()
        encoder.update(0.02)
    _, rows = head.topk(encoder.eval()(token, offset, weight), 1)
    assert rows[:, 0].tolist() == token.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": 0}, "vocabulary: expected at least 1, got 0"),
        ({"width": 0}, "width: expected at least 1"),
        ({"dropout": 1.0}, "dropout: expected a probability"),
        ({"word_dropout": -0.1}, "word_dropout: expected a probability"),
        ({"activation": "gelu"}, "activation: expected one of relu, none, got 'gelu'"),
        ({"dtype": "fp8"}, "dtype: expected one of fp32, bf16, got 'fp8'"),
        (
            {"optimizer": RowOptimizer(state_dtype="fp16")},
            "state_dtype: expected one of fp32, bf16",
        ),
        ({"optimizer": "lamb"}, "optimizer: expected one of sgd, adagrad, adam"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BowEncoder(**{"vocabulary": V, "width": D, **options})


def test_foreign_configurations() -> None:
    with pytest.raises(InputError, match="kind `bow`"):
        BowEncoder.from_config({"model": {}})
    with pytest.raises(InputError, match="options of BowEncoder"):
        BowEncoder.from_config({"kind": "bow", "vocabulary": 3, "width": 2, "depth": 1})
