"""Importance by contribution: what each group adds to the log odds of single candidates.

Integrated Gradients and Feature Ablation, both Captum's, over the inputs of `Ranker.dense`, against
the average candidate of the sample.

Legend: ``R`` candidates explained, ``F`` columns of one input, ``G`` groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import FeatureAblation, IntegratedGradients
from torch import Tensor

from ranking.attribution_groups import FeatureGroup
from ranking.attribution_inputs import SampleInputs

_STEPS = 32  # Gauss-Legendre nodes of the integral
_CHUNK = 64  # candidates integrated at once: each takes all steps together
_ABLATED = 4096

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contributions:
    """What each group adds to candidates' log odds, over those of the average candidate.

    Attributes:
        of_group: [R, G].
        log_odds: [R] of the candidates.
        baseline: log odds of the average candidate.
    """

    of_group: Array
    log_odds: Array
    baseline: float

    def importance(self) -> Array:
        """Return [G]: the mean size of each group's contribution."""
        return np.abs(self.of_group).mean(axis=0)

    def incompleteness(self) -> float:
        """Return by how much the contributions miss the change of log odds, as a share of it.

        Integrated Gradients are complete: up to the error of the numeric integral, contributions
        sum to the difference of log odds from the average candidate's.
        """
        change = self.log_odds - self.baseline
        missed = np.abs(self.of_group.sum(axis=1) - change).mean()
        return float(missed / max(np.abs(change).mean(), 1e-9))


class Explainer:
    """Attributes the log odds of candidates to groups of features.

    The baseline of all is the average candidate of the sample. A baseline of zeros would not do:
    cosine similarities are the same all along the straight line from zero to an embedding, so
    Integrated Gradients would never see them.

    Args:
        sample: whose average is the baseline.
        groups: which hold each feature once.
    """

    def __init__(self, sample: SampleInputs, groups: Sequence[FeatureGroup]) -> None:
        self._ranker = sample.ranker
        self._names = list(sample.inputs)
        self._groups = len(groups)
        group_of = {name: i for i, group in enumerate(groups) for name in group.members}
        self._columns = [
            torch.tensor([group_of[owner] for owner in sample.owners[name]], dtype=torch.int64)
            for name in self._names
        ]
        average = sample.average()
        self._average = tuple(average[name] for name in self._names)
        with torch.no_grad():
            self._baseline = float(self._log_odds(*self._average))

    def integrated_gradients(
        self, sample: SampleInputs, rows: Tensor, on_rows: Callable[[int], None] = lambda _: None
    ) -> Contributions:
        """Return the contributions of Integrated Gradients (https://arxiv.org/abs/1703.01365).

        Args:
            sample: the baseline's, or another of the same ranker.
            rows: [R] int64, which of its candidates.
            on_rows: called with the number of candidates of each chunk.
        """
        # One number for all candidates, whose inputs are apart: its gradients are theirs, and
        # Captum differentiates one output in place of one a candidate and step.
        method = IntegratedGradients(lambda *inputs: self._log_odds(*inputs).sum().reshape(1))

        def attribute(inputs: tuple[Tensor, ...]) -> Tensor:
            found = method.attribute(inputs, baselines=self._average, n_steps=_STEPS)
            sums = torch.zeros(len(inputs[0]), self._groups)
            for columns, part in zip(self._columns, found, strict=True):
                sums.index_add_(1, columns, part.float())
            return sums

        return self._contributions(sample, rows, _CHUNK, attribute, on_rows)

    def ablation(
        self, sample: SampleInputs, rows: Tensor, on_rows: Callable[[int], None] = lambda _: None
    ) -> Contributions:
        """Return what is lost when each group is replaced by the average candidate's.

        Arguments as of `integrated_gradients`.
        """
        method = FeatureAblation(self._log_odds)
        masks = tuple(columns[None] for columns in self._columns)

        def attribute(inputs: tuple[Tensor, ...]) -> Tensor:
            found = method.attribute(inputs, baselines=self._average, feature_mask=masks)
            sums = torch.zeros(len(inputs[0]), self._groups)
            for columns, part in zip(self._columns, found, strict=True):
                sums[:, columns] = part  # all columns of a group hold the group's figure
            return sums

        return self._contributions(sample, rows, _ABLATED, attribute, on_rows)

    def _log_odds(self, *inputs: Tensor) -> Tensor:
        """Return the logits [R]; each candidate stands as a request of its own."""
        named = dict(zip(self._names, inputs, strict=True))
        return self._ranker.dense(named, torch.arange(len(inputs[0])))

    def _contributions(
        self,
        sample: SampleInputs,
        rows: Tensor,
        chunk: int,
        attribute: Callable[[tuple[Tensor, ...]], Tensor],
        on_rows: Callable[[int], None],
    ) -> Contributions:
        found, log_odds = [], []
        for some in rows.split(chunk):
            spread = sample.spread(some)
            inputs = tuple(spread[name] for name in self._names)
            found.append(attribute(inputs).detach())
            with torch.no_grad():
                log_odds.append(self._log_odds(*inputs))
            on_rows(len(some))
        return Contributions(
            of_group=torch.cat(found).numpy(),
            log_odds=torch.cat(log_odds).numpy(),
            baseline=self._baseline,
        )
