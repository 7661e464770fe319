"""`sparse_sgd_`, `sparse_adagrad_`, `sparse_adam_`: values. Bits, edges and layout have files of
their own beside this one.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from common import (
    DEVICES,
    DTYPES,
    LOW,
    assert_no_worse,
    assert_same_bits,
    make_counter,
    make_hyper,
    name_of,
)
from sparse_common import ADAM, RULES, SGD, SHAPES, RowStep, random_rows, torch_step, touched
from xmlkernels.ops import sparse_adagrad_, sparse_adam_, sparse_sgd_
from xmlkernels.ops.hyper import DECAY, LR

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def check_against_exact(step: RowStep, device: str = "cpu") -> None:
    """Touched rows no worse than torch's, all others as they were."""
    got = {k: v.cpu() for k, v in step.to(device).run().items()}
    exact = step.exact()
    low = torch_step(step)
    rows = touched(step)
    dtype = step.tensors["param"].dtype
    if "kahan" in got:
        whole, wide = (r["param"][rows].double() + r["kahan"][rows].double() for r in (got, exact))
        assert_no_worse(whole, low["param"], wide, dtype, what="param + kahan")
    for name in got.keys() & {"param", "momentum", "second"}:
        wide = exact[name][rows] + (
            exact["kahan"][rows] if name == "param" and "kahan" in exact else 0
        )
        kind = got[name].dtype
        # A row has many columns but one second moment: its error counts like that of the tensor's
        # own format.
        assert_no_worse(
            got[name][rows],
            low[name],
            wide,
            dtype if name == "param" else kind,
            what=name,
            rounded=kind,
        )
    if "row_step" in got:
        assert torch.equal(got["row_step"][rows], step.tensors["row_step"][rows] + 1)
    if "row_decay" in got:
        assert torch.equal(got["row_decay"][rows], step.tensors["decay_sum"].expand(rows.shape[0]))
    check_untouched(step, got)


def check_untouched(step: RowStep, got: dict[str, Tensor]) -> None:
    rest = torch.ones(step.tensors["param"].shape[0], dtype=torch.bool)
    rest[touched(step)] = False
    assert_same_bits({k: v[rest] for k, v in got.items()}, {k: step.tensors[k][rest] for k in got})


# 1. Tiny examples, worked by hand. Row 1 of three, gradient 2 * scale 1/2 = 1 and -4 * 1/2 = -2.
ROWS, GRAD = torch.tensor([1, 3]), torch.tensor([[2.0, -4.0], [math.nan, math.nan]])  # 3 is fill


def on(device: str, *tensors: Tensor) -> list[Tensor]:
    return [t.to(device) for t in tensors]


@pytest.mark.parametrize("device", DEVICES)
def test_sgd_by_hand(device: str) -> None:
    """Decay 1/2 in the gradient: g = [1, -2] + [4, 8] / 2 = [3, 2]; m = [2, 2] / 2 + g = [4, 3]; w
    = [4, 8] - m / 10.
    """
    param, momentum = (
        torch.tensor(v, device=device)
        for v in ([[1.0, 1], [4, 8], [1, 1]], [[1.0, 1], [2, 2], [1, 1]])
    )
    rows, grad, hyper, counter = on(
        device, ROWS, GRAD, make_hyper(0.1, 0.5, 0.5, scale=0.5), make_counter()
    )
    sparse_sgd_(param, momentum, rows, grad, hyper, counter)
    assert momentum.tolist() == [[1, 1], [4, 3], [1, 1]]
    torch.testing.assert_close(param.cpu(), torch.tensor([[1, 1], [3.6, 7.7], [1, 1]]))
    # W (1 - 1/20) - [1, -2] / 10.
    sparse_sgd_(param, None, rows, grad, hyper, counter, decoupled=True)
    torch.testing.assert_close(param.cpu(), torch.tensor([[1, 1], [3.32, 7.515], [1, 1]]))


