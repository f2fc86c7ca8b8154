"""The requests that a run is explained on: one week, one slice of it, a sample of that.

Slices are of requests, by the length of their purchase history, or of candidates: a request then
keeps those of its candidates that are in the slice. Thirds are of the week's requests with a
history.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from features import columns
from features.batch import RecordFiles, RequestBatch
from features.errors import BadInputError
from features.requests import RequestsManifest
from ranking.bundle import Bundle

SLICES = (
    *("all", "with_history", "without_history", "unseen_products"),
    *("short_history", "middle_history", "long_history"),
)
BUNDLE = "bundle"
LEAST = 30  # clicks, and candidates without, below which no figure is given

_GROUPS = 32  # row groups read at once

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Week:
    """A trained ranker beside one week of the data that it belongs to.

    Attributes:
        bundle: of the run.
        manifest: of the data's request records.
        number: of the week.
    """

    bundle: Bundle
    manifest: RequestsManifest
    number: int

    @classmethod
    def open(cls, run: Path, data: Path, number: int | None = None) -> "Week":
        """Open a run and its data.

        Args:
            run: folder that train-ranker wrote.
            data: folder of the dataset that it was trained on.
            number: of the week; the run's evaluation week where None.

        Raises:
            BadInputError: the run is not finished, the data are not the run's, or have no such
                week.
        """
        if not (run / BUNDLE).is_dir():
            raise BadInputError(
                f"{run}: is not a finished run of train-ranker (no {BUNDLE}); finish it, or name "
                "another --run"
            )
        bundle = Bundle.open(run / BUNDLE)
        manifest = RequestsManifest.load(data / "requests")
        asked = {
            "data": (bundle.provenance.get("data_fingerprint"), manifest.fingerprint),
            "history window": (bundle.window_days, manifest.window_days),
            "longest history": (bundle.history_cap, manifest.history_cap),
        }
        for what, (expected, found) in asked.items():
            if found != expected:
                raise BadInputError(
                    f"{manifest.folder}: the {what} of these request records ({found}) is not "
                    f"what {run} was trained with ({expected}); name its data with --data"
                )
        if number is None:
            number = bundle.config.training.evaluate_week
        manifest.path(number)
        return cls(bundle=bundle, manifest=manifest, number=number)

    def training_weeks(self) -> list[int]:
        """Return the weeks that the ranker was trained on."""
        training = self.bundle.config.training
        last = training.evaluate_week
        return [w for w in self.manifest.weeks if last - training.train_weeks <= w < last]

    def records(self) -> pa.Table:
        """Return the week's request records."""
        files = RecordFiles.open([self.manifest.path(self.number)])
        return pa.concat_tables(files.chunks(_GROUPS))

    def products_seen(self) -> npt.NDArray[np.int64]:
        """Return the products that were impressed in the training weeks."""
        files = RecordFiles.open([self.manifest.path(week) for week in self.training_weeks()])
        others = [f.name for f in self.bundle.schema.features]
        others += [columns.PURCHASE_HISTORY, columns.CLICKED, columns.QUERY]
        found: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        for records in files.chunks(_GROUPS, leave_out=others):
            found = np.union1d(found, _flat(records, columns.PRODUCT_ID))
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampledRequests:
    """Requests of one slice.

    Attributes:
        batch: of them, with the candidates that are in the slice.
        records: the same requests with all of their candidates.
        user_c: [C] int64, the user of each candidate, counted from 0.
        slice_requests: how many requests the slice has.
    """

    batch: RequestBatch
    records: pa.Table
    user_c: npt.NDArray[np.int64]
    slice_requests: int

    @property
    def clicked(self) -> Mask:
        """[C]."""
        return self.batch.clicked.numpy() > 0


