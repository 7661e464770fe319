"""The peers of benchmarks/peers.py: each computes what its description says, against references on
a small shape.
"""

import importlib.machinery
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import cases, cases_bce_step, fp8_head, peers, shapes
from benchmarks.cases_bce_step import ops, own_fp8_step
from benchmarks.head import make_head
from xmlkernels.errors import InputError
from xmlkernels.ops import Hyper
from xmlkernels.reference.bce_step import bce_step_
from xmlkernels.reference.matmul_topk import matmul_topk

ROOT = Path(__file__).resolve().parents[2]
TINY = shapes.Shape("tiny", 6, 300, 24, K=7)


def one_unit(exact: Tensor) -> Tensor:
    """The distance between neighbouring bf16 numbers at each place."""
    return torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=2.0**-100))) - 7)


@pytest.mark.parametrize("rows", [97, 300, 1000])
def test_elmo_is_a_step_of_sgd_in_chunks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "LR", 0.05)  # at the benchmark's rate nothing would move by a unit
    head = make_head(TINY, "bf16", "cpu")
    wide, x = head.weight.float(), head.x.to(torch.bfloat16).float()
    hyper, counter = Hyper(0.05).tensor(), torch.tensor([0, 0])
    expected, _ = bce_step_(wide, x, head.pos_row, head.pos_sample, hyper, counter)
    before = head.weight.clone()
    dx = peers.elmo_step(head, rows=rows)()
    assert isinstance(dx, Tensor) and dx.dtype == torch.float32
    assert (dx - expected).norm() / expected.norm() < 0.02
    # Beside one unit of rounding stands what logits, sigma and dW in bf16 lose of the update.
    slack = one_unit(wide) + 0.05 * 2.0**-8 * x.abs().sum(0) + 0.01 * (wide - before.float()).abs()
    assert ((head.weight.float() - wide).abs() <= slack).all()
    moved = wide - before.float()
    slope = ((head.weight.float() - before.float()) * moved).sum() / moved.square().sum()
    assert 0.97 < slope < 1.03


def test_elmo_rounds_without_bias_and_anew_in_each_chunk_and_step() -> None:
    counter = torch.tensor([3])
    weight, grad = torch.full((200, 300), 0.5).bfloat16(), torch.ones(200, 300).bfloat16()
    first, again, other, later = (weight.clone() for _ in range(4))
    peers.stochastic_sgd(first, grad, 1e-4, counter, 1)
    peers.stochastic_sgd(again, grad, 1e-4, counter, 1)
    peers.stochastic_sgd(other, grad, 1e-4, counter, 2)
    peers.stochastic_sgd(later, grad, 1e-4, counter + 1, 1)
    assert abs((first.float().mean() - 0.5).item() + 1e-4) < 1e-5
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, later)


KERNEL = """
import torch
from benchmarks.peers_triton import stochastic_sgd
weight, grad = torch.full((67, 300), 0.5).bfloat16(), torch.ones(67, 300).bfloat16()
weight[1] = -3.0
after = [weight.clone() for _ in range(2)]
for chunk, table in enumerate(after):
    stochastic_sgd(table, grad, 1e-3, torch.tensor([3]), chunk)
found = after[0].float()
assert not torch.equal(*after), "each chunk has words of its own"
assert set(found[1].tolist()) <= {-3.0, -3.015625}, "one of the two neighbours"
assert abs(found[2:].mean().item() - 0.499) < 5e-5, found[2:].mean()
assert ((found[2:] - 0.499).abs() <= 2.0**-9).all()
"""


def test_the_peer_kernel_does_the_same() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", KERNEL], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("capability", [80, 90])
def test_the_peer_kernel_compiles(capability: int) -> None:
    compiler = pytest.importorskip("triton.compiler")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter does not compile")
    from triton.backends.compiler import GPUTarget

    from benchmarks import peers_triton

    signature = {
        "weight": "*bf16",
        "grad": "*bf16",
        "counter": "*i64",
        "lr": "fp32",
        "size": "i32",
        "chunk": "i32",
    }
    source = compiler.ASTSource(
        fn=peers_triton._sgd,
        signature=signature | {"BLOCK": "constexpr"},
        constexprs={"BLOCK": peers_triton._BLOCK},
    )
    assert compiler.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


