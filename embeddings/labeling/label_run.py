"""Labelling the pairs chosen, chunk by chunk: what is known is not asked again.

An answer is in the cache as soon as the grader has given it, and a chunk's labels appear whole or
not at all, so that a run can end at any moment and go on from there.

Legend: ``P`` pairs of a chunk.
"""

import fcntl
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from embeddings.labeling.cache import AnswerCache, answer_keys
from embeddings.labeling.grades import UNGRADED, Grader, Grades, Pairs
from embeddings.labeling.label_files import part_path, part_state, write_part
from embeddings.labeling.pair_files import Selection, Titles
from features import columns
from features.errors import BadInputError
from features.files import write_text

RECORD = "run.json"

_LOCK = ".lock"
_WARM_UP_PAIRS = 32
_MEASURED_PAIRS = 256


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made where missing.

    Raises:
        BadInputError: another run is at work there.
    """
    if output.exists() and not output.is_dir():
        raise BadInputError(f"{output}: is a file; name a folder")
    output.mkdir(parents=True, exist_ok=True)
    with (output / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInputError(f"{output}: another run is at work there") from error
        yield


def check_record(output: Path, made_of: Mapping[str, str]) -> None:
    """Refuse a folder whose labels are of another grader, other pairs or another catalog.

    Args:
        output: the folder.
        made_of: a fingerprint by what it is of, named as a sentence names it.

    Raises:
        BadInputError: it names what differs.
    """
    path = output / RECORD
    if not path.exists():
        if any(file.name[0] not in "._" for file in output.glob("*.parquet")):
            raise BadInputError(
                f"{output}: exists and is no folder of labels; choose another --output"
            )
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    for what, fingerprint in made_of.items():
        if found.get(what) != fingerprint:
            raise BadInputError(
                f"{output}: was begun with another {what}; choose another --output or remove it"
            )


def write_record(output: Path, made_of: Mapping[str, str]) -> None:
    """Note what the labels of a folder are made of."""
    write_text(output / RECORD, json.dumps(made_of, indent=2) + "\n")


@dataclass(slots=True, kw_only=True)
class Tally:
    """What one run did.

    Attributes:
        labelled: pairs of the parts that this run wrote that have a label.
        from_cache: those of them whose answer was known when the run began.
        asked: pairs that the grader was given; pairs of one query and one title count once.
        grading_seconds: that the grader took.
    """

    labelled: int = 0
    from_cache: int = 0
    asked: int = 0
    grading_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unfinished:
    """A part to write: its pairs, and how many of their answers were known at first."""

    pairs: int
    known: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Chunk:
    """Pairs of a part, with what is asked of the grader for each."""

    number: int
    table: pa.Table
    pairs: Pairs
    keys: list[bytes]


@dataclass(slots=True, kw_only=True)
class LabelRun:
    """One run over the pairs of a folder.

    Attributes:
        output: the folder.
        grader: who grades.
        selection: the pairs.
        titles: of the products.
        cache: answers that are known.
        limit: the most pairs to label; labels beyond it that are there stay.
        on_labelled: called with the number of pairs that were dealt with since its last call.
        tally: what was done so far.
    """

    output: Path
    grader: Grader
    selection: Selection
    titles: Titles
    cache: AnswerCache
    limit: int | None = None
    on_labelled: Callable[[int], None] = lambda _: None
    tally: Tally = field(default_factory=Tally)
    _unfinished: dict[int, _Unfinished] = field(default_factory=dict, init=False)
    _given_up: set[bytes] = field(default_factory=set, init=False)

    def take_known(self) -> int:
        """Write the parts whose answers are all known; return how many pairs others lack.

        Pairs that got no label in an earlier run are among these: they are tried again.
        """
        unknown = 0
        nothing_known = self.cache.is_empty()
        for number, pairs in enumerate(self.selection.chunks(self.limit)):
            state = part_state(part_path(self.output, number))
            if state.pairs >= pairs and not state.ungraded:
                self.on_labelled(pairs)
                continue
            pairs = max(pairs, state.pairs)
            if nothing_known:
                self._unfinished[number] = _Unfinished(pairs=pairs, known=0)
                unknown += pairs
                continue
            chunk = self._read(number, pairs)
            answers = self.cache.look_up(chunk.keys)
            lacking = int((answers.label == UNGRADED).sum())
            todo = _Unfinished(pairs=pairs, known=pairs - lacking)
            if lacking:
                self._unfinished[number] = todo
                unknown += lacking
            else:
                self._write(chunk, todo, answers)
                self.on_labelled(pairs)
        return unknown

    def sample(self, pairs: int) -> Pairs:
        """Return some of the first chunk's pairs without an answer, evenly spaced in it.

        None is asked the same as another.
        """
        chunk, unknown = self._unknown(next(iter(self._unfinished)))
        unknown = np.array(list({chunk.keys[row]: row for row in unknown}.values()))
        spaced = np.linspace(0, len(unknown) - 1, min(pairs, len(unknown))).astype(np.int64)
        return chunk.pairs.take(unknown[spaced])

    def measure(self) -> float:
        """Have the grader grade a few pairs; return how many it does in a second.

        What it says is kept, so that nothing is done twice.
        """
        sample = self.sample(_WARM_UP_PAIRS + _MEASURED_PAIRS)
        keys = answer_keys(self.grader.fingerprint, sample)
        rows = np.arange(len(sample))
        measured = rows[min(_WARM_UP_PAIRS, len(rows) // 2) :]
        self._ask(sample, keys, rows[: -len(measured)])
        start = time.perf_counter()
        self._ask(sample, keys, measured)
        return len(measured) / (time.perf_counter() - start)

    def grade(self) -> None:
        """Have what is not known graded, and write the parts.

        Raises:
            BadInputError: the grader cannot go on; the labels that it gave are written.
        """
        for number, todo in self._unfinished.items():
            chunk, unknown = self._unknown(number)
            self.on_labelled(todo.pairs - len(unknown))
            try:
                self._ask(chunk.pairs, chunk.keys, unknown, self.on_labelled)
            except BadInputError:
                self._write(chunk, todo, self.cache.look_up(chunk.keys))
                raise
            self._write(chunk, todo, self.cache.look_up(chunk.keys))

    def _read(self, number: int, count: int) -> _Chunk:
        table = self.selection.read(number, count)
        pairs = Pairs(
            queries=table.column(columns.QUERY).to_pylist(),
            titles=self.titles.of(table.column(columns.PRODUCT_ID).to_numpy()),
        )
        keys = answer_keys(self.grader.fingerprint, pairs)
        return _Chunk(number=number, table=table, pairs=pairs, keys=keys)

    def _unknown(self, number: int) -> tuple[_Chunk, np.ndarray]:
        """Return a chunk and the positions of its pairs that are to be asked."""
        chunk = self._read(number, self._unfinished[number].pairs)
        unknown = np.flatnonzero(self.cache.look_up(chunk.keys).label == UNGRADED)
        if self._given_up:
            given_up = [chunk.keys[row] in self._given_up for row in unknown]
            unknown = unknown[~np.array(given_up, bool)]
        return chunk, unknown

    def _ask(
        self,
        pairs: Pairs,
        keys: list[bytes],
        positions: np.ndarray,
        on_labelled: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Have the grader grade the pairs at some positions, and keep each answer at once."""
        first = {keys[position]: position for position in positions[::-1]}
        alike = np.array([first[keys[position]] for position in positions], np.int64)
        distinct, count = np.unique(alike, return_counts=True)
        start = time.perf_counter()
        for begin in range(0, len(distinct), self.grader.chunk_pairs):
            rows = distinct[begin : begin + self.grader.chunk_pairs]
            for grades in self.grader.grade(pairs.take(rows)):
                graded = grades.label != UNGRADED
                answered = rows[grades.position[graded]]
                self.cache.add(
                    [keys[row] for row in answered],
                    grades.label[graded],
                    grades.probability[graded],
                )
                self._given_up.update(keys[row] for row in rows[grades.position[~graded]])
                self.tally.asked += len(grades.position)
                on_labelled(int(count[begin + grades.position].sum()))
        self.tally.grading_seconds += time.perf_counter() - start

    def _write(self, chunk: _Chunk, todo: _Unfinished, grades: Grades) -> None:
        self.cache.commit()
        write_part(part_path(self.output, chunk.number), chunk.table, grades, self.grader)
        self.tally.labelled += int((grades.label != UNGRADED).sum())
        self.tally.from_cache += todo.known
