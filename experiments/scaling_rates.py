"""Speed over time, told from what the commands leave: files of weeks, and TensorBoard's scalars."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from features.manifest import RequestsManifest

_PARTS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """How far a job was at a moment.

    Attributes:
        seconds: on any clock.
        rows: impressions that were done.
    """

    seconds: float
    rows: int


def feature_marks(requests: Path) -> list[list[Mark]]:
    """Return when each week of request records was written, and how many impressions were by then.

    Args:
        requests: folder of request records, as it was built.

    Returns:
        One uninterrupted stretch.
    """
    manifest = RequestsManifest.load(requests)
    written = sorted(
        (manifest.path(week).stat().st_mtime, counts.rows)
        for week, counts in manifest.weeks.items()
    )
    marks, rows = [], 0
    for moment, number in written:
        rows += number
        marks.append(Mark(seconds=moment, rows=rows))
    return [marks]


def training_marks(board: Path) -> list[list[Mark]]:
    """Return how many rows were trained on when, in a stretch for each time the run was started.

    Args:
        board: TensorBoard's folder of the run.
    """
    from tensorboard.backend.event_processing import (  # type: ignore[import-untyped]
        event_accumulator,
    )

    stretches = []
    for file in sorted(board.glob("events.*")):
        events = event_accumulator.EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        if "train/loss" in events.Tags()["scalars"]:
            scalars = events.Scalars("train/loss")
            stretches.append([Mark(seconds=s.wall_time, rows=s.step) for s in scalars])
    return stretches


def rates(stretches: Sequence[Sequence[Mark]], parts: int = _PARTS) -> list[float]:
    """Return rows/s of the parts of a job, each of about as many rows, first to last.

    The time between two stretches does not count. There are fewer parts where there are fewer
    marks.
    """
    steps = [
        (after.rows - before.rows, after.seconds - before.seconds)
        for stretch in stretches
        for before, after in pairwise(stretch)
    ]
    total = sum(rows for rows, _ in steps)
    found: list[float] = []
    done = part_rows = 0
    part_seconds = 0.0
    for rows, seconds in steps:
        done += rows
        part_rows += rows
        part_seconds += seconds
        if done >= total * (len(found) + 1) / parts and part_seconds > 0:
            found.append(part_rows / part_seconds)
            part_rows, part_seconds = 0, 0.0
    return found
