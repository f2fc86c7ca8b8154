"""Slices of the evaluation rows: the paper's (Section 4.2), and what goes beyond it.

The paper has all rows and those of users with and without purchase history, each in the week after
the training weeks ("NW", next week). Beyond it: products that training never showed, short, middle
and long histories, and each evaluation week by itself.

A slice is measured in each evaluation week apart, by the models trained for that week, and the
figures of the weeks are averaged; so every week must have `LEAST` clicks and `LEAST` non-clicks in
the slice. Where one of them has not, the rows of all weeks are pooled as if they were one week's,
if together they have enough: what is measured then also compares scores of one week's model with
those of another's. Where not even the pool has enough, nothing is measured.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.ranking_results import Bools, EvaluationWeek
from features.errors import BadInputError

LEAST = 30
ALL = "all"

_Select = Callable[[EvaluationWeek], Bools]  # the rows of a week, bool [C]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slice:
    """Some rows of the evaluation weeks.

    Attributes:
        name: as JSON has it, such as ``"with_history"``.
        title: as tables have it.
        definition: which rows these are.
        rows: by week, bool ``[C]``; a week that the slice is not about is left out.
        clicked: by week, bool ``[rows of the slice]``.
    """

    name: str
    title: str
    definition: str
    rows: Mapping[int, Bools]
    clicked: Mapping[int, Bools]

    @property
    def count(self) -> int:
        """The number of rows in all its weeks."""
        return sum(len(clicked) for clicked in self.clicked.values())

    @property
    def positives(self) -> int:
        """The number of clicks in all its weeks."""
        return sum(int(clicked.sum()) for clicked in self.clicked.values())

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """The weeks by what is measured together: each apart, all pooled, or none at all."""
        weeks = tuple(self.clicked)
        if all(_enough([self.clicked[week]]) for week in weeks):
            return [(week,) for week in weeks]
        return [weeks] if _enough(list(self.clicked.values())) else []

    @property
    def shortage(self) -> str:
        """Which rows are too few, with their number; empty for a slice that can be measured."""
        if self.groups:
            return ""
        if self.positives < LEAST:
            return f"too few clicks: {self.positives}"
        return f"too few non-clicks: {self.count - self.positives}"


def _enough(parts: Sequence[Bools]) -> bool:
    clicks = sum(int(part.sum()) for part in parts)
    return min(clicks, sum(map(len, parts)) - clicks) >= LEAST


def make_slices(weeks: Sequence[EvaluationWeek]) -> list[Slice]:
    """Return the slices in the order of the table; weeks by themselves only where there are more.

    Raises:
        BadInputError: a week is given twice, or all rows together are too few.
    """
    numbers = [week.week for week in weeks]
    if not numbers or len(set(numbers)) != len(numbers):
        raise BadInputError(f"evaluation weeks must be given, each once, got {numbers}")

    def slice_of(name: str, title: str, definition: str, select: _Select) -> Slice:
        rows = {week.week: select(week) for week in weeks}
        return _slice(name, title, definition, rows, weeks)

    everything = slice_of(ALL, "all", "all rows", lambda week: np.ones_like(week.clicked))
    if everything.shortage:
        raise BadInputError(
            f"evaluation needs {LEAST} clicked and {LEAST} unclicked rows; in weeks "
            f"{', '.join(map(str, numbers))} there are {everything.shortage}"
        )
    slices = [
        everything,
        slice_of(
            "with_history",
            "with purchase history",
            "requests whose user purchased anything in the window",
            lambda week: _of_requests(week, week.history_lengths > 0),
        ),
        slice_of(
            "without_history",
            "without purchase history",
            "requests whose user purchased nothing in the window",
            lambda week: _of_requests(week, week.history_lengths == 0),
        ),
        slice_of(
            "unseen_products",
            "products unseen in training",
            "candidates that the training weeks never showed",
            lambda week: ~week.product_seen,
        ),
    ]
    slices += [
        slice_of(f"{name}_history", f"{name} history", definition, _between(low, high))
        for name, definition, low, high in _thirds(weeks)
    ]
    if len(weeks) > 1:
        slices += [_week_slice(week) for week in weeks]
    return slices


def _slice(
    name: str,
    title: str,
    definition: str,
    rows: Mapping[int, Bools],
    weeks: Sequence[EvaluationWeek],
) -> Slice:
    clicked = {week.week: week.clicked[rows[week.week]] for week in weeks}
    return Slice(name=name, title=title, definition=definition, rows=rows, clicked=clicked)


def _week_slice(week: EvaluationWeek) -> Slice:
    rows = {week.week: np.ones_like(week.clicked)}
    title = f"week {week.week}"
    return _slice(f"week_{week.week}", title, "all rows of this week alone", rows, [week])


def _thirds(weeks: Sequence[EvaluationWeek]) -> list[tuple[str, str, int, int]]:
    """Return name, definition, least and greatest length of each third of the histories.

    The thirds are of the requests of all weeks whose history is not empty; equal lengths are never
    parted, so that they may differ in size.
    """
    lengths = np.concatenate([week.history_lengths for week in weeks])
    lengths = lengths[lengths > 0]
    first, second, last = 0, 0, 0
    if len(lengths):
        cuts = np.quantile(lengths, (1 / 3, 2 / 3, 1), method="inverted_cdf")
        first, second, last = (int(cut) for cut in cuts)
    ends = (("short", 1, first), ("middle", first + 1, second), ("long", second + 1, last))
    return [
        (name, f"{low:,} to {high:,} purchases" if low <= high else "no such history", low, high)
        for name, low, high in ends
    ]


def _between(low: int, high: int) -> _Select:
    return lambda week: _of_requests(
        week, (low <= week.history_lengths) & (week.history_lengths <= high)
    )


def _of_requests(week: EvaluationWeek, chosen: Bools) -> Bools:
    return np.repeat(chosen, week.lengths)
