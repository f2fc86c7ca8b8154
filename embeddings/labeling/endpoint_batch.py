"""Batches."""

from collections.abc import Iterator

from embeddings.labeling.endpoint import Endpoint
from embeddings.labeling.grades import Grades, Pairs


def grade_in_batches(endpoint: Endpoint, pairs: Pairs) -> Iterator[Grades]:
    """Yield."""
    raise NotImplementedError
