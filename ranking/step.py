"""What the training loop asks of whatever computes its steps, on cores or on a GPU."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ranking.encoded import EncodedBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """What one optimiser step trains on.

    Attributes:
        batch: of several processes, the part of this one.
        rows: candidates of all parts.
        weight: what they count together in the loss.
    """

    batch: EncodedBatch
    rows: int
    weight: float


class Step(Protocol):
    """Computes gradients; how its input comes to it, and when its losses can be read."""

    def __call__(self, batch: EncodedBatch, weight: float | None = None) -> Any:
        """Set the dense parameters' gradients, update the tables, return the mean log loss."""

    def ahead(self, steps: Iterable[StepInput]) -> Iterator[StepInput]:
        """Yield the steps with their batches where they are computed."""

    def behind(self, losses: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, float]]:
        """Yield (rows, loss) of each step in their order, as soon as reading it holds nothing up.

        Args:
            losses: computes the steps; (rows, what the step returned).
        """

    def close(self) -> None:
        """Give back what it holds."""
