"""What is timed: each op, and its peers' methods written anew from their descriptions.

Closed forms behind the columns `tflops` and `gbps`, the same for every implementation, so that they
are rates of useful work; s is the bytes of a table element, m of a momentum element (0 without
momentum), P the number of positives:

| op | FLOP | bytes |
|---|---|---|
| bce_step | 6 B L D: logits, dX and dW | 2 L D (s + m), table and momentum read and written once; 8 B D, x and dx; 12 P |
| bce_step, skip | 2 B L D and 4 B R D | L D s and R D s, R the rows of groups with positives; the rest as above |
| bce_loss | 2 B L D, backward 6 B L D: logits twice and dX | s L D, twice in the backward; 4 B D, dx as much; 12 P |
| matmul_topk | 2 B L D | s L D, the table; 4 B D, x; 12 B K, values and rows |
| sparse_update | 2, 7 or 14 N D: SGD, Adagrad, Adam | 2 N D (s + m), the rows and their states; 4 N D, gradient; 8 N |
| bag_step | 2 T D and 2 or 14 U D: SGD, Adam; T tokens, U rows they name | 2 U D (s + m); 4 B D; 12 T; 8 B |
| mm (the ceiling) | 2 n³ | 3 s n² |
"""  # noqa: E501  (a table row cannot be broken)

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import DTYPES, LR, REFERENCE_ELEMENTS, Case
from benchmarks.cases_bag import bag_step_cases
from benchmarks.cases_cascade import cascade_cases
from benchmarks.cases_cluster import cluster_step_cases
from benchmarks.cases_loss import bce_loss_cases
from benchmarks.cases_shortlist import shortlist_cases
from benchmarks.cases_sparse import sparse_update_cases
from benchmarks.head import Head, make_head, positives
from benchmarks.shapes import Shape
from benchmarks.timing import Step
from xmlkernels import ops
from xmlkernels.errors import InputError
from xmlkernels.ops import Hyper
from xmlkernels.reference.bce_step import GROUP
from xmlkernels.reference.bce_step import bce_step_ as bce_step_reference
from xmlkernels.reference.matmul_topk import matmul_topk as matmul_topk_reference

CEILING_SIZE = {"cpu": 2048, "cuda": 8192}  # a GPU would finish 2048³ before its clocks rise
OPS = {
    "bce_step": ("bce_step_",),
    "shortlist_matmul": ("shortlist_matmul",),
    "cluster_step": ("cluster_step_",),
    "sparse_update": ("sparse_sgd_", "sparse_adagrad_", "sparse_adam_"),
    "matmul_topk": ("matmul_topk",),
    "bce_loss": ("bce_loss",),
    "bag_step": ("bag_step_",),
}
"""The public functions of `xmlkernels.ops` that each benchmark times."""

MOMENTUM = 0.9


def bce_work(shape: Shape, s: int, m: int = 0) -> tuple[int, int]:
    """FLOP and bytes of one step; s and m are the bytes of a table and of a momentum element."""
    table = shape.L * shape.D
    return 6 * shape.B * table, 2 * table * (s + m) + 8 * shape.B * shape.D + 12 * positives(shape)


def skip_work(shape: Shape, s: int) -> tuple[int, int]:
    """The same where every group of 128 rows without a positive is skipped; at most one group for
    each positive is not.
    """
    busy = min(shape.L, GROUP * positives(shape)) * shape.D
    moved = (shape.L * shape.D + busy) * s + 8 * shape.B * shape.D + 12 * positives(shape)
    return 2 * shape.B * shape.L * shape.D + 4 * shape.B * busy, moved


def topk_work(shape: Shape, s: int) -> tuple[int, int]:
    """FLOP and bytes of one search; s is the bytes of a table element."""
    table, k = shape.L * shape.D, shape.K or 1
    return 2 * shape.B * table, s * table + 4 * shape.B * shape.D + 12 * shape.B * k


def own_step(
    head: Head, *, op: Callable[..., Any], momentum: bool, need_loss: bool, **options: float
) -> Step:
    """`bce_step_`, or its reference. The momentum has the table's format."""
    device = head.weight.device
    hyper = Hyper(LR, beta1=MOMENTUM if momentum else 0).tensor(device)
    counter = torch.tensor([1, 0], device=device)
    state = torch.zeros_like(head.weight) if momentum else None

    def step() -> Tensor:
        dx, _ = op(
            head.weight,
            head.x,
            head.pos_row,
            head.pos_sample,
            hyper,
            counter,
            momentum=state,
            need_loss=need_loss,
            **options,
        )
        counter[1] += 1
        return dx

    return step


