"""Two models of how three people come to their grades, fitted to how often each sum occurs.

They fit about equally well and fill the gap that the sums leave in different ways; how far their
figures lie apart tells how little the sums say.

Legend: ``7`` sums of three grades (3 to 9), ``10`` sets of three grades, ``3`` grades (1 to 3).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import factorial, prod
from typing import Any, Protocol

import numpy as np

PEOPLE = 3
GRADES = (1, 2, 3)
SUMS = np.arange(3, 10)
SETS = list(combinations_with_replacement(GRADES, PEOPLE))
"""The sets of three grades, as ascending tuples."""
SUM = np.array([sum(grades) for grades in SETS])
"""[10] of each set."""
COUNTS = np.array([[grades.count(grade) for grade in GRADES] for grades in SETS])
"""[10, 3] how often each set holds each grade."""

_NODES = 96
_LEAST = 1e-300
_WAYS = np.array([factorial(PEOPLE) / prod(map(factorial, row)) for row in COUNTS.tolist()])


class Model(Protocol):
    """How likely grades are."""

    def joint(self) -> np.ndarray:
        """Return the probability of each set and of a fourth person's grade, [10, 3]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """A pair's relevance is standard normal; a person adds a normal error, and cuts twice.

    Attributes:
        cuts: of the relevance that a person sees, between the grades.
        error: standard deviation of a person's error.
    """

    cuts: tuple[float, float]
    error: float

    def joint(self) -> np.ndarray:
        """Return the probability of each set and of a fourth person's grade, [10, 3]."""
        from scipy.special import ndtr

        node, weight = np.polynomial.hermite_e.hermegauss(_NODES)
        below = ndtr((np.array(self.cuts)[:, None] - node) / self.error)
        grade = np.diff(np.vstack([np.zeros_like(node), below, np.ones_like(node)]), axis=0)
        sets = _WAYS[:, None] * (grade[None] ** COUNTS[:, :, None]).prod(1)
        return (weight / weight.sum() * sets) @ grade.T


@dataclass(frozen=True, slots=True, kw_only=True)
class Dirichlet:
    """Each pair has its own chances of the three grades, which vary as a Dirichlet distribution.

    Attributes:
        weights: its parameters.
    """

    weights: tuple[float, float, float]

    def joint(self) -> np.ndarray:
        """Return the probability of each set and of a fourth person's grade, [10, 3]."""
        weights = np.array(self.weights)
        total = weights.sum()
        # One grade after the other, each likelier for having been given (Polya's urn).
        rising = [prod(_rising(w, n) for w, n in zip(weights, row, strict=True)) for row in COUNTS]
        sets = _WAYS * np.array(rising) / _rising(total, PEOPLE)
        return sets[:, None] * (COUNTS + weights) / (total + PEOPLE)


def fit(sums: np.ndarray) -> dict[str, Model]:
    """Return the models, by name, under which counts of the sums, [7], are most likely."""

    def threshold(values: np.ndarray) -> Model:
        first, width, error = values[0], np.exp(values[1]), np.exp(values[2])
        return Threshold(cuts=(float(first), float(first + width)), error=float(error))

    def dirichlet(values: np.ndarray) -> Model:
        first, second, third = np.exp(values).tolist()
        return Dirichlet(weights=(first, second, third))

    return {
        "threshold": _most_likely(sums, threshold, [(-1, 0, error) for error in (-1, 0, 1)]),
        "dirichlet": _most_likely(sums, dirichlet, [(0, 0, 0)]),
    }


def describe(model: Model, sums: np.ndarray) -> dict[str, Any]:
    """Return how often a model expects each mean, and how well that fits counts ``sums`` [7].

    ``misplaced`` is half the sum of the absolute differences of the shares.
    """
    expected, observed = of_sums(model), sums / sums.sum()
    return {
        "model": repr(model),
        "expected": expected.round(5).tolist(),
        "observed": observed.round(5).tolist(),
        "misplaced": float(np.abs(observed - expected).sum() / 2),
    }


def of_sums(model: Model) -> np.ndarray:
    """Return the probability of each sum, [7]."""
    return np.bincount(SUM, weights=model.joint().sum(1), minlength=10)[3:]


def _most_likely(
    sums: np.ndarray, make: Callable[[np.ndarray], Model], starts: list[tuple[float, ...]]
) -> Model:
    from scipy.optimize import minimize

    def loss(values: np.ndarray) -> float:
        likelihood = sums @ np.log(np.maximum(of_sums(make(values)), _LEAST))
        return -float(likelihood / sums.sum())

    limits = [(-20, 20)] * len(starts[0])  # grades may all be the same
    found = [minimize(loss, start, method="L-BFGS-B", bounds=limits) for start in starts]
    return make(min(found, key=lambda one: one.fun).x)


def _rising(value: float, times: int) -> float:
    return float(np.prod([value + step for step in range(times)]))
