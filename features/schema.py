"""``dataset.toml``: what a dataset is, which features its impressions carry, and its weeks.

Example::

    name = "complete-journey"
    licence = "..."
    provenance = "..."
    caveat = "..."                    # stands beside every figure of this dataset

    [weeks]
    first_day = 2016-12-26            # first day of week 1
    evaluate = 44
    train = 30                        # weeks before the evaluated one

    [features]
    from_history = ["type_repeats"]   # dense features that count what the purchase history holds

    [features.sparse]                 # int64 or string columns of impressions.parquet
    request = ["store"]
    candidate = ["brand"]

    [features.dense]                  # numeric columns
    request = ["household_spend"]
    candidate = ["price", "type_repeats"]

A dataset of products and graded queries, without impressions, has neither weeks nor features.
"""

import datetime as dt
import difflib
import tomllib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from features.errors import BadInputError

Kind = Literal["sparse", "dense"]
Level = Literal["request", "candidate"]
KINDS: tuple[Kind, ...] = ("sparse", "dense")
LEVELS: tuple[Level, ...] = ("request", "candidate")
_FROM_HISTORY = "from_history"


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One feature column of ``impressions.parquet``.

    Attributes:
        name: of the column.
        kind: ``sparse`` for ids, ``dense`` for numbers.
        level: whether it belongs to the request or to each of its candidates.
        from_history: a hand-made counter of what the purchase history holds; dense features only.
    """

    name: str
    kind: Kind
    level: Level
    from_history: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Weeks:
    """The calendar by which a dataset is split in time.

    Week ``w`` is ``[first_day + 7 (w - 1) days, first_day + 7 w days)``.
    """

    first_day: dt.date
    evaluate: int
    train: int = 30

    def start(self, week: int) -> dt.datetime:
        """Return the first instant of ``week``."""
        return dt.datetime.combine(self.first_day, dt.time()) + dt.timedelta(weeks=week - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSchema:
    """The content of ``dataset.toml``."""

    name: str
    licence: str = ""
    provenance: str = ""
    caveat: str = ""
    weeks: Weeks | None = None
    features: tuple[Feature, ...] = field(default=())

    def names(self, kind: Kind, level: Level) -> tuple[str, ...]:
        """Return the names of the features of one kind and level, in declared order."""
        return tuple(f.name for f in self.features if f.kind == kind and f.level == level)

    def leaving_out(self, names: Collection[str]) -> "DatasetSchema":
        """Return the schema without some of its features.

        Raises:
            BadInputError: there is no feature of such a name.
        """
        reject_unknown(self.name, names, [f.name for f in self.features], what="feature")
        return replace(self, features=tuple(f for f in self.features if f.name not in names))

    @classmethod
    def load(cls, folder: Path) -> "DatasetSchema":
        """Read ``folder/dataset.toml``.

        Raises:
            BadInputError: the file is missing, is not TOML, or holds an unknown key or value.
        """
        path = folder / "dataset.toml"
        if not path.is_file():
            raise BadInputError(f"{path}: no such file; it declares the features of a dataset")
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BadInputError(f"{path}: not valid TOML: {error}") from error
        return parse_schema(str(path), content)

    def to_toml(self) -> str:
        """Return the text of ``dataset.toml``."""
        lines = [
            f"{key} = {_quote(getattr(self, key))}"
            for key in ("name", "licence", "provenance", "caveat")
        ]
        if self.weeks is not None:
            lines += ["", "[weeks]", f"first_day = {self.weeks.first_day.isoformat()}"]
            lines += [f"evaluate = {self.weeks.evaluate}", f"train = {self.weeks.train}"]
        counters = [f.name for f in self.features if f.from_history]
        if counters:
            lines += ["", "[features]", f"from_history = {_list(counters)}"]
        for kind in KINDS:
            lines += ["", f"[features.{kind}]"]
            lines += [f"{level} = {_list(self.names(kind, level))}" for level in LEVELS]
        return "\n".join(lines) + "\n"


def reject_unknown(
    where: str, given: Iterable[str], known: Iterable[str], *, what: str = "key"
) -> None:
    """Raise `BadInputError` for the first of ``given`` that is not ``known``, with a suggestion."""
    known = list(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}"
            raise BadInputError(f"{where}: unknown {what} '{key}'{hint}")


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _list(names: Iterable[str]) -> str:
    return f"[{', '.join(map(_quote, names))}]"


def parse_schema(path: str, content: dict[str, Any]) -> DatasetSchema:
    """Make a schema of the parsed content of ``dataset.toml``; ``path`` names it in errors."""
    texts = ("name", "licence", "provenance", "caveat")
    reject_unknown(path, content, [*texts, "weeks", "features"])
    for key in texts:
        if not isinstance(content.get(key, ""), str):
            raise BadInputError(f"{path}: '{key}' must be text, got {content[key]!r}")
    if not content.get("name"):
        raise BadInputError(f"{path}: 'name' is missing")
    return DatasetSchema(
        **{key: content.get(key, "") for key in texts},
        weeks=_parse_weeks(path, content.get("weeks")),
        features=_parse_features(path, content.get("features", {})),
    )


def _parse_weeks(path: str, content: Any) -> Weeks | None:
    if content is None:
        return None
    reject_unknown(f"{path} [weeks]", content, ["first_day", "evaluate", "train"])
    first_day, evaluate = content.get("first_day"), content.get("evaluate")
    train = content.get("train", 30)
    if not isinstance(first_day, dt.date) or isinstance(first_day, dt.datetime):
        raise BadInputError(f"{path} [weeks]: 'first_day' must be a date, got {first_day!r}")
    for key, value in (("evaluate", evaluate), ("train", train)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadInputError(f"{path} [weeks]: '{key}' must be 1 or more, got {value!r}")
    return Weeks(first_day=first_day, evaluate=evaluate, train=train)


def _parse_features(path: str, content: dict[str, Any]) -> tuple[Feature, ...]:
    reject_unknown(f"{path} [features]", content, [_FROM_HISTORY, *KINDS])
    features: list[Feature] = []
    for kind in KINDS:
        levels = content.get(kind, {})
        reject_unknown(f"{path} [features.{kind}]", levels, LEVELS)
        for level in LEVELS:
            names = _names(f"{path} [features.{kind}]", levels, level)
            features += [Feature(name=name, kind=kind, level=level) for name in names]
    seen: set[str] = set()
    for feature in features:
        if feature.name in seen:
            raise BadInputError(f"{path}: feature '{feature.name}' is declared twice")
        seen.add(feature.name)
    counters = _names(f"{path} [features]", content, _FROM_HISTORY)
    dense = [f.name for f in features if f.kind == "dense"]
    reject_unknown(f"{path} [features] {_FROM_HISTORY}", counters, dense, what="dense feature")
    return tuple(replace(f, from_history=f.name in counters) for f in features)


def _names(where: str, content: dict[str, Any], key: str) -> list[str]:
    names = content.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadInputError(f"{where}: '{key}' must be a list of names, got {names!r}")
    return names
