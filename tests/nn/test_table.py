"""What all tables share: an optimizer's state, and what a table takes before it is made."""

from typing import Any

import pytest
import torch

from xmlkernels import InputError
from xmlkernels.nn.bow import BowEncoder, WordTable
from xmlkernels.nn.cascade_level import CascadeLevel, DenseLevel
from xmlkernels.nn.full_head import FullHead
from xmlkernels.nn.mixed import MixedHead, MixedLevel
from xmlkernels.nn.plain import PlainHead, PlainLevel
from xmlkernels.nn.table import STATES, RowOptimizer, Table, normal, without_states
from xmlkernels.planner import planned

N, D = 70, 12
FULL, WORDS = ((N, D), torch.float32), ((N,), torch.float32)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (RowOptimizer("sgd"), {}),
        (RowOptimizer("sgd", momentum=0.9), {"momentum": FULL}),
        (RowOptimizer("adagrad"), {"second": FULL}),
        (RowOptimizer("adagrad", row_wise=True), {"second": WORDS}),
        (RowOptimizer("adam"), {"momentum": FULL, "second": FULL}),
        (RowOptimizer("adam", row_wise=True), {"momentum": FULL, "second": WORDS}),
        (
            RowOptimizer("adam", row_wise=True, state_dtype="bf16"),
            {"momentum": ((N, D), torch.bfloat16), "second": WORDS},
        ),
        (
            RowOptimizer("adamw_dense", row_wise=True),
            {"momentum": FULL, "second": FULL}
            | dict.fromkeys(("bias_momentum", "bias_second"), ((N, 1), torch.float32)),
        ),
        (RowOptimizer(kahan=True), {"kahan": ((N, D), torch.bfloat16)}),
    ],
)
def test_the_state_of_an_optimizer(optimizer: RowOptimizer, expected: dict[str, Any]) -> None:
    found = optimizer.states((N, D), "bf16", bias=True)
    assert found == expected and found.keys() <= set(STATES)
    exact = optimizer.states((N, D), "fp32", bias=True)
    assert exact == {name: state for name, state in expected.items() if name != "kahan"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "lamb"}, "table optimizer: expected one of sgd, adagrad, adam, adamw_dense, got"),
        ({"state_dtype": "fp8"}, "state_dtype: expected one of fp32, bf16, fp16, got 'fp8'"),
        ({"momentum": 1.0}, r"momentum: expected a number in \[0, 1\), got 1.0"),
        ({"betas": (-0.1, 0.9)}, r"betas\[0\]: expected a number in \[0, 1\), got -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]: expected a number in"),
        ({"epsilon": -1e-8}, "epsilon: expected a number of 0 or more, got -1e-08"),
        ({"decay": float("nan")}, "decay: expected a number of 0 or more, got nan"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RowOptimizer(**options)


OPTIMIZERS = [
    RowOptimizer("sgd"),
    RowOptimizer("sgd", momentum=0.9, state_dtype="fp16", kahan=True),
    RowOptimizer("adam", state_dtype="bf16"),
    RowOptimizer("adam", row_wise=True, kahan=True),
    RowOptimizer("adagrad"),
    RowOptimizer("adamw_dense", state_dtype="bf16"),
]
MADE = {
    "mixed": lambda dtype, rows: MixedHead(
        N, D, compute="fp16", dtype=dtype, bias=True, optimizer=rows
    ),
    "mixed level": lambda dtype, rows: MixedLevel(
        N, D, 9, compute="bf16", dtype=dtype, optimizer=rows, seed=0, fill=True
    ),
    "plain": lambda dtype, rows: PlainHead(N, D, dtype=dtype, bias=True, optimizer=rows),
    "plain level": lambda dtype, rows: PlainLevel(
        N, D, 9, dtype=dtype, optimizer=rows, seed=0, fill=True
    ),
    "full": lambda dtype, rows: FullHead(N, D, dtype=dtype, bias=True, optimizer=rows),
    "level": lambda dtype, rows: CascadeLevel(
        N, D, 9, dtype=dtype, optimizer=rows, seed=0, fill=True
    ),
    "dense": lambda dtype, rows: DenseLevel(
        N, D, 9, dtype=dtype, optimizer=rows, seed=0, fill=True
    ),
    "words": lambda dtype, rows: BowEncoder(N, D, dtype=dtype, optimizer=rows).table,
}
KINDS = {
    "mixed": MixedHead,
    "mixed level": MixedLevel,
    "plain": PlainHead,
    "plain level": PlainLevel,
} | {"full": FullHead, "level": CascadeLevel, "dense": DenseLevel, "words": WordTable}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("kind", MADE)
def test_a_planned_table_says_what_a_real_one_holds(
    kind: str, optimizer: RowOptimizer, dtype: str
) -> None:
    try:
        KINDS[kind].check_options(dtype, optimizer)
    except InputError as error:
        with pytest.raises(InputError) as caught:
            MADE[kind](dtype, optimizer)
        assert str(caught.value) == str(error)
        return
    real, meant = MADE[kind](dtype, optimizer), planned(lambda: MADE[kind](dtype, optimizer))
    held = {name: tensor.untyped_storage().nbytes() for name, tensor in real.named_buffers()}
    assert meant.bytes() == real.bytes() == held
    assert all(tensor.is_meta for tensor in meant.buffers())
    states = optimizer.states((N, D), dtype, bias=real.bias is not None)
    assert {name for name in STATES if name in held} == states.keys()
    for name, (shape, state) in states.items():
        assert getattr(real, name).shape == shape and getattr(real, name).dtype == state


def test_rows_scores_and_the_best_rows_agree() -> None:
    table = Table(N, D, dtype="bf16", bias=True, draw=normal(1.0), seed=2)
    table.bias.normal_()
    x, index = torch.randn(5, D), torch.tensor([3, 0, 69, -1])
    logits = x @ table.rows(0, N).T + table.bias
    scores = table.scores(x, index)
    torch.testing.assert_close(scores[:, :3], logits[:, index[:3]], rtol=0.02, atol=0.05)
    assert (scores[:, 3] == -torch.inf).all()
    values, rows = table.topk(x, 4)
    torch.testing.assert_close(values, logits.topk(4).values, rtol=0.02, atol=0.05)
    torch.testing.assert_close(table.scores(x, rows), values, rtol=0.02, atol=0.05)


def test_the_loss_is_differentiable_in_the_embeddings() -> None:
    table = Table(N, D, draw=normal(0.5), seed=2)
    x = torch.randn(4, D, requires_grad=True)
    row, sample = torch.tensor([2, 5, 5]), torch.tensor([1, 0, 3], dtype=torch.int32)
    target = torch.zeros(4, N)
    target[sample.long(), row] = 1
    z = x @ table.weight.T
    expected = torch.nn.functional.binary_cross_entropy_with_logits(z, target, reduction="sum")
    loss = table.loss(x, row, sample)
    torch.testing.assert_close(loss[0], expected)
    (ours,), (theirs,) = torch.autograd.grad(loss, x), torch.autograd.grad(expected, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_prediction_does_without_states() -> None:
    trained = FullHead(3, 2, dtype="bf16", optimizer=RowOptimizer("adam", kahan=True))
    plain = FullHead(3, 2, dtype="bf16")
    named = {f"head.{k}": v for k, v in trained.state_dict().items()} | {"encoder.second": None}
    own = {f"head.{k}": v for k, v in plain.state_dict().items()} | {"encoder.second": None}
    assert without_states(named, own).keys() == own.keys() < named.keys()
