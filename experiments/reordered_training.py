"""``train-ranker`` with each batch read backwards: the same sums, added in another order.

A batch is a set: its order changes nothing but the rounding of the sums over it. What this changes
in a run's metrics is what float addition allows; `experiments.scaling_processes` holds the
difference between one process and several against it::

    python -m experiments.reordered_training --data DIR --output DIR ...
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from ranking import run
from ranking.cli import main
from ranking.training import StepInput, Trainer


class ReorderedTrainer(Trainer):
    """A `Trainer` that turns each batch round."""

    def _chunks(self) -> Iterator[Iterable[StepInput]]:
        for chunk in super()._chunks():
            yield (_reversed(step) for step in chunk)


def _reversed(step: StepInput) -> StepInput:
    order = torch.arange(len(step.batch.query) - 1, -1, -1)
    return replace(step, batch=step.batch.reorder(order))


if __name__ == "__main__":
    run.Trainer = ReorderedTrainer  # type: ignore[misc]
    sys.exit(main())
