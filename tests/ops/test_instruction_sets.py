"""The CPU kernels are compiled once per instruction set: all that this processor can run give the
reference's bits.
"""

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common import DTYPES, LOW, bits, dyadic_step, fp8_step, make_counter, make_hyper, needs_kernels
from skips import exact_step
from xmlkernels import ops
from xmlkernels.reference import bce_loss as reference_loss
from xmlkernels.reference import bce_step as reference_step
from xmlkernels.reference import matmul_topk as reference_topk
from xmlkernels.reference import rescale_rows as reference_rescale

HERE = Path(__file__).parent
STREAMS = make_hyper(2.0**-8, 2.0**-4, 0.5, 0.75, 0.0, scale=1.0)


def digest(tensors: list[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(bits(t).numpy().tobytes() for t in tensors)).hexdigest()


def results_in_8_bits(
    step: Callable[..., Any],
    backward: Callable[..., Any],
    topk: Callable[..., Any],
    rescale: Callable[..., Any],
) -> dict[str, str]:
    """The same for e4m3 tables: subnormals, normals and what saturates, over several scales."""
    out = {}
    for n, d, exponent in ((300, 7, -6), (521, 70, -18)):
        scale = 2.0 ** -(torch.arange(n) % 4 + 8).float()
        lr, x_dtype = 2.0 ** (exponent - 2), torch.bfloat16
        case = fp8_step(
            dyadic_step(
                33, n, d, torch.float32, exponent=exponent, lr=lr, need_loss=False, x_dtype=x_dtype
            ),
            scale,
        )
        got = case.run(step)
        out[f"sgd e4m3 {n}"] = digest([got[k] for k in ("weight", "row_scale", "dx")])
        t = case.tensors
        args = (
            t["x"],
            t["weight"],
            torch.zeros(n),
            t["pos_row"],
            t["pos_sample"],
            None,
            t["row_scale"],
        )
        out[f"backward e4m3 {n}"] = digest(
            list(backward(*args, need_dweight=True, need_dbias=True))
        )
        x = t["x"].clone()
        x[:, 1::2] *= -1  # else every score is 0
        out[f"topk e4m3 {n}"] = digest(
            list(topk(x, t["weight"], None, 40, row_scale=t["row_scale"]))
        )
        weight, row_scale = t["weight"].clone(), t["row_scale"].clone()
        count = rescale(weight, row_scale, t["counter"], 2**33)
        out[f"rescale e4m3 {n}"] = digest([weight, row_scale, count])
    state = {k: torch.zeros(400, 24, dtype=torch.bfloat16) for k in ("momentum", "second")}
    case = fp8_step(
        dyadic_step(
            33, 400, 24, torch.float32, hyper=STREAMS, decoupled=True, x_dtype=torch.bfloat16
        )
    )
    for rule, given in (("momentum", {"momentum": state["momentum"]}), ("adam", state)):
        got = case.replace(**given, counter=make_counter(step=0)).run(step)
        out[f"{rule} e4m3"] = digest([got[k] for k in ("weight", "row_scale", "dx", *given)])
    return out


def results(
    step: Callable[..., Any],
    backward: Callable[..., Any],
    topk: Callable[..., Any],
    rescale: Callable[..., Any],
) -> dict[str, str]:
    """One digest for each of some calls whose sums are exact in any order."""
    out = {}
    for dtype in DTYPES:
        for b, n, d in ((5, 300, 7), (100, 521, 70)):
            case = dyadic_step(b, n, d, dtype, need_loss=False)
            got = case.run(step)
            out[f"sgd {dtype} {b}"] = digest([got["weight"], got["dx"]])
            t = case.tensors
            args = (t["x"], t["weight"], torch.zeros(n), t["pos_row"], t["pos_sample"])
            out[f"backward {dtype} {b}"] = digest(
                list(backward(*args, need_dweight=True, need_dbias=True))
            )
            whole = t["x"].float().mul(16).to(dtype)
            out[f"topk {dtype} {b}"] = digest(
                list(topk(whole, t["weight"].float().mul(64).to(dtype), None, 40))
            )
        state = {
            k: torch.zeros(400, 24, dtype=LOW[dtype == LOW[0]]) for k in ("momentum", "second")
        }
        case = dyadic_step(33, 400, 24, dtype, hyper=STREAMS, decoupled=True)
        for name, given in (("momentum", {"momentum": state["momentum"]}), ("adam", state)):
            got = case.replace(**given, counter=make_counter(step=0)).run(step)
            out[f"{name} {dtype}"] = digest([got[k] for k in ("weight", "dx", *given)])
        got = exact_step(33, 700, 24, dtype, hyper=STREAMS).run(step)
        out[f"skip {dtype}"] = digest([got[k] for k in ("weight", "dx", "skipped")])
    for dtype in LOW:
        got = (
            dyadic_step(33, 400, 24, dtype)
            .replace(kahan=torch.zeros(400, 24, dtype=dtype))
            .run(step)
        )
        out[f"kahan {dtype}"] = digest([got[k] for k in ("weight", "dx", "kahan")])
    out |= results_in_8_bits(step, backward, topk, rescale)
    for exponent in (-24, -36):
        case = dyadic_step(33, 400, 24, torch.float16, exponent=-24, lr=2.0 ** (exponent - 4))
        out[f"subnormal {exponent}"] = digest([case.run(step)["weight"]])
    return out


# Results that are not exact are held to the same bound as everywhere, in a process of that
# instruction set.
CHILD = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import test_bce_loss, test_bce_step, test_instruction_sets as t
from xmlkernels import ops
for dtype in t.DTYPES:
    for shape in ((5, 129, 7), (0, 33, 7)):
        test_bce_step.check_against_exact(test_bce_step.make("adam bf16", shape, dtype))
    test_bce_loss.test_no_worse_than_torch((65, 300, 40), dtype, "cpu")
native = torch.ops.xmlkernels
of = ops.bce_step_, native.bce_loss_backward, ops.matmul_topk, ops.rescale_rows_
print(json.dumps(t.results(*of)))
"""


def run_child(name: str, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(HERE)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"XMLKERNELS_CPU": name, "XMLKERNELS_REQUIRE_NATIVE": "1"},
        cwd=HERE.parents[1],
    )


@functools.cache
def refusal() -> str:
    """What the library says of an instruction set that does not exist; empty when it is not
    loaded.
    """
    if ops.missing is not None:
        return ""
    code = (
        "import torch; from xmlkernels import ops; ops.matmul_topk(torch.ones(1, 1), torch.ones(1, "
        "1), None, 1)"
    )
    return run_child("none", code).stderr.strip().splitlines()[-1]


def instruction_sets() -> list[str]:
    found = re.search(r"expected ([\w ]+) on this processor", refusal())
    return found[1].split(" or ") if found else ["portable"]


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    return results(
        reference_step.bce_step_,
        reference_loss.bce_loss_backward,
        reference_topk.matmul_topk,
        reference_rescale.rescale_rows_,
    )


@needs_kernels
@pytest.mark.parametrize(
    "name", instruction_sets()[1:]
)  # the first is in use: all other tests are its own
def test_every_instruction_set(name: str, expected: dict[str, str]) -> None:
    done = run_child(name, CHILD)
    assert done.returncode == 0, done.stderr[-3000:]
    got = json.loads(done.stdout)
    assert [k for k in expected if got[k] != expected[k]] == []


@needs_kernels
def test_an_unknown_instruction_set_is_told() -> None:
    said = refusal()
    assert "environment variable XMLKERNELS_CPU: expected" in said
    assert "got 'none'; unset it to use the fastest" in said
    assert instruction_sets()[-1] == "portable"
