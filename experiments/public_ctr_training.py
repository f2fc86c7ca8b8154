"""Training of one seed: Adam, the rate divided on a plateau, early stopping, the best epoch kept.

The order of an epoch's rows and its dropout depend on seed and epoch alone, and the learning rate
on the validation AUCs so far, so that a run killed at any moment goes on from its last epoch as if
nothing had happened.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

from experiments.public_ctr_config import PublicConfig
from experiments.public_ctr_data import EncodedData, EncodedSplit
from experiments.public_ctr_model import ParallelDCNv2
from features.checkpoint import copy_into, load_state, save_state
from features.console import progress_bar, say
from features.errors import BadInputError
from ranking.training import seeded

_EVALUATION_ROWS = 1 << 14
_LEAST_GAIN = 1e-6  # in AUC, to count as better
_LOWEST_RATE = 1e-6
_RATE_FACTOR = 0.1
_GRADIENT_NORM = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """What one epoch came to.

    Attributes:
        loss: mean log loss of its training batches, without the embedding L2.
        auc: of the validation rows.
        log_loss: of the validation rows.
        learning_rate: that it was trained with.
        seconds: of training, without validation.
    """

    loss: float
    auc: float
    log_loss: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plateau:
    """Where a run stands by its validation AUCs.

    Attributes:
        best: the epoch with the best AUC, from 0; -1 before the first.
        stale: epochs without a better one since.
        drops: epochs without a better one in all.
    """

    best: int
    stale: int
    drops: int

    @classmethod
    def of(cls, aucs: list[float]) -> "Plateau":
        """Read off what the AUCs of the epochs so far mean."""
        best, drops = -1, 0
        for epoch, auc in enumerate(aucs):
            if best < 0 or auc > aucs[best] + _LEAST_GAIN:
                best = epoch
            else:
                drops += 1
        return cls(best=best, stale=len(aucs) - 1 - best, drops=drops)


class SeedRun:
    """One seed's model, optimiser and history.

    Args:
        data: the dataset.
        config: how to train.
        seed: of initial weights, order and dropout.
    """

    def __init__(self, data: EncodedData, config: PublicConfig, seed: int) -> None:
        self.data = data
        self.config = config
        self.seed = seed
        self.history: list[Epoch] = []
        fields = data.fields
        with seeded(seed):
            self.model = ParallelDCNv2(
                data.table_rows, len(fields.categorical), len(fields.numeric), config
            )
        embeddings = self.model.embeddings()
        others = [p for p in self.model.parameters() if all(p is not e for e in embeddings)]
        # The gradient of the embedding L2, l2 * embedding, is what Adam's weight decay adds.
        # NOTE[DIFF]: FuxiCTR clips the gradient's norm with that term in it, here without.
        self._adam = torch.optim.Adam(
            [
                {"params": embeddings, "weight_decay": config.embedding_l2},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            fused=True,
        )
        self._best: dict[str, Tensor] = {}

    @property
    def plateau(self) -> Plateau:
        """Where the run stands."""
        return Plateau.of([epoch.auc for epoch in self.history])

    @property
    def done(self) -> bool:
        """Whether no epoch is left, or the last ones brought nothing."""
        spent = len(self.history) >= self.config.epochs
        return spent or self.plateau.stale >= self.config.patience

    def train(self, checkpoint: Path) -> None:
        """Train to the end, from the checkpoint where there is one, and restore the best epoch.

        Raises:
            BadInputError: the loss became NaN or infinite, or the checkpoint does not fit.
        """
        if checkpoint.exists():
            self._restore(checkpoint)
        while not self.done:
            self._train_epoch()
            self._save(checkpoint)
        copy_into(self._tensors(), self._best, "best epoch")

    def scores(self, split: str) -> tuple[float, float]:
        """Return AUC and log loss of a split."""
        rows = self.data.splits[split]
        probability = self.predict(rows)
        return (
            float(roc_auc_score(rows.clicked, probability)),
            float(log_loss(rows.clicked, probability)),
        )

    @torch.no_grad()
    def predict(self, split: EncodedSplit) -> npt.NDArray[np.float64]:
        """Return the click probabilities of a split's rows, ``[N]``."""
        self.model.eval()
        found = []
        for start in range(0, len(split), _EVALUATION_ROWS):
            rows, values, _ = _batch(split, np.s_[start : start + _EVALUATION_ROWS])
            found.append(torch.sigmoid(self.model(rows, values).double()).numpy())
        return np.concatenate(found)

    def _train_epoch(self) -> None:
        number = len(self.history)
        rate = max(self.config.learning_rate * _RATE_FACTOR**self.plateau.drops, _LOWEST_RATE)
        for group in self._adam.param_groups:
            group["lr"] = rate
        begin = time.perf_counter()
        noise = int(np.random.SeedSequence((self.seed, number)).generate_state(1)[0])
        with seeded(noise):
            loss = self._pass(number)
        seconds = time.perf_counter() - begin
        auc, validation_loss = self.scores("valid")
        self.history.append(
            Epoch(loss=loss, auc=auc, log_loss=validation_loss, learning_rate=rate, seconds=seconds)
        )
        if self.plateau.best == number:
            self._best = {name: tensor.clone() for name, tensor in self._tensors().items()}
        say(
            f"seed {self.seed}, epoch {number + 1}: validation AUC {auc:.6f}, log loss "
            f"{validation_loss:.6f}, {len(self.data.splits['train']) / seconds:,.0f} rows/s"
        )

    def _pass(self, epoch: int) -> float:
        """Train on every row once; returns the mean log loss."""
        train = self.data.splits["train"]
        order = np.random.default_rng((self.seed, epoch)).permutation(len(train))
        self.model.train()
        total = 0.0
        with progress_bar() as bar:
            task = bar.add_task(f"seed {self.seed}, epoch {epoch + 1}", total=len(train))
            for number, chosen in enumerate(self._batches(order)):
                loss = self._step(*_batch(train, chosen))
                if not math.isfinite(loss):
                    raise BadInputError(
                        f"seed {self.seed}: the loss became {loss} in epoch {epoch + 1}, batch "
                        f"{number + 1}: lower 'learning_rate' or look for extreme numeric values"
                    )
                total += loss * len(chosen)
                bar.update(task, advance=len(chosen))
        return total / len(train)

    def _batches(self, order: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
        size = self.config.batch_size
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            if len(chosen) > 1:  # batch normalisation knows no variance of one row
                yield np.sort(chosen)  # read in the order of the file

    def _step(self, rows: Tensor, values: Tensor, clicked: Tensor) -> float:
        loss = F.binary_cross_entropy_with_logits(self.model(rows, values), clicked)
        self._adam.zero_grad()
        loss.backward()
        trained = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if norm > _GRADIENT_NORM:
            torch.nn.utils.clip_grads_with_norm_(trained, _GRADIENT_NORM, norm)
        self._adam.step()
        return loss.item()

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict())

    def _adam_tensors(self) -> dict[str, Tensor]:
        return {
            f"{number}/{key}": value
            for number, values in self._adam.state_dict()["state"].items()
            for key, value in values.items()
        }

    def _save(self, path: Path) -> None:
        sections = {"model": self._tensors(), "adam": self._adam_tensors(), "best": self._best}
        tensors = {f"{s}/{n}": t for s, part in sections.items() for n, t in part.items()}
        save_state(path, tensors, {"history": [asdict(epoch) for epoch in self.history]})

    def _restore(self, path: Path) -> None:
        tensors, header = load_state(path)
        saved: dict[str, dict[str, Tensor]] = {"model": {}, "adam": {}, "best": {}}
        for name, tensor in tensors.items():
            section, _, rest = name.partition("/")
            saved[section][rest] = tensor
        copy_into(self._tensors(), saved["model"], str(path))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in saved["adam"].items():
            number, _, key = name.partition("/")
            state.setdefault(int(number), {})[key] = tensor
        groups = self._adam.state_dict()["param_groups"]
        self._adam.load_state_dict({"state": state, "param_groups": groups})
        self._best = saved["best"]
        self.history = [Epoch(**epoch) for epoch in header["history"]]


def _batch(
    split: EncodedSplit, chosen: npt.NDArray[np.int64] | slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows [B, F], values [B, D] and labels [B] of the chosen rows."""
    return (
        torch.from_numpy(np.array(split.table_rows[chosen])),
        torch.from_numpy(np.array(split.values[chosen])),
        torch.from_numpy(split.clicked[chosen].astype(np.float32)),
    )
