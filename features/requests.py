"""Request records: one row per search, with its purchase history and its candidates.

Built from a dataset folder into a folder of Parquet files, one a week::

    request_id  user_id  requested_at  query  purchase_history  purchase_age_days
    7           3        2017-10-23 …  soup   [81, 12, 81]      [0, 6, 40]
        <request features>  product_id  clicked        <candidate features>
        …                   [5, 9, 40]  [no, yes, no]  [.., .., ..]

Rows are ordered by ``(requested_at, request_id)``, candidates by ``product_id``. All that belongs
to the user or the query stands once a request: it is stored, read and computed once.
"""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

from features import columns
from features.dataset import Dataset, reading
from features.duckdb_engine import DuckDbEngine
from features.engine import Engine, Plan, Progress, Session
from features.errors import BadInputError
from features.files import fingerprint, write_text
from features.manifest import (
    FORMAT,
    MANIFEST,
    UNFINISHED,
    OtherFormatError,
    RequestsManifest,
    WeekCounts,
    week_path,
)
from features.schema import Weeks


def build_requests(
    dataset: Path,
    output: Path,
    *,
    window_days: int = 84,
    history_cap: int = 1000,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> RequestsManifest:
    """Build the request records of a dataset folder.

    Nothing is computed from a purchase at or after its request. The same inputs and options give
    the same bytes; a build that was killed carries on with the weeks that are missing, and one
    that is complete is left as it is. Other inputs or options, and records of another format,
    replace what ``output`` holds.

    Args:
        dataset: folder with ``impressions.parquet``, ``purchases.parquet``, ``catalog.parquet``
            and ``dataset.toml``.
        output: folder of the records.
        window_days: a history reaches this many days of 24 hours back from the request.
        history_cap: the most products in a history, the most recent ones.
        engine: what computes them; DuckDB if ``None``. All give the same records.
        progress: called with the number of weeks that are done and their total.

    Raises:
        BadInputError: the dataset breaks a rule of `features.dataset`, or an option is below 1;
            nothing was written then.
    """
    for name, value in (("window_days", window_days), ("history_cap", history_cap)):
        if value < 1:
            raise BadInputError(f"{name} must be 1 or more, got {value}")
    if output.exists() and not output.is_dir():
        raise BadInputError(f"{output}: is a file, expected a folder for the request records")
    opened = Dataset.open(dataset)
    key: dict[str, Any] = {
        "format": FORMAT,
        "dataset": opened.schema.name,
        "fingerprint": _fingerprint(opened),
        "window_days": window_days,
        "history_cap": history_cap,
    }
    finished = _finished(output, key)
    if finished is not None:
        return finished
    with (engine or DuckDbEngine()).open(opened, output) as session:
        session.dataset.check(session.connection)
        with reading(dataset):
            calendar, weeks = _calendar_and_weeks(session)
            plan = Plan(
                output=output,
                window_days=window_days,
                history_cap=history_cap,
                calendar=calendar,
                weeks=weeks,
            )
            session.prepare(plan)
            unknown = _count_unknown(session)
            _make_room(output, key)
            _write_missing(session, plan, progress)
    manifest = RequestsManifest(folder=output, weeks=weeks, unknown_products=unknown, **key)
    manifest.save()
    (output / UNFINISHED).unlink()
    return manifest


def _write_missing(session: Session, plan: Plan, progress: Progress | None) -> None:
    missing = [week for week in plan.weeks if not week_path(plan.output, week).exists()]
    done = len(plan.weeks) - len(missing)
    with closing(session.write(missing)) as written:
        for _ in written:
            done += 1
            if progress is not None:
                progress(done, len(plan.weeks))


def _finished(output: Path, key: dict[str, Any]) -> RequestsManifest | None:
    """Return the manifest of ``output`` if it holds all records of the build ``key``."""
    if not (output / MANIFEST).exists():
        return None
    try:
        manifest = RequestsManifest.load(output)
    except OtherFormatError:
        return None
    same = all(getattr(manifest, name) == value for name, value in key.items())
    whole = all(manifest.path(week).is_file() for week in manifest.weeks)
    return manifest if same and whole else None


def _fingerprint(dataset: Dataset) -> str:
    tables = (dataset.catalog, dataset.purchases, dataset.impressions)
    return fingerprint(dataset.folder / "dataset.toml", *(table.path for table in tables))


def _calendar_and_weeks(session: Session) -> tuple[Weeks, dict[int, WeekCounts]]:
    """Return the calendar and the counts of each week that has requests."""
    dataset = session.dataset
    rows = dataset.impressions.select("request_id", "requested_at", "clicked")
    # A request has one time (it was checked), so it lies in one day.
    days = session.connection.execute(
        f"""
        SELECT
            requested_at::DATE AS day,
            count(DISTINCT request_id), count(*), count_if(clicked), min(requested_at)
        FROM ({rows}) GROUP BY requested_at::DATE ORDER BY day
        """
    ).fetchall()
    calendar = dataset.schema.weeks or Weeks(first_day=days[0][0], evaluate=1)
    if days[0][0] < calendar.first_day:
        raise BadInputError(
            f"{dataset.impressions.path}: column 'requested_at' holds {days[0][4]}, before the "
            f"first day of week 1 in dataset.toml, {calendar.first_day}"
        )
    counts: dict[int, list[int]] = {}
    for day, *found, _ in days:
        week = (day - calendar.first_day).days // 7 + 1
        counts[week] = [
            old + new for old, new in zip(counts.get(week, [0] * 3), found, strict=True)
        ]
    weeks = {w: WeekCounts(requests=n, rows=r, positives=p) for w, (n, r, p) in counts.items()}
    return calendar, weeks


def _count_unknown(session: Session) -> int:
    """Return the number of impressions whose product the catalog does not hold."""
    shown, known = session.dataset.impressions, session.dataset.catalog
    row = session.connection.execute(
        f"SELECT count(*) FROM ({shown.select(columns.PRODUCT_ID)}) "
        f"ANTI JOIN ({known.select(columns.PRODUCT_ID)}) USING (product_id)"
    ).fetchone()
    assert row is not None
    return int(row[0])


def _make_room(output: Path, key: dict[str, Any]) -> None:
    """Remove what another build left in ``output``, and note which build is under way."""
    note = output / UNFINISHED
    text = json.dumps(key, indent=2) + "\n"
    for leftover in output.glob(".week-*.partial-*"):
        leftover.unlink()
    if not note.is_file() or note.read_text(encoding="utf-8") != text:
        for stale in (note, output / MANIFEST, *output.glob("week-*.parquet")):
            stale.unlink(missing_ok=True)
        write_text(note, text)