def eager_step(head: Head, *, compiled: bool) -> Step:
    """What a user writes: Linear, BCEWithLogitsLoss(sum) on dense targets, backward with dx, SGD
    with momentum.

    The dense targets are made in the step, from the same sparse positives that the other
    implementations take.
    """
    linear = nn.Linear(head.weight.shape[1], head.weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(head.weight)  # in place of a second table
    criterion = nn.BCEWithLogitsLoss(reduction="sum")
    optimizer = torch.optim.SGD(linear.parameters(), lr=LR, momentum=MOMENTUM)
    x = head.x.clone().requires_grad_()

    def forward(x: Tensor, y: Tensor) -> Tensor:
        return criterion(linear(x), y)

    if compiled:
        import torch._inductor.config as inductor

        inductor.compile_threads = 1  # a pool of compiler processes would stay beside the timing
        forward = torch.compile(forward, dynamic=False)

    def step() -> Tensor:
        x.grad = None
        optimizer.zero_grad(set_to_none=True)
        y = torch.zeros(x.shape[0], head.weight.shape[0], device=x.device)
        y[head.pos_sample.long(), head.pos_row] = 1
        forward(x, y).backward()
        optimizer.step()
        assert x.grad is not None
        return x.grad

    return step


def renee_step(head: Head, *, low: str) -> Step:
    """After Renee (Jain et al., MLSys 2023, section 4), from the description.

    fp32 master and momentum; a low-precision copy of the table each step; all logits in one
    low-precision buffer, turned in place into sigmoid minus targets; dE and dW as low-precision
    products, widened; SGD with momentum.
    """
    dtype = DTYPES[low]
    master, momentum = head.weight, torch.zeros_like(head.weight)
    table = master if low == "fp32" else torch.empty_like(master, dtype=dtype)
    logits = torch.empty(head.x.shape[0], master.shape[0], dtype=dtype, device=master.device)
    places = (head.pos_sample.long(), head.pos_row)
    minus_one = torch.full((len(head.pos_row),), -1, dtype=dtype, device=master.device)

    def step() -> Tensor:
        if table is not master:
            table.copy_(master)
        e = head.x.to(dtype)
        torch.mm(e, table.T, out=logits)
        logits.sigmoid_().index_put_(places, minus_one, accumulate=True)
        dx = (logits @ table).float()
        momentum.mul_(MOMENTUM).add_((logits.T @ e).float())
        master.add_(momentum, alpha=-LR)
        return dx

    return step


def bce_step_cases(shape: Shape, device: str, compiled: bool) -> list[Case]:
    cases = []
    inputs = {name: partial(make_head, shape, name, device) for name in DTYPES}

    def add(
        impl: str, phase: str, dtype: str, table: str, m: int, start: Callable[[Head], Step]
    ) -> None:
        cases.append(
            Case(
                impl,
                phase,
                dtype,
                *bce_work(shape, DTYPES[table].itemsize, m),
                inputs[table],
                start,
            )
        )

    for name, dtype in DTYPES.items():
        own = partial(own_step, op=ops.bce_step_, momentum=False, need_loss=False)
        add("xmlkernels", "sgd", name, name, 0, own)
        add("xmlkernels", "momentum", name, name, dtype.itemsize, partial(own, momentum=True))
        add("xmlkernels", "loss", name, name, 0, partial(own, need_loss=True))
        if shape.L * shape.D <= REFERENCE_ELEMENTS:
            add("reference", "sgd", name, name, 0, partial(own, op=bce_step_reference))
    # The most that skipping saves: whatever has no positive is skipped.
    skips = partial(own_step, op=ops.bce_step_, momentum=False, need_loss=False, skip_below=1e30)
    cases.append(Case("xmlkernels", "skip", "bf16", *skip_work(shape, 2), inputs["bf16"], skips))
    add("eager", "momentum", "fp32", "fp32", 4, partial(eager_step, compiled=False))
    if compiled:
        add("compile", "momentum", "fp32", "fp32", 4, partial(eager_step, compiled=True))
    # fp16 as published; a CPU multiplies it slowly.
    for low in ("fp32", "bf16") if device == "cpu" else ("fp16",):
        add("renee", "momentum", low, "fp32", 4, partial(renee_step, low=low))
    return cases


def _own_topk(head: Head, *, op: Callable[..., Any], k: int) -> Step:
    return lambda: op(head.x, head.weight, None, k)


def _eager_topk(head: Head, *, k: int) -> Step:
    return lambda: torch.topk(head.x @ head.weight.T, k)


def _matmul(head: Head) -> Step:
    return lambda: head.x @ head.weight.T


def matmul_topk_cases(shape: Shape, device: str, compiled: bool) -> list[Case]:
    """`compiled` changes nothing: the compiler takes both calls of the eager version from the same
    libraries.
    """
    k, cases = shape.K or 1, []
    inputs = {name: partial(make_head, shape, name, device) for name in ("fp32", "bf16")}

    def add(impl: str, phase: str, dtype: str, start: Callable[[Head], Step]) -> None:
        cases.append(
            Case(
                impl, phase, dtype, *topk_work(shape, DTYPES[dtype].itemsize), inputs[dtype], start
            )
        )

    for name in inputs:
        add("xmlkernels", "topk", name, partial(_own_topk, op=ops.matmul_topk, k=k))
        if shape.L * shape.D <= REFERENCE_ELEMENTS:
            add("reference", "topk", name, partial(_own_topk, op=matmul_topk_reference, k=k))
    add("eager", "topk", "fp32", partial(_eager_topk, k=k))
    add("matmul", "product", "fp32", _matmul)
    return cases


def level_cases(shape: Shape, device: str, compiled: bool) -> list[Case]:
    """One level, or all levels of a cascade."""
    return (
        cascade_cases(shape, device)
        if shape.name.endswith("cascade")
        else cluster_step_cases(shape, device, compiled)
    )


BUILDERS: dict[str, Callable[[Shape, str, bool], list[Case]]] = {
    "bag_step": bag_step_cases,
    "bce_loss": bce_loss_cases,
    "bce_step": bce_step_cases,
    "cluster_step": level_cases,
    "matmul_topk": matmul_topk_cases,
    "shortlist_matmul": shortlist_cases,
    "sparse_update": sparse_update_cases,
}


def ceiling_dtype(dtype: str, device: str) -> str:
    """The format whose torch.mm rate bounds a case: on a CPU fp16 is widened, its own mm is a
    thousandth of fp32's.
    """
    return "fp32" if dtype == "fp16" and device == "cpu" else dtype


def ceiling(dtype: str, device: str) -> Case:
    """torch.mm of n x n matrices in `dtype`."""
    n = CEILING_SIZE[device]

    def make() -> tuple[Tensor, Tensor, Tensor]:
        a, b = (torch.randn(n, n, device=device).to(DTYPES[dtype]) for _ in range(2))
        return a, b, torch.empty_like(a)

    def start(held: tuple[Tensor, Tensor, Tensor]) -> Step:
        return lambda: torch.mm(held[0], held[1], out=held[2])

    return Case("mm", "ceiling", dtype, 2 * n**3, 3 * DTYPES[dtype].itemsize * n * n, make, start)


def build(op: str, shape: Shape, device: str, compiled: bool = True) -> list[Case]:
    """The cases of one shape, the op's own first."""
    return BUILDERS[op](shape, device, compiled)


def require_op(op: str, device: str) -> None:
    """Says why an op cannot be timed, if so.

    Raises:
        InputError: the package lacks the op, no kernel of it is loaded for the device, or nothing
            here times it.
    """
    absent = [name for name in OPS[op] if not hasattr(ops, name)]
    if absent:
        raise InputError(
            f"--op {op}",
            "an op of this version of xmlkernels",
            f"{', '.join(absent)}, not in xmlkernels.ops",
            "choose one of "
            f"{', '.join(name for name in OPS if all(hasattr(ops, n) for n in OPS[name]))}",
        )
    if op not in BUILDERS:
        raise InputError(
            f"--op {op}",
            f"an op with cases to time ({', '.join(BUILDERS)})",
            f"{op}, which has none yet",
            "add its cases to benchmarks/cases.py and its shapes to benchmarks/shapes.py",
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device",
            "a device of this machine",
            "cuda, which torch does not find",
            "use --device cpu",
        )
    for name in OPS[op]:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(
            f"xmlkernels::{name}", device.upper()
        ):
            # A row named xmlkernels that timed the reference would be false.
            raise InputError(
                f"--device {device}",
                f"a kernel of {name} for {device}",
                f"the reference alone ({ops.missing or 'none is built'})",
                "build the native library with `pip install --no-build-isolation -e .`",
            )