def test_topk_in_the_format_of_the_table() -> None:
    head = make_head(TINY, "bf16", "cpu")
    values, rows = peers.topk_step(head, k=7)()  # type: ignore[misc]
    expected, _ = matmul_topk(head.x, head.weight, None, 7)
    assert values.dtype == torch.bfloat16 and rows.shape == (6, 7)
    torch.testing.assert_close(values.float(), expected, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("impl", peers.SOFTMAX)
def test_peers_of_another_loss_join_where_installed_and_say_so(
    impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        seen["target"] = target
        return torch.nn.functional.cross_entropy(
            x.float() @ weight.float().T, target, reduction="sum"
        )

    if impl == "liger":
        inner = types.ModuleType("liger_kernel.transformers")
        inner.LigerFusedLinearCrossEntropyLoss = lambda reduction: (
            lambda weight, x, target: loss(x, weight, target)
        )  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "liger_kernel.transformers", inner)
    whole = lambda x, weight, target, reduction: loss(x, weight, target)  # noqa: E731
    if impl == "quack":
        inner = types.ModuleType("quack.linear_cross_entropy")
        inner.chunked_linear_cross_entropy = whole  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "quack.linear_cross_entropy", inner)
    own = impl == "torch-linear-cross-entropy"
    if own:  # an older torch
        monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    package = types.ModuleType(peers.SOFTMAX[impl])
    package.__spec__ = importlib.machinery.ModuleSpec(package.__name__, None)
    package.linear_cross_entropy = whole  # type: ignore[attr-defined]

    absent = {case.impl for case in cases.build_for_card("bce_step", TINY, "cpu", compiled=False)}
    if own:
        monkeypatch.setattr(torch.nn.functional, "linear_cross_entropy", whole, raising=False)
    else:
        monkeypatch.setitem(sys.modules, package.__name__, package)
    case = next(
        c for c in cases.build_for_card("bce_step", TINY, "cpu", compiled=False) if c.impl == impl
    )
    assert impl not in absent and "softmax" in case.phase and "no update" in case.phase
    head = case.inputs()
    before = head.weight.clone()
    dx = case.start(head)()
    assert isinstance(dx, Tensor) and dx.shape == (6, 24) and torch.equal(head.weight, before)
    pairs = set(zip(head.pos_sample.tolist(), head.pos_row.tolist(), strict=True))
    assert all((sample, row) in pairs for sample, row in enumerate(seen["target"].tolist()))


def test_the_8_bit_table_is_what_its_scale_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_head, "_ROWS", 128)
    head = fp8_head.make_fp8_head(TINY, "cpu")
    value = head.weight.float() * head.row_scale[:, :1]
    assert head.weight.shape == (300, 24) and abs(value.std() - 0.02) < 1e-3
    assert torch.equal(head.row_scale[:, 1], value.abs().amax(1))
    assert (head.row_scale[:, 0] == 2.0**-8).all()
    assert torch.equal(head.x, make_head(TINY, "fp32", "cpu").x)
    given = {}

    def op(weight: Tensor, x: Tensor, *rest: Tensor, row_scale: Tensor) -> tuple[Tensor, Tensor]:
        given.update(weight=weight, row_scale=row_scale, step=int(rest[-1][1]))
        return x, x

    monkeypatch.setattr(ops, "bce_step_", op)
    step = own_fp8_step(head)
    assert torch.equal(step(), head.x) and given["step"] == 0  # type: ignore[arg-type]
    step()
    assert given["step"] == 1
    assert given["weight"] is head.weight
    assert given["row_scale"] is head.row_scale


def test_every_shape_of_a_card_has_cases_with_keys_of_their_own() -> None:
    for op, benchmark in cases.BENCHMARKS.items():
        for shape in benchmark.for_card():
            for device in ("cpu", "cuda"):
                keys = [case.key for case in cases.build_for_card(op, shape, device)]
                assert len(set(keys)) == len(keys) and keys[0][0] == "xmlkernels"
    shape = cases.BENCHMARKS["bce_step"].gpu_shapes[0]
    keys = [case.key for case in cases.build_for_card("bce_step", shape, "cuda")]
    assert {("xmlkernels", "sgd", "fp8"), ("elmo", "sgd", "bf16")} <= set(keys)
    assert ("renee", "momentum", "fp16") in keys
    assert {"eager", "compile"} <= {impl for impl, _, _ in keys}


def test_the_pass_of_cutlass_is_a_peer_where_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")

    def impls(batch: int, device: str = "cuda") -> set[str]:
        shape = shapes.Shape("tiny", batch, 300, 24)
        return {case.impl for case in cases.build_for_card("bce_step", shape, device)}

    assert "cutlass" not in impls(128) | impls(128, "cpu")  # not built here
    monkeypatch.setattr(cases_bce_step, "pass_is_built", lambda device: True)
    assert "cutlass" in impls(128) and "cutlass" in impls(65)
    assert "cutlass" not in impls(64) | impls(129)
    head, other = make_head(TINY, "bf16", "cpu"), make_head(TINY, "bf16", "cpu")
    # A CPU has one pass: the comparison before the timing finds nothing.
    dx = cases_bce_step.pass_step(head)()
    options = {"momentum": False, "need_loss": False}
    expected = cases_bce_step.own_step(other, op=ops.bce_step_, **options)()
    assert torch.equal(dx, expected) and torch.equal(head.weight, other.weight)
    real = ops.bce_step_
    calls = iter([1.0, 1.0001])

    def wrong(*args: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        dx, loss = real(*args, **options)
        return dx * next(calls), loss

    monkeypatch.setattr(ops, "bce_step_", wrong)
    with pytest.raises(RuntimeError, match=r"dx is 1.0e-04 from Triton's, 100.00% of the table"):
        cases_bce_step.pass_step(head)


def test_a_card_has_names_of_its_own() -> None:
    for benchmark in cases.BENCHMARKS.values():
        names = {shape.name for shape in (*benchmark.for_card(), *benchmark.shapes)}
        count = len(benchmark.for_card()) + len(benchmark.shapes)
        assert benchmark.for_card() == benchmark.shapes or len(names) == count
    with pytest.raises(InputError, match="--shape of bce_step: expected one of B32-L4k, "):
        # benchmarks/run.py keeps to the CPU's.
        cases.pick("bce_step", cases.BENCHMARKS["bce_step"].gpu_shapes[0].name)
