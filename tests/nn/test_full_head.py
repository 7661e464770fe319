"""The full head: its table, its options, and that a step does what autograd and torch's optimizers
would do.
"""

import pytest
import torch
from torch import nn

from xmlkernels import InputError
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.table import RowOptimizer


def positives(pairs: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = sorted(pairs)
    return torch.tensor([r for r, _ in pairs]), torch.tensor(
        [s for _, s in pairs], dtype=torch.int32
    )


def test_initial_table_is_normal_and_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = FullHead(5000, 96, seed=3).weight
    torch.manual_seed(2)
    again, other = FullHead(5000, 96, seed=3).weight, FullHead(5000, 96, seed=4).weight
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert abs(float(first.std()) - 0.02) < 2e-4
    assert abs(float(first.mean())) < 2e-4


@pytest.mark.parametrize(
    ("optimizer", "decoupled"), [("sgd", False), ("adam", False), ("adam", True)]
)
def test_steps_follow_torch(optimizer: str, decoupled: bool) -> None:
    """Ten fp32 steps beside nn.Linear, BCEWithLogits(sum) and torch's own optimizer."""
    labels, width, batch, lr, decay = 37, 12, 6, 0.05, 0.1
    rows = RowOptimizer(optimizer, momentum=0.9, decay=decay, decoupled=decoupled)
    head = FullHead(labels, width, optimizer=rows, seed=1)
    twin = nn.Linear(width, labels, bias=False)
    twin.weight.data.copy_(head.weight)
    make = {
        ("sgd", False): lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=decay),
        ("adam", False): lambda p: torch.optim.Adam(p, lr=lr, weight_decay=decay),
        ("adam", True): lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=decay),
    }[optimizer, decoupled]
    torch_optimizer = make(twin.parameters())
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        x = torch.randn(batch, width, generator=generator)
        target = (torch.rand(batch, labels, generator=generator) < 0.1).float()
        row, sample = positives([(int(r), int(s)) for s, r in target.nonzero()])
        dx, loss = head.step(x, row, sample, lr=lr, need_loss=True)
        leaf = x.clone().requires_grad_()
        expected = nn.functional.binary_cross_entropy_with_logits(
            twin(leaf), target, reduction="sum"
        )
        torch_optimizer.zero_grad()
        expected.backward()
        torch_optimizer.step()
        torch.testing.assert_close(loss[0], expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(dx, leaf.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.weight, twin.weight.data, rtol=1e-4, atol=1e-5)


def test_the_counter_moves_so_that_rounding_differs_between_steps() -> None:
    head = FullHead(64, 8, dtype="bf16", seed=5)
    row, sample = positives([(3, 0)])
    x = torch.full((1, 8), 0.01)
    start = head.weight.clone()
    moved = []
    for _ in range(2):
        head.weight.copy_(start)
        head.step(x, row, sample, lr=0.01, need_loss=False)
        moved.append(head.weight.clone())
    assert int(head.counter[1]) == 2
    assert not torch.equal(moved[0], moved[1])


def test_state_is_kept_only_where_the_optimizer_needs_it() -> None:
    assert FullHead(4, 4).momentum is None
    assert FullHead(4, 4, optimizer=RowOptimizer("sgd", momentum=0.9)).second is None
    adam = FullHead(4, 4, optimizer=RowOptimizer("adam", state_dtype="bf16"))
    assert adam.momentum is not None and adam.momentum.dtype == torch.bfloat16
    assert adam.second is not None and adam.second.dtype == torch.bfloat16
    exact = FullHead(4, 4, optimizer=RowOptimizer(kahan=True))
    assert exact.kahan is None  # fp32 leaves nothing over
    assert not any(p.requires_grad for p in FullHead(4, 4, bias=True).parameters())


def test_an_fp8_table_learns_what_an_fp32_table_learns() -> None:
    """The same 100 steps; rows outgrow their first range of 1.75 on the way, and are counted."""
    labels, width, batch = 40, 16, 16
    heads = {dtype: FullHead(labels, width, dtype=dtype, seed=1) for dtype in ("fp32", "fp8")}
    assert heads["fp8"].weight.dtype == torch.float8_e4m3fn and heads["fp8"].kahan is None
    torch.testing.assert_close(
        heads["fp8"].rows(0, labels), heads["fp32"].rows(0, labels), rtol=2.0**-4, atol=2.0**-18
    )
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(labels, width, generator=generator)
    losses: dict[str, list[float]] = {dtype: [] for dtype in heads}
    for _ in range(100):
        label = torch.randint(labels, (batch,), generator=generator)
        x = centres[label] + 0.1 * torch.randn(batch, width, generator=generator)
        row, sample = positives([(int(r), s) for s, r in enumerate(label)])
        for dtype, head in heads.items():
            losses[dtype].append(float(head.step(x, row, sample, lr=0.02, need_loss=True)[1]))
    assert (
        sum(losses["fp8"][-10:]) < 1.1 * sum(losses["fp32"][-10:]) < 0.6 * sum(losses["fp8"][:10])
    )
    head = heads["fp8"]
    assert head.row_scale is not None and head.rescaled is not None and int(head.rescaled) > 0
    assert (head.row_scale[:, 0] >= 2.0**-8).all() and (head.row_scale[:, 0] > 2.0**-8).any()
    for head in heads.values():
        values, rows = head.topk(centres, 1)
        assert (rows[:, 0] == torch.arange(labels)).float().mean() > 0.8
        torch.testing.assert_close(
            values[:, 0], (centres * head.rows(0, labels)[rows[:, 0]]).sum(1), rtol=0.02, atol=0.02
        )


def test_an_fp8_table_has_no_kahan() -> None:
    with pytest.raises(InputError, match="label table: kahan: expected False for fp8"):
        FullHead(4, 4, dtype="fp8", optimizer=RowOptimizer(kahan=True))


def test_topk_ranks_by_logit() -> None:
    head = FullHead(5, 2, std=0)
    head.weight.copy_(torch.tensor([[1.0, 0], [3, 0], [2, 0], [0, 1], [-1, 0]]))
    values, rows = head.topk(torch.tensor([[1.0, 0.5]]), 3)
    assert rows.tolist() == [[1, 2, 0]]
    assert values.tolist() == [[3.0, 2.0, 1.0]]
    _, rows = head.topk(torch.tensor([[1.0, 0.5]]), 2, torch.tensor([[1]]))
    assert rows.tolist() == [[2, 0]]


def test_options_that_no_full_head_takes_are_named() -> None:
    for options, message in (
        ({"dtype": "fp4"}, "dtype: expected one of fp32, bf16, fp16, fp8, got 'fp4'"),
        ({"optimizer": "lamb"}, "optimizer: expected one of sgd, adam, got 'lamb'"),
        ({"optimizer": RowOptimizer("adagrad")}, "optimizer: expected one of sgd, adam, got 'ada"),
        ({"optimizer": RowOptimizer("adam", row_wise=True)}, "row_wise: expected False, got True"),
    ):
        with pytest.raises(InputError, match=f"label table: {message}"):
            FullHead(4, 4, **options)  # type: ignore[arg-type]


def test_biases_start_at_the_frequencies() -> None:
    head = FullHead(5, 3, bias=True, std=0)
    positives, documents = torch.tensor([0, 1, 50, 99, 100]), 100
    head.start_at_frequencies(positives, documents)
    assert head.bias is not None
    expected = torch.tensor([0.5, 1.5, 50.5, 99.5, 100.5]).double() / 101
    torch.testing.assert_close(torch.sigmoid(head.bias.double()), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(InputError, match="label table: expected a bias"):
        FullHead(5, 3).start_at_frequencies(positives, documents)
    with pytest.raises(
        InputError, match=r"positives: expected 5 numbers, one for each label, got \[4\]"
    ):
        head.start_at_frequencies(positives[:4], documents)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_rows_start_at_the_centroids(dtype: str) -> None:
    """Two batches; label 1 has one document, label 2 none; sample 4 of the second batch has no
    label.
    """
    head = FullHead(4, 3, dtype=dtype, seed=5)
    drawn = head.rows(2, 3)
    x = torch.arange(27.0).reshape(9, 3).square() / 50
    labels = [{0}, {0, 3}, {3}, {0}, {1, 3}, {0}, set(), {3}, {0, 3}]
    parts = []
    for start, end in ((0, 4), (4, 9)):
        pairs = sorted((label, s) for s, found in enumerate(labels[start:end]) for label in found)
        rows = torch.tensor([r for r, _ in pairs])
        samples = torch.tensor([s for _, s in pairs], dtype=torch.int32)
        parts.append((x[start:end], rows, samples))
    head.start_at_centroids(iter(parts), 0.5)
    for label in (0, 1, 3):
        own = x[[label in found for found in labels]].double().mean(0) - x.double().mean(0)
        expected = 0.5 * own / own.norm()
        tolerance = {"fp32": 1e-6, "bf16": 2**-8, "fp8": 2**-4}[dtype]
        torch.testing.assert_close(
            head.rows(label, label + 1)[0].double(),
            expected,
            rtol=tolerance,
            atol=1e-3 if dtype == "fp8" else 1e-6,
        )
    assert torch.equal(head.rows(2, 3), drawn)
    if head.row_scale is not None:
        torch.testing.assert_close(head.row_scale[:, 1], head.rows(0, 4).abs().amax(1))
    with pytest.raises(InputError, match="norm of the first label rows: expected a number above 0"):
        head.start_at_centroids(iter(parts), 0.0)
    with pytest.raises(InputError, match="expected training documents, got none"):
        head.start_at_centroids(iter([]), 1.0)


def test_labels_that_would_hardly_change_are_skipped() -> None:
    labels, width = 4 * 128, 16
    plain = FullHead(labels, width, dtype="bf16")
    skips = FullHead(labels, width, dtype="bf16", skip_units=0.5)
    assert plain.skipped is None and skips.skip_below == 2.0**-14
    x = torch.rand(4, width) + 0.5
    for head in (plain, skips):
        head.weight[128:] = -2  # logits below -16: settled
        head.step(x, *positives([(3, 0), (130, 1)]), lr=0.1, need_loss=False)
    assert skips.skipped is not None and skips.skipped.tolist() == [2, 4]
    assert torch.equal(plain.weight[:256], skips.weight[:256]) and (skips.weight[256:] == -2).all()
    assert "skipped" not in skips.state_dict()  # a count of this process, no part of the model