@pytest.mark.parametrize("device", DEVICES)
def test_adagrad_by_hand(device: str) -> None:
    """v = [3, 0] + [1, 4] = [4, 4]; w -= 0.1 [1, -2] / (2 + 2). Row-wise: v = 6.5 + (1 + 4) / 2 =
    9, over 3 + 2.
    """
    rows, grad, hyper, counter = on(
        device, ROWS, GRAD, make_hyper(0.1, eps=2.0, scale=0.5), make_counter()
    )
    param = torch.ones(3, 2, device=device)
    second = torch.tensor([[1.0, 1], [3, 0], [1, 1]], device=device)
    sparse_adagrad_(param, second, rows, grad, hyper, counter)
    assert second.tolist() == [[1, 1], [4, 4], [1, 1]]
    torch.testing.assert_close(param.cpu(), torch.tensor([[1, 1], [0.975, 1.05], [1, 1]]))
    param, second = torch.ones(3, 2, device=device), torch.tensor([1.0, 6.5, 1], device=device)
    sparse_adagrad_(param, second, rows, grad, hyper, counter)
    assert second.tolist() == [1, 9, 1]
    torch.testing.assert_close(param.cpu(), torch.tensor([[1, 1], [0.98, 1.04], [1, 1]]))


@pytest.mark.parametrize("device", DEVICES)
def test_adam_by_hand(device: str) -> None:
    """b1 = 1/2, b2 = 3/4: m = [1/2, -1], v = [1/4, 1]. Second update of the row: m / (3/4), v /
    (7/16).

    w = 1 + ln 2 / ... : the row is owed a decay of exp(-ln 2) = 1/2.
    """
    hyper = make_hyper(0.1, 0.3, 0.5, 0.75, 1.0, scale=0.5)
    rows, grad, hyper, counter = on(device, ROWS, GRAD, hyper, make_counter(step=99))
    param = torch.ones(3, 2, device=device)
    m = torch.zeros(3, 2, device=device)
    v = torch.zeros(3, 2, device=device)
    row_step = torch.tensor([1, 1, 1], device=device)
    row_decay = torch.tensor([-1.0, -1.0, -1.0], device=device)
    decay_sum = torch.tensor([-1 - math.log(2)], device=device)
    sparse_adam_(
        param,
        m,
        v,
        rows,
        grad,
        hyper,
        counter,
        row_step=row_step,
        row_decay=row_decay,
        decay_sum=decay_sum,
        decoupled=True,
    )
    assert m.tolist() == [[0, 0], [0.5, -1], [0, 0]] and v.tolist() == [[0, 0], [0.25, 1], [0, 0]]
    assert row_step.tolist() == [1, 2, 1]
    torch.testing.assert_close(row_decay.cpu(), torch.tensor([-1, -1 - math.log(2), -1]))
    step = [0.1 * (g / 0.75) / ((q / 0.4375) ** 0.5 + 1) for g, q in ((0.5, 0.25), (-1.0, 1.0))]
    torch.testing.assert_close(
        param.cpu(), torch.tensor([[1, 1], [0.5 - step[0], 0.5 - step[1]], [1, 1]])
    )


# 2. The reference against torch's own optimizers in float64, over several steps on changing rows.
def steps_of(
    rule: str, hyper: Tensor, d: int = 5, **given: Any
) -> tuple[RowStep, list[tuple[Tensor, Tensor]]]:
    n, g = 11, torch.Generator().manual_seed(3)
    start = random_rows(rule, (1, n, d), F32, hyper=hyper, **given)
    start.tensors |= {
        k: torch.zeros_like(v) for k, v in start.tensors.items() if k in ("momentum", "second")
    }
    wide = {
        k: v.double() if v.is_floating_point() and k != "hyper" else v
        for k, v in start.tensors.items()
    }
    moves = []
    for _ in range(7):
        rows = (
            torch.randperm(n, generator=g)[: int(torch.randint(1, n, (1,), generator=g))]
            .sort()
            .values
        )
        moves.append((rows, torch.randn(rows.shape[0], d, generator=g).double()))
    return RowStep(rule, wide, start.options), moves


def follow(step: RowStep, moves: list[tuple[Tensor, Tensor]]) -> RowStep:
    for number, (rows, grad) in enumerate(moves):
        step = step.replace(rows=rows, grad=grad, counter=make_counter(step=number))
        step = step.replace(**step.run(reference=True))
    return step


