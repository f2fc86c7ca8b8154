"""The rows of the paper's Table 1 (Section 4.1): one retrieval method each.

BM25 reads titles as the library ``bm25s`` scores them: Lucene's variant with ``k1`` 1.5 and ``b``
0.75, texts in lower case cut into runs of letters and digits, no stop words left out. Its second
row reduces words to their stems (Snowball's English stemmer), which finds "bracket" in "brackets".

Legend: ``Q`` queries, ``N`` products of the pool, ``K`` length of a list.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from embeddings.retrieval import METRICS, Search, rank_scores, score_random, score_ranking
from experiments.retrieval_task import ProductVectors, RetrievalTask
from experiments.vision_language_baselines import (
    DEFAULT_CHECKPOINTS,
    CheckpointMissingError,
    Family,
    load_baseline,
)
from features.console import say

if TYPE_CHECKING:
    from embeddings.encoder import Encoder

DASHCLIP = "DashCLIP (image-text)"
TOKEN = r"\w+"
"""What BM25 takes for a word, a regular expression."""

_FAMILY_NAMES: dict[Family, str] = {"clip": "CLIP", "blip": "BLIP", "flava": "FLAVA"}
_QUERIES_AT_ONCE = 64
_INSTALL = "install it with: pip install 'dashclip-ranker[retrieval]'"

Scores = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Methods:
    """What is compared.

    Attributes:
        checkpoints: hub name or local folder of each vision-language baseline.
        untrained: the start of our own model, before any training.
        trained: our model.
        search: how the nearest products are found.
    """

    checkpoints: Mapping[Family, str] = field(default_factory=lambda: dict(DEFAULT_CHECKPOINTS))
    untrained: "Encoder | None" = None
    trained: "Encoder | None" = None
    search: Search = "exact"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """What one method reached.

    Attributes:
        name: of the method.
        scores: by K, what `embeddings.retrieval.score_ranking` returns; ``None`` where the method
            could not be measured.
        note: why it could not be, or what to know of it; may be empty.
    """

    name: str
    scores: Mapping[int, Scores] | None = None
    note: str = ""


class UnavailableError(Exception):
    """A method cannot be measured; the message says why."""


def measure_rows(task: RetrievalTask, methods: Methods, ks: Sequence[int]) -> Iterator[Row]:
    """Yield the rows of the table in the paper's order; what cannot be measured says why.

    Args:
        task: queries and pool.
        methods: what is compared.
        ks: the lengths of the list to score.

    Raises:
        BadInputError: a checkpoint that is there is unreadable or of another architecture.
    """
    board = _Board(task, ks)
    random = {k: score_random(task.relevance, len(task.pool), k) for k in ks}
    yield Row(name="Random", scores=random, note="expected value")
    yield board.measure("BM25", lambda: (_bm25(task, board.longest, stem=False), ""))
    yield board.measure("BM25 (stemmed)", lambda: (_bm25(task, board.longest, stem=True), ""))
    for family, checkpoint in methods.checkpoints.items():
        yield from _vision_language(board, family, checkpoint, methods.search)
    encoders = {
        "MiniLM (untrained)": _packaged(),
        "our model, untrained": methods.untrained,
        DASHCLIP: methods.trained,
    }
    for name, encoder in encoders.items():
        yield board.measure(name, partial(_encoder, board, encoder, methods.search))


class _Board:
    """Scores rankings of one task."""

    def __init__(self, task: RetrievalTask, ks: Sequence[int]) -> None:
        self.task = task
        self.ks = ks
        self.longest = max(ks)

    def measure(self, name: str, rank: Callable[[], tuple[np.ndarray, str]]) -> Row:
        """Return the row of a method whose ``rank`` gives a ranking and a note."""
        try:
            ranking, note = rank()
        except UnavailableError as error:
            say(f"{name}: {error}")
            return Row(name=name, note=str(error))
        scores = {k: score_ranking(ranking, self.task.relevance, k) for k in self.ks}
        first = scores[self.ks[0]]
        figures = ", ".join(f"{m.replace('_', ' ')} {first[m].mean():.3f}" for m in METRICS)
        say(f"{name}: {figures}")
        return Row(name=name, scores=scores, note=note)

    def nearest(
        self, queries: np.ndarray, products: ProductVectors, kind: str, search: Search
    ) -> tuple[np.ndarray, str]:
        """Return the ranking by vectors and a note on the products that have none."""
        if not len(products.places):
            raise UnavailableError(f"no {kind}s in this dataset")
        pool = len(self.task.pool)
        without = pool - len(products.places)
        note = f"{without:,} of {pool:,} products have no {kind} and rank last" if without else ""
        return self.task.rank(queries, products, self.longest, search), note


class Bm25:
    """BM25 over titles, as the module says.

    Args:
        queries: [Q] texts.
        titles: [N] texts.
        stem: whether words are reduced to their stems.

    Raises:
        UnavailableError: a package is not installed, or no title holds a word.
    """

    def __init__(self, queries: Sequence[str], titles: Sequence[str], *, stem: bool) -> None:
        bm25s = _imported("bm25s", "bm25s")
        stemmer = _imported("Stemmer", "PyStemmer").Stemmer("english") if stem else None
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it asks for DEBUG itself
        self._queries, words = (
            bm25s.tokenize(
                list(texts),
                lower=True,
                token_pattern=TOKEN,
                stopwords=[],
                stemmer=stemmer,
                return_ids=False,
                show_progress=False,
            )
            for texts in (queries, titles)
        )
        if not any(words):
            raise UnavailableError("no titles in this dataset")
        self._index = bm25s.BM25(k1=1.5, b=0.75, method="lucene", backend="numpy")
        self._index.index(words, show_progress=False)

    def scores(self, part: slice) -> np.ndarray:
        """Return the scores [q, N] of all titles for some of the queries."""
        index = self._index
        tokens = self._queries[part]
        return np.stack(
            [index.get_scores_from_ids(index.get_tokens_ids(query)) for query in tokens]
        )


def _bm25(task: RetrievalTask, k: int, *, stem: bool) -> np.ndarray:
    """Return the ranking [Q, min(K, N)] by BM25 over titles; ties go to the lower catalog row."""
    bm25 = Bm25(task.queries, task.titles, stem=stem)
    starts = range(0, len(task.queries), _QUERIES_AT_ONCE)
    rankings = [rank_scores(bm25.scores(slice(s, s + _QUERIES_AT_ONCE)), k) for s in starts]
    return task.pool[np.concatenate(rankings)]


def _imported(module: str, distribution: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{distribution} is not installed; {_INSTALL}") from error


def _vision_language(
    board: _Board, family: Family, checkpoint: str, search: Search
) -> Iterator[Row]:
    """Yield the text and the image row of a pretrained model; it is in memory for these only."""
    name = _FAMILY_NAMES[family]
    task = board.task
    try:
        model = load_baseline(family, checkpoint)
    except CheckpointMissingError as error:
        say(f"{name}: {error}")
        yield from (Row(name=f"{name} ({kind})", note=str(error)) for kind in ("text", "image"))
        return
    queries = task.encode_queries(model.encode_texts)
    yield board.measure(
        f"{name} (text)",
        lambda: board.nearest(queries, task.encode_titles(model.encode_texts), "title", search),
    )
    yield board.measure(
        f"{name} (image)",
        lambda: board.nearest(queries, task.encode_images(model.encode_images), "image", search),
    )


def _encoder(board: _Board, encoder: "Encoder | None", search: Search) -> tuple[np.ndarray, str]:
    """Return the ranking by an encoder's query and product vectors and a note on them."""
    if encoder is None:
        raise UnavailableError("not given to this run")
    queries = board.task.encode_queries(encoder.encode_queries)
    products = board.task.encode_products(encoder)
    kind = "title or image" if encoder.reads_images else "title"
    ranking, note = board.nearest(queries, products, kind, search)
    reads = "" if encoder.reads_images else "reads titles only"
    if encoder.reads_images and not board.task.catalog.has_images:
        reads = "no images in this dataset: titles only"
    note = "; ".join(part for part in (reads, note) if part)
    return ranking, note


def _packaged() -> "Encoder":
    from embeddings.text_encoder import TextEncoder

    return TextEncoder.packaged()
