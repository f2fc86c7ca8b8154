"""Fewer requests without a click, for training: each kept one counts for those left out.

A request with a click is kept and counts 1. One without is kept with probability ``keep`` and
counts ``1 / keep``, so that sums over the sample estimate those over all requests without bias.
Only what is trained on is sampled; evaluation reads all requests.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features import columns
from features.console import progress_bar
from features.errors import BadInputError
from features.files import atomic_file
from features.manifest import (
    MANIFEST,
    OtherFormatError,
    RequestsManifest,
    WeekCounts,
    week_path,
)
from features.record_files import ROW_GROUP, record_writer


def sample_requests(
    manifest: RequestsManifest, output: Path, *, keep: float, weeks: Iterable[int]
) -> RequestsManifest:
    """Write samples of some weeks of request records, with a column ``weight``.

    The same records and options give the same sample. Weeks that ``output`` holds already are not
    made again; samples of other records, of another format or with another ``keep`` are replaced.

    Args:
        manifest: of all request records.
        output: folder of the sample.
        keep: probability with which a request without a click is kept, in (0, 1].
        weeks: which ones to sample.

    Raises:
        BadInputError: ``keep`` is out of range, or a week is missing.
    """
    if not 0 < keep <= 1:
        raise BadInputError(f"the share of unclicked requests must be in (0, 1], got {keep}")
    sources = {week: manifest.path(week) for week in sorted(set(weeks))}
    key = f"{manifest.fingerprint}, {float(keep)} of the requests without a click"
    found = _finished(output, replace(manifest, fingerprint=key))
    missing = [week for week in sources if week not in found]
    with progress_bar() as bar:
        for week in bar.track(missing, description="sampling"):
            found[week] = _sample_week(sources[week], week_path(output, week), keep, week)
    sample = replace(manifest, folder=output, fingerprint=key, weeks=dict(sorted(found.items())))
    if missing:  # several processes may read a sample that is there
        sample.save()
    return sample


def _finished(output: Path, wanted: RequestsManifest) -> dict[int, WeekCounts]:
    """Return the weeks that ``output`` holds of a sample; those of another one are forgotten."""
    if not (output / MANIFEST).exists():
        return {}
    try:
        made = RequestsManifest.load(output)
    except OtherFormatError:
        made = None
    options = ("fingerprint", "window_days", "history_cap")
    if made is None or any(getattr(made, name) != getattr(wanted, name) for name in options):
        for stale in (output / MANIFEST, *output.glob("week-*.parquet")):
            stale.unlink()
        return {}
    return {week: counts for week, counts in made.weeks.items() if made.path(week).is_file()}


def _sample_week(source: Path, target: Path, keep: float, week: int) -> WeekCounts:
    random = np.random.default_rng([week])
    requests = rows = positives = 0
    with pq.ParquetFile(source) as file, atomic_file(target) as scratch:
        weight = pa.field(columns.WEIGHT, pa.float32(), nullable=False)
        schema = file.schema_arrow.append(weight)
        pending = schema.empty_table()
        with record_writer(scratch, schema) as writer:
            for group in range(file.num_row_groups):
                kept = _sample(file.read_row_group(group), keep, random)
                requests += len(kept)
                clicked = kept[columns.CLICKED].combine_chunks().flatten()
                rows += len(clicked)
                positives += pc.sum(clicked).as_py() or 0
                pending = pa.concat_tables([pending, kept.cast(schema)])
                if len(pending) >= ROW_GROUP:
                    writer.write_table(pending.slice(0, ROW_GROUP))
                    pending = pending.slice(ROW_GROUP)
            writer.write_table(pending)
    return WeekCounts(requests=requests, rows=rows, positives=positives)


def _sample(records: pa.Table, keep: float, random: np.random.Generator) -> pa.Table:
    clicked = records[columns.CLICKED].combine_chunks()
    lengths = pc.list_value_length(clicked).to_numpy(zero_copy_only=False)
    request_c = np.repeat(np.arange(len(records)), lengths)
    flat = clicked.flatten().to_numpy(zero_copy_only=False)
    clicks = np.bincount(request_c, weights=flat, minlength=len(records))
    chosen = (clicks > 0) | (random.random(len(records)) < keep)
    weight = np.where(clicks > 0, 1.0, 1 / keep).astype(np.float32)[chosen]
    return records.filter(pa.array(chosen)).append_column(columns.WEIGHT, pa.array(weight))