def draw_sample(
    week: Week, records: pa.Table, part: str, number: int, seed: int
) -> SampledRequests:
    """Draw ``number`` requests of a slice, or take all of it where it has fewer.

    Raises:
        BadInputError: the slice or the sample has too few clicks, or candidates without, or one
            request only.
    """
    within = _candidates_of_slice(week, records, part)
    lengths = _lengths(records, columns.PRODUCT_ID)
    request_c = np.repeat(np.arange(len(records)), lengths)
    chosen = np.unique(request_c[within])
    clicked = _flat(records, columns.CLICKED).astype(bool)
    where = f"{week.manifest.folder}, week {week.number}"
    _check(f"{where}: slice '{part}'", len(chosen), clicked[within], "")
    if number < len(chosen):
        drawn = np.random.default_rng(seed).permutation(len(chosen))[:number]
        chosen = chosen[np.sort(drawn)]
    taken = records.take(pa.array(chosen))
    kept = within[np.isin(request_c, chosen)]
    batch = keep_candidates(RequestBatch.from_records(taken, week.bundle.schema), kept)
    hint = "; draw more with --sample"
    what = f"{where}: the sample of slice '{part}'"
    _check(what, len(chosen), batch.clicked.numpy() > 0, hint)
    users = np.unique(taken[columns.USER_ID].to_numpy(), return_inverse=True)[1]
    return SampledRequests(
        batch=batch,
        records=taken,
        user_c=np.repeat(users, batch.lengths.numpy()),
        slice_requests=len(np.unique(request_c[within])),
    )


def keep_candidates(batch: RequestBatch, kept: Mask) -> RequestBatch:
    """Return the batch with those of its candidates that ``kept`` ([C]) marks."""
    request_c = torch.repeat_interleave(batch.lengths)
    mask = torch.from_numpy(kept)
    return replace(
        batch,
        lengths=torch.bincount(request_c[mask], minlength=len(batch.lengths)),
        product=batch.product[mask],
        candidate_sparse=batch.candidate_sparse[:, mask],
        candidate_dense=batch.candidate_dense[:, mask],
        clicked=batch.clicked[mask],
    )


def find_request(week: Week, records: pa.Table, request_id: int) -> pa.Table:
    """Return the record (one row) of a request.

    Raises:
        BadInputError: the week has no such request.
    """
    found = records.filter(pc.equal(records[columns.REQUEST_ID], request_id))
    if len(found) == 0:
        raise BadInputError(
            f"{week.manifest.folder}, week {week.number}: holds no request {request_id}"
        )
    return found


def telling_request(sample: SampledRequests) -> pa.Table:
    """Return the record of the sample's first request with a click and, if any, a history."""
    requests = np.repeat(np.arange(len(sample.records)), sample.batch.lengths.numpy())
    clicked = np.unique(requests[sample.clicked])
    with_history = sample.batch.history_lengths.numpy() > 0
    both = clicked[with_history[clicked]]
    chosen = both if len(both) else clicked
    return sample.records.slice(int(chosen[0]), 1)


def _candidates_of_slice(week: Week, records: pa.Table, part: str) -> Mask:
    """Return which candidates are in a slice, bool [C]."""
    if part == "unseen_products":
        return ~np.isin(_flat(records, columns.PRODUCT_ID), week.products_seen())
    history = _lengths(records, columns.PURCHASE_HISTORY)
    some = history[history > 0]
    # Equal lengths are never parted, so that thirds may differ in size.
    cuts = np.quantile(some, (1 / 3, 2 / 3), method="inverted_cdf") if len(some) else (0, 0)
    of_requests: dict[str, Mask] = {
        "all": np.ones(len(records), dtype=bool),
        "with_history": history > 0,
        "without_history": history == 0,
        "short_history": (history > 0) & (history <= cuts[0]),
        "middle_history": (history > cuts[0]) & (history <= cuts[1]),
        "long_history": history > cuts[1],
    }
    if part not in of_requests:
        raise BadInputError(f"unknown slice '{part}'; known: {', '.join(SLICES)}")
    return np.repeat(of_requests[part], _lengths(records, columns.PRODUCT_ID))


def _check(what: str, requests: int, clicked: Mask, hint: str) -> None:
    clicks, rows = int(clicked.sum()), len(clicked)
    if clicks < LEAST:
        found = f"has too few clicks: {clicks:,} among {rows:,} candidates"
    elif rows - clicks < LEAST:
        found = f"has too few candidates without a click: {rows - clicks:,} of {rows:,}"
    elif requests < 2:
        found = "has one request only, and nothing to permute it with"
    else:
        return
    raise BadInputError(f"{what} {found}; {LEAST} or more are needed{hint}")


def _flat(records: pa.Table, name: str) -> np.ndarray:
    return records[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _lengths(records: pa.Table, name: str) -> npt.NDArray[np.int64]:
    lengths = pc.list_value_length(records[name].combine_chunks()).fill_null(0)
    return lengths.to_numpy(zero_copy_only=False).astype(np.int64)
