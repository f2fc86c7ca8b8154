"""``python -m experiments.ab_test_replay``: A/B tests of known lift, made of real requests.

Weeks of request records are served again: users are dealt to buckets by `serving.ab_routing`, what
they were shown is logged by `serving.exposure_log`, and what they clicked then is the outcome. No
ranker is asked, so that both buckets see the same: an A/A test. For an A/B test, products that the
treated users did not click are clicked at random, so often that the click-through rate grows by the
lift that was asked for.

One such test of each kind goes through files and ``experiments.ab_test``. Many more, each with a
salt of its own, say how often the 5 % level finds a lift that is not there, and how often the 95 %
interval holds the one that is.
"""

import datetime as dt
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
import tyro

from features import columns
from features.console import print_table, progress_bar, run_command
from features.errors import BadInputError
from features.files import write_text

if TYPE_CHECKING:
    import pyarrow as pa

    from serving.ab_routing import Routing

PROG = "python -m experiments.ab_test_replay"
REPLAY_JSON = "replay.json"
_PRICE = "price"  # what a click brings where records have it


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Make A/A and A/B tests of request records, and see whether ab_test tells them.

    Writes replay.json, and in the folders aa and ab the logs, the outcomes and what ab_test made
    of them.
    """

    requests: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of request records, as build-features writes it."""
    weeks: tuple[int, ...]
    """Which weeks to serve again."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The folder to write; logs of an earlier replay in it are replaced."""
    lift: float = 0.2
    """Relative lift of the click-through rate in A/B tests."""
    salts: int = 1000
    """How many tests of each kind."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Impressions:
    """The impressions of some weeks, as ``R`` rows of ``B`` requests.

    Attributes:
        request: int64 ``[R]``, place of its request.
        product_id: int64 ``[R]``.
        clicked: bool ``[R]``.
        price: float64 ``[R]``, 0 where it is not known.
        request_id: int64 ``[B]``.
        user_id: int64 ``[B]``.
        time: of each request.
    """

    request: npt.NDArray[np.int64]
    product_id: npt.NDArray[np.int64]
    clicked: npt.NDArray[np.bool_]
    price: npt.NDArray[np.float64]
    request_id: npt.NDArray[np.int64]
    user_id: npt.NDArray[np.int64]
    time: list[dt.datetime]

    @classmethod
    def read(cls, folder: Path, weeks: Sequence[int]) -> "Impressions":
        """Read weeks of the request records in ``folder``.

        Raises:
            BadInputError: there are no records, or none of a week.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        from features.manifest import RequestsManifest

        manifest = RequestsManifest.load(folder)
        for week in weeks:
            if week not in manifest.weeks:
                known = f"{min(manifest.weeks)} to {max(manifest.weeks)}"
                raise BadInputError(f"{folder}: no requests of week {week}; its weeks are {known}")
        names = [columns.REQUEST_ID, columns.USER_ID, columns.REQUESTED_AT]
        names += [columns.PRODUCT_ID, columns.CLICKED]
        if _PRICE in pq.read_schema(manifest.path(weeks[0])).names:
            names.append(_PRICE)
        return cls._of(
            pa.concat_tables([pq.read_table(manifest.path(week), columns=names) for week in weeks])
        )

    @classmethod
    def _of(cls, records: "pa.Table") -> "Impressions":
        import pyarrow.compute as pc

        products = records[columns.PRODUCT_ID].combine_chunks()
        rows = pc.list_flatten(products).to_numpy()
        price = np.zeros(len(rows))
        if _PRICE in records.column_names:
            found = pc.list_flatten(records[_PRICE].combine_chunks())
            price = np.nan_to_num(found.to_numpy(zero_copy_only=False).astype(np.float64))
        return cls(
            request=np.repeat(np.arange(len(records)), pc.list_value_length(products).to_numpy()),
            product_id=rows,
            clicked=pc.list_flatten(records[columns.CLICKED].combine_chunks()).to_numpy(
                zero_copy_only=False
            ),
            price=price,
            request_id=records[columns.REQUEST_ID].to_numpy(),
            user_id=records[columns.USER_ID].to_numpy(),
            time=records[columns.REQUESTED_AT].to_pylist(),
        )

    def with_lift(
        self, routing: "Routing", lift: float, rng: np.random.Generator
    ) -> npt.NDArray[np.bool_]:
        """Return ``clicked``, with more clicks of treated users."""
        user, place = np.unique(self.user_id, return_inverse=True)
        treated = treated_users(routing, user)[place][self.request]
        more = rng.random(len(self.clicked)) < _chance(float(self.clicked.mean()), lift)
        return self.clicked | (treated & more)


