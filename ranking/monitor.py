"""What a training run shows while it lasts: a progress bar or lines, and TensorBoard scalars."""

from pathlib import Path

from rich.progress import TextColumn
from torch.utils.tensorboard import SummaryWriter

from features.console import progress_bar, say
from ranking.training import Progress

_EVERY_STEPS = 50
_SMOOTHING = 0.98


class Monitor:
    """Follows a `Trainer` as its ``on_step``.

    On a terminal it draws a bar with rows/s, smoothed loss and time left; elsewhere it prints a
    line for every tenth of the run.

    Args:
        rows: candidates of the whole run.
        folder: for TensorBoard's files.
    """

    def __init__(self, rows: int, folder: Path) -> None:
        self._rows = rows
        self._board = SummaryWriter(folder)
        self._bar = progress_bar(
            TextColumn("{task.fields[speed]} rows/s, loss {task.fields[loss]}")
        )
        self._task = self._bar.add_task("training", total=rows, speed="?", loss="?")
        self._loss = 0.0
        self._said = 0
        self._bar.start()

    def close(self) -> None:
        """Take the bar down and finish TensorBoard's files."""
        self._bar.stop()
        self._board.close()

    def __call__(self, progress: Progress, loss: float) -> None:
        """Note the loss of one more step."""
        first = self._loss == 0
        self._loss = loss if first else _SMOOTHING * self._loss + (1 - _SMOOTHING) * loss
        if progress.step % _EVERY_STEPS and progress.rows < self._rows:
            return
        speed = progress.rows / max(progress.seconds, 1e-9)
        self._bar.update(
            self._task, completed=progress.rows, speed=f"{speed:,.0f}", loss=f"{self._loss:.4f}"
        )
        self._board.add_scalar("train/log_loss", self._loss, progress.rows)
        self._board.add_scalar("train/rows_per_second", speed, progress.rows)
        tenth = 10 * progress.rows // self._rows
        if self._bar.disable and (tenth > self._said or first):
            left = (self._rows - progress.rows) / speed
            say(
                f"training: {progress.rows:,} of {self._rows:,} rows, {speed:,.0f} rows/s, "
                f"loss {self._loss:.4f}, {left:.0f} s left"
            )
            self._said = tenth

    def end(self, progress: Progress) -> None:
        """Note what the validation week gave."""
        for epoch, loss in enumerate(progress.validation, 1):
            self._board.add_scalar("validation/log_loss", loss, epoch)
