"""What a grader is given, what it says, and what every grader can do.

Legend: ``P`` pairs, ``3`` labels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

LABELS = ("irrelevant", "moderately relevant", "highly relevant")
"""The names of the labels 0, 1 and 2 (paper, Section 2.2)."""

UNGRADED = -1
"""In the place of a label: the grader gave no answer that could be read."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairs:
    """Pairs of a query and a product to grade.

    Attributes:
        queries: [P] texts.
        titles: [P] titles of the products.
    """

    queries: Sequence[str]
    titles: Sequence[str]

    def __post_init__(self) -> None:
        assert len(self.queries) == len(self.titles)

    def __len__(self) -> int:
        return len(self.queries)

    def take(self, positions: np.ndarray) -> "Pairs":
        """Return the pairs at ``positions`` ([n] int)."""
        return Pairs(
            queries=[self.queries[position] for position in positions],
            titles=[self.titles[position] for position in positions],
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grades:
    """What a grader says of some pairs.

    Attributes:
        position: [n] int64, which of the pairs given; each pair once over all `Grades` of a call.
        label: [n] int8, 0, 1, 2 or `UNGRADED`.
        probability: [n, 3] float32 of each label; NaN where the grader does not tell.
    """

    position: np.ndarray
    label: np.ndarray
    probability: np.ndarray


class Grader(Protocol):
    """Grades pairs of query and product.

    Attributes:
        model: what graded, for the record: a name, or a folder's name and fingerprint.
        prompt_version: of the prompt (`embeddings.labeling.prompts`); empty where there is none.
        fingerprint: of all that decides an answer (weights, prompt, decoding): answers of the same
            fingerprint may be reused.
        chunk_pairs: how many pairs it likes to be given at once.
    """

    model: str
    prompt_version: str
    fingerprint: str
    chunk_pairs: int

    def grade(self, pairs: Pairs) -> Iterator[Grades]:
        """Yield the grades of all pairs, some at a time and in any order, as they are known.

        What has been yielded is final: a caller may store it at once. An answer that cannot be
        read, after all retries, is yielded as `UNGRADED`, never guessed.

        Raises:
            BadInputError: the grader cannot be reached, or a limit that its user set is reached.
        """
        ...


def grade_all(
    grader: Grader, pairs: Pairs, on_graded: Callable[[int], None] | None = None
) -> Grades:
    """Return the grades of all pairs, in their order.

    Args:
        grader: who grades.
        pairs: ``P`` pairs.
        on_graded: called with the number of pairs that were graded since its last call.
    """
    label = np.full(len(pairs), UNGRADED, np.int8)
    probability = np.full((len(pairs), len(LABELS)), np.nan, np.float32)
    for first in range(0, len(pairs), grader.chunk_pairs):
        rows = np.arange(first, min(first + grader.chunk_pairs, len(pairs)))
        for grades in grader.grade(pairs.take(rows)):
            label[rows[grades.position]] = grades.label
            probability[rows[grades.position]] = grades.probability
            if on_graded:
                on_graded(len(grades.position))
    return Grades(position=np.arange(len(pairs)), label=label, probability=probability)
