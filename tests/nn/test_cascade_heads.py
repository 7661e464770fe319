"""The heads of a cascade before their first step: first values, formats, features, memory."""

import math

import pytest
import torch

from xmlkernels import InputError
from xmlkernels.nn.cascade_heads import CascadeHeads
from xmlkernels.nn.table import RowOptimizer

SIZES, MOST, WIDTH = [40, 300, 5000], [9, 20], 24
LAYERS = [(1, 2), (3,), (4,)]


def make_heads(**options: object) -> CascadeHeads:
    return CascadeHeads(SIZES, MOST, WIDTH, **{"layers": LAYERS, "topk": [5, 7], **options})


def test_first_values_are_xavier_uniform_zero_biases_and_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    heads = make_heads(seed=3)
    torch.manual_seed(2)
    again, other = make_heads(seed=3), make_heads(seed=4)
    for n, level, same, differs in zip(
        SIZES, heads.levels, again.levels, other.levels, strict=True
    ):
        bound = math.sqrt(6 / (n + WIDTH))
        assert 0.99 * bound < float(level.weight.abs().max()) <= bound
        assert abs(float(level.weight.mean())) < 0.05 * bound
        assert not level.bias.any() and level.bias.dtype == torch.float32
        assert torch.equal(level.weight, same.weight)
        assert not torch.equal(level.weight, differs.weight)
    linear = heads.projections["0"]
    bound = math.sqrt(6 / (3 * WIDTH))
    assert tuple(linear.weight.shape) == (WIDTH, 2 * WIDTH)
    assert 0.99 * bound < float(linear.weight.detach().abs().max()) <= bound
    assert torch.equal(linear.weight, again.projections["0"].weight)
    assert torch.equal(linear.bias, again.projections["0"].bias)
    assert not any(level.weight.any() for level in make_heads(fill=False).levels)


@pytest.mark.parametrize(
    ("dtype", "clusters"), [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp8", "bf16")]
)
def test_formats_hold_the_same_first_values(dtype: str, clusters: str) -> None:
    formats = {
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp8": torch.float8_e4m3fn,
    }
    exact, heads = make_heads(), make_heads(dtype=dtype)
    assert [level.weight.dtype for level in heads.levels] == [formats[clusters]] * 2 + [
        formats[dtype]
    ]
    for level, full in zip(heads.levels, exact.levels, strict=True):
        torch.testing.assert_close(level.rows(0, 40), full.weight[:40], rtol=2.0**-4, atol=2.0**-17)
    assert [
        level.weight.dtype for level in make_heads(dtype="fp8", cluster_dtype="fp32").levels[:2]
    ] == [torch.float32] * 2


def test_state_is_kept_only_where_the_optimizer_needs_it() -> None:
    row = make_heads()
    full = make_heads(optimizer=RowOptimizer("adam", state_dtype="bf16"))
    sgd = make_heads(optimizer="sgd")
    assert row.levels[2].second.shape == (5000,) and full.levels[2].second.shape == (5000, WIDTH)
    assert full.levels[2].second.dtype == torch.bfloat16
    assert sgd.levels[2].momentum is None
    assert sgd.levels[2].second is None
    assert sgd.levels[2].gain == 1
    sgd = make_heads(optimizer=RowOptimizer("sgd", momentum=0.9))
    assert sgd.levels[2].momentum is not None
    # The tables of a cascade are no parameters: only the linear layer stands in a torch optimizer.
    assert [name for name, _ in row.named_parameters()] == [
        "projections.0.weight",
        "projections.0.bias",
    ]


def test_the_gain_is_a_power_of_two_near_64_candidate_lists() -> None:
    gains = [level.gain for level in make_heads().levels]
    # 64 times 40, 5 * 9 and 7 * 20 are 2560, 2880 and 8960.
    assert gains == [
        2.0**11,
        2.0**11,
        2.0**13,
    ]


def test_features_go_through_the_linear_layer_where_two_layers_are_read() -> None:
    heads = make_heads(drops=[0.5, 0.25, 0.0], projection_drop=0.0)
    vectors = [torch.randn(4, 2 * WIDTH), torch.randn(4, WIDTH), torch.randn(4, WIDTH)]
    heads.eval()
    first, second, third = heads.features(vectors)
    torch.testing.assert_close(first, heads.projections["0"](vectors[0]))
    assert torch.equal(second, vectors[1]) and torch.equal(third, vectors[2])
    heads.train()
    torch.manual_seed(0)
    dropped = heads.features([v.repeat(500, 1) for v in vectors])
    shares = [float((f == 0).float().mean()) for f in dropped]
    assert shares == pytest.approx([0.5, 0.25, 0.0], abs=0.02)
    torch.testing.assert_close(
        dropped[1][dropped[1] != 0], (vectors[1] / 0.75).repeat(500, 1)[dropped[1] != 0]
    )
    one = make_heads(layers=[(1,), (2,), (3,)])
    assert len(one.projections) == 0


def test_sizes_of_tables_and_states() -> None:
    heads = make_heads(dtype="bf16")
    for nodes, level in zip(SIZES, heads.levels, strict=True):
        sizes = {name: t.numel() * t.element_size() for name, t in level.state_dict().items()}
        assert sizes == {  # bf16 rows, fp32 first moment, row-wise second
            "weight": 2 * nodes * WIDTH,
            "bias": 4 * nodes,
            "momentum": 4 * nodes * WIDTH,
            "second": 4 * nodes,
            "counter": 16,
        }


def test_levels_out_of_range_are_refused() -> None:
    for sizes in ([10], [2, 3, 4, 5, 6, 7]):
        with pytest.raises(
            InputError, match=f"levels of the cascade: expected 2 to 5, got {len(sizes)}"
        ):
            CascadeHeads(
                sizes,
                [2] * (len(sizes) - 1),
                WIDTH,
                layers=[(1,)] * len(sizes),
                topk=[1] * (len(sizes) - 1),
            )
