"""What a run will take, before it is started: memory by part, bytes on the wire, seconds.

`parts` counts bytes, `budget` puts them together per process, `cards` and `speed` turn a step into
seconds by what a device is known to do.
"""

from xmlkernels.planner.budget import Budget, summed
from xmlkernels.planner.cards import CARDS, Card, card_of, this_cpu
from xmlkernels.planner.parts import (
    activation_bytes,
    encoder_parts,
    label_bytes,
    plan,
    planned,
    shortlist_bytes,
    table_parts,
    told,
)

__all__ = [
    "CARDS",
    "Budget",
    "Card",
    "activation_bytes",
    "card_of",
    "encoder_parts",
    "label_bytes",
    "plan",
    "planned",
    "shortlist_bytes",
    "summed",
    "table_parts",
    "this_cpu",
    "told",
]