def treated_users(routing: "Routing", users: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return which of the users meet the treatment."""
    return np.array([routing.bucket(user) == "treatment" for user in users.tolist()])


def _chance(rate: float, lift: float) -> float:
    """Return how often what is not clicked must be, for the rate to grow by a relative lift."""
    return lift * rate / (1 - rate)


def replay(
    impressions: Impressions, output: Path, routing: "Routing", lift: float
) -> tuple[Path, Path]:
    """Write the exposure log and the outcomes of a test, and return their paths.

    Args:
        impressions: what was shown.
        output: folder of both.
        routing: of the users.
        lift: relative, of the treatment; 0 for an A/A test.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from serving.exposure_log import Exposure, ExposureLog

    clicked = impressions.with_lift(routing, lift, np.random.default_rng(0))
    folder = output / "exposures"
    for old in folder.glob("*.jsonl"):
        old.unlink()
    bounds = np.searchsorted(impressions.request, np.arange(len(impressions.request_id) + 1))
    with ExposureLog(folder, capacity=len(clicked) + len(bounds)) as log:
        for place, (request_id, user_id, time) in enumerate(
            zip(impressions.request_id, impressions.user_id, impressions.time, strict=True)
        ):
            bucket = routing.bucket(user_id)
            shown = impressions.product_id[bounds[place] : bounds[place + 1]]
            log.write(
                Exposure(
                    request_id=str(request_id),
                    time=time.replace(tzinfo=dt.UTC).isoformat(),
                    user_id=int(user_id),
                    bucket=bucket,
                    model=f"replay of {bucket}" if lift else "replay",
                    candidates=shown,
                    probabilities=np.zeros(len(shown)),
                )
            )
    assert log.dropped == 0
    outcomes = {
        columns.REQUEST_ID: impressions.request_id[impressions.request].astype(str),
        columns.PRODUCT_ID: impressions.product_id,
        columns.CLICKED: clicked,
        "revenue": impressions.price * clicked,
    }
    pq.write_table(pa.table(outcomes), output / "outcomes.parquet")
    return folder, output / "outcomes.parquet"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Users:
    """What the ``U`` users did: ids, impressions and clicks, ``[U]`` each."""

    user_id: npt.NDArray[np.int64]
    impressions: npt.NDArray[np.int64]
    clicks: npt.NDArray[np.int64]

    @classmethod
    def of(cls, impressions: Impressions) -> "Users":
        """Sum impressions by user."""
        user, place = np.unique(impressions.user_id, return_inverse=True)
        of_row = place[impressions.request]
        return cls(
            user_id=user,
            impressions=np.bincount(of_row, minlength=len(user)),
            clicks=np.bincount(of_row, weights=impressions.clicked, minlength=len(user)).astype(
                np.int64
            ),
        )


def many_tests(users: Users, salts: int, lift: float) -> dict[str, float]:
    """Return how a test of the click-through rate fares over many salts.

    Args:
        users: of the replay.
        salts: number of tests, each with a salt and a seed of its own.
        lift: relative, that the treatment has.

    Returns:
        Shares of the tests: ``rejected`` no lift at the 5 % level, ``held`` the lift in the 95 %
        interval of the relative lift. And ``mean_lift``, with its ``standard_error``.
    """
    results = list(_tests(users, salts, lift))
    lifts = [relative for relative, _, _ in results]
    return {
        "tests": salts,
        "lift": lift,
        "rejected": float(np.mean([p_value < 0.05 for _, _, p_value in results])),
        "held": float(np.mean([low <= lift <= high for _, (low, high), _ in results])),
        "mean_lift": float(np.mean(lifts)),
        "standard_error": float(np.std(lifts, ddof=1) / math.sqrt(salts)),
    }


def _tests(
    users: Users, salts: int, lift: float
) -> Iterator[tuple[float, tuple[float, float], float]]:
    """Yield relative lift, its interval and p of each test."""
    from experiments.ab_test_statistics import compare, ratio
    from serving.ab_routing import Routing

    impressions = users.impressions.astype(np.float64)
    chance = _chance(users.clicks.sum() / users.impressions.sum(), lift)
    with progress_bar() as progress:
        for salt in progress.track(range(salts), description=f"tests of lift {lift:.0%}"):
            treated = treated_users(Routing(salt=str(salt), treatment_share=0.5), users.user_id)
            more = np.random.default_rng(salt).binomial(users.impressions - users.clicks, chance)
            clicks = (users.clicks + more * treated).astype(np.float64)
            control, treatment = (
                ratio(clicks[chosen], impressions[chosen]) for chosen in (~treated, treated)
            )
            assert control is not None
            assert treatment is not None
            found = compare(control, treatment)
            assert found.relative is not None
            assert found.relative_interval is not None
            assert found.p_value is not None
            yield found.relative, found.relative_interval, found.p_value


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(Options, _replay, prog=PROG, arguments=arguments)


def _replay(options: Options) -> None:
    if not options.weeks:
        raise BadInputError("--weeks must name one week or more")
    if options.salts < 2 or not 0 < options.lift < 1:
        raise BadInputError(
            f"--salts must be 2 or more and --lift between 0 and 1, "
            f"got {options.salts} and {options.lift}"
        )
    from experiments.ab_test import main as ab_test
    from serving.ab_routing import Routing

    impressions = Impressions.read(options.requests, options.weeks)
    routing = Routing(salt="replay", treatment_share=0.5)
    for name, lift in (("aa", 0.0), ("ab", options.lift)):
        exposures, outcomes = replay(impressions, options.output / name, routing, lift)
        paths = {"--exposures": exposures, "--outcomes": outcomes, "--output": exposures.parent}
        status = ab_test([str(part) for pair in paths.items() for part in pair])
        assert status == 0
    users = Users.of(impressions)
    found = [many_tests(users, options.salts, lift) for lift in (0.0, options.lift)]
    _show(options, found, users)


def _show(options: Options, found: list[dict[str, float]], users: Users) -> None:
    document: dict[str, Any] = {
        "requests": str(options.requests),
        "weeks": options.weeks,
        "users": len(users.user_id),
        "impressions": int(users.impressions.sum()),
        "tests": found,
    }
    write_text(options.output / REPLAY_JSON, json.dumps(document, indent=2) + "\n")
    print_table(
        f"{options.salts:,} tests of the click-through rate, {len(users.user_id):,} users",
        ["lift", "found on average", "p < .05", "interval holds the lift"],
        [
            [
                f"{test['lift']:.0%}",
                f"{test['mean_lift']:+.2%} ± {test['standard_error']:.2%}",
                f"{test['rejected']:.1%}",
                f"{test['held']:.1%}",
            ]
            for test in found
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
