"""`bag_step_`: backward of an embedding bag and update of its rows in one. Stored bits, threads and
shards are tested beside those of the sparse updates, on which it stands."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from common import (
    DEVICES,
    DTYPES,
    assert_same_bits,
    make_counter,
    make_hyper,
    name_of,
    needs_kernels,
)
from sparse_common import ROW_STATES, RULES, RowStep, random_bags, some_rows
from test_sparse_update import VARIANTS, check_against_exact, check_untouched
from xmlkernels.ops import Hyper, bag_step_

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# (B, T, n, D): single, no occurrences, no bags, ragged, aligned, many occurrences of few rows, more
# than one work item.
SHAPES = [
    (1, 8, 1, 1), (4, 0, 9, 5), (0, 12, 9, 5), (7, 30, 37, 7), (64, 700, 256, 64),
    (40, 3000, 20, 33), (65, 2500, 5003, 260),
]  # fmt: skip


# 1. A tiny example, worked by hand.
@pytest.mark.parametrize("device", DEVICES)
def test_by_hand(device: str) -> None:
    """Bags [0, 2, -1], [] and [2, 2]; the last token, 1, lies in no bag.

    Gradients [1, 2], [7, 7], [10, 20]. Row 0: 1/2 [1, 2]; row 2: 2 [1, 2] + (1 + 3) [10, 20] = [42,
    84]. lr 1/10.
    """
    weight = torch.ones(3, 2, device=device)
    grad = torch.tensor([[1.0, 2], [7, 7], [10, 20]], device=device)
    token = torch.tensor([0, 2, -1, 2, 2, 1], device=device)
    offset = torch.tensor([0, 3, 3, 5], device=device)
    token_weight = torch.tensor([0.5, 2, 9, 1, 3, 9], device=device)
    hyper, counter = make_hyper(0.1).to(device), make_counter().to(device)
    bag_step_(weight, grad, token, offset, hyper, counter, token_weight=token_weight)
    torch.testing.assert_close(weight.cpu(), torch.tensor([[0.95, 0.9], [1, 1], [-3.2, -7.4]]))
    weight = torch.ones(3, 2, device=device)
    bag_step_(weight, grad, token, offset, hyper, counter)  # row 2: [1, 2] + 2 [10, 20]
    torch.testing.assert_close(weight.cpu(), torch.tensor([[0.9, 0.8], [1, 1], [-1.1, -3.2]]))


# 2. The reference against autograd of embedding_bag and torch's optimizers, in float64.
@pytest.mark.parametrize("mode", ["sum", "mean", "weights"])
@pytest.mark.parametrize("rule", ["sgd", "adagrad", "adam"])
def test_reference_is_autograd_of_embedding_bag(rule: str, mode: str) -> None:
    hyper = make_hyper(0.1, 0.0, 0.9, 0.99, 0.0 if rule == "adam" else 1e-3)
    step = random_bags(rule, (9, 60, 23, 5), F32, fill=0, hyper=hyper)
    t = {
        k: v.double() if v.is_floating_point() and k != "hyper" else v
        for k, v in step.tensors.items()
    }
    for name in t.keys() & {"momentum", "second"}:
        t[name].zero_()
    lr, _, beta1, beta2, eps, *_ = Hyper(*t["hyper"].tolist())
    p = torch.nn.Parameter(t["param"].clone())
    optimizer: torch.optim.Optimizer = {
        "sgd": lambda: torch.optim.SGD([p], lr),
        "adagrad": lambda: torch.optim.Adagrad([p], lr, eps=eps),
        "adam": lambda: torch.optim.SparseAdam([p], lr, (beta1, beta2), 1e-300),
    }[rule]()
    factor = t.pop("token_weight")
    if mode == "mean":
        length = (t["offset"][1:] - t["offset"][:-1]).clamp(min=1).double()
        factor = torch.cat(
            [(1 / length).repeat_interleave(t["offset"].diff()), torch.ones(2).double()]
        )
    if mode != "sum":
        t["token_weight"] = factor
    step = RowStep(rule, t, {})
    inside = int(t["offset"][-1])
    for number in range(5):
        grad = torch.randn(9, 5).double()
        given = (
            {"per_sample_weights": factor[:inside], "mode": "sum"}
            if mode == "weights"
            else {"mode": mode}
        )
        out = embedding_bag(
            t["token"][:inside],
            p,
            t["offset"],
            include_last_offset=True,
            sparse=rule != "sgd",
            **given,
        )
        optimizer.zero_grad()
        out.backward(grad)
        optimizer.step()
        step = step.replace(grad=grad, counter=make_counter(step=number))
        step = step.replace(**step.run(reference=True))
    torch.testing.assert_close(step.tensors["param"], p.detach(), rtol=1e-10, atol=1e-12)


# 3. The kernel is no worse than PyTorch at the same precision.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("rule", RULES)
def test_no_worse_than_torch(
    rule: str, dtype: torch.dtype, shape: tuple[int, int, int, int], device: str
) -> None:
    check_against_exact(random_bags(rule, shape, dtype), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("variant", [*VARIANTS, "no weights"])
def test_variants_are_no_worse(variant: str, dtype: torch.dtype, device: str) -> None:
    given: dict[str, Any] = (
        {"weights": False} if variant == "no weights" else dict(VARIANTS[variant])
    )
    if dtype == F32:
        given.pop("kahan", None)
    check_against_exact(random_bags("adam", (30, 400, 90, 33), dtype, **given), device)


# 4. Boundary ids.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [1, 2, 2048, 2049, 5000])
def test_first_and_last_row_and_nothing_else(n: int, device: str) -> None:
    """Tables on both sides of a digit of the sort."""
    for row in {0, n - 1}:
        step = random_bags("adam", (3, 9, n, 17), BF16)
        step = step.replace(
            token=torch.tensor([-1, row, -1, -1, row, -1, row, row, row]),
            offset=torch.tensor([0, 3, 3, 6]),
        )
        got = {k: v.cpu() for k, v in step.to(device).run().items()}
        check_untouched(step, got)
        assert not torch.equal(got["param"][row], step.tensors["param"][row])


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_but_fill(device: str) -> None:
    step = random_bags("adam", (5, 40, 70, 9), BF16)
    for changed in (
        {"token": torch.full((40,), -1)},
        {"offset": torch.zeros(6, dtype=torch.int64)},
    ):
        some = step.replace(**changed)
        assert_same_bits(
            some.to(device).run(),
            {k: v for k, v in step.tensors.items() if k in ("param", *ROW_STATES)},
        )


# 5. Fixed order, bits.
def dyadic_bags(rule: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> RowStep:
    """Bags whose sums are exact in fp32; so are the steps of SGD with momentum and of Adam from
    zero states.
    """
    bags, count, n, d = shape
    g = torch.Generator().manual_seed(0)
    step = random_bags(rule, shape, dtype)
    # positive: with epsilon 0 no sum may be zero.
    grad = torch.randint(1, 32, (bags, d), generator=g)
    t = step.tensors | {
        "param": (torch.randint(-63, 64, (n, d), generator=g) / 64).to(dtype),
        "grad": grad / 64,
        "token_weight": torch.randint(1, 3, (count,), generator=g).float(),
        "hyper": make_hyper(2.0**-8, 2.0**-4, 0.5, 0.75, 0.0, scale=0.5),
        "counter": make_counter(step=0),
    }
    for name in t.keys() & {"momentum", "second"}:
        t[name] = torch.zeros_like(t[name])
    return RowStep(rule, t, {"decoupled": True})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("rule", RULES)
def test_bits(rule: str, dtype: torch.dtype, device: str) -> None:
    for shape in ((5, 60, 37, 7), (40, 3000, 300, 100), (70, 700, 5003, 130)):
        step = dyadic_bags(rule, dtype, shape).to(device)
        assert_same_bits(step.run(), step.run(reference=True))


@needs_kernels
def test_occurrences_are_added_in_ascending_order() -> None:
    """fp32 addition in the stated order, to the bit; one row has more occurrences than a work item
    of the kernel.
    """
    bags, count, n, d = 100, 40_000, 30, 9
    g = torch.Generator().manual_seed(0)
    token = torch.randint(0, n, (count,), generator=g)
    token[torch.rand(count, generator=g) < 0.5] = 7
    offset = torch.arange(bags + 1) * (count // bags)
    grad = torch.randn(bags, d, generator=g)
    weight = torch.zeros(n, d)
    bag_step_(weight, grad, token, offset, make_hyper(-1.0), make_counter())
    expected = torch.zeros(n, d)
    for row in range(n):
        for bag in (token == row).nonzero()[:, 0] // (count // bags):
            expected[row] += grad[bag]
    assert_same_bits({"weight": weight}, {"weight": expected})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
def test_it_is_the_sparse_update_of_the_summed_gradient(rule: str, device: str) -> None:
    """Bags of one token each, every row at most once: nothing is summed, so both ops store the same
    bits.
    """
    step = random_bags(rule, (50, 50, 300, 40), BF16, weights=False)
    rows, one = some_rows(50, 300), torch.arange(51)
    bag = step.replace(token=rows, offset=one).to(device).run()
    t = {k: v for k, v in step.tensors.items() if k not in ("token", "offset")} | {"rows": rows}
    assert_same_bits(bag, RowStep(rule, t, step.options).to(device).run())


# What is not finite.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("grad", DTYPES, ids=name_of)
def test_a_non_finite_gradient_or_weight_leaves_everything_as_it_was(
    grad: torch.dtype, bad: float, device: str
) -> None:
    step = random_bags(
        "adam", (30, 400, 90, 33), BF16, grad=grad, row_step=True, lazy=True, kahan=True
    )
    before = {k: v for k, v in step.tensors.items() if k in ("param", *ROW_STATES)}
    for name, places in (("grad", ((0, 0), (29, 32))), ("token_weight", ((0,), (399,)))):
        for place in places:
            value: Tensor = step.tensors[name].clone()
            value[place] = bad
            assert_same_bits(step.replace(**{name: value}).to(device).run(), before)
