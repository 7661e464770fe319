"""The kinds of model, by the name that a checkpoint has for them."""

from xmlkernels.models.base import Model
from xmlkernels.models.cascade import Cascade
from xmlkernels.models.end_to_end import EndToEnd

KINDS: dict[str, type[Model]] = {model.kind: model for model in (EndToEnd, Cascade)}
