"""The model of memory traffic beside the useful bytes of the same row; its counts are checked in
tests/interpreter.
"""

import pytest

from benchmarks import cases, floors, model


@pytest.mark.parametrize(
    "op, key, over",
    [
        ("matmul_topk", "xmlkernels/topk/bf16", 1.0),
        ("shortlist_matmul", "xmlkernels/forward/bf16", 1.0),
        ("shortlist_matmul", "xmlkernels/shared/fp32", 1.0),
        ("cluster_step", "xmlkernels/adam/bf16", 1.07),  # shares of dx go to memory and back
        ("shortlist_matmul", "xmlkernels/step/bf16", None),
        ("sparse_update", "xmlkernels/adam/bf16", None),
        ("matmul_topk", "eager/topk/bf16", None),
    ],
)
def test_the_model_against_the_useful_bytes(op: str, key: str, over: float | None) -> None:
    shape = cases.BENCHMARKS[op].gpu_shapes[0]
    impl, phase, dtype = key.split("/")
    letters = {letter: getattr(shape, letter) for letter in "BLDSK"}
    found = floors.modelled_bytes(
        {"op": op, "impl": impl, "phase": phase + floors.GRAPH, "dtype": dtype} | letters, model
    )
    case = next(c for c in cases.build_for_card(op, shape, "cuda") if c.key == (impl, phase, dtype))
    assert (found is None) == (over is None)
    assert over is None or found == pytest.approx(over * case.bytes, rel=0.01)
