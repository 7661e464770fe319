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
        ("cluster_step", "xmlkernels/adam/bf16", 1.20),  # scores and update read the rows apart
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
    if found is not None and over is not None:
        assert found["memory"] == pytest.approx(over * case.bytes, rel=0.01)
        # What the processors ask for comes through L2: never less than the table's part of it.
        assert found["cache"] > 0.5 * found["memory"]


def test_both_figures_of_traffic_are_shown() -> None:
    row = {"op": "matmul_topk", "impl": "xmlkernels", "phase": "topk", "dtype": "bf16"}
    row |= {"shape": "s", "B": 512, "L": 1280, "D": 768, "S": None, "K": 10, "peak_mb": None}
    row |= dict.fromkeys(("ms_p20", "ms_p50", "ms_p80"), 1.0) | {"gbps": 1.0, "tflops": 1.0}
    of = model.matmul_topk_accesses(512, 1280, 768, [1280])
    cache = 2 * sum(loads + stores for loads, stores in of.values())
    found = floors.modelled_bytes(row, model)
    assert found is not None and found["cache"] == cache >= found["memory"]
    header, line = floors.table([row], floors.Ceilings(), model)
    assert header.split()[-5:] == ["model", "GB", "memory", "GB", "L2"]
    assert line.split()[-2:] == [f"{found[k] / 1e9:.2f}" for k in ("memory", "cache")]
