"""The update of table rows that every in-place op shares: what the reference means. The kernels'
tests build on it.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from common import assert_same_bits, decoded, make_counter, make_hyper, to_fp8
from xmlkernels.ops.hyper import DECAY, LR, Hyper
from xmlkernels.reference.update import update_rows, update_rows_at_

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TRUE = torch.tensor(True)


def table(n: int = 9, d: int = 5, **states: torch.dtype) -> dict[str, Tensor]:
    """A table with the named states; second_row asks for a row-wise second moment."""
    g = torch.Generator().manual_seed(n + d)
    t = {"weight": torch.randn(n, d, generator=g, dtype=F64).to(states.pop("weight", F64))}
    for name, dtype in states.items():
        shape = (n,) if name == "second_row" else (n, d)
        noise = torch.randn(shape, generator=g, dtype=F64)
        t[name.removesuffix("_row")] = (noise.square() if "second" in name else 0.1 * noise).to(
            dtype
        )
    return t


def run(
    t: dict[str, Tensor], rows: Tensor, grad: Tensor, hyper: Tensor, **options: Any
) -> dict[str, Tensor]:
    """The tensors after the update; `t` stays as it is."""
    after = {k: v.clone() for k, v in t.items()}
    states = {k: v for k, v in after.items() if k != "weight"}
    counter, apply = options.pop("counter", make_counter(step=3)), options.pop("apply", TRUE)
    update_rows_at_(after["weight"], rows, grad, hyper, counter, apply, **states, **options)
    return after


def some(n: int = 9, d: int = 5) -> tuple[Tensor, Tensor]:
    rows = torch.tensor([0, 2, 3, n - 1])
    return rows, torch.randn(4, d, generator=torch.Generator().manual_seed(1), dtype=F64)


def test_adagrad_by_hand() -> None:
    """v = 1 + 4 = 5, w = 3 - 0.5 * 2 / (sqrt 5 + 0.25); row-wise v = 1 + (4 + 16) / 2 = 11."""
    hyper, counter, rows = make_hyper(0.5, eps=0.25), make_counter(), torch.tensor([1])
    weight, grad = torch.tensor([[9.0, 9], [3, 7]]), torch.tensor([[2.0, 4]])
    second = torch.tensor([[8.0, 8], [1, 1]])
    update_rows_at_(weight, rows, grad, hyper, counter, TRUE, second=second)
    assert second.tolist() == [[8, 8], [5, 17]]
    expected = [3 - 0.5 * 2 / (math.sqrt(5) + 0.25), 7 - 0.5 * 4 / (math.sqrt(17) + 0.25)]
    torch.testing.assert_close(weight, torch.tensor([[9, 9], expected]))
    weight, second = torch.tensor([[9.0, 9], [3, 7]]), torch.tensor([8.0, 1])
    update_rows_at_(weight, rows, grad, hyper, counter, TRUE, second=second)
    assert second.tolist() == [8, 11]
    rate = 0.5 / (math.sqrt(11) + 0.25)
    torch.testing.assert_close(weight, torch.tensor([[9, 9], [3 - rate * 2, 7 - rate * 4]]))


def test_row_wise_adam_by_hand() -> None:
    """Step 2 (t = 2), b1 = 1/2, b2 = 3/4: m = 1/2 + 1 = 3/2 and 1/2 + 2; v = 3/4 4 + 1/4 10;
    corrections 3/4 and 7/16.
    """
    hyper = make_hyper(0.1, beta1=0.5, beta2=0.75, eps=0.01)
    weight = torch.tensor([[1.0, 2]])
    momentum = torch.tensor([[1.0, 1]])
    second = torch.tensor([4.0])
    update_rows_at_(
        weight,
        torch.tensor([0]),
        torch.tensor([[2.0, 4]]),
        hyper,
        make_counter(step=1),
        TRUE,
        momentum=momentum,
        second=second,
    )
    assert momentum.tolist() == [[1.5, 2.5]] and second.tolist() == [5.5]
    rate = 0.1 / 0.75 / (math.sqrt(5.5 / (7 / 16)) + 0.01)
    torch.testing.assert_close(weight, torch.tensor([[1 - rate * 1.5, 2 - rate * 2.5]]))


def test_row_wise_second_moment_takes_the_l2_term() -> None:
    hyper = make_hyper(0.1, decay=0.5, eps=0.01)
    weight = torch.tensor([[4.0, -2]]).to(BF16)
    second = torch.zeros(1)
    kahan = torch.tensor([[2.0, 0]]).to(BF16)
    args = (torch.tensor([0]), torch.tensor([[1.0, 1]]), hyper, make_counter(), TRUE)
    update_rows_at_(weight, *args, second=second, kahan=kahan)
    assert second.tolist() == [(4.0**2 + 0) / 2]  # g = (1 + 0.5 (4 + 2), 1 - 0.5 * 2)


@pytest.mark.parametrize("decoupled", [False, True])
def test_full_states_equal_torch(decoupled: bool) -> None:
    """Adagrad and Adam with [n, D] states against torch's own optimizers on the touched rows, in
    float64.
    """
    rows, grad = some()
    hyper = make_hyper(0.05, 0.0 if decoupled else 0.1, 0.9, 0.99, 1e-6).to(F64)
    h = Hyper(*hyper.tolist())
    t = table(second=F64)
    p = torch.nn.Parameter(t["weight"][rows].clone())
    p.grad = grad.clone()
    adagrad = torch.optim.Adagrad([p], h.lr, eps=h.epsilon, weight_decay=h.decay)
    adagrad.state[p]["sum"] = t["second"][rows].clone()
    adagrad.step()
    got = run(t, rows, grad, hyper, decoupled=decoupled)
    torch.testing.assert_close(got["weight"][rows], p.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got["second"][rows], adagrad.state[p]["sum"], rtol=1e-12, atol=1e-12)

    t = table(momentum=F64, second=F64)
    p = torch.nn.Parameter(t["weight"][rows].clone())
    p.grad = grad.clone()
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    adam = kind([p], h.lr, (h.beta1, h.beta2), h.epsilon, h.decay)
    adam.state[p] = {
        "step": torch.tensor(3.0),
        "exp_avg": t["momentum"][rows],
        "exp_avg_sq": t["second"][rows].clone(),
    }
    adam.step()
    got = run(t, rows, grad, hyper, decoupled=decoupled)
    torch.testing.assert_close(got["weight"][rows], p.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("state", ["second", "second_row"])
def test_each_row_corrects_its_bias_by_its_own_count(state: str) -> None:
    """Row by row as if the counter stood at the row's own step."""
    rows, grad = some()
    hyper = make_hyper(0.05, 0.1, 0.9, 0.99, 1e-6).to(F64)
    t = table(**{"momentum": F64, state: F64})
    count = torch.arange(9) * 7
    got = run(t | {"row_step": count}, rows, grad, hyper)
    assert torch.equal(got["row_step"] - count, torch.tensor([1, 0, 1, 1, 0, 0, 0, 0, 1]))
    for i, row in enumerate(rows):
        alone = run(
            t, rows[i : i + 1], grad[i : i + 1], hyper, counter=make_counter(step=int(count[row]))
        )
        torch.testing.assert_close(got["weight"][row], alone["weight"][row], rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    "rule", [{}, {"momentum": F64}, {"second": F64}, {"momentum": F64, "second_row": F64}], ids=str
)
def test_lazy_decay_equals_the_dense_decay_of_every_step(rule: dict[str, torch.dtype]) -> None:
    """A schedule of eight rates; a row is touched now and then, and brought up to date at the
    end.
    """
    lazy, dense = table(**rule), table(**rule)
    lazy["row_decay"] = torch.zeros(9, dtype=F64)
    total, generator = torch.zeros(1, dtype=F64), torch.Generator().manual_seed(3)
    for step in range(8):
        hyper = make_hyper(0.1 / (1 + step), 0.3, 0.9, 0.99, 1e-6).to(F64)
        total += torch.log1p(-hyper[LR] * hyper[DECAY])
        rows = torch.randperm(9, generator=generator)[:3].sort()[0] if step < 7 else torch.arange(9)
        grad = torch.randn(len(rows), 5, generator=generator, dtype=F64)
        counter = make_counter(step=step)
        lazy = run(
            lazy, rows, grad, hyper, counter=counter, decay_sum=total.clone(), decoupled=True
        )
        still = torch.ones(9, dtype=torch.bool)
        still[rows] = False
        dense["weight"][still] *= 1 - hyper[LR] * hyper[DECAY]
        dense = run(dense, rows, grad, hyper, counter=counter, decoupled=True)
        assert torch.equal(lazy["row_decay"][rows], total.expand(len(rows)))
    torch.testing.assert_close(lazy["weight"], dense["weight"], rtol=1e-12, atol=1e-14)


