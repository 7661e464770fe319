"""What a kernel must move, by its schedule: closed forms, equal to what the interpreter counts (tests/interpreter).

Printed beside a floor and called "model": an account of accesses and what they come to in bytes, no measurement.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """Block sizes of the GPU kernel; the defaults are those of D=768, B=128 in bf16."""

    tile: int = 16_384
    block_b: int = 128
    block_l: int = 64
    block_d: int = 128
    segments: int = 21


def _up(a: int, b: int) -> int:
    return -(-a // b)


def bce_step_accesses(
    B: int, L: int, D: int, blocks: Blocks, *, positives: int = 0, states: int = 0, bias: bool = False, loss: bool = False
) -> dict[str, tuple[int, int]]:
    """Elements that one `bce_step_` loads and stores, by tensor; `states` counts momentum, second and kahan.

    The search for each block's first positive is left out: it depends on the data, and is at most
    (ceil(L / block_l) + 1) (floor(log2(positives)) + 1) loads of pos_row.
    """
    of_b, of_l, of_d, tiles = _up(B, blocks.block_b), _up(L, blocks.block_l), _up(D, blocks.block_d), _up(L, blocks.tile)
    partial = blocks.segments * B * D
    out = {
        "weight": ((2 * of_b + 1) * L * D, L * D),  # logits and dX by every block of samples, the update once
        "state": (states * L * D, states * L * D),
        "x": ((2 * of_l + 1) * B * D, 0),  # logits and update by every block of labels; the finite check once
        "gradient": (2 * of_d * B * L, B * L),
        "partial": ((tiles + 1) * partial, tiles * partial),
        "dx": (0, B * D),
        "pos_row": (of_b * positives, 0),
        "pos_sample": (of_b * positives, 0),
    }
    if bias:
        out |= {"bias": ((of_b + 1) * L, L), "column_sum": (of_b * L, of_b * L)}
    if loss:
        out |= {"loss_part": (of_b * of_l, of_b * of_l), "loss": (0, 1)}
    return out


def bce_step_bytes(
    B: int, L: int, D: int, tile: int = 16_384, *, element: int = 2, state_element: int = 2, states: int = 0,
    positives: int = 0, bias: bool = False, loss: bool = False, blocks: Blocks | None = None,
) -> dict[str, int]:  # fmt: skip
    """Model of one `bce_step_`: bytes between memory and L2, and between L2 and the processors.

    The assumption: a tile's rows and gradient (tile * (D + B) elements), x and the partial sums of dX stay in L2 from one
    product to the next. Then memory sees each row once and back once, the states, bias and positives, and nothing else.

    Returns:
        memory: bytes that must come from or go to memory. cache: bytes of all accesses of the three products.
    """
    blocks = blocks or Blocks(tile)
    of = bce_step_accesses(B, L, D, blocks, positives=positives, states=states, bias=bias, loss=loss)
    size = dict.fromkeys(of, 4) | {"weight": element, "x": element, "gradient": element, "state": state_element, "pos_row": 8}
    memory = 2 * L * D * (element + states * state_element) + 2 * B * D * element + positives * 12 + (8 * L if bias else 0)
    return {"memory": memory, "cache": sum((loads + stores) * size[name] for name, (loads, stores) in of.items())}
