"""Which layers the levels read, and the vectors that come of it."""

import pytest
import torch

from xmlkernels import InputError
from xmlkernels.nn.encoder import Encoder
from xmlkernels.nn.layer_recipe import checked_layers, default_layers


@pytest.mark.parametrize(
    ("depth", "recipes"),
    [
        (
            12,
            {
                2: ((9, 10), (12,)),
                3: ((7, 8), (10,), (12,)),
                4: ((5, 6), (8,), (10,), (12,)),
                5: ((5, 6), (8,), (10,), (11,), (12,)),
            },
        ),
        (
            24,
            {2: ((18, 20), (24,)), 3: ((16, 18), (22,), (24,)), 4: ((15, 16), (18,), (22,), (24,))},
        ),
        (
            6,
            {
                2: ((4, 5), (6,)),
                3: ((3, 4), (5,), (6,)),
                4: ((2, 3), (4,), (5,), (6,)),
                5: ((1, 2), (3,), (4,), (5,), (6,)),
            },
        ),
        (4, {2: ((2, 3), (4,)), 4: ((1,), (2,), (3,), (4,))}),
        (2, {2: ((1,), (2,))}),
    ],
)
def test_default_layers(depth: int, recipes: dict) -> None:
    assert {levels: default_layers(depth, levels) for levels in recipes} == recipes


@pytest.mark.parametrize("depth", range(2, 49))
def test_every_depth_has_ascending_layers_that_end_at_the_last(depth: int) -> None:
    for levels in range(2, min(5, depth) + 1):
        recipe = default_layers(depth, levels)
        flat = [j for level in recipe for j in level]
        assert len(recipe) == levels
        assert flat == sorted(set(flat))
        assert flat[0] >= 1
        assert flat[-1] == depth
        assert all(len(level) == 1 for level in recipe[1:])


def test_too_few_layers_and_too_many_levels_are_told() -> None:
    with pytest.raises(
        InputError,
        match="encoder: expected 4 layers or more, one for each level of the tree, got 3; take a",
    ):
        default_layers(3, 4)
    for levels in (1, 6):
        with pytest.raises(
            InputError, match=f"levels of the cascade: expected 2 to 5, got {levels}"
        ):
            default_layers(12, levels)
    for recipe, message in (
        ([(1,)], "expected 2 entries, one for each level, got 1"),
        ([(1, 2, 3), (4,)], "expected one or two layers for a level"),
        ([(), (4,)], "expected one or two layers for a level"),
        ([(1,), (7,)], "expected layers from 0 to 6, those of this encoder, got layer 7"),
        ([(-1,), (6,)], "expected layers from 0 to 6, those of this encoder, got layer -1"),
    ):
        with pytest.raises(InputError, match=message):
            checked_layers(recipe, 2, 6)
    assert checked_layers([[1, 2], [99]], 2, None) == ((1, 2), (99,))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_layer_vectors_are_the_pooled_hidden_states(pooling: str) -> None:
    encoder = Encoder.tiny(50, layers=3, seed=1, pooling=pooling, dropout=0.5).eval()
    ids = torch.randint(5, 50, (4, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    mask[2, :2] = 0  # padded on the left: the first real token is the third
    recipe = ((0, 1), (2,), (3,))
    got = encoder.layer_vectors(recipe, ids, mask)
    with torch.no_grad():
        states = encoder.model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True
        ).hidden_states
        assert len(states) == encoder.layers + 1 == 4
        pooled = []
        for state in states:
            if pooling == "cls":
                pooled.append(torch.stack([state[s, 2 if s == 2 else 0] for s in range(4)]))
            else:
                pooled.append(torch.stack([state[s, mask[s] == 1].mean(0) for s in range(4)]))
        for vector, level in zip(got, recipe, strict=True):
            torch.testing.assert_close(vector, torch.cat([pooled[j] for j in level], 1))
        torch.testing.assert_close(got[2], encoder(ids, mask))
    assert [tuple(v.shape) for v in got] == [(4, 64), (4, 32), (4, 32)]
    assert all(v.dtype == torch.float32 for v in got)


def test_gradients_of_all_levels_reach_the_layers_below() -> None:
    encoder = Encoder.tiny(50, layers=3, seed=1, pooling="cls").eval()
    ids = torch.full((2, 5), 7)
    first, last = encoder.layer_vectors(((1,), (3,)), ids, torch.ones_like(ids))
    torch.autograd.backward([first, last], [torch.ones_like(first), torch.zeros_like(last)])
    grads = [encoder.model.encoder.layer[i].output.dense.weight.grad for i in range(3)]
    assert grads[0].any() and not grads[1].any() and not grads[2].any()


def test_a_layer_beyond_the_encoder_is_told() -> None:
    encoder = Encoder.tiny(50, layers=2)
    ids = torch.full((2, 5), 7)
    with pytest.raises(InputError, match="got layer 3; take a deeper encoder or other layers"):
        encoder.layer_vectors(((1,), (3,)), ids, torch.ones_like(ids))