def test_a_row_wise_second_moment_rounds_like_column_0() -> None:
    t = table(200, 5, momentum=F32, second_row=BF16, weight=F32)
    full = {
        "weight": t["weight"][:, :1],
        "momentum": t["momentum"][:, :1],
        "second": t["second"][:, None].contiguous(),
    }
    rows, grad = torch.arange(200), torch.full((200, 5), 0.7)
    hyper = make_hyper(0.1, beta1=0.9, beta2=0.999, eps=1e-6)
    row_wise = run(t, rows, grad, hyper, row_offset=2**33)
    column = run(full, rows, grad[:, :1], hyper, row_offset=2**33)
    assert torch.equal(row_wise["second"], column["second"][:, 0])
    # Global rows choose the words.
    assert not torch.equal(row_wise["second"], run(t, rows, grad, hyper)["second"])
    mean = (row_wise["second"].double() - (0.999 * t["second"].double() + 0.001 * 0.49)).mean()
    assert abs(float(mean)) < 5 * 2**-9 / 200**0.5


def test_only_the_real_rows_are_touched_and_only_where_applied() -> None:
    states = {"momentum": F32, "second_row": F32, "kahan": BF16, "weight": BF16}
    t = table(**states) | {"row_step": torch.arange(9), "row_decay": torch.zeros(9)}
    rows, grad = torch.tensor([1, 4, 9, 9]), torch.ones(4, 5)
    options = {"decay_sum": torch.tensor([-0.5]), "decoupled": True}
    hyper = make_hyper(0.1, 0.1, 0.9, 0.99, 1e-6)
    got = run(t, rows, grad, hyper, **options)
    for name, after in got.items():
        changed = (after != t[name]).reshape(9, -1).any(1)
        assert changed.nonzero().flatten().tolist() == [1, 4], name
    assert_same_bits(t, run(t, rows, grad * torch.nan, hyper, apply=torch.tensor(False), **options))


