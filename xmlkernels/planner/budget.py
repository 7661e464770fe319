"""The memory of one process: what stays, and what is there in one phase of a run alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Budget:
    """Bytes of one process in one memory.

    Attributes:
        held: by part, from the first step to the end.
        phases: by phase (a step, an evaluation, …), the parts that are there meanwhile alone. No
            two phases are there at once.
    """

    held: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def phase(self) -> str:
        """The phase that takes most; "" where there is none."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()), default="")

    @property
    def peak(self) -> int:
        """Bytes at most."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes by part at the peak, what stays first."""
        return dict(self.held) | dict(self.phases.get(self.phase, {}))


def summed(budgets: Iterable[Budget]) -> Budget:
    """Put together what is in one memory."""
    held: dict[str, int] = {}
    phases: dict[str, dict[str, int]] = {}
    for budget in budgets:
        _add(held, budget.held)
        for name, parts in budget.phases.items():
            _add(phases.setdefault(name, {}), parts)
    return Budget(held, phases)


def _add(total: dict[str, int], parts: Mapping[str, int]) -> None:
    for name, count in parts.items():
        total[name] = total.get(name, 0) + count
