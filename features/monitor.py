"""What a training run shows while it lasts: a progress bar or lines, and TensorBoard scalars."""

from pathlib import Path

from rich.progress import TextColumn
from torch.utils.tensorboard import SummaryWriter

from features.console import progress_bar, say

_EVERY_STEPS = 50
_SMOOTHING = 0.98


class Monitor:
    """Follows a training run step by step.

    On a terminal it draws a bar with speed, smoothed loss and time left; elsewhere it prints a
    line for every tenth of the run.

    Args:
        what: the name of what is trained, as in "stage 1".
        total: examples of the whole run.
        unit: what an example is called, as in "rows".
        folder: for TensorBoard's files.
    """

    def __init__(self, what: str, total: int, unit: str, folder: Path) -> None:
        self._what = what
        self._total = total
        self._unit = unit
        self._board = SummaryWriter(folder)
        self._bar = progress_bar(
            TextColumn(f"{{task.fields[speed]}} {unit}/s, loss {{task.fields[loss]}}")
        )
        self._task = self._bar.add_task(what, total=total, speed="?", loss="?")
        self._figures: dict[str, float] = {}
        self._steps = 0
        self._said = 0
        self._bar.start()

    def close(self) -> None:
        """Take the bar down and finish TensorBoard's files."""
        self._bar.stop()
        self._board.close()

    def step(self, *, done: int, seconds: float, figures: dict[str, float]) -> None:
        """Note one more step.

        Args:
            done: examples so far.
            seconds: time they took.
            figures: of this step; ``"loss"`` among them.
        """
        first = not self._steps
        self._steps += 1
        for name, value in figures.items():
            before = self._figures.get(name, value)
            self._figures[name] = _SMOOTHING * before + (1 - _SMOOTHING) * value
        if self._steps % _EVERY_STEPS and done < self._total and not first:
            return
        speed = done / max(seconds, 1e-9)
        loss = self._figures["loss"]
        self._bar.update(self._task, completed=done, speed=f"{speed:,.0f}", loss=f"{loss:.4f}")
        for name, value in self._figures.items():
            self._board.add_scalar(f"train/{name}", value, done)
        self._board.add_scalar(f"train/{self._unit}_per_second", speed, done)
        tenth = 10 * done // self._total
        if self._bar.disable and (tenth > self._said or first):
            left = (self._total - done) / speed
            say(
                f"{self._what}: {done:,} of {self._total:,} {self._unit}, {speed:,.0f} "
                f"{self._unit}/s, loss {loss:.4f}, {left:.0f} s left"
            )
            self._said = tenth

    def evaluated(self, epoch: int, figures: dict[str, float]) -> None:
        """Note what an evaluation gave."""
        for name, value in figures.items():
            self._board.add_scalar(f"evaluation/{name}", value, epoch)
