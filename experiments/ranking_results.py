"""What the ranking benchmark's runs leave behind: rows of the evaluation weeks, and their scores.

Dimensions: ``B`` requests and ``C`` candidates (rows) of one week, ``S`` training seeds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvaluationWeek:
    """The rows of one evaluation week, in the order of its request records.

    ::

        user_id          [3,     8]
        lengths          [2,     3]
        history_lengths  [31,    0]
        clicked          [1, 0,  0, 0, 1]
        product_seen     [1, 1,  1, 0, 1]
                         req. 0  request 1

    Attributes:
        week: its number.
        clicked: bool ``[C]``.
        lengths: int64 ``[B]``, candidates of each request; they sum to ``C``.
        user_id: int64 ``[B]``.
        history_lengths: int64 ``[B]``, purchases in the window of the purchase history.
        product_seen: bool ``[C]``, whether the training weeks show the product.

    Raises:
        ValueError: shapes do not agree, or a count is negative.
    """

    week: int
    clicked: Bools
    lengths: Integers
    user_id: Integers
    history_lengths: Integers
    product_seen: Bools

    def __post_init__(self) -> None:
        rows, requests = self.clicked.shape, self.lengths.shape
        if len(rows) != 1 or self.product_seen.shape != rows:
            raise ValueError(
                f"week {self.week}: clicked and product_seen must have one value per candidate, "
                f"got shapes {rows} and {self.product_seen.shape}"
            )
        if self.clicked.dtype != np.bool_ or self.product_seen.dtype != np.bool_:
            raise ValueError(
                f"week {self.week}: clicked and product_seen must be bool, "
                f"got {self.clicked.dtype} and {self.product_seen.dtype}"
            )
        for name in ("user_id", "history_lengths"):
            if len(requests) != 1 or getattr(self, name).shape != requests:
                raise ValueError(
                    f"week {self.week}: lengths and {name} must have one value per request, "
                    f"got shapes {requests} and {getattr(self, name).shape}"
                )
        if (self.lengths < 0).any() or self.lengths.sum() != rows[0]:
            raise ValueError(
                f"week {self.week}: lengths must be 0 or more and sum to the number of candidates "
                f"({rows[0]}), got a sum of {self.lengths.sum()}"
            )
        if (self.history_lengths < 0).any():
            raise ValueError(f"week {self.week}: history_lengths must be 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VariantResult:
    """The scores that one variant's runs gave to the rows of the evaluation weeks.

    Attributes:
        name: short name, such as ``"product-query"``.
        title: what tables call it, as in the paper's Table 2.
        baseline: name of the variant that the lift is against; ``None`` for a baseline itself.
        probability: by week, float32 ``[S, C]``, one row a seed, each value in [0, 1].
        seeds: of the ``S`` rows, each once.
        facts: ``"rows_per_second"`` in training, ``"parameters"`` and ``"model_bytes"``, each the
            mean over the runs; what is not known is left out.

    Raises:
        ValueError: no seed or one twice, a shape does not agree, or a probability is NaN or
            outside [0, 1].
    """

    name: str
    title: str
    baseline: str | None
    probability: Mapping[int, Floats]
    seeds: tuple[int, ...]
    facts: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"{self.name}: seeds must be given, each once, got {self.seeds}")
        for week, scores_SC in self.probability.items():  # noqa: N806
            where = f"{self.name}, week {week}: probability"
            if scores_SC.ndim != 2 or len(scores_SC) != len(self.seeds):
                raise ValueError(
                    f"{where} must have a row for each of {len(self.seeds)} seeds, "
                    f"got shape {scores_SC.shape}"
                )
            # Written so that NaN counts as wrong: every comparison with NaN is false.
            if not ((scores_SC >= 0) & (scores_SC <= 1)).all():
                raise ValueError(f"{where} must be in [0, 1]")