def test_pieces_are_not_written() -> None:
    t = table(4, 3, momentum=F32, second=F32, weight=F16)
    before = {k: v.clone() for k, v in t.items()}
    hyper = make_hyper(0.1, 0.1, 0.9, 0.99, 1e-6)
    writes = update_rows(
        t["weight"],
        torch.ones(4, 3),
        hyper,
        make_counter(),
        torch.arange(4),
        t["momentum"],
        t["second"],
        None,
        False,
    )
    assert [id(old) for old, _ in writes] == [id(t[k]) for k in ("weight", "momentum", "second")]
    assert all(new.dtype == old.dtype for old, new in writes)
    assert_same_bits(before, t)


def test_8_bit_rows_keep_their_scale_and_largest_value() -> None:
    """Away from rounding (a step of a whole unit) the new codes are exact; the maximum only grows;
    other rows stay.
    """
    weight, row_scale = to_fp8(torch.tensor([[1.0, -0.5], [0.25, 0.125], [1, 1]]), 2.0**-8)
    row_scale[1, 1] = 0.75
    grad, rows = torch.tensor([[1.0, 0], [0, -0.5]]), torch.tensor([0, 1])
    update_rows_at_(weight, rows, grad, make_hyper(0.25), make_counter(), TRUE, row_scale=row_scale)
    assert decoded(weight, row_scale).tolist() == [[0.75, -0.5], [0.25, 0.25], [1, 1]]
    assert row_scale.tolist() == [[2.0**-8, 1], [2.0**-8, 0.75], [2.0**-8, 1]]
    update_rows_at_(
        weight, rows, -8 * grad, make_hyper(0.25), make_counter(), TRUE, row_scale=row_scale
    )
    # 2.75 saturates.
    assert decoded(weight, row_scale).tolist() == [
        [1.75, -0.5],
        [0.25, -0.75],
        [1, 1],
    ]
    assert row_scale[:, 1].tolist() == [1.75, 0.75, 1]