@pytest.mark.parametrize("rule", ["sgd", "adagrad", "adam"])
def test_reference_is_torch_optim_on_sparse_gradients(rule: str) -> None:
    """SparseAdam adds epsilon before the bias correction, so epsilon is 0 here; the dense
    optimizers below have it.
    """
    hyper = make_hyper(0.1, 0.0, 0.9, 0.99, 0.0 if rule == "adam" else 1e-3)
    step, moves = steps_of(rule, hyper)
    lr, _, beta1, beta2, eps, *_ = (float(h) for h in hyper)
    p = torch.nn.Parameter(step.tensors["param"].clone())
    optimizer: torch.optim.Optimizer = {
        "sgd": lambda: torch.optim.SGD([p], lr),
        "adagrad": lambda: torch.optim.Adagrad([p], lr, eps=eps),
        "adam": lambda: torch.optim.SparseAdam([p], lr, (beta1, beta2), 1e-300),
    }[rule]()
    for rows, grad in moves:
        p.grad = torch.sparse_coo_tensor(rows[None], grad, p.shape, check_invariants=True)
        optimizer.step()
    torch.testing.assert_close(
        follow(step, moves).tensors["param"], p.detach(), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("decoupled", [False, True], ids=["l2", "decoupled"])
@pytest.mark.parametrize("rule", RULES)
def test_reference_is_torch_optim_on_all_rows(rule: str, decoupled: bool) -> None:
    hyper = make_hyper(0.1, 0.3, 0.9, 0.99, 1e-2)
    step, moves = steps_of(rule, hyper, decoupled=decoupled)
    moves = [(torch.arange(11), torch.randn(11, 5).double()) for _ in moves]
    lr, decay, beta1, beta2, eps, *_ = (float(h) for h in hyper)
    p, l2 = torch.nn.Parameter(step.tensors["param"].clone()), 0 if decoupled else decay
    optimizer: torch.optim.Optimizer = {
        "sgd": lambda: torch.optim.SGD([p], lr, weight_decay=l2),
        "momentum": lambda: torch.optim.SGD([p], lr, beta1, weight_decay=l2),
        "adagrad": lambda: torch.optim.Adagrad([p], lr, weight_decay=l2, eps=eps),
        "adam": lambda: (torch.optim.AdamW if decoupled else torch.optim.Adam)(
            [p], lr, (beta1, beta2), eps, decay
        ),
    }[rule]()
    for _, grad in moves:
        if decoupled and rule != "adam":
            p.data.mul_(1 - lr * decay)
        p.grad = grad
        optimizer.step()
    torch.testing.assert_close(
        follow(step, moves).tensors["param"], p.detach(), rtol=1e-9, atol=1e-12
    )


def test_reference_row_steps_are_optimizers_of_their_own() -> None:
    """Each row as a parameter of its own AdamW, which counts the row's updates alone."""
    hyper = make_hyper(0.1, 0.3, 0.9, 0.99, 1e-2)
    step, moves = steps_of("adam", hyper, row_step=True, decoupled=True)
    step.tensors["row_step"].zero_()
    lr, decay, beta1, beta2, eps, *_ = (float(h) for h in hyper)
    parts = [torch.nn.Parameter(row.clone()) for row in step.tensors["param"]]
    optimizers = [torch.optim.AdamW([p], lr, (beta1, beta2), eps, decay) for p in parts]
    for rows, grad in moves:
        for row, g in zip(rows.tolist(), grad, strict=True):
            parts[row].grad = g
            optimizers[row].step()
    after = follow(step, moves).tensors
    torch.testing.assert_close(
        after["param"], torch.stack([p.detach() for p in parts]), rtol=1e-9, atol=1e-12
    )
    assert after["row_step"].tolist() == [sum(r in rows for rows, _ in moves) for r in range(11)]


def test_reference_late_decay_is_decay_at_every_step() -> None:
    """Rows that were not touched for a while come out as if a dense optimizer had shrunk them at
    every step.
    """
    hyper = make_hyper(0.1, 0.3)
    step, moves = steps_of("sgd", hyper, lazy=True)
    step = step.replace(row_decay=torch.zeros(11).double(), decay_sum=torch.zeros(1).double())
    moves[-1] = (torch.arange(11), torch.randn(11, 5).double())  # the last step reaches every row
    lr, decay = float(hyper[LR]), float(hyper[DECAY])
    dense = step.tensors["param"].clone()
    for number, (rows, grad) in enumerate(moves):
        dense *= 1 - lr * decay
        dense[rows] -= lr * grad
        total = torch.tensor([(number + 1) * math.log1p(-lr * decay)], dtype=torch.float64)
        step = follow(step.replace(decay_sum=total), [(rows, grad)])
    torch.testing.assert_close(step.tensors["param"], dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ["adagrad", "adam"])
def test_reference_row_wise_second_moment(rule: str) -> None:
    """A row whose gradient has the same magnitude everywhere has the same second moment in each
    column.
    """
    hyper = make_hyper(0.1, 0.0, 0.9, 0.99, 1e-2)
    step, moves = steps_of(rule, hyper, row_wise=True)
    moves = [(rows, grad.sign() * grad[:, :1].abs()) for rows, grad in moves]
    full = step.replace(second=torch.zeros(11, 5).double())
    row_wise, full = follow(step, moves).tensors, follow(full, moves).tensors
    torch.testing.assert_close(row_wise["param"], full["param"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(row_wise["second"], full["second"].mean(1), rtol=1e-12, atol=1e-12)


# 3. Kernels are no worse than PyTorch at the same precision.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("rule", RULES)
def test_no_worse_than_torch(
    rule: str, dtype: torch.dtype, shape: tuple[int, int, int], device: str
) -> None:
    check_against_exact(random_rows(rule, shape, dtype), device)


VARIANTS: dict[str, dict[str, Any]] = {
    "decoupled": {"decoupled": True},
    "fp32 states": {"state": F32},
    "bf16 states": {"state": BF16},
    "fp16 states": {"state": F16},
    "row-wise": {"row_wise": True},
    "row-wise bf16": {"row_wise": True, "state": BF16},
    "steps of the rows": {"row_step": True},
    "late decay": {"lazy": True},
    "kahan": {"kahan": True},
    "all": {"row_wise": True, "row_step": True, "lazy": True},
    "grad bf16": {"grad": BF16},
    "grad fp16": {"grad": F16},
    "fill": {"fill": 5},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rule", RULES)
def test_variants_are_no_worse(rule: str, variant: str, dtype: torch.dtype, device: str) -> None:
    given = dict(VARIANTS[variant])
    if rule != "adam":
        given.pop("row_step", None)
    if dtype == F32:
        given.pop("kahan", None)
    if "second" not in RULES[rule]:
        given.pop("row_wise", None)
    for shape in ((70, 150, 33), (9, 40, 260)):
        check_against_exact(random_rows(rule, shape, dtype, **given), device)


# 4. Boundary ids.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
def test_first_and_last_row_and_nothing_else(rule: str, device: str) -> None:
    for n in (1, 2, 64, 65, 1000):
        for row in {0, n - 1}:
            step = random_rows(rule, (1, n, 17), BF16).replace(rows=torch.tensor([row]))
            got = {k: v.cpu() for k, v in step.to(device).run().items()}
            check_untouched(step, got)
            assert not torch.equal(got["param"][row], step.tensors["param"][row])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
def test_fill_is_ignored(rule: str, device: str) -> None:
    """Rows of n or more, equal or not, with NaN for a gradient; and nothing but fill."""
    step = random_rows(rule, (130, 300, 33), BF16, state=BF16)
    t = step.tensors
    rows = torch.cat([t["rows"], torch.tensor([300, 300, 301, 2**40])])
    grad = torch.cat([t["grad"], torch.full((4, 33), math.nan)])
    assert_same_bits(step.replace(rows=rows, grad=grad).to(device).run(), step.to(device).run())
    only = step.replace(rows=rows[-4:], grad=grad[-4:])
    assert_same_bits(
        only.to(device).run(), {k: v for k, v in t.items() if k in ("param", "momentum", "second")}
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW, ids=name_of)
@pytest.mark.parametrize("rule, hyper", [("sgd", SGD), ("adam", ADAM)])
def test_a_row_counts_for_itself_alone(
    rule: str, hyper: Tensor, dtype: torch.dtype, device: str
) -> None:
    """The stored bits of a row do not depend on which other rows are touched."""
    step = random_rows(rule, (300, 900, 40), dtype, hyper=hyper)
    whole, t = step.to(device).run(), step.tensors
    for part in (slice(0, 1), slice(100, 170), slice(299, 300)):
        some = (
            step.replace(rows=t["rows"][part], grad=t["grad"][part].contiguous()).to(device).run()
        )
        rows = t["rows"][part]
        assert_same_bits(
            {k: v[rows] for k, v in some.items()}, {k: v[rows] for k, v in whole.items()}
        )
