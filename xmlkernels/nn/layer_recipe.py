"""Choose the layers of the encoder that each level of a cascade reads."""

from collections.abc import Sequence

from xmlkernels.errors import InputError

Recipe = tuple[tuple[int, ...], ...]

# Layers counted from 1 (0 is the embeddings' output), coarsest level first. Source: CascadeXML
# (NeurIPS 2022), section 4 and its released settings for R = 3, 4; XMC_HTC for R = 2, 5 and for
# encoders of 24 layers.
_TWELVE: dict[int, Recipe] = {
    2: ((9, 10), (12,)),
    3: ((7, 8), (10,), (12,)),
    4: ((5, 6), (8,), (10,), (12,)),
    5: ((5, 6), (8,), (10,), (11,), (12,)),
}
_TWENTY_FOUR: dict[int, Recipe] = {3: ((16, 18), (22,), (24,)), 4: ((15, 16), (18,), (22,), (24,))}


def default_layers(num_layers: int, levels: int) -> Recipe:
    """Choose the layers of each level, coarsest first; two layers of a level are concatenated.

    12 layers, and 24 with R = 3 or 4, take the published recipes. Any other depth n takes the one
    for 12: its layer j becomes floor(j n / 12), lowered where two would coincide, so that layers
    ascend. A coarsest level whose lower layer would be the embeddings reads the upper one alone.
    Six layers (MiniLM, DistilBERT), R = 4: (2, 3), 4, 5, 6.

    Args:
        num_layers: n, of the encoder.
        levels: R, 2 to 5, the label level included.

    Raises:
        InputError: R is out of range, or the encoder has fewer layers than levels.
    """
    if levels not in _TWELVE:
        mend = "build the label tree with 1 to 4 depths"
        raise InputError("levels of the cascade", "2 to 5", str(levels), mend)
    if num_layers < levels:
        expected = f"{levels} layers or more, one for each level of the tree"
        mend = (
            "take a deeper encoder or a tree with fewer depths, or name the layers of each level "
            "yourself (a layer may serve several)"
        )
        raise InputError("encoder", expected, str(num_layers), mend)
    published = _TWENTY_FOUR.get(levels) if num_layers == 24 else None
    if published is not None:
        return published
    following = num_layers + 1
    recipe: list[tuple[int, ...]] = []
    for level in reversed(_TWELVE[levels]):
        layers: list[int] = []
        for layer in reversed(level):
            following = min(layer * num_layers // 12, following - 1)
            layers.insert(0, following)
        recipe.insert(0, tuple(j for j in layers if j > 0))
    return tuple(recipe)


def checked_layers(recipe: Sequence[Sequence[int]], levels: int, num_layers: int | None) -> Recipe:
    """Check a recipe and return it as tuples.

    Args:
        recipe: layers of each level, coarsest first.
        levels: R.
        num_layers: of the encoder; None where it is not known, or where it has no layers (a bag of
            words) and gives every level the same.

    Raises:
        InputError: not one entry for each level, an entry without layers, more than two, or a layer
            that the encoder lacks.
    """
    layers = tuple(tuple(int(j) for j in level) for level in recipe)
    where = "layers of the levels"
    if len(layers) != levels:
        mend = "name the layers of every level, coarsest first"
        raise InputError(where, f"{levels} entries, one for each level", f"{len(layers)}", mend)
    for level in layers:
        if len(level) not in (1, 2):
            raise InputError(where, "one or two layers for a level", str(level), "correct it")
        if num_layers is not None and (min(level) < 0 or max(level) > num_layers):
            expected = f"layers from 0 to {num_layers}, those of this encoder"
            got = f"layer {max(level) if max(level) > num_layers else min(level)}"
            raise InputError(where, expected, got, "take a deeper encoder or other layers")
    return layers
